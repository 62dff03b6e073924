"""What a report says of a model and of the machine, as they are now. Knows modules and memory."""

from __future__ import annotations

import os
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from vauban import _backend
from vauban._arrays import flat_parameters
from vauban.models.anatomy import anatomy
from vauban.models.notes import notes


@dataclass(frozen=True)
class ModelInfo:
    """A model in figures. `bytes` and `dtype` are those in memory, `stored_dtype` the folder's.

    `quantization` is how the weights are packed, or were before they were unpacked to run;
    `converted` says that `load` made float32 of them.

    >>> import vauban
    >>> info = vauban.describe(vauban.load(vauban.organism_path("4bit"))[0])
    >>> info.n_layers, info.d_model, info.model_type
    (6, 128, 'qwen3')
    """

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


def describe(model: nn.Module) -> ModelInfo:
    """The `ModelInfo` of a model, whoever loaded it and whatever was done to it since.

    >>> import vauban
    >>> model, _ = vauban.load(vauban.organism_path("dense"))
    >>> vauban.describe(model).d_model
    128
    """
    parts = anatomy(model)
    dtype = float_dtype(model)
    packed = next((m for _, m in model.named_modules() if "scales" in m), None)
    now = ModelInfo(
        path="(in memory)",
        model_type=str(getattr(model, "model_type", type(model).__name__)),
        n_layers=parts.n_layers,
        d_model=parts.d_model,
        dtype=dtype,
        stored_dtype=dtype,
        quantization=None if packed is None else f"{packed.bits}-bit",
        parameters=parameter_count(model),
        bytes=sum(int(p.nbytes) for p in flat_parameters(model).values()),
        converted=False,
    )
    facts = dict(notes(model).source or {})
    if packed is None and not facts.get("converted"):
        facts.pop("quantization", None)
    return replace(now, **facts)


def folder_of(model: nn.Module) -> Path | None:
    """The folder that `load` read a model from; None for a model from elsewhere."""
    return notes(model).folder


def float_dtype(model: nn.Module) -> str:
    """The dtype that most floating parameters have."""
    sizes: dict[str, int] = {}
    for value in flat_parameters(model).values():
        if mx.issubdtype(value.dtype, mx.floating):
            name = str(value.dtype).removeprefix("mlx.core.")
            sizes[name] = sizes.get(name, 0) + int(value.size)
    return max(sizes, key=lambda n: sizes[n]) if sizes else "none"


def parameter_count(model: nn.Module) -> int:
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


def device_info() -> DeviceInfo:
    """The device MLX computes on, its memory, and whether OpenBLAS serves a Linux CPU."""
    gpu = mx.default_device() == mx.Device(mx.gpu)
    backend = "cpu"
    if gpu:
        backend = "metal" if mx.metal.is_available() else "cuda"
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    available = free_memory()
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


def free_memory() -> int:
    """Bytes that a CPU program may still take; half of the memory where nobody says."""
    meminfo = Path("/proc/meminfo")
    if meminfo.is_file():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
