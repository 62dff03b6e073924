"""The verb that compares two finished runs: `compare RUN_A RUN_B`. No model is loaded."""

import argparse

from vauban.cli.console import Console
from vauban.comparison import RunComparison, compare_runs, shown_figure

_ARROWS = {"lower": "lower is better", "higher": "higher is better", None: ""}


def compare(options: argparse.Namespace) -> int:
    """Print the figures of two runs side by side, and the answers to common prompts in pairs."""
    result = compare_runs(options.run_a, options.run_b)
    console = Console(as_json=options.json)
    console.pairs(
        None,
        [(side, f"{run['folder']} ({run['model']})") for side, run in _sides(result)],
    )
    console.line()
    console.grid(
        ["", "", "a", "b", "better"],
        [
            [pair.name, _ARROWS[pair.direction], shown_figure(pair.a), shown_figure(pair.b),
             pair.better or "–"]
            for pair in result.figures
        ],
        texts=2,
    )  # fmt: skip
    console.line("brackets: 95% intervals", "dim")
    console.line()
    for name, test in result.paired.items():
        if test is not None:
            words = test.summary().replace("only before", "only in a").replace("after", "in b")
            console.line(f"{name} in pairs: {words}")
    counts = ", ".join(f"{count} {label}" for label, count in result.common.items())
    console.line(f"prompts in both runs: {counts or 'none'}")
    for note in result.notes:
        console.warning(note)
    console.document(result.to_dict())
    return 0


def _sides(result: RunComparison) -> list[tuple[str, dict[str, str]]]:
    return [("a", dict(result.a)), ("b", dict(result.b))]
