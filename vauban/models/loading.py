"""Open a model folder or a Hub id, check it before it is used, and choose the dtype it runs in.

Knows folders, mlx-lm's loader and memory; knows no prompts. safetensors only.
"""

from __future__ import annotations

import copy
import json
import os
import struct
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_map
from mlx_lm.utils import dequantize_model

from vauban import _backend
from vauban._arrays import flat_parameters
from vauban._paths import data_dir
from vauban.errors import InputError, ModelError
from vauban.models.anatomy import anatomy
from vauban.models.notes import forget, note, notes

_KINDS = ("dense", "moe", "4bit")
# A folder with one of these files has a tokenizer.
_TOKENIZERS = ("tokenizer*.json", "*.model", "*.tiktoken", "vocab.*")


@dataclass(frozen=True)
class ModelInfo:
    """What a report says of a model; bytes as loaded."""

    path: str
    model_type: str
    n_layers: int
    d_model: int
    dtype: str
    stored_dtype: str
    quantization: str | None
    parameters: int
    bytes: int
    converted: bool

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class DeviceInfo:
    """The machine as MLX sees it; memory in bytes; `openblas` None where it does not matter."""

    name: str
    backend: str
    memory_total: int
    memory_available: int
    openblas: bool | None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def organism_path(kind: str = "dense") -> Path:
    """The bundled model organism: "dense", "moe" or "4bit". A folder that mlx_lm.load opens."""
    if kind not in _KINDS:
        raise InputError(f"organism kind is {kind!r}; expected one of {', '.join(_KINDS)}")
    path = data_dir() / "organism" / kind
    if not (path / "config.json").is_file():
        raise InputError(f"the bundled organism is missing from {path}; reinstall vauban")
    return path


def device_info() -> DeviceInfo:
    """The device MLX computes on, its memory, and whether OpenBLAS serves a Linux CPU."""
    gpu = mx.default_device() == mx.Device(mx.gpu)
    backend = "cpu"
    if gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = _available_memory(total)
    name = "CPU"
    if gpu:
        facts = mx.device_info()
        name = str(facts.get("device_name", backend))
        total = int(facts.get("max_recommended_working_set_size", total) or total)
        available = max(0, total - mx.get_active_memory())
    elif sys.platform.startswith("linux"):
        name = f"CPU, {len(os.sched_getaffinity(0))} cores"
    blas = _backend.openblas_loaded if backend == "cpu" and sys.platform == "linux" else None
    return DeviceInfo(name, backend, total, available, blas)


def _available_memory(total: int) -> int:
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return total // 2


def load(
    path_or_repo: str | Path, *, unpack: bool = False, **options: Any
) -> tuple[nn.Module, Any]:
    """(model, tokenizer) of a local folder or a Hub id, through `mlx_lm.load`.

    `options` go to mlx_lm.load (adapter_path, revision, trust_remote_code, ...). On a CPU back end
    half-precision weights run in float32 when 4 bytes per parameter fit in half of the free
    memory. Packed weights stay packed, unless `unpack` asks to have them in float32 as well where
    the same holds: a packed matrix is multiplied 60 times slower there. Raises ModelError naming
    what is missing, broken or NaN.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> len(model.layers) > 2
    True
    """
    _backend.check_backend()
    import mlx_lm

    folder = model_folder(path_or_repo, revision=options.get("revision"))
    check_folder(folder)
    options.pop("revision", None)
    try:
        model, tokenizer = cast(Any, mlx_lm.load(str(folder), **options))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        adapter = options.get("adapter_path")
        what = f"{path_or_repo} with the adapter {adapter}" if adapter else f"{path_or_repo}"
        raise ModelError(f"mlx-lm cannot load {what}: {error}") from error
    _check_finite(model, path_or_repo)
    stored = _float_dtype(model)
    parameters = _count(model)
    converted = mx.default_device() == mx.Device(mx.cpu) and _run_in_float32(
        model, parameters, unpack=unpack
    )
    parts = anatomy(model)
    config = json.loads((folder / "config.json").read_text())
    packed = config.get("quantization") or config.get("quantization_config")
    label = _quantization_label(packed)
    if label and not any("scales" in m for _, m in model.named_modules()):
        stored = label
    info = ModelInfo(
        path=str(path_or_repo),
        model_type=str(config.get("model_type", "unknown")),
        n_layers=parts.n_layers,
        d_model=parts.d_model,
        dtype=_float_dtype(model),
        stored_dtype=stored,
        quantization=label,
        parameters=parameters,
        bytes=sum(int(p.nbytes) for p in flat_parameters(model).values()),
        converted=converted,
    )
    note(model, folder=folder, source=info)
    return model, tokenizer


def folder_of(model: nn.Module) -> Path | None:
    """The folder that `load` read a model from; None for a model from elsewhere."""
    return notes(model).folder


def load_tokenizer(path_or_repo: str | Path) -> Any:
    """The tokenizer of a folder or Hub id as `load` gives it, None where the folder has none.

    Raises ModelError for one that cannot be read.
    """
    from mlx_lm.utils import load_tokenizer as read

    folder = model_folder(path_or_repo)
    if not any(any(folder.glob(pattern)) for pattern in _TOKENIZERS):
        return None
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    try:
        return read(folder, eos_token_ids=config.get("eos_token_id"))
    except (ValueError, KeyError, TypeError, RuntimeError, OSError, AttributeError) as error:
        raise ModelError(f"mlx-lm cannot read the tokenizer of {folder}: {error}") from error


