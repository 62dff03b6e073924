"""An edit as an mlx-lm LoRA folder: rank k per writer, exact, applied on top of any stored weights.

`mlx_lm.generate --adapter-path DIR` opens it; the checkpoint is left alone. Knows plans and
mlx-lm's adapter format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban import __version__
from vauban.edits import EditPlan, Update
from vauban.edits.modules import module_weight
from vauban.errors import InputError
from vauban.export.checkpoint import Source

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"


def check_adaptable(plan: EditPlan) -> None:
    """InputError where a plan is no low-rank change of matrices alone."""
    if plan.embedding == "untie":
        raise InputError(
            "an adapter cannot give a tied head its own matrix; plan with embedding='tied' (the "
            "head changes too) or embedding=False"
        )
    for update in plan.updates:
        if update.offset is not None:
            raise InputError("an affine cut adds constants, which an adapter cannot hold")
        if update.mode is not None:
            raise InputError("norm_preserve is no low-rank change; an adapter cannot hold it")
        if update.bias:
            raise InputError(
                f"{update.path} has a bias, which mlx-lm's adapters cannot change; export the "
                "weights instead"
            )


def write_adapter(plan: EditPlan, source: Source, folder: Path) -> dict[str, float]:
    """Write adapters.safetensors and adapter_config.json; returns what is left per writer.

    W - α L R with L (out, k), R (k, in) is LoRA with lora_a = Rᵀ and lora_b = -α Lᵀ at scale 1.
    """
    check_adaptable(plan)
    modules = dict(source.model.named_modules())
    arrays: dict[str, mx.array] = {}
    left: dict[str, float] = {}
    for update in plan.updates:
        weight = module_weight(modules[update.path])
        found = _factors(update, weight)
        left[update.path] = update.share_left(_merged(update, weight, found), weight)
        for name, value in found.items():
            arrays[f"{update.path}.{name}"] = value
        mx.eval(arrays)
    config: dict[str, Any] = {
        "fine_tune_type": "lora",
        # Keys are full paths, which mlx-lm matches over the whole model, not per block.
        "num_layers": 0,
        "lora_parameters": {
            "rank": int(plan.basis.shape[0]),
            "scale": 1.0,
            "dropout": 0.0,
            "keys": [u.path for u in plan.updates],
        },
        "vauban": __version__,
    }
    mx.save_safetensors(str(folder / WEIGHTS), arrays, {"format": "mlx"})
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return left


def _merged(update: Update, weight: mx.array, factors: dict[str, mx.array]) -> mx.array:
    """The matrix that the stored weight and the adapter make together, in float32."""
    a, b = factors["lora_a"], factors["lora_b"]
    if update.writes_rows:
        return weight.astype(mx.float32) + a @ b
    if a.ndim == 3:
        return weight.astype(mx.float32) + b @ a
    return weight.astype(mx.float32) + b.T @ a.T


def _factors(update: Update, weight: mx.array) -> dict[str, mx.array]:
    """lora_a and lora_b in the shapes mlx-lm has for linear, stacked experts and embeddings."""
    taken = update.taken(weight)
    left = update.basis if update.rows is None else update.basis * update.rows.T
    if update.writes_rows:
        return {"lora_a": taken.T, "lora_b": -update.alpha * update.basis}
    if taken.ndim == 3:
        experts, k, _ = taken.shape
        spread = mx.broadcast_to((-update.alpha * left).T, (experts, left.shape[1], k))
        return {"lora_a": taken, "lora_b": mx.contiguous(spread)}
    return {"lora_a": taken.T, "lora_b": -update.alpha * left}
