"""The search for a cut: which direction, by what the model says under it.

In reading order:
    answers   choose a direction by short answers under its run-time cut
"""

from vauban.search.answers import AnswerChoice, AnswerTrial, choose_by_answers

__all__ = ["AnswerChoice", "AnswerTrial", "choose_by_answers"]
