"""The examples in the docstrings of the instruments run and are right."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *("evaluation.accuracy", "evaluation.capability", "evaluation.guard"),
        "evaluation.likelihood",
        *("evaluation.metrics", "evaluation.refusal", "evaluation.standin"),
        *("evaluation.statistics", "evaluation.texts", "prompts.texts"),
    ],
)
def test_the_examples_of_docstrings_are_right(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"vauban.{name}"))
    assert found.attempted and not found.failed
