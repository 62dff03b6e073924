"""The edit as a PEFT adapter, which transformers and what is built on it put on the source model.

The same factors as mlx-lm's, under PEFT's names, in a folder of their own: both programs call their
configuration adapter_config.json. Knows PEFT's format and stored names; needs no PEFT.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import mlx.core as mx

from vauban.edits import EditPlan
from vauban.edits.embedding import is_tied
from vauban.export.source import Source
from vauban.export.transformers_names import AS_TRANSFORMERS

FOLDER = "peft"
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def write_peft(
    plan: EditPlan, source: Source, arrays: Mapping[str, mx.array], folder: Path
) -> str | None:
    """Write `folder`/peft from mlx-lm's `arrays`; the reason where transformers cannot use it.

    PEFT adds B A x to W x, with A (r, in) and B (out, r): the transposes of mlx-lm's factors. What
    an embedding has are lora_embedding_A (r, rows) and lora_embedding_B (d, r).
    """
    modules: dict[str, str] = {}
    for update in plan.updates:
        name = stored_module(source, update.path)
        if name is None:
            return f"transformers' name of {update.path} is not known, or it is no plain matrix"
        modules[update.path] = name
    if any("scales" in source.modules[path] for path in modules):
        return "the source is packed, which transformers does not read"
    table = next((u for u in plan.updates if u.writes_rows), None)
    if table is not None and is_tied(source.model):
        return f"PEFT changes {table.path} for the input alone, and the head shares it"
    tensors = {}
    for update in plan.updates:
        a, b = (arrays[f"{update.path}.lora_{side}"] for side in "ab")
        name = f"{_PREFIX}{modules[update.path]}"
        if update.writes_rows:
            tensors[f"{name}.lora_embedding_A"], tensors[f"{name}.lora_embedding_B"] = a.T, b.T
        else:
            tensors[f"{name}.lora_A.weight"], tensors[f"{name}.lora_B.weight"] = a.T, b.T
    rank = int(plan.basis.shape[0])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(source.folder),
        "r": rank,
        # PEFT scales by lora_alpha / r.
        "lora_alpha": rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": sorted(modules.values()),
    }
    (folder / FOLDER).mkdir()
    arrays = {name: mx.contiguous(value) for name, value in tensors.items()}
    mx.save_safetensors(str(folder / FOLDER / WEIGHTS), arrays, {"format": "pt"})
    (folder / FOLDER / CONFIG).write_text(json.dumps(config, indent=2) + "\n")
    return None


def stored_module(source: Source, path: str) -> str | None:
    """What transformers calls a module; None where that is not known, and for stacks of experts."""
    if source.same_layout:
        known = source.config.get("model_type") in AS_TRANSFORMERS
        return path if known and ".switch_mlp." not in f".{path}." else None
    origin = source.origins.get(f"{path}.weight")
    if origin is None or origin.turned or len(origin.names) > 1:
        return None
    name = origin.names[0]
    return name.removesuffix(".weight") if name.endswith(".weight") else None
