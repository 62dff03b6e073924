"""Rotary positions: what a configuration says of them, and what a built module does.

The claim is read as transformers reads it (`rope_parameters`, or the older fields) and turned into
frequencies in float64; a module is asked for its own by rotating unit vectors. Loads nothing.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

BASES = ("rope_embedding_base", "rope_theta", "rotary_emb_base")
"""Fields that hold the base, by the names of transformers 5 and of its past."""
LOCAL_BASES = ("rope_local_base_freq", "rope_local_theta", "swa_rope_theta")
FRACTIONS = ("partial_rotary_factor", "rotary_pct")
# Families whose sliding layers have a base of their own, 10000 where it is not said.
_LOCAL = ("gemma3", "gear", "plamo3")
FULL, SLIDING = "full_attention", "sliding_attention"
# Types whose frequencies are computed here; modules of other types are not compared.
_KNOWN = ("default", "linear", "dynamic", "llama3", "yarn", "longrope")
_SYNONYMS = {"su": "longrope", "deepseek_yarn": "yarn", None: "default"}


@dataclass(frozen=True)
class RopeClaim:
    """Rotary positions of some layers: base, type, the type's numbers, the share of a head."""

    base: float | None
    kind: str
    settings: Mapping[str, Any]
    fraction: float | None = None

    @property
    def text(self) -> str:
        """As a message names it: base 500000, yarn (factor 4.0)."""
        factor = self.settings.get("factor")
        scaled = "" if self.kind == "default" else f", {self.kind}"
        base = "base not said" if self.base is None else f"base {self.base:g}"
        return base + scaled + (f" (factor {factor:g})" if _number(factor) else "")


@dataclass(frozen=True, eq=False)
class Rotation:
    """What a module does to a head at position 1: angles (dims / 2,) descending, and a factor."""

    dims: int
    angles: np.ndarray
    factor: float

    @property
    def rotated(self) -> int:
        """How many of the coordinates turn."""
        return 2 * int((self.angles > 1e-12).sum())


def rope_claims(config: Mapping[str, Any]) -> dict[str | None, RopeClaim]:
    """What a configuration says, by layer type; under None what holds for all of them.

    `rope_parameters` wins over the older fields, as it does in transformers. Empty where neither
    is set.

    >>> claims = rope_claims({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}})
    >>> claims[None].text
    'base 500000'
    """
    parameters = config.get("rope_parameters")
    if isinstance(parameters, Mapping) and parameters:
        nested = {k: v for k, v in parameters.items() if isinstance(v, Mapping)}
        if nested:
            return {kind: _claim(config, one) for kind, one in nested.items()}
        main = _claim(config, parameters)
    else:
        scaling = config.get("rope_scaling")
        main = _claim(config, scaling if isinstance(scaling, Mapping) else {})
        if main.base is None and not scaling:
            return {}
    local = next((config[f] for f in LOCAL_BASES if _number(config.get(f))), None)
    if local is None and str(config.get("model_type")).startswith(_LOCAL):
        local = 10_000.0
    if local is None:
        return {None: main}
    return {FULL: main, SLIDING: RopeClaim(float(local), "default", {}, main.fraction)}


def _claim(config: Mapping[str, Any], settings: Mapping[str, Any]) -> RopeClaim:
    merged = {**{k: config[k] for k in (*BASES, *FRACTIONS) if k in config}, **settings}
    base = next((merged[f] for f in BASES if _number(merged.get(f))), None)
    fraction = next((merged[f] for f in FRACTIONS if _number(merged.get(f))), None)
    kind = settings.get("rope_type", settings.get("type"))
    kind = _SYNONYMS.get(kind, kind)
    context = {k: config.get(k) for k in ("max_position_embeddings",)}
    original = config.get("original_max_position_embeddings")
    if _number(original) and kind in ("llama3", "yarn", "longrope"):
        context["original_max_position_embeddings"] = original
        settings = {k: v for k, v in settings.items() if k != "original_max_position_embeddings"}
    return RopeClaim(
        None if base is None else float(base),
        str(kind),
        {**context, **settings},
        None if fraction is None else float(fraction),
    )


