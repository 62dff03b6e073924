"""The search for a cut: which direction, by what the model says under it.

In reading order:
    kernel         a strength for every block, said by four numbers
    short_answers  validation prompts put to a model under one change after another
    answers        choose a direction by short answers under its run-time cut
    strength       choose how much is cut in which blocks and components
    measure        `vauban.measure`, with the layer chosen by answers
"""

from vauban.search.answers import AnswerChoice, AnswerTrial, choose_by_answers
from vauban.search.kernel import StrengthKernel
from vauban.search.measure import measure
from vauban.search.strength import Strength, StrengthChoice, StrengthTrial, choose_strength

__all__ = [
    "AnswerChoice",
    "AnswerTrial",
    "Strength",
    "StrengthChoice",
    "StrengthKernel",
    "StrengthTrial",
    "choose_by_answers",
    "choose_strength",
    "measure",
]
