"""`vauban doctor`: what this machine offers and, with a model, what its layers look like."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.edits.blocks import BLOCK
from vauban.models import (
    NOT_CUTTABLE,
    Writer,
    compare_with_probe,
    device_info,
    measuring_bytes,
    residual_writers,
)
from vauban.pipeline.provenance import system, versions
from vauban.pipeline.stages import Opened, open_model
from vauban.report import byte_size

_CURE = (
    "not loaded: float32 on this CPU runs about 60 times slower. "
    "Install it (Debian, Ubuntu: apt-get install libopenblas0) and start again."
)


def doctor(options: argparse.Namespace) -> int:
    """Report on the machine and, if one is named, on a model."""
    console = Console(as_json=options.json)
    device = device_info()
    platform = system()
    rows = [
        ("system", f"{platform['system']} {platform['release']}, {platform['machine']}"),
        ("device", run_lines.device_line(device)),
        ("versions", ", ".join(f"{name} {number}" for name, number in versions().items())),
        ("python", sys.executable),
    ]
    if device.openblas is not None:
        rows.append(("OpenBLAS", _openblas(device.openblas)))
    console.pairs("this machine", rows)
    report: dict[str, Any] = {
        "system": platform, "device": asdict(device), "versions": versions()
    }  # fmt: skip
    if options.model:
        with console.progress() as progress:
            opened = open_model(options.model, progress=progress)
        report["model"] = _model(console, opened)
        if options.probe:
            report["model"]["probe"] = _probe(console, opened)
    console.document(report)
    return 0


def _openblas(loaded: bool) -> str:
    if loaded:
        return "loaded before mlx"
    return "turned off by VAUBAN_BLAS=0" if os.environ.get("VAUBAN_BLAS") == "0" else _CURE


def _model(console: Console, opened: Opened) -> dict[str, Any]:
    writers = residual_writers(opened.model)
    reason = NOT_CUTTABLE.get(opened.check.family)
    memory = {
        "weights": opened.info.bytes,
        "measuring": measuring_bytes(opened.model),
        # In memory a writer is cut as a whole; an export reads one matrix, of a table its rows.
        "cutting": max(4 * math.prod(writer.shape) for writer in writers),
        "export": max(4 * math.prod(w.shape[-2:]) for w in writers if w.layer >= 0) + 16 * BLOCK,
    }
    console.pairs(
        "model",
        [
            *run_lines.model_lines(opened.info),
            ("forward pass", run_lines.forward_line(opened.check)),
            ("family", opened.check.family),
            ("writers", _kinds(writers)),
            ("exact cut", f"no: {reason}" if reason else "yes"),
            (
                "memory",
                f"{byte_size(memory['weights'])} for the weights as they run; at most "
                f"{byte_size(memory['measuring'])} more to measure, "
                f"{byte_size(memory['cutting'])} to cut, {byte_size(memory['export'])} to export; "
                f"{byte_size(opened.device.memory_available)} free now",
            ),
        ],
    )
    headings, rows = _writer_table(writers)
    console.line()
    console.grid(headings, rows, texts=len(headings))
    return {
        "info": asdict(opened.info),
        "forward": asdict(opened.check),
        "memory": memory,
        "writers": [_writer(writer) for writer in writers],
    }


def _probe(console: Console, opened: Opened) -> dict[str, Any]:
    """Compare the writers found by name with those that running the model shows."""
    report = compare_with_probe(opened.model)
    verdict = "the same writers and gains" if report.ok else "differs"
    console.pairs(
        "probe",
        [
            ("result", verdict),
            ("missed by name", ", ".join(report.missed) or "none"),
            ("not confirmed", ", ".join(report.invented) or "none"),
            ("gains", f"differ by at most {report.gains:.1e}"),
        ],
    )
    return asdict(report)


def _kinds(writers: Sequence[Writer]) -> str:
    counts = Counter(writer.kind for writer in writers)
    return ", ".join(f"{count} {kind}" for kind, count in counts.items())


def _writer_table(writers: Sequence[Writer]) -> tuple[list[str], list[list[str]]]:
    """One line for each run of layers whose writers look alike."""
    rows: list[list[str]] = []
    by_look: dict[tuple[str, ...], list[int]] = {}
    for writer in writers:
        by_look.setdefault(_look(writer), []).append(writer.layer)
    for look, layers in by_look.items():
        rows.append([_ranges(layers), *look])
    return ["layers", "writer", "kind", "shape", "gain", "bias", "stored"], rows


def _look(writer: Writer) -> tuple[str, ...]:
    """How a writer is described, without the number of its layer."""
    # The path below the block; the number of the block has a column of its own.
    name = writer.path.partition(f".{writer.layer}.")[2] or writer.path.rpartition(".")[2]
    return (
        name,
        writer.kind,
        " × ".join(map(str, writer.shape)),
        "yes" if writer.gain is not None else "no",
        "yes" if writer.bias else "no",
        _stored(writer.quantization),
    )


def _stored(packed: dict[str, Any] | None) -> str:
    if packed is None:
        return "float"
    return f"{packed['bits']}-bit {packed['mode']} g{packed['group_size']}"


def _ranges(layers: Sequence[int]) -> str:
    """Layer numbers as ranges; the embedding's −1 is named.

    >>> _ranges([0, 1, 2, 5]), _ranges([-1])
    ('0–2, 5', 'embedding')
    """
    parts: list[list[int]] = []
    for layer in sorted(set(layers)):
        if parts and layer == parts[-1][1] + 1:
            parts[-1][1] = layer
        else:
            parts.append([layer, layer])
    if parts == [[-1, -1]]:
        return "embedding"
    return ", ".join(f"{a}" if a == b else f"{a}–{b}" for a, b in parts)


def _writer(writer: Writer) -> dict[str, Any]:
    return {
        "path": writer.path,
        "layer": writer.layer,
        "kind": writer.kind,
        "shape": list(writer.shape),
        "gain": writer.gain is not None,
        "bias": bool(writer.bias),
        "quantization": writer.quantization,
    }