def expected_rotations(claim: RopeClaim, dims: int) -> dict[str, Rotation]:
    """What transformers does with `dims` coordinates, under "", and mlx-lm's known departures.

    "truncate": mlx-lm rounds YaRN's correction range whatever the configuration says.
    "short_factor": mlx-lm takes LongRoPE's long factors for short texts too. Empty for a type that
    is not computed here and for a configuration that lacks what its type needs.
    """
    if claim.base is None or claim.kind not in _KNOWN:
        return {}
    settings = claim.settings
    exponents = np.arange(0, dims, 2, dtype=np.float64) / dims
    plain = claim.base**-exponents
    factor: Any = settings.get("factor")
    if claim.kind in ("default", "dynamic"):
        # NTK scaling changes the base only past the trained length, Hunyuan's alpha from the start.
        alpha = settings.get("alpha") if claim.kind == "dynamic" else None
        if _number(alpha) and alpha and dims > 2:
            plain = (claim.base * alpha ** (dims / (dims - 2))) ** -exponents
        return {"": _rotation(dims, plain)}
    original: Any = settings.get("original_max_position_embeddings")
    if original is None:
        original = settings.get("max_position_embeddings")
    try:
        if claim.kind == "linear":
            return {"": _rotation(dims, plain / factor)}
        if claim.kind == "llama3":
            return {"": _rotation(dims, _llama3(plain, settings, original))}
        if claim.kind == "yarn":
            scale = _yarn_scale(settings, factor or settings["max_position_embeddings"] / original)
            cut, smooth = (
                _rotation(dims, _yarn(claim.base, plain, settings, original, rounded), scale)
                for rounded in (True, False)
            )
            if settings.get("truncate", True):
                return {"": cut}
            return {"": smooth, "truncate": cut}
        return _longrope(dims, plain, settings, original)
    except (TypeError, KeyError, ValueError, ZeroDivisionError):
        # A number that the type needs is missing or none; mlx-lm names it when it builds the model.
        return {}


def _llama3(plain: np.ndarray, settings: Mapping[str, Any], original: float) -> np.ndarray:
    low, high = settings["low_freq_factor"], settings["high_freq_factor"]
    turns = original * plain / (2 * np.pi)
    share = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return (1 - share) * plain / settings["factor"] + share * plain


def _yarn(
    base: float, plain: np.ndarray, settings: Mapping[str, Any], original: float, rounded: bool
) -> np.ndarray:
    dims = 2 * len(plain)
    factor = settings.get("factor") or settings["max_position_embeddings"] / original

    def border(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(base))

    low, high = (
        border(settings.get("beta_fast") or 32),
        border(settings.get("beta_slow") or 1),
    )
    if rounded:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    ramp = np.clip((np.arange(len(plain)) - low) / (high - low or 0.001), 0.0, 1.0)
    return plain * (1 - ramp) + plain / factor * ramp


def _yarn_scale(settings: Mapping[str, Any], factor: float) -> float:
    given = settings.get("attention_factor")
    if given is not None:
        return float(given)
    over, under = settings.get("mscale"), settings.get("mscale_all_dim")
    if over and under:
        return yarn_magnitude(factor, over) / yarn_magnitude(factor, under)
    return yarn_magnitude(factor, 1.0)


def yarn_magnitude(factor: float, weight: float) -> float:
    """YaRN's growth of queries and keys, .1 w ln s + 1 (Peng et al. 2023, arXiv 2309.00071)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _longrope(
    dims: int, plain: np.ndarray, settings: Mapping[str, Any], original: float
) -> dict[str, Rotation]:
    factor = settings.get("factor") or settings["max_position_embeddings"] / original
    scale = settings.get("attention_factor")
    if scale is None:
        scale = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    short, long = (
        _rotation(
            dims,
            plain / np.asarray(settings[f"{name}_factor"], dtype=np.float64),
            # Phi-MoE gives the growth itself.
            float(settings.get(f"{name}_mscale") or scale),
        )
        for name in ("short", "long")
    )
    return {"": short, "short_factor": long}


def _rotation(dims: int, angles: np.ndarray, factor: float = 1.0) -> Rotation:
    return Rotation(dims, np.sort(angles)[::-1], factor)


def built_rotation(module: nn.Module) -> Rotation | None:
    """What a rotary module does at position 1; None for one that cannot be asked.

    Every unit vector is turned: its own coordinate gives the cosine, the others the sine, so that
    the order of the pairs does not matter.

    >>> built_rotation(nn.RoPE(4, base=100.0)).angles.round(4).tolist()
    [1.0, 0.1]
    """
    dims = getattr(module, "dims", None) or getattr(module, "dim", None)
    if not isinstance(dims, int) or dims < 2 or dims % 2:
        return None
    try:
        turned = module(mx.eye(dims)[:, None, None, :], offset=1)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError):
        # A family's own rotary module, called in a way of its own: nothing is claimed of it.
        return None
    if not isinstance(turned, mx.array) or turned.size != dims * dims:
        return None
    matrix = np.array(turned.astype(mx.float32), dtype=np.float64).reshape(dims, dims)
    cosine = np.diag(matrix)
    sine = np.linalg.norm(matrix - np.diag(cosine), axis=1)
    angles = np.sort(np.arctan2(sine, cosine))[::-1]
    return Rotation(dims, angles[::2], float(np.median(np.hypot(sine, cosine))))


def rotary_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The rotary modules of a built model, by path."""
    return {
        path: module
        for path, module in model.named_modules()
        if any(word in path.rpartition(".")[2].lower() for word in ("rope", "rotary"))
    }


def same_angles(built: Rotation, expected: Rotation) -> bool:
    """Whether two rotations turn by the same angles; kernels differ by less than a thousandth."""
    return built.angles.shape == expected.angles.shape and bool(
        np.allclose(built.angles, expected.angles, rtol=1e-3, atol=1e-6)
    )


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
