"""What the packed writers of a plan read, so that rounding can weigh its errors by it.

Decides which prompts are read, runs them under the run-time cut, and collects second moments. Knows
plans, folders and models; rounds nothing (`vauban.rounding` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import integers
from vauban._common import Progress
from vauban.edits.plan import EditPlan
from vauban.errors import InputError
from vauban.generation import TOKEN_BUDGET, Batches, eos_ids, generate_tokens, token_budget
from vauban.models import (
    anatomy,
    faster_twin,
    forward,
    load_tokenizer,
    module_inputs,
    output_gradients,
    unpacked_shape,
)
from vauban.prompts import encode_chat, load_prompts, measuring_paths
from vauban.rounding import Energy, InputMoments

Inputs = Mapping[str, tuple[Energy | None, ...]]
"""By writer path what the matrix reads: one moment, or one per expert (None: never routed to)."""

# Measuring prompts of each class that are read when nobody names any.
PROMPTS_PER_CLASS = 64
# Rows of the sketch of a matrix's inputs; an expert reads fewer tokens, and there are many of them.
RANK, _EXPERT_RANK = 256, 64
# Texts whose gradients are read, at most: each costs several forward passes.
_TEXTS = 64
# Random texts that stand in for prompts: their number and their length in tokens.
_RANDOM_TEXTS = (64, 32)


@dataclass(frozen=True, eq=False)
class CalibratedPlan(EditPlan):
    """An `EditPlan` with what its packed writers read (`inputs`)."""

    inputs: Inputs = field(default_factory=dict)

    def summary(self) -> str:
        read = self.settings["calibration"]
        texts = f"{read['prompts']} prompts" if read["prompts"] else "random tokens"
        head, *notes = super().summary().split("\n")
        return "\n".join([head, f"packed writers rounded for what they read on {texts}", *notes])


def inputs_of(plan: EditPlan) -> Inputs:
    """What the plan's packed writers read; empty for a plan that is not calibrated."""
    return plan.inputs if isinstance(plan, CalibratedPlan) else {}


def calibrate_from_folder(
    plan: EditPlan,
    folder: Path | None,
    calibrate: bool | None,
    progress: Progress | None = None,
) -> EditPlan:
    """The plan calibrated on the measuring prompts of a model folder, with its tokenizer.

    A calibrated plan, and any plan for `calibrate` False, comes back as it is. Where the folder
    lacks what is needed, None adds a note to the plan and True raises InputError.
    """
    if calibrate is False or isinstance(plan, CalibratedPlan):
        return plan
    obstacle = _obstacle(plan, folder)
    if not obstacle:
        assert folder is not None
        tokenizer = load_tokenizer(folder)
        return _calibrate(plan, tokenizer, _folder_prompts(folder), progress=progress)
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
    largest = max(token for p in _folder_prompts(folder) for token in encode_chat(tokenizer, p))
    vocabulary = anatomy(plan.model).vocabulary
    if largest >= vocabulary:
        return (
            f"the tokenizer of {folder} gives token {largest}, the model's vocabulary ends at "
            f"{vocabulary - 1}"
        )
    return ""


def _folder_prompts(folder: Path) -> list[str]:
    return [p for path in measuring_paths(folder) for p in load_prompts(path)[:PROMPTS_PER_CLASS]]


