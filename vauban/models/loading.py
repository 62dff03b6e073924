"""Open a model folder or a Hub id, check it before it is used, and choose the dtype it runs in.

Knows folders, mlx-lm's loader and memory; knows no prompts. safetensors only.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from vauban import _backend
from vauban._arrays import flat_parameters
from vauban._paths import data_dir
from vauban.claims.translation import translated
from vauban.claims.unmet import unmet_claims, unread_biases, warn_of_claims
from vauban.errors import InputError, ModelError, VaubanWarning
from vauban.models.info import float_dtype, free_memory, parameter_count
from vauban.models.notes import forget, note
from vauban.models.weight_files import weight_files

_KINDS = ("dense", "moe", "4bit", "facts")
# A folder with one of these files has a tokenizer.
_TOKENIZERS = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*")
# What of a Hub repository is downloaded: weights, settings, tokenizers, and the terms of use, which
# go along wherever the weights go.
DOWNLOADED = (
    *("*.json", "*.safetensors", "*.py", "*.model", "*.tiktoken", "*.txt", "*.jsonl", "*.jinja"),
    *("LICENSE*", "LICENCE*", "NOTICE*", "USE_POLICY*", "README*"),
)
# What mlx-lm's loaders raise for a folder that they cannot read.
_UNREADABLE = (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError)


def organism_path(kind: str = "dense") -> Path:
    """The bundled model organism: "dense", "moe", "4bit", or "facts", which knows things of people
    and refuses nothing. A folder that mlx_lm.load opens.

    Raises InputError for another kind, and where the installation has lost its data.

    >>> organism_path("dense").name, (organism_path("4bit") / "config.json").is_file()
    ('dense', True)
    """
    if kind not in _KINDS:
        raise InputError(f"organism kind is {kind!r}; expected one of {', '.join(_KINDS)}")
    path = data_dir() / "organism" / kind
    if not (path / "config.json").is_file():
        raise InputError(f"the bundled organism is missing from {path}; reinstall vauban")
    return path


def load(path_or_repo: str | Path, *, unpack: bool = False, **options: Any) -> tuple[Any, ...]:
    """(model, tokenizer) of a local folder or a Hub id, through `mlx_lm.load`.

    `options` are mlx_lm.load's: adapter_path, revision, tokenizer_config, ... `return_config=True`
    gives (model, tokenizer, configuration). With `lazy=True` no weight is read before it is used,
    so they are not checked for NaN here.

    What the configuration says under names that mlx-lm's class does not read (`rope_parameters`,
    `layer_types`) is translated for it. A VaubanWarning lists fields that are not taken up;
    InputError refuses rotary positions that are not.

    On a CPU back end half-precision weights run in float32 when 4 bytes per parameter fit in half
    of the free memory. Packed weights stay packed, unless `unpack` asks to have them in float32 as
    well where the same holds: a packed matrix is multiplied 60 times slower there. Raises
    ModelError naming what is missing, broken or NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> len(model.layers) > 2
    True
    """
    _backend.check_backend()
    import mlx_lm

    folder = model_folder(path_or_repo, revision=options.pop("revision", None))
    config = check_folder(folder)
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer ({', '.join(_TOKENIZERS)}); copy its files from the model "
            "that the weights come from"
        )
    chosen = weight_files(folder)
    for text in chosen.notes:
        warnings.warn(text, VaubanWarning, stacklevel=2)
    given = options.pop("model_config", None) or {}
    told = {**translated({**config, **given}), **given}
    config |= told
    try:
        with chosen.loadable() as place:
            loaded = cast(Any, mlx_lm.load(str(place), model_config=told, **options))
            if place != folder:
                loaded[1].name_or_path = str(folder)
    except _UNREADABLE as error:
        adapter = options.get("adapter_path")
        what = f"{path_or_repo} with the adapter {adapter}" if adapter else f"{path_or_repo}"
        raise ModelError(
            f"mlx-lm cannot load {what}: {error}{unread_biases(config, error)}"
        ) from error
    model = loaded[0]
    claims = unmet_claims(config, model)
    lazy = bool(options.get("lazy"))
    if not lazy:
        _check_finite(model, path_or_repo)
    label = _quantization_label(config.get("quantization") or config.get("quantization_config"))
    packed = any("scales" in m for _, m in model.named_modules())
    stored = label if label and not packed else float_dtype(model)
    converted = _on_cpu() and _run_in_float32(model, unpack=unpack, lazy=lazy)
    source = {
        "path": str(path_or_repo),
        "model_type": str(config["model_type"]),
        "stored_dtype": stored,
        "quantization": label,
        "converted": converted,
    }
    fields = tuple(sorted(told.keys() - given.keys()))
    note(model, folder=folder, source=source, claims=claims, translated=fields)
    warn_of_claims(claims)
    return loaded


def load_tokenizer(path_or_repo: str | Path) -> Any:
    """The tokenizer of a folder or Hub id as `load` gives it, None where the folder has none.

    Raises ModelError for one that cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as read

    folder = model_folder(path_or_repo)
    if not has_tokenizer(folder):
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return read(folder, eos_token_ids=config.get("eos_token_id"))
    except _UNREADABLE as error:
        raise ModelError(f"mlx-lm cannot read the tokenizer of {folder}: {error}") from error


