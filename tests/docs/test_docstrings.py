"""The examples in docstrings run, and give what is printed."""

import doctest
import importlib
import pkgutil

import vauban

ROOMS = ("interventions", "models", "knowledge", "comparison")
MODULES = [
    "vauban._common",
    "vauban.linalg",
    "vauban.directions.geometry",
    "vauban.edits.directions",
    "vauban.evaluation.facts",
    "vauban.evaluation.pairs",
    "vauban.search.front",
    "vauban.search.scoring",
    "vauban.search.space",
    "vauban._extras",
    *(
        f"vauban.{room}.{module.name}"
        for room in ROOMS
        for module in pkgutil.iter_modules([f"{vauban.__path__[0]}/{room}"])
    ),
]


def test_the_examples_of_docstrings_run() -> None:
    results = {name: doctest.testmod(importlib.import_module(name)) for name in MODULES}
    assert {name: r for name, r in results.items() if r.failed} == {}
    assert sum(r.attempted for r in results.values()) >= 40