def calibrate(
    plan: EditPlan,
    tokenizer: Any = None,
    prompts: Sequence[Any] | None = None,
    *,
    max_tokens: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibratedPlan:
    """The plan with what its packed writers read: see `EditPlan.calibrated`."""
    if prompts is not None and not prompts:
        raise InputError("no calibration prompts; expected at least one, or None for random tokens")
    if prompts is not None and tokenizer is None:
        raise InputError("calibration prompts need the tokenizer of the model")
    return _calibrate(plan, tokenizer, prompts, max_tokens, seed, progress)


def _calibrate(
    plan: EditPlan,
    tokenizer: Any,
    prompts: Sequence[Any] | None,
    max_tokens: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> CalibratedPlan:
    planned = dict(plan.model.named_modules())
    packed = {u.path for u in plan.updates if "scales" in planned[u.path]}
    model = faster_twin(plan.model)
    # A model that was unpacked to run faster shows no packing: all its writers are read.
    chosen = [u for u in plan.updates if not packed or u.path in packed]
    # The head reads a shared table as well, which the Fisher information of its rows leaves out.
    tables = [
        u.path
        for u in chosen
        if u.writes_rows and not (u.is_embedding and plan.embedding == "tied")
    ]
    matrices = [u.path for u in chosen if not u.writes_rows]
    cut = replace(plan, model=model).virtual()
    if prompts is None:
        texts = _random_texts(anatomy(model).vocabulary, seed)
        facts: dict[str, Any] = {"prompts": 0}
    else:
        heads = [encode_chat(tokenizer, prompt) for prompt in prompts]
        answers = generate_tokens(
            model, heads, eos=eos_ids(tokenizer), max_tokens=max_tokens, interventions=cut,
            progress=progress,
        )  # fmt: skip
        texts = [head + answer for head, answer in zip(heads, answers, strict=True)]
        facts = {"prompts": len(prompts), "max_tokens": max_tokens}
    inputs = _inputs(model, matrices, texts, cut, progress)
    notes = list(plan.notes)
    if tables:
        try:
            inputs |= _sensitivities(model, tables, texts, cut, seed, progress)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            # Some kernels have no gradient in mlx; the table is then rounded without weights.
            notes.append(f"{tables[0]} is rounded without calibration: {error}")
    facts |= {"tokens": sum(len(t) for t in texts), "seed": seed, "modules": len(inputs)}
    values = {f.name: getattr(plan, f.name) for f in fields(EditPlan)}
    values["settings"] = {**plan.settings, "calibration": facts}
    values["notes"] = tuple(notes)
    return CalibratedPlan(**values, inputs=inputs)


def _random_texts(vocabulary: int, seed: int) -> list[list[int]]:
    drawn = mx.random.randint(0, vocabulary, _RANDOM_TEXTS, key=mx.random.key(seed))
    return [integers(row) for row in drawn]


def _inputs(
    model: nn.Module, paths: list[str], texts: list[list[int]], cut: Any,
    progress: Progress | None,
) -> dict[str, tuple[Energy | None, ...]]:  # fmt: skip
    """Per matrix the second moment of its inputs under the cut; per expert where it has some."""
    modules = dict(model.named_modules())
    sizes = {path: unpacked_shape(modules[path]) for path in paths}
    sketches: dict[str, list[InputMoments | None]] = {
        path: [None] * (shape[0] if len(shape) == 3 else 1) for path, shape in sizes.items()
    }

    def take(path: str, expert: int, rows: np.ndarray) -> None:
        sketch = sketches[path][expert]
        if sketch is None:
            rank = _EXPERT_RANK if len(sizes[path]) == 3 else RANK
            sketch = sketches[path][expert] = InputMoments(sizes[path][-1], rank)
        sketch.update(rows)

    def read(path: str, x: mx.array, experts: mx.array | None) -> None:
        rows = np.array(x.astype(mx.float32))
        if experts is None:
            take(path, 0, rows)
            return
        routed = np.array(integers(experts))
        for expert in np.unique(routed):
            take(path, int(expert), rows[routed == expert])

    with module_inputs(model, paths, read):
        for batch in _batches(texts, progress, "read inputs"):
            out = forward(model, batch, positions="last", interventions=cut, logits=False)
            mx.eval(out.residual)
    return {
        path: tuple(None if sketch is None else sketch.energy() for sketch in parts)
        for path, parts in sketches.items()
    }


def _sensitivities(
    model: nn.Module, paths: list[str], texts: list[list[int]], cut: Any, seed: int,
    progress: Progress | None,
) -> dict[str, tuple[Energy | None, ...]]:  # fmt: skip
    """Per table the Fisher information of what it writes."""
    modules = dict(model.named_modules())
    sketches = {path: InputMoments(unpacked_shape(modules[path])[-1], RANK) for path in paths}
    key = mx.random.key(seed)
    chosen = texts[:: -(-len(texts) // _TEXTS)]
    # A forward pass keeps one vector per residual; its gradient all that every block computed.
    budget = max(1, token_budget(model) // 16)
    for batch in _batches(chosen, progress, "read gradients", budget):
        key, batch_key = mx.random.split(key)
        rows = output_gradients(model, paths, batch, interventions=cut, key=batch_key)
        for path, gradients in rows.items():
            sketches[path].update(np.array(gradients))
    return {path: (moments.energy(),) for path, moments in sketches.items()}


def _batches(
    texts: list[list[int]], progress: Progress | None, stage: str, budget: int = TOKEN_BUDGET
) -> Iterator[mx.array]:
    """Texts of one length at a time: padding is nothing that a matrix has to round well for."""
    done = 0
    for batch in Batches(texts, equal_lengths=True, budget=budget):
        yield batch.tokens
        done += len(batch.rows)
        if progress:
            progress(stage, done, len(texts))
