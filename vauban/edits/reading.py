"""What a plan reads before it is rounded when nobody has said: the model's own measuring prompts.

Knows folders, tokenizers and plans; rounds nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vauban.edits.edit_plan import EditPlan
from vauban.errors import InputError
from vauban.models import anatomy, load_tokenizer
from vauban.prompts import encode_chat, load_prompts, measuring_paths

# Prompts of each of the two sets.
PROMPTS = 64


def with_inputs(plan: EditPlan, folder: Path | None, calibrate: bool | None) -> EditPlan:
    """`plan`, its packed writers to be rounded for what they read on measuring prompts.

    The tokenizer and the prompts are those of `folder`. As it is where it was calibrated before,
    and for `calibrate` False. With None what stands in the way becomes a note; with True it is an
    InputError.
    """
    if calibrate is False or "calibration" in plan.settings:
        return plan
    obstacle = _obstacle(plan, folder)
    if not obstacle:
        assert folder is not None
        return plan.calibrated(load_tokenizer(folder), _prompts(folder))
    if calibrate:
        raise InputError(f"{obstacle}, so nothing can be read to calibrate the rounding")
    note = f"packed modules are rounded alike for any input: {obstacle}"
    return replace(plan, notes=(*plan.notes, note))


def _obstacle(plan: EditPlan, folder: Path | None) -> str:
    """Why nothing can be read; "" where it can."""
    if folder is None:
        return "the model that was planned for does not say which folder it came from"
    tokenizer = load_tokenizer(folder)
    if tokenizer is None:
        return f"{folder} has no tokenizer"
    largest = max(token for p in _prompts(folder) for token in encode_chat(tokenizer, p))
    vocabulary = anatomy(plan.model).vocabulary
    if largest >= vocabulary:
        return (
            f"the tokenizer of {folder} gives token {largest}, the model's vocabulary ends at "
            f"{vocabulary - 1}"
        )
    return ""


def _prompts(folder: Path) -> list[str]:
    return [p for path in measuring_paths(folder) for p in load_prompts(path)[:PROMPTS]]