def has_tokenizer(folder: Path) -> bool:
    """Whether a file in the folder bears the name of a tokenizer's."""
    return any(any(folder.glob(pattern)) for pattern in _TOKENIZERS)


def faster_twin(model: nn.Module) -> nn.Module:
    """A float32 copy of a packed model on a CPU back end, where that fits; else the model itself.

    For many passes: the same numbers, at 60 times the speed (see `load`).
    """
    if not _on_cpu() or not any("scales" in m for _, m in model.named_modules()):
        return model
    twin = copy.deepcopy(model)
    forget(twin)
    return twin if _run_in_float32(twin, unpack=True) else model


def model_folder(path_or_repo: str | Path, *, revision: str | None = None) -> Path:
    """The local folder of a path or a Hub id (downloaded through huggingface_hub's cache)."""
    path = Path(path_or_repo).expanduser()
    if path.exists():
        if not path.is_dir():
            raise ModelError(f"{path} is a file; expected a model folder or a Hub id (org/name)")
        return path
    text = str(path_or_repo)
    if text.count("/") != 1 or text.startswith((".", "/", "~")):
        raise ModelError(f"no model folder at {text}; expected a folder or a Hub id (org/name)")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=list(DOWNLOADED)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot get {text} from the Hub: {first}") from error


def check_folder(folder: Path) -> dict[str, Any]:
    """The configuration of a model folder.

    Raises ModelError for a folder without one, without a type, and as `weight_files` does.
    """
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise ModelError(
            f"{folder} has no config.json; expected an MLX or Hugging Face model folder"
        )
    try:
        config = json.loads(config_file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{config_file} is not JSON: {error}") from error
    if not isinstance(config, dict) or not config.get("model_type"):
        raise ModelError(f"{config_file} names no model_type; mlx-lm cannot tell what it is")
    weight_files(folder)
    return config


def _check_finite(model: nn.Module, source: Any) -> None:
    for name, value in flat_parameters(model).items():
        if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all()):
            raise ModelError(f"{source}: weight {name} holds NaN or inf")


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)


def _run_in_float32(model: nn.Module, *, unpack: bool, lazy: bool = False) -> bool:
    """Make float32 of half-precision weights, and with `unpack` of packed ones, where they fit.

    Half precision runs 36 times slower than float32 on MLX's CPU back end.
    """
    half = any(v.dtype in (mx.float16, mx.bfloat16) for v in flat_parameters(model).values())
    packed = unpack and any("scales" in m for _, m in model.named_modules())
    if not (half or packed) or 4 * parameter_count(model) > free_memory() / 2:
        return False
    model.update(
        tree_map(
            lambda v: v.astype(mx.float32) if v.dtype in (mx.float16, mx.bfloat16) else v,
            model.parameters(),
        )
    )
    if packed:
        # Scales and offsets are float32 by now, so this loses nothing.
        dequantize_model(model)
    if not lazy:
        mx.eval(model.parameters())
    return True


def _quantization_label(packed: Any) -> str | None:
    if not isinstance(packed, dict):
        return None
    bits, group = packed.get("bits"), packed.get("group_size")
    if bits is None:
        return str(packed.get("quant_method", "packed"))
    mode = packed.get("mode", "affine")
    return f"{bits}-bit {mode} g{group}"
