"""Verdicts, pairs and the length curve of an evaluation, as lines for a terminal or a card.

Reads the figures as `run.json` holds them under `evaluation`.
"""

from collections.abc import Mapping
from typing import Any

from vauban.report.figures import percent
from vauban.report.table import aligned, markdown_row

_HEADINGS = ("answers to harmful prompts", "before", "after")


def _rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    before, after = evaluation["verdicts_original"], evaluation["verdicts_modified"]
    return [(label, str(before[label]), str(after[label])) for label in before]


def verdict_lines(evaluation: Mapping[str, Any]) -> list[str]:
    """The five verdicts before and after as aligned lines, then pairs and length curve."""
    return [*aligned(_HEADINGS, _rows(evaluation)), *verdict_sentences(evaluation)]


def verdict_markdown(evaluation: Mapping[str, Any]) -> str:
    """The same as a markdown table with sentences below it."""
    lines = [markdown_row(_HEADINGS), markdown_row(["---", "---:", "---:"])]
    lines += [markdown_row(row) for row in _rows(evaluation)]
    return "\n".join([*lines, "", *(f"{text}  " for text in verdict_sentences(evaluation))])


def verdict_sentences(evaluation: Mapping[str, Any]) -> list[str]:
    """Pairs, length curve and the first token's KL in words."""
    sentences = []
    paired = evaluation["paired"]
    if paired is not None:
        low, high = paired["interval"]
        sentences.append(
            f"Pairs: {paired['only_before']} of {paired['n']} prompts refused only before, "
            f"{paired['only_after']} only after; difference {100 * paired['difference']:+.1f} "
            f"points [{100 * low:+.1f}, {100 * high:+.1f}], exact McNemar p = "
            f"{paired['p_value']:.2g}."
        )
    points = [
        f"{point['tokens']} tokens {_rate(point['original'])} → {_rate(point['modified'])}"
        for point in evaluation["length_curve"]
    ]
    if len(points) > 1:
        sentences.append(f"Refused when cut to: {'; '.join(points)}.")
    if evaluation["first_token_kl"] is not None:
        blind = evaluation["first_token"] is not None
        sentences.append(
            f"KL of the first token alone {evaluation['first_token_kl']:.3g}, of all tokens "
            f"{evaluation['kl_divergence']:.3g}"
            + ("; the first is blind: every answer begins alike." if blind else ".")
        )
    return sentences


def _rate(value: float | None) -> str:
    return "–" if value is None else percent(value, 0)