def faster_twin(model: nn.Module) -> nn.Module:
    """A float32 copy of a packed model on a CPU back end, where that fits; else the model itself.

    For many passes: the same numbers, at 60 times the speed (see `load`).
    """
    if mx.default_device() != mx.Device(mx.cpu):
        return model
    if not any("scales" in m for _, m in model.named_modules()):
        return model
    twin = copy.deepcopy(model)
    converted = _run_in_float32(twin, _count(model), unpack=True)
    forget(twin)
    return twin if converted else model


def in_memory(model: nn.Module) -> bool:
    """Whether the weights of a model have been read; a model opened lazily to be edited has not.

    By what mlx holds: with another large model beside it a lazy one may pass for read.
    """
    return mx.get_active_memory() >= sum(int(v.nbytes) for v in flat_parameters(model).values())


def describe(model: nn.Module) -> ModelInfo:
    """What a report says of a model, whoever loaded it; bytes and dtype as they are now."""
    source = notes(model).source
    parts = anatomy(model)
    packed = [m for _, m in model.named_modules() if "scales" in m]
    dtype = _float_dtype(model)
    label = f"{packed[0].bits}-bit" if packed else None
    if source is not None and (packed or source.converted):
        label = source.quantization
    return ModelInfo(
        path=source.path if source else "(in memory)",
        model_type=source.model_type if source else _model_type(model),
        n_layers=parts.n_layers,
        d_model=parts.d_model,
        dtype=dtype,
        stored_dtype=source.stored_dtype if source else dtype,
        quantization=label,
        parameters=_count(model),
        bytes=sum(int(p.nbytes) for p in flat_parameters(model).values()),
        converted=source.converted if source else False,
    )


def _model_type(model: nn.Module) -> str:
    return str(getattr(model, "model_type", type(model).__name__))


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

    patterns = [
        "*.json",
        "*.safetensors",
        "*.py",
        "*.model",
        "*.tiktoken",
        "*.txt",
        "*.jsonl",
        "*.jinja",
    ]
    try:
        return Path(snapshot_download(text, revision=revision, allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first = str(error).strip().splitlines()[0]
        raise ModelError(f"cannot get {text} from the Hub: {first}") from error


def check_folder(folder: Path) -> None:
    """Refuse a folder without config, with an unknown type or with broken safetensors."""
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
    files = sorted(folder.glob("model*.safetensors"))
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        named = set(json.loads(index.read_text(encoding="utf-8")).get("weight_map", {}).values())
        missing = sorted(name for name in named if not (folder / name).is_file())
        if missing:
            raise ModelError(f"{folder} lacks {missing[0]}, which its index names")
    if not files:
        raise ModelError(f"{folder} has no model*.safetensors; only safetensors are read")
    for file in files:
        check_safetensors(file)


def check_safetensors(file: Path) -> dict[str, Any]:
    """The header of a safetensors file; ModelError when its sizes do not add up."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        start = stream.read(8)
        length = struct.unpack("<Q", start)[0] if len(start) == 8 else -1
        if length < 2 or length > min(size - 8, 100_000_000):
            raise ModelError(f"{file} is truncated or no safetensors file ({size} bytes)")
        try:
            header = json.loads(stream.read(length))
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ModelError(f"{file} has a broken header: {error}") from error
    end = max((t["data_offsets"][1] for k, t in header.items() if k != "__metadata__"), default=0)
    if 8 + length + end != size:
        raise ModelError(
            f"{file} holds {size} bytes, its header promises {8 + length + end}; truncated?"
        )
    return header


def _check_finite(model: nn.Module, source: Any) -> None:
    for name, value in flat_parameters(model).items():
        # Reductions read each tensor once; NaN and inf both fail the comparison.
        if mx.issubdtype(value.dtype, mx.floating) and not bool(mx.isfinite(value).all()):
            raise ModelError(f"{source}: weight {name} holds NaN or inf")


def _float_dtype(model: nn.Module) -> str:
    """The dtype that most floating parameters have."""
    sizes: dict[str, int] = {}
    for value in flat_parameters(model).values():
        if mx.issubdtype(value.dtype, mx.floating):
            name = str(value.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + int(value.size)
    return max(sizes, key=lambda n: sizes[n]) if sizes else "none"


def _run_in_float32(model: nn.Module, parameters: int, *, unpack: bool) -> bool:
    """Half precision runs 36 times slower than float32 on MLX's CPU back end."""
    flat = flat_parameters(model).values()
    half = any(v.dtype in (mx.float16, mx.bfloat16) for v in flat)
    packed = unpack and any("scales" in m for _, m in model.named_modules())
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    if not (half or packed) or 4 * parameters > _available_memory(total) / 2:
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
    mx.eval(model.parameters())
    return True


def _count(model: nn.Module) -> int:
    """Parameters of the unpacked model; scales and offsets of packed weights do not count."""
    total = 0
    for _, module in model.named_modules():
        packed = "scales" in module
        for name, value in module.items():
            if not isinstance(value, mx.array) or (packed and name in ("scales", "biases")):
                continue
            factor = 32 / int(module.bits) if packed and name == "weight" else 1
            total += int(value.size * factor)
    return total


def _quantization_label(packed: Any) -> str | None:
    if not isinstance(packed, dict):
        return None
    bits, group = packed.get("bits"), packed.get("group_size")
    if bits is None:
        return str(packed.get("quant_method", "packed"))
    mode = packed.get("mode", "affine")
    return f"{bits}-bit {mode} g{group}"
