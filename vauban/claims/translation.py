"""Fields of a configuration under the names that mlx-lm's class reads.

transformers 5 writes rotary positions as `rope_parameters` and kinds of layers as `layer_types`;
many classes of mlx-lm read the older fields only, and would take their defaults. Knows mlx-lm's
dataclasses of arguments, builds no model.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

from vauban.claims.rope import (
    BASES,
    FRACTIONS,
    FULL,
    LOCAL_BASES,
    SLIDING,
    RopeClaim,
    rope_claims,
    yarn_magnitude,
)
from vauban.errors import InputError, ModelError

# A field of mlx-lm's classes, and what transformers 5 calls the same number.
_RENAMED = {
    "num_experts": "num_local_experts",
    "num_local_experts": "num_experts",
    "n_ctx": "n_positions",
}


def translated(config: Mapping[str, Any]) -> dict[str, Any]:
    """What mlx-lm has to be told beside the configuration (`model_config` of its loader).

    Empty where the class reads the configuration as it is. Raises InputError for kinds of layers
    that the class has no words for, ModelError where mlx-lm's file for the type does not open.

    >>> llama = {"model_type": "llama", "rope_parameters": {"rope_theta": 5e5}}
    >>> translated(llama)
    {'rope_theta': 500000.0}
    """
    read = class_of(config)
    if read is None:
        return {}
    fields, source = _parameters(read), inspect.getsource(sys.modules[read.__module__])
    text = config.get("text_config")
    inner = _text_class(read, text if isinstance(text, Mapping) else config)
    flat = inner if "text_config" in fields and not isinstance(text, Mapping) else read
    if flat is not None and flat is not read:
        fields, source = _parameters(flat), inspect.getsource(sys.modules[flat.__module__])
    changes = _changes(config, fields, source)
    if isinstance(text, Mapping):
        reader = inner if "text_config" in fields else read
        if reader is not None:
            source = inspect.getsource(sys.modules[reader.__module__])
            inside = _changes(text, _parameters(reader), source)
            if inside:
                changes["text_config"] = {**text, **inside}
    return changes


def class_of(config: Mapping[str, Any]) -> type | None:
    """mlx-lm's dataclass of arguments for a configuration; None for a type that it has not."""
    from mlx_lm.utils import _get_classes

    if config.get("model_file"):
        return None
    try:
        return _get_classes(dict(config))[1]
    except ValueError:
        return None
    except SystemExit as error:
        raise ModelError(
            f"mlx-lm's file for {config.get('model_type')} does not open: it ends the program over "
            "a package that it misses (its own message stands above)"
        ) from error


def _parameters(read: type) -> dict[str, bool]:
    """{field: whether it has to be given}."""
    listed = inspect.signature(read).parameters.values()
    return {p.name: p.default is inspect.Parameter.empty for p in listed}


def _text_class(read: type, text: Mapping[str, Any]) -> type | None:
    """The dataclass for `text_config`: of the file that it names, the only one, or Llama's."""
    from mlx_lm.utils import MODEL_REMAPPING

    names = vars(sys.modules[read.__module__])
    kind = str(text.get("model_type"))
    kind = MODEL_REMAPPING.get(kind, kind)
    files = [v for v in names.values() if inspect.ismodule(v) and hasattr(v, "ModelArgs")]
    for file in files:
        if file.__name__.rpartition(".")[2] == kind:
            return file.ModelArgs
    named = [
        value
        for name, value in names.items()
        if inspect.isclass(value)
        and value is not read
        and dataclasses.is_dataclass(value)
        and hasattr(value, "from_dict")
        and (value.__module__ == read.__module__ or name.startswith("Text"))
    ]
    candidates = named or [file.ModelArgs for file in files]
    plain = [one for one in candidates if one.__module__.endswith(".llama")]
    return candidates[0] if len(candidates) == 1 else plain[0] if plain else None


