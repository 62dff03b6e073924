"""What an export reads before it rounds: the measuring prompts that the model's folder brings.

Knows folders, tokenizers and plans; rounds nothing.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from vauban.edits import EditPlan
from vauban.errors import InputError
from vauban.export.checkpoint import open_source
from vauban.models import anatomy, in_memory, load_tokenizer
from vauban.prompts import encode_chat, load_prompts, measuring_paths

# Prompts of each of the two sets.
PROMPTS = 32


def calibrated(
    plan: EditPlan, folder: Path, precision: str | None, calibrate: bool | None
) -> EditPlan:
    """`plan`, its packed writers to be rounded for what they read on measuring prompts.

    As it is where nothing packed stays packed, where it was calibrated before, and for `calibrate`
    False. With None what stands in the way (weights that were never read, no tokenizer, one of
    another model) becomes a note; with True it is an InputError.
    """
    if calibrate is False or precision not in (None, "same") or "calibration" in plan.settings:
        return plan
    modules = open_source(folder).modules
    if not any("scales" in modules[u.path] for u in plan.updates if u.path in modules):
        return plan
    obstacle = ""
    prompts: list[str] = []
    tokenizer = None
    if calibrate is None and not in_memory(plan.model):
        obstacle = "the model that was planned for is not in memory"
    elif (tokenizer := load_tokenizer(folder)) is None:
        obstacle = f"{folder} has no tokenizer"
    else:
        prompts = [p for path in measuring_paths(folder) for p in load_prompts(path)[:PROMPTS]]
        largest = max(token for p in prompts for token in encode_chat(tokenizer, p))
        vocabulary = anatomy(plan.model).vocabulary
        if largest >= vocabulary:
            obstacle = (
                f"the tokenizer of {folder} gives token {largest}, the model's vocabulary ends at "
                f"{vocabulary - 1}"
            )
    if not obstacle:
        return plan.calibrated(tokenizer, prompts)
    if calibrate:
        raise InputError(f"{obstacle}, so nothing can be read to calibrate the rounding")
    note = f"packed modules are rounded alike for any input: {obstacle}"
    return replace(plan, notes=(*plan.notes, note))
