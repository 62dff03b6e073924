"""Kinds of export, and programs that open them: each rebuilt here, or the program itself.

A reader gives the logits of what it opened, None where it has none to give, and raises `Refused`
where the program would refuse the folder. `docs/generate_opens_page.py` prints the matrix.
"""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.utils import _get_classes, load_model

import vauban
from tests.export.checkpoints import save_checkpoint, unit
from tests.export.test_layout import foreign
from vauban._arrays import flat_parameters
from vauban.export import programs
from vauban.export.tensor_files import stored_tensors

TOKENS = [[1, 5, 7, 9, 3, 11, 2]]
_GGUF = {"llama": "LLAMA", "mixtral": "LLAMA", "qwen3_moe": "QWEN3MOE", "qwen3_vl": "QWEN3VL"}


class Refused(Exception):
    """What the program does with a folder that it cannot open."""


@dataclass(frozen=True)
class Kind:
    """One kind of folder that vauban writes."""

    name: str
    words: str
    source: Callable[[Path], Path]
    precision: str = "same"
    layout: str = "same"

    def export(self, place: Path) -> tuple[Path, Path, vauban.EditPlan, Any]:
        """(source, folder, plan, report) of a cut of a tiny model."""
        source = self.source(place / "source")
        plan = vauban.plan_cut(load_model(source)[0], unit(), embedding=False)
        out = place / "out"
        report = plan.export(source, out, self.precision, layout=self.layout, calibrate=False)
        return source, out, plan, report


def _plain(bits: int = 0, name: str = "llama") -> Callable[[Path], Path]:
    return lambda folder: save_checkpoint(folder, name, bits=bits, dtype=mx.float32)


def _foreign(name: str) -> Callable[[Path], Path]:
    return lambda folder: foreign(folder, name)


def _seeing(folder: Path) -> Path:
    """A language model with a vision tower, which is a stand-in of the smallest size."""
    foreign(folder, "qwen3_vl")
    config = json.loads((folder / "config.json").read_text())
    config["vision_config"] = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 2,
        "out_hidden_size": 64, "num_position_embeddings": 16, "deepstack_visual_indexes": [0],
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    return folder


KINDS = (
    Kind("floats", "floats, one layout for all programs (Llama)", _plain()),
    Kind("packed", "packed 4-bit", _plain(bits=4)),
    Kind("8bit", "floats with `--precision 8bit`", _plain(), "8bit"),
    Kind("experts", "experts stored one by one (Mixtral)", _foreign("mixtral")),
    Kind("stacks", "the same with `--layout mlx`", _foreign("mixtral"), layout="mlx"),
    Kind(
        "unstacked",
        "stacked experts (Qwen 3 MoE) with `--layout hf`",
        _plain(name="qwen3_moe"),
        layout="hf",
    ),
    Kind("vision", "a language model with a vision tower (Qwen 3 VL)", _seeing),
    Kind("adapter", "`--precision adapter`", _plain(), "adapter"),
)


def open_in_mlx_lm(folder: Path, source: Path) -> np.ndarray:
    if (folder / "adapters.safetensors").exists():
        from mlx_lm.tuner.utils import load_adapters

        return _logits(load_adapters(load_model(source)[0], str(folder)))
    return _logits(load_model(folder)[0])


def open_as_swift(folder: Path, source: Path) -> np.ndarray:
    """What MLX's Swift apps do: every .safetensors below the folder, every tensor a parameter.

    Their classes convert foreign names as mlx-lm's do, and what is left over is refused.
    """
    if not (folder / "config.json").exists():
        raise Refused("no config.json")
    config = json.loads((folder / "config.json").read_text())
    model_class, arguments = _get_classes(config)
    model = model_class(arguments.from_dict(config))
    weights: dict[str, mx.array] = {}
    for file in sorted(folder.rglob("*.safetensors")):
        weights |= mx.load(str(file))
    if hasattr(model, "sanitize"):
        weights = model.sanitize(weights)
    packing = config.get("quantization")
    if packing:

        def form(path: str, module: nn.Module) -> Any:
            other = packing.get(path, True)
            return other if f"{path}.scales" in weights else False

        nn.quantize(model, packing["group_size"], packing["bits"], class_predicate=form)
    unknown = weights.keys() ^ flat_parameters(model).keys()
    if unknown:
        raise Refused(f"unknown or missing: {min(unknown)}")
    model.load_weights(list(weights.items()), strict=True)
    return _logits(model)


def open_in_transformers(folder: Path, source: Path) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText

    if not (folder / "config.json").exists():
        raise Refused("no config.json")
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization"):
        raise Refused("MLX's packed weights")
    sees = "vision_config" in config
    model, found = (AutoModelForImageTextToText if sees else AutoModelForCausalLM).from_pretrained(
        folder, dtype=torch.float32, output_loading_info=True
    )
    for what in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        # The tower of these tests is a stand-in.
        wrong = sorted(str(key) for key in found[what] if "visual" not in str(key))
        if wrong:
            raise Refused(f"{what}: {wrong[0]}")
    with torch.no_grad():
        return model.eval()(torch.tensor(TOKENS)).logits.numpy()


def open_in_peft(folder: Path, source: Path) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    if not (folder / "peft").is_dir():
        raise Refused("no PEFT adapter")
    base = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    with torch.no_grad():
        model = PeftModel.from_pretrained(base, folder / "peft").eval()
        return model(torch.tensor(TOKENS)).logits.numpy()


def open_in_llama_cpp(folder: Path, source: Path) -> None:
    """The converter's table of names: every tensor has a place, experts are merged before."""
    import gguf

    if not (folder / "config.json").exists():
        raise Refused("no config.json")
    config = json.loads((folder / "config.json").read_text())
    if config.get("quantization"):
        raise Refused("MLX's packed weights")
    arch = getattr(gguf.MODEL_ARCH, _GGUF[config["model_type"]])
    inner = config.get("text_config", config)
    table = gguf.get_tensor_name_map(arch, inner["num_hidden_layers"])
    for name in stored_tensors(folder):
        if ".visual." in name:
            continue  # The tower goes into a file of its own, mmproj.
        merged = re.sub(r"experts\.\d+\.", "experts.", name)
        merged = merged.replace("model.language_model.", "model.")
        # The converter gives Mixtral's merged experts the name of an older checkpoint.
        merged = re.sub(
            r"model\.layers\.(\d+)\.block_sparse_moe\.experts", r"layers.\1.feed_forward.experts",
            merged,
        )  # fmt: skip
        if table.get_name(merged, try_suffixes=(".weight", ".bias")) is None:
            raise Refused(f"can not map tensor {name}")


@dataclass(frozen=True)
class Program:
    """A program, what it needs here, and its reader."""

    name: str
    needs: tuple[str, ...]
    read: Callable[[Path, Path], np.ndarray | None]

    @property
    def installed(self) -> bool:
        return all(importlib.util.find_spec(module) for module in self.needs)


READERS = (
    Program(programs.MLX_LM, (), open_in_mlx_lm),
    Program(programs.SWIFT, (), open_as_swift),
    Program(programs.TRANSFORMERS, ("torch", "transformers"), open_in_transformers),
    Program(programs.LLAMA_CPP, ("gguf",), open_in_llama_cpp),
    Program(programs.PEFT, ("torch", "peft"), open_in_peft),
)


def matrix(place: Path) -> dict[str, tuple[str, ...]]:
    """{kind: the programs that its report names}."""
    return {kind.name: kind.export(place / kind.name)[3].programs for kind in KINDS}


def _logits(model: nn.Module) -> np.ndarray:
    return np.array(model(mx.array(TOKENS)).astype(mx.float32))
