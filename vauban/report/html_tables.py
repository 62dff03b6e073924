"""The report's tables of what was tried: candidates of the direction, finalists of the strength.

Reads the run document; each function returns at most one table.
"""

from collections.abc import Mapping
from typing import Any

from vauban.report.figures import decimal, percent


def candidate_table(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The shortlist of a choice by answers as a table."""
    answers = run["direction"]["provenance"].get("answers") or {}
    if not answers.get("shortlist"):
        return []
    best = (answers["layer"], answers["position"])
    rows = [
        (
            f"{row['layer']}{' (chosen)' if (row['layer'], row['position']) == best else ''}",
            row["position"], row["prompts"], percent(row["refused"]), percent(row["over_refused"]),
            percent(row["degenerate"]), decimal(row["kl"], 2),
        )
        for row in answers["shortlist"]
    ]  # fmt: skip
    return [
        {
            "title": "Choice of the direction",
            "note": " ".join(answers["notes"]) or "Short answers to validation prompts under the "
            "cut of each candidate.",
            "headings": ("residual", "position", "prompts", "refused", "harmless refused",
                         "degenerate", "first-token KL"),
            "rows": rows,
        }
    ]  # fmt: skip


def strength_table(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The finalists of the search for a strength."""
    strength = run.get("strength")
    if not strength:
        return []
    rows = [
        (
            _shape(trial.get("strength") or strength["strength"]), trial["prompts"],
            percent(trial["refused"]), percent(trial["over_refused"]),
            percent(trial["degenerate"]), decimal(trial["kl"], 2),
        )
        for trial in strength["trials"]
    ]  # fmt: skip
    note = f"{strength['tried']} {strength.get('kind', 'shapes')}, the best by short answers."
    return [
        {
            "title": "Choice of the strength",
            "note": " ".join([note, *(f"{text}." for text in strength["notes"])]),
            "headings": ("strength", "prompts", "refused", "harmless refused", "degenerate",
                         "first-token KL"),
            "rows": rows,
        }
    ]  # fmt: skip


def _shape(strength: Mapping[str, Any]) -> str:
    parts = []
    for name, kernel in strength.items():
        if not isinstance(kernel, Mapping):
            continue
        if kernel["centre"] is None:
            parts.append(f"{name} {kernel['peak']:.3g}")
        else:
            parts.append(
                f"{name} {kernel['peak']:.3g} about block {kernel['centre']:.3g}, "
                f"{kernel['floor']:.3g} from {kernel['width']:.3g} blocks on"
            )
    return "; ".join([*parts, *(["embedding cut"] if strength.get("embedding") else [])])
