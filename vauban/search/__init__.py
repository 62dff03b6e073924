"""The search for a cut: which direction, by what the model says under it.

In reading order:
    kernel    a strength for every block, said by four numbers
    answers   choose a direction by short answers under its run-time cut
"""

from vauban.search.answers import AnswerChoice, AnswerTrial, choose_by_answers
from vauban.search.kernel import StrengthKernel

__all__ = ["AnswerChoice", "AnswerTrial", "StrengthKernel", "choose_by_answers"]
