"""Tiny random models of mlx-lm's own classes, one per entry of `configurations.json`.

An entry names a model file of mlx-lm and what differs from the common sizes. Norms, biases, routers
and packed matrices are randomised, so that a gain, a bias or an expert that is missed shows.
"""

from __future__ import annotations

import importlib
import json
import sys
import types
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map_with_path

_FILE = Path(__file__).with_name("configurations.json")
# Sign vectors of rotations and decay rates: anything else would not be the same kind of model.
_KEPT = ("signs", "A_log")


@cache
def _read() -> dict[str, Any]:
    return json.loads(_FILE.read_text())


def names() -> list[str]:
    """All configurations, "family" or "family@variant"."""
    return list(_read()["families"])


def module_of(name: str) -> str:
    """The mlx-lm model file of a configuration."""
    entry = _read()["families"][name]
    return entry.get("module", name.split("@")[0])


def configuration(name: str) -> dict[str, Any]:
    """The complete configuration: the common sizes, then what the entry changes."""
    common, entry = _read()["common"], _read()["families"][name]["config"]
    config = {"model_type": module_of(name), **common, **entry}
    if "text_config" in entry:
        text = {"model_type": module_of(name), **common, **entry["text_config"]}
        config["text_config"] = text
    return json.loads(json.dumps(config))


def with_tie(name: str, tied: bool) -> dict[str, Any]:
    """The configuration with the head tied to the embedding, or not."""
    config = configuration(name)
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = tied
    return config


def build(name: str, seed: int = 0, config: dict[str, Any] | None = None) -> nn.Module:
    """A float32 model with randomised norms and biases, in evaluation mode.

    `config` stands in for the configuration of that name.

    >>> build("llama").args.hidden_size
    64
    """
    if module_of(name) == "olmo":
        # Its file asks for a package that only its tokenizer needs.
        sys.modules.setdefault("hf_olmo", types.ModuleType("hf_olmo"))
    if module_of(name) == "bitnet" and not mx.metal.is_available():
        _without_metal()
    module = importlib.import_module(f"mlx_lm.models.{module_of(name)}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(config or configuration(name)))
    model.update(tree_map_with_path(_randomised, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def _without_metal() -> None:
    """BitNet's product in plain mlx, where its kernel cannot run: digit k of a byte is row k."""
    from mlx_lm.models.bitlinear_layers import BitLinear

    def product(self: Any, x: mx.array, packed: mx.array) -> mx.array:
        digits = [(packed >> (2 * k)) & 3 for k in range(4)]
        weight = mx.concatenate(digits).astype(x.dtype) - 1
        scale = 1 / self.weight_scale if self.invert_weight_scales else self.weight_scale
        return (x @ weight.T) * scale

    BitLinear.execute_matmul_kernel = product


def _randomised(path: str, p: mx.array) -> mx.array:
    name = path.split(".")[-1]
    if p.dtype == mx.uint8:
        # Four ternary digits a byte (BitNet): each pair of bits is 0, 1 or 2.
        digits = mx.random.randint(0, 3, (*p.shape, 4))
        return (digits * mx.array([1, 4, 16, 64])).sum(axis=-1).astype(mx.uint8)
    if not mx.issubdtype(p.dtype, mx.floating):
        return mx.random.randint(0, 2**31 - 1, p.shape).astype(p.dtype)
    if name in _KEPT:
        return p
    if p.dtype == mx.float16:
        return (0.05 * mx.random.normal(p.shape)).astype(p.dtype)
    p = p.astype(mx.float32)
    constant = p.size > 1 and float(p.max() - p.min()) == 0.0
    return p + 0.3 * mx.random.normal(p.shape) if p.ndim == 1 or constant else p
