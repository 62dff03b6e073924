"""A plan tried without changing a weight: its run-time form, and what it leaves of the direction.

The run-time form uses the factors of the weight edit, so both give the same model (DESIGN 6).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban._common import largest, probe_tokens
from vauban.edits.embedding import read_head
from vauban.edits.modules import module_weight
from vauban.edits.plan import EditPlan
from vauban.errors import InputError, ModelError
from vauban.generation import Batches
from vauban.interventions import Intervention, ModuleOutputs, ModuleWeights
from vauban.models import anatomy, forward


@dataclass(frozen=True, eq=False)
class Leakage:
    """What is left: ‖U W'‖/‖U W‖ per writer, and the largest ‖D h‖/‖h‖ in the stream."""

    writers: Mapping[str, float]
    stream: float

    @property
    def worst(self) -> float:
        """The largest share over the writers."""
        return largest(self.writers.values())

    def summary(self) -> str:
        return f"direction left: at most {self.worst:.1e} per writer, stream {self.stream:.1e}"

    def to_dict(self) -> dict[str, Any]:
        return {"writers": dict(self.writers), "worst": self.worst, "stream": self.stream}


def virtual(plan: EditPlan) -> tuple[Intervention, ...]:
    """The interventions that change a forward pass as the plan changes the weights."""
    return (*_cut(plan), *plan.constants)


def head_alone(plan: EditPlan) -> tuple[Intervention, ...]:
    """The change of a shared matrix in its role as the head alone; () where nothing is shared."""
    if plan.embedding != "tied":
        return ()
    return (_head(plan, {u.path: (u.basis, u.alpha) for u in plan.updates if u.is_embedding}),)


def leakage(plan: EditPlan, model: nn.Module | None = None) -> Leakage:
    """Share left per writer and in the stream; ModelError for NaN or inf in either."""
    model = model if model is not None else plan.model
    plan.check_modules(model, "the model")
    modules = dict(model.named_modules())
    writers = {}
    for update in plan.updates:
        before = module_weight(modules[update.path])
        writers[update.path] = update.share_left(update.weight(before), before)
        _check_finite(writers[update.path], update.path)
    return Leakage(writers, stream_leak(plan, model))


def stream_leak(
    plan: EditPlan,
    model: nn.Module | None = None,
    token_lists: Sequence[Sequence[int]] | None = None,
) -> float:
    """Largest ‖D h‖/‖h‖ over residuals and tokens under the run-time cut, without its constants."""
    model = model if model is not None else plan.model
    if token_lists is None:
        token_lists = [probe_tokens(24, anatomy(model).vocabulary)]
    if not token_lists:
        raise InputError("token_lists is empty; expected at least one list of tokens")
    cut = _cut(plan)
    shares = []
    for batch in Batches(token_lists, equal_lengths=True):
        out = forward(model, batch.tokens, positions="all", interventions=cut, logits=False)
        assert out.residual is not None
        h = out.residual.astype(mx.float32)
        share = mx.linalg.norm(h @ plan.basis.T, axis=-1) / mx.linalg.norm(h, axis=-1)
        shares.append(float(share.max()))
        _check_finite(shares[-1], "the residual stream under the run-time cut")
    return max(shares)


def _check_finite(value: float, what: str) -> None:
    """Raise for NaN, which `max` and `<` take for the smaller one: a perfect cut."""
    if not mx.isfinite(mx.array(value)):
        raise ModelError(f"{what} holds NaN or inf, so what is left of the direction is unknown")


def _cut(plan: EditPlan) -> tuple[Intervention, ...]:
    """The run-time form without the constants of an affine cut."""
    tied = frozenset(u.path for u in plan.updates if u.is_embedding and plan.embedding == "tied")
    outputs = {u.path: (u.basis, u.alpha) for u in plan.updates if u.acts_on_outputs}
    inside = [u for u in plan.updates if not u.acts_on_outputs]
    interventions: list[Intervention] = []
    if outputs:
        head = _head(plan, {p: outputs[p] for p in tied if p in outputs})
        interventions.append(ModuleOutputs({**outputs, **head.factors}, head.heads))
    if inside:
        if tied - outputs.keys() and read_head(plan.model).reader == "matrix":
            raise InputError(
                f"{type(plan.model).__module__}'s head reads the embedding's matrix itself, "
                "which has no run-time form with norm_preserve; apply or export the plan"
            )
        modules = dict(plan.model.named_modules())
        edited = {u.path: u.weight(module_weight(modules[u.path])) for u in inside}
        biases = {
            u.path: u.new_bias(modules[u.path].bias)
            for u in inside
            if u.bias and "bias" in modules[u.path]
        }
        interventions.append(ModuleWeights(edited, biases, tied))
    return tuple(interventions)


def _head(plan: EditPlan, tables: Mapping[str, tuple[mx.array, float]]) -> ModuleOutputs:
    """The cut of a head that shares `tables`, made where the head reads the stream.

    A head that reads the matrix itself, past the embedding's own method, has the final norm's
    output changed instead, which nothing else reads.
    """
    parts = anatomy(plan.model)
    if parts.embedding_path not in tables or read_head(plan.model).reader != "matrix":
        return ModuleOutputs({}, tables)
    paths = [p for p, m in plan.model.named_modules() if m is parts.norm]
    if not paths:
        raise InputError(
            f"{type(plan.model).__module__}'s head reads the embedding's matrix itself, "
            "behind no norm that could be changed instead; apply or export the plan"
        )
    return ModuleOutputs({paths[0]: tables[parts.embedding_path]}, {})
