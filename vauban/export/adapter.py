"""An edit as an mlx-lm LoRA folder: rank k per writer, exact, applied on top of any stored weights.

`mlx_lm.generate --model SOURCE --adapter-path DIR` opens it; the checkpoint is left alone. Knows
plans and mlx-lm's adapter format.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban import __version__
from vauban.edits import EditPlan, Update
from vauban.edits.lowrank import share
from vauban.edits.modules import module_weight
from vauban.errors import CheckError, InputError
from vauban.export.peft_adapter import write_peft
from vauban.export.read_back import norm
from vauban.export.source import Source, open_source

CONFIG, WEIGHTS = "adapter_config.json", "adapters.safetensors"

_WRAPPED = (
    nn.Linear,
    nn.QuantizedLinear,
    nn.Embedding,
    nn.QuantizedEmbedding,
    SwitchLinear,
    QuantizedSwitchLinear,
)
"""The modules that mlx-lm can put an adapter on."""


def is_adapter(folder: str | Path) -> bool:
    """Whether a folder holds an adapter alone, which needs its model to be opened."""
    folder = Path(folder)
    return (folder / CONFIG).is_file() and not (folder / "config.json").exists()


def check_adaptable(plan: EditPlan) -> None:
    """InputError where a plan is no low-rank change of matrices alone."""
    if plan.embedding == "untie":
        raise InputError(
            "an adapter cannot give a tied head its own matrix; plan with embedding='tied' (the "
            "head changes too) or embedding=False"
        )
    modules = dict(plan.model.named_modules())
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
        module = modules[update.path]
        if not isinstance(module, _WRAPPED):
            raise InputError(
                f"{update.path} is a {type(module).__name__}, which mlx-lm's adapters cannot wrap"
            )


def write_adapter(plan: EditPlan, source: Source, folder: Path) -> tuple[str, ...]:
    """Write adapters.safetensors and adapter_config.json, and the same for PEFT into `peft`.

    The result says why there is no PEFT adapter, where transformers cannot use one.

    W - α L R with L (out, k), R (k, in) is LoRA with lora_a = Rᵀ and lora_b = -α Lᵀ at scale 1.
    InputError where `check_adaptable` says so, or for a plan of another model.
    """
    check_adaptable(plan)
    plan.check_modules(source.model, str(source.folder))
    # Told from shapes, which are gone once a module is released.
    _ = source.origins
    arrays: dict[str, mx.array] = {}
    for update in plan.updates:
        factors = _factors(update, module_weight(source.modules[update.path]))
        mx.eval(factors)
        source.release(update.path)
        for name, value in factors.items():
            arrays[f"{update.path}.{name}"] = value
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
    reason = write_peft(plan, source, arrays, folder)
    return () if reason is None else (f"no PEFT adapter beside mlx-lm's: {reason}",)


def adapter_shares(
    plan: EditPlan, source: Source, folder: Path
) -> tuple[dict[str, float], dict[str, float]]:
    """Per writer ‖U Ŵ‖/‖U W‖ and ‖U (Ŵ - W')‖/‖U W‖, read back: what is left, and what is missed.

    Ŵ is what mlx-lm makes of the written folder on the source, W' what was planned. CheckError
    where mlx-lm does not take the folder, or puts nothing on a writer.
    """
    from mlx_lm.tuner.utils import load_adapters

    opened = open_source(source.folder)
    plain = {update.path: opened.modules[update.path] for update in plan.updates}
    try:
        adapted = dict(load_adapters(opened.model, str(folder)).named_modules())
    except (ValueError, KeyError) as error:
        raise CheckError(f"{folder}: mlx-lm cannot open this adapter: {error}") from error
    left: dict[str, float] = {}
    missed: dict[str, float] = {}
    for update in plan.updates:
        if "lora_a" not in adapted[update.path]:
            raise CheckError(f"{folder}: mlx-lm puts no adapter on {update.path}")
        weight = module_weight(plain[update.path])
        rows = update.removed(_merged(update, weight, adapted[update.path]))
        had = norm(update.removed(weight))
        left[update.path] = share(norm(rows), had)
        missed[update.path] = share(norm(rows - update.removed(update.weight(weight))), had)
        opened.release(update.path)
    return left, missed


def _merged(update: Update, weight: mx.array, adapted: nn.Module) -> mx.array:
    """The matrix that the stored weight and the adapter make together, in float32."""
    a, b = adapted.lora_a, adapted.scale * adapted.lora_b
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
