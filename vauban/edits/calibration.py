"""What the packed matrices of a planned cut read, so that rounding can mind it.

Knows plans, prompts and models; rounds nothing (`feedback` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import integers
from vauban._common import Progress
from vauban.edits.edit_plan import EditPlan
from vauban.edits.moments import Energy, InputMoments
from vauban.errors import InputError
from vauban.models import (
    TOKEN_BUDGET,
    anatomy,
    batches,
    eos_ids,
    faster_twin,
    forward,
    generate_tokens,
    module_inputs,
    output_gradients,
    token_budget,
    unpacked_shape,
)
from vauban.prompts import encode_chat

# Rows of the sketch of a matrix's inputs; an expert reads fewer tokens, and there are many of them.
RANK, _EXPERT_RANK = 256, 64
# Texts whose gradients are read, at most: they cost several forward passes.
_TEXTS = 64
# What stands in for prompts where there are none: so many texts of so many tokens drawn evenly.
_DRAWN = (64, 32)


def calibrate(
    plan: EditPlan,
    tokenizer: Any = None,
    prompts: Sequence[Any] | None = None,
    *,
    max_tokens: int = 24,
    seed: int = 0,
    progress: Progress | None = None,
) -> EditPlan:
    """The same plan with what its packed writers read: see `EditPlan.calibrated`."""
    if prompts is not None and not prompts:
        raise InputError("no calibration prompts; expected at least one, or None for random tokens")
    if prompts is not None and tokenizer is None:
        raise InputError("calibration prompts need the tokenizer of the model")
    given = dict(plan.model.named_modules())
    packed = {u.path for u in plan.updates if "scales" in given[u.path]}
    model = faster_twin(plan.model)
    # A model that was unpacked to run faster shows no packing: all its writers are read.
    chosen = [u for u in plan.updates if not packed or u.path in packed]
    # A table that the head shares is read by the head as well, which this does not weigh.
    tables = [
        u.path
        for u in chosen
        if u.writes_rows and not (u.is_embedding and plan.embedding == "tied")
    ]
    matrices = [u.path for u in chosen if not u.writes_rows]
    virtual = replace(plan, _model=model).virtual()
    if prompts is None:
        texts = _random_texts(anatomy(model).vocabulary, seed)
        facts: dict[str, Any] = {"prompts": 0}
    else:
        heads = [encode_chat(tokenizer, prompt) for prompt in prompts]
        answers = generate_tokens(
            model, heads, eos=eos_ids(tokenizer), max_tokens=max_tokens, interventions=virtual,
            progress=progress,
        )  # fmt: skip
        texts = [head + answer for head, answer in zip(heads, answers, strict=True)]
        facts = {"prompts": len(prompts), "max_tokens": max_tokens}
    inputs = _inputs(model, matrices, texts, virtual, progress)
    notes = []
    if tables:
        try:
            inputs |= _sensitivities(model, tables, texts, virtual, seed, progress)
        except (ValueError, RuntimeError, NotImplementedError) as error:
            # Some kernels have no gradient in mlx; the table is then rounded as without this.
            notes.append(f"{tables[0]} is rounded without calibration: {error}")
    facts |= {"tokens": sum(len(t) for t in texts), "seed": seed, "modules": len(inputs)}
    return replace(
        plan,
        updates=tuple(replace(u, inputs=inputs.get(u.path, ())) for u in plan.updates),
        settings={**plan.settings, "calibration": facts},
        notes=(*plan.notes, *notes),
    )


def _random_texts(vocabulary: int, seed: int) -> list[list[int]]:
    drawn = mx.random.randint(0, vocabulary, _DRAWN, key=mx.random.key(seed))
    return [integers(row) for row in drawn]


def _inputs(
    model: nn.Module, paths: list[str], texts: list[list[int]], virtual: Any,
    progress: Progress | None,
) -> dict[str, tuple[Energy | None, ...]]:  # fmt: skip
    """Per matrix the second moment of its inputs under the cut; per expert where it has some."""
    modules = dict(model.named_modules())
    sizes = {path: unpacked_shape(modules[path]) for path in paths}
    found: dict[str, list[InputMoments | None]] = {
        path: [None] * (shape[0] if len(shape) == 3 else 1) for path, shape in sizes.items()
    }

    def take(path: str, expert: int, rows: np.ndarray) -> None:
        held = found[path][expert]
        if held is None:
            rank = _EXPERT_RANK if len(sizes[path]) == 3 else RANK
            held = found[path][expert] = InputMoments(sizes[path][-1], rank)
        held.update(rows)

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
            out = forward(model, batch, positions="last", interventions=virtual, logits=False)
            mx.eval(out.residual)
    return {
        path: tuple(None if held is None else held.energy() for held in parts)
        for path, parts in found.items()
    }


def _sensitivities(
    model: nn.Module, paths: list[str], texts: list[list[int]], virtual: Any, seed: int,
    progress: Progress | None,
) -> dict[str, tuple[Energy | None, ...]]:  # fmt: skip
    """Per table the Fisher information of what it writes."""
    modules = dict(model.named_modules())
    held = {path: InputMoments(unpacked_shape(modules[path])[-1], RANK) for path in paths}
    key = mx.random.key(seed)
    chosen = texts[:: -(-len(texts) // _TEXTS)]
    # A forward pass keeps one vector per residual; its gradient all that every block computed.
    budget = max(1, token_budget(model) // 16)
    for batch in _batches(chosen, progress, "read gradients", budget):
        key, own = mx.random.split(key)
        rows = output_gradients(model, paths, batch, interventions=virtual, key=own)
        for path, gradients in rows.items():
            held[path].update(np.array(gradients))
    return {path: (moments.energy(),) for path, moments in held.items()}


def _batches(
    texts: list[list[int]], progress: Progress | None, stage: str, budget: int = TOKEN_BUDGET
) -> Iterator[mx.array]:
    """Texts of one length at a time: padding is nothing that a matrix has to round well for."""
    done = 0
    for batch in batches(texts, equal_lengths=True, budget=budget):
        yield batch.tokens
        done += len(batch.rows)
        if progress:
            progress(stage, done, len(texts))
