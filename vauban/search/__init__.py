"""The search for a cut: which direction, by what the model says under it.

`vauban.search` is this room and the function `search` at once: the module can be called.

In reading order:
    kernel           a strength for every block, said by four numbers
    short_answers    validation prompts put to a model under one change after another
    answers          choose a direction by short answers under its run-time cut
    strength         choose how much is cut in which blocks and components
    measure          `vauban.measure`, with the layer chosen by answers
    space            what a search varies, and what a point of it means
    direction_table  directions at every residual and position, also between two
    front            what a trial is, and which trials no other one beats
    scoring          a trial's figures, stopped where it cannot win
    known_cuts       the cuts that a search begins with
    trial_journal    finished trials on disk, and the sampler
    rescore          the front on prompts that no trial saw
    result           all trials and what follows from them; search.json
    trials           `vauban.search`: the order of it all
    plots            the front as an interactive page and as a picture
"""

import sys
from types import ModuleType

from vauban.search.answers import AnswerChoice, AnswerTrial, choose_by_answers
from vauban.search.front import Trial
from vauban.search.kernel import StrengthKernel
from vauban.search.measure import measure
from vauban.search.rescore import Rescored
from vauban.search.result import SearchResult
from vauban.search.space import KernelSpace, SearchSpace
from vauban.search.strength import Strength, StrengthChoice, StrengthTrial, choose_strength
from vauban.search.trials import search

__all__ = [
    "AnswerChoice",
    "AnswerTrial",
    "KernelSpace",
    "Rescored",
    "SearchResult",
    "SearchSpace",
    "Strength",
    "StrengthChoice",
    "StrengthKernel",
    "StrengthTrial",
    "Trial",
    "choose_by_answers",
    "choose_strength",
    "measure",
    "search",
]


class _Callable(ModuleType):
    """A module that can be called: `vauban.search(...)` beside `from vauban.search import ...`."""

    __call__ = staticmethod(search)


sys.modules[__name__].__class__ = _Callable
