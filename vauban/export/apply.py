"""Make a planned edit in memory. Knows plans, modules and how edited matrices are stored."""

from __future__ import annotations

import warnings

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vauban._common import Progress
from vauban.edits.blocks import edited_rows
from vauban.edits.embedding import untie
from vauban.edits.modules import float_module, refuse_unknown_packing, repacked_module
from vauban.edits.packed import check_precision, store_packed
from vauban.edits.plan import EditPlan
from vauban.errors import InputError, VaubanWarning
from vauban.export.calibrate import calibrate_from_folder, inputs_of
from vauban.export.interrupted import digest_of
from vauban.models import folder_of, forget, unpacked_shape
from vauban.models.notes import note, notes


def apply_plan(
    plan: EditPlan,
    model: nn.Module,
    precision: str | None = None,
    *,
    calibrate: bool | None = None,
    progress: Progress | None = None,
) -> nn.Module:
    """Edit `model` in place and return it: see `EditPlan.apply`."""
    check_precision(precision)
    if precision == "adapter":
        raise InputError(
            "precision 'adapter' is a folder, not a change in memory; export the plan with it "
            "and load the model with adapter_path="
        )
    plan.check_modules(model, "the model")
    modules = dict(model.named_modules())
    for update in plan.updates:
        refuse_unknown_packing(modules[update.path])
    packed = any("scales" in modules[u.path] for u in plan.updates)
    if packed and precision in (None, "same"):
        before = set(plan.notes)
        plan = calibrate_from_folder(plan, folder_of(plan.model), calibrate, progress)
        for text in plan.notes:
            if text not in before:
                warnings.warn(text, VaubanWarning, stacklevel=3)
    inputs = inputs_of(plan)
    if plan.embedding == "untie":
        untie(model, modules)
    for number, update in enumerate(plan.updates, 1):
        module = modules[update.path]
        stored = store_packed(module, update, precision, inputs.get(update.path, ()))
        if stored is not None:
            edited = repacked_module(
                module, stored.arrays, stored.bits, stored.group_size, stored.mode
            )
        else:
            rows = mx.concatenate(list(edited_rows(module, update)))
            shape = unpacked_shape(module)
            edited = float_module(module)
            edited.weight = rows.reshape(shape)
        if update.bias and "bias" in edited:
            edited.bias = update.new_bias(edited.bias)
        mx.eval(edited.parameters())
        if edited is not module:
            model.update_modules(tree_unflatten([(update.path, edited)]))
        if progress:
            progress("apply", number, len(plan.updates))
    forget(model)
    done = {update.path: digest_of(update) for update in plan.updates}
    note(model, edited={**notes(model).edited, **done})
    return model