def _changes(config: Mapping[str, Any], fields: Mapping[str, bool], source: str) -> dict[str, Any]:
    """The fields of one level that have to be added or corrected."""
    changes = {
        field: config[other]
        for field, other in _RENAMED.items()
        if field in fields and config.get(field) is None and config.get(other) is not None
    }
    pattern = _pattern(config, fields, source)
    if pattern is not None:
        changes["sliding_window_pattern"] = pattern
    claims = rope_claims(config)
    if not claims:
        return changes
    if "rope_parameters" in fields:
        if config.get("rope_parameters") is None and "rope_theta" not in fields:
            changes["rope_parameters"] = _as_parameters(config, claims)
        return changes
    main = claims.get(FULL, claims.get(None, next(iter(claims.values()))))
    local = claims.get(SLIDING)
    if isinstance(config.get("rope_parameters"), Mapping) and config["rope_parameters"]:
        wanted = {
            **dict.fromkeys(BASES, main.base),
            **dict.fromkeys(FRACTIONS, main.fraction),
            **dict.fromkeys(LOCAL_BASES, local.base if local else None),
        }
        scaling = _scaling(main, source)
        if scaling is not None:
            wanted["rope_scaling"] = scaling
        changes |= {
            field: value
            for field, value in wanted.items()
            if field in fields and value is not None and config.get(field) != value
        }
        if "rope_scaling" in fields and scaling is None and config.get("rope_scaling"):
            changes["rope_scaling"] = None
        if fields.get("rotary_dim") and "rotary_dim" not in config and main.fraction is not None:
            changes["rotary_dim"] = int(head_size(config) * main.fraction)
    if fields.get("rope_scaling") and "rope_scaling" not in {**config, **changes}:
        changes["rope_scaling"] = None
    return changes


def _as_parameters(
    config: Mapping[str, Any], claims: Mapping[str | None, RopeClaim]
) -> dict[str, Any]:
    """The older fields as `rope_parameters`, for a class that reads only those."""
    one = claims.get(None, claims.get(FULL))
    assert one is not None
    parameters = {
        "rope_type": "default",
        "rope_theta": one.base,
        **(config.get("rope_scaling") or {}),
    }
    if one.fraction is not None:
        parameters["partial_rotary_factor"] = one.fraction
    return parameters


def _scaling(claim: RopeClaim, source: str) -> dict[str, Any] | None:
    """`rope_scaling` for a claim, None for the default type."""
    if claim.kind == "default":
        return None
    settings = {
        k: v for k, v in claim.settings.items() if k != "max_position_embeddings" and v is not None
    }
    settings["rope_type"] = claim.kind
    if 'rope_scaling["type"]' in source:
        settings["type"] = claim.kind
    factor, given = settings.get("factor"), settings.get("attention_factor")
    if claim.kind == "yarn" and given is not None and factor and factor > 1:
        # mlx-lm knows no attention_factor; with this weight its own formula gives it.
        settings["mscale"] = (given - 1) / (yarn_magnitude(factor, 1.0) - 1)
        settings.pop("mscale_all_dim", None)
    return settings


def _pattern(
    config: Mapping[str, Any], fields: Mapping[str, bool], source: str
) -> int | str | None:
    """`sliding_window_pattern` for a class that reads no `layer_types`."""
    kinds = config.get("layer_types")
    if (
        "sliding_window_pattern" not in fields
        or "layer_types" in fields
        or not isinstance(kinds, list)
        or not {FULL, SLIDING} >= set(kinds)
    ):
        return None
    given = config.get("sliding_window_pattern")
    sliding = [kind == SLIDING for kind in kinds]
    if "pattern.index(" in source or isinstance(given, str):
        # EXAONE 4 repeats a text, L for local and G for global.
        text = "".join("L" if one else "G" for one in sliding)
        return None if isinstance(given, str) and _repeats(given, text) else text
    every = next((i + 1 for i, one in enumerate(sliding) if not one), len(sliding) + 1)
    if [(i + 1) % every != 0 for i in range(len(sliding))] != sliding:
        raise InputError(
            f"layer_types of config.json are {_runs(sliding)}; mlx-lm's {config.get('model_type')} "
            "knows only one full layer after every so many sliding ones, and would read the others "
            "with the wrong window and the wrong rotary base"
        )
    return None if given == every else every


def _repeats(pattern: str, text: str) -> bool:
    return bool(pattern) and all(pattern[i % len(pattern)] == one for i, one in enumerate(text))


def _runs(sliding: list[bool]) -> str:
    return "".join("S" if one else "F" for one in sliding) + " (S sliding, F full)"


def head_size(config: Mapping[str, Any]) -> int:
    """The size of an attention head; 0 where the configuration does not say."""
    size = config.get("head_dim")
    if isinstance(size, int) and size:
        return size
    width, heads = config.get("hidden_size"), config.get("num_attention_heads")
    return width // heads if isinstance(width, int) and isinstance(heads, int) and heads else 0
