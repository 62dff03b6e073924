"""The examples in docstrings run and are right."""

import doctest
import importlib

import pytest


@pytest.mark.parametrize(
    "name",
    [
        *("evaluation.behaviour", "evaluation.evaluate", "evaluation.intervals"),
        *("evaluation.likelihood", "evaluation.perplexity", "evaluation.verdicts"),
        *("prompts.chat", "prompts.reasoning", "prompts.sets", "prompts.sources", "prompts.texts"),
        *("report.figures", "report.table", "quick.inspect_direction"),
        *("cli.setting_flags", "cli.doctor"),
        *("study.chart", "study.exact_answers", "study.figures"),
        *("study.guard", "study.guard_result", "study.tables"),
    ],
)
def test_the_examples_of_docstrings_are_right(name: str) -> None:
    found = doctest.testmod(importlib.import_module(f"vauban.{name}"))
    assert found.attempted and not found.failed
