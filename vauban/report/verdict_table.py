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


def off_target_sentence(found: Mapping[str, Any] | None) -> str:
    """What changed beside refusal on the answers to harmless prompts, in one sentence; "" where a
    run has not looked."""
    if not found:
        return ""
    names = {
        "words": "words an answer", "hedging": "with a hedge", "same_language": "in the prompt's "
        "language", "json": "JSON tasks in JSON", "turns": "earlier turns remembered",
    }  # fmt: skip
    parts = []
    for name, words in names.items():
        one = found[name]
        if one is None:
            continue
        if name == "words":
            text = f"{one['before']:.1f} → {one['after']:.1f} {words}"
        else:
            text = f"{words} {percent(one['before'], 0)} → {percent(one['after'], 0)} of {one['n']}"
        if one["test"] is not None and one["test"]["p_value"] < 0.05:
            text += f" (p = {one['test']['p_value']:.2g})"
        if one["interval"] is not None and not one["interval"][0] <= 0 <= one["interval"][1]:
            low, high = one["interval"]
            text += f" (difference {low:+.1f} to {high:+.1f})"
        parts.append(text)
    # A run of an earlier version has not counted them.
    before, after = found.get("unfinished", (0, 0))
    if before or after:
        parts.append(f"{before} → {after} cut off inside their reasoning and not counted")
    return f"Beside the aim, on answers to harmless prompts: {'; '.join(parts)}."


def _rate(value: float | None) -> str:
    return "–" if value is None else percent(value, 0)
