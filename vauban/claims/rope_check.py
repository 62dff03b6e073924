"""The rotary modules of a built model against what its configuration says.

Knows claims, rotations and where a block's number stands in a path; changes nothing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import mlx.nn as nn

from vauban.claims.rope import (
    RopeClaim,
    Rotation,
    built_rotation,
    expected_rotations,
    rope_claims,
    rotary_modules,
    same_angles,
)
from vauban.claims.translation import head_size
from vauban.errors import InputError

# Families whose transformers class turns only a share of each head.
_PARTIAL = (
    *("glm", "phi", "stablelm", "gpt_neox", "nemotron", "persimmon", "qwen3_next", "qwen3_5"),
    *("minimax", "solar_open", "laguna", "mimo", "bailing"),
)
_DEPARTURES = {
    "truncate": "mlx-lm rounds YaRN's correction range",
    "short_factor": "mlx-lm takes long_factor for short texts too",
}


def rope_departures(config: Mapping[str, Any], model: nn.Module) -> list[tuple[str, Any, str]]:
    """(field, value, what mlx-lm does) where it departs from transformers by a known detail.

    Raises InputError where a module turns by other angles than the configuration says.
    """
    claims = rope_claims(config)
    departures: dict[str, tuple[str, Any, str]] = {}
    known: dict[tuple[Any, ...], str] = {}
    for path, module in rotary_modules(model).items():
        candidates = _candidates(config, claims, path)
        built = built_rotation(module)
        if built is None or not candidates:
            continue
        key = (built.dims, built.factor, built.angles.tobytes(), *map(id, candidates))
        if key not in known:
            known[key] = _compared(config, candidates, path, built)
            field = known[key]
            if field == "attention_factor":
                text = f"mlx-lm grows queries and keys by {built.factor:.4g}"
                departures[field] = (field, candidates[0].settings.get(field), text)
            elif field:
                value = candidates[0].settings.get(field)
                departures[field] = (field, value, _DEPARTURES[field])
        _check_share(config, candidates, path, built, departures)
    return list(departures.values())


def _candidates(
    config: Mapping[str, Any], claims: Mapping[str | None, RopeClaim], path: str
) -> list[RopeClaim]:
    """What a module may do: its block's own claim, where the configuration names the kinds."""
    block = re.search(r"\.(\d+)\.", path)
    kinds = config.get("layer_types")
    kind = None
    if block and isinstance(kinds, list) and int(block[1]) < len(kinds):
        kind = kinds[int(block[1])]
    if kind in claims:
        return [claims[kind]]
    listed = list(claims.values())
    if None in claims and (kind or config.get("sliding_window")):
        # OLMo 3's kind stretches the full layers only.
        listed.append(RopeClaim(claims[None].base, "default", {}, claims[None].fraction))
    return listed


def _compared(
    config: Mapping[str, Any], candidates: list[RopeClaim], path: str, built: Rotation
) -> str:
    """ "" where the module does what is said, else the field of a known departure."""
    expected = [(claim, expected_rotations(claim, built.dims)) for claim in candidates]
    if not all(found for _, found in expected):
        return ""
    for _, found in expected:
        for field, rotation in found.items():
            if same_angles(built, rotation):
                apart = abs(built.factor - rotation.factor) > 1e-3 * rotation.factor
                return field or ("attention_factor" if apart else "")
    raise InputError(
        f"config.json gives rotary positions {candidates[0].text}, and mlx-lm's "
        f"{config['model_type']} builds {path} with {_described(built)}: it does not read "
        f"{'rope_parameters' if config.get('rope_parameters') else 'that field'}, and no field of "
        "it says the same. The model would run with other numbers at every token; use another "
        "program for it, or take the field out of a copy's config.json to run it as mlx-lm does"
    )


def _described(built: Rotation) -> str:
    """The rotation of a module, as a base where it is a plain one."""
    second = float(built.angles[1]) if len(built.angles) > 1 else 0.0
    if second <= 0:
        return f"angles {built.angles.round(4).tolist()}"
    base = second ** (-built.dims / 2)
    plain = RopeClaim(base, "default", {})
    if abs(built.angles[0] - 1) < 1e-3 and same_angles(
        built, expected_rotations(plain, built.dims)[""]
    ):
        return f"base {base:.6g}"
    return "other angles (" + ", ".join(f"{a:.3g}" for a in built.angles[:3]) + ", ...)"


def _check_share(
    config: Mapping[str, Any],
    candidates: list[RopeClaim],
    path: str,
    built: Rotation,
    departures: dict[str, tuple[str, Any, str]],
) -> None:
    fraction, size = candidates[0].fraction, head_size(config)
    if fraction is None or fraction >= 1 or not size or config.get("qk_rope_head_dim"):
        return
    if any(one.fraction != fraction for one in candidates) or built.rotated != size:
        return
    field = "partial_rotary_factor"
    if str(config["model_type"]).startswith(_PARTIAL):
        raise InputError(
            f"config.json turns {fraction:g} of each head ({field}), and mlx-lm's "
            f"{config['model_type']} builds {path} to turn all {size} coordinates. The model would "
            "run with other numbers at every token; use another program for it, or take the field "
            "out of a copy's config.json to run it as mlx-lm does"
        )
    departures[field] = (field, fraction, f"mlx-lm's {config['model_type']} turns whole heads")
