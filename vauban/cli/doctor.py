"""`vauban doctor`: what this machine offers and, with a model, what its layers look like."""

import argparse
import math
import os
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from vauban.activations import ActivationMoments, stream_activations
from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.directions.loud_coordinates import (
    LoudCoordinate,
    loud_coordinates,
    ratios,
    standing_out,
)
from vauban.edits import WriterScale, writer_scales
from vauban.edits.blocks import BLOCK
from vauban.export.side_files import beside_index, left_behind, weight_like
from vauban.generation import measuring_bytes
from vauban.models import (
    NOT_CUTTABLE,
    Writer,
    compare_with_probe,
    device_info,
    residual_writers,
    weight_files,
)
from vauban.models.notes import notes
from vauban.pipeline.provenance import system, versions
from vauban.pipeline.stages import Opened, open_model
from vauban.prompts import load_prompts, measuring_paths
from vauban.report import byte_size

LOUD_PROMPTS = 16
"""Harmless prompts that are read; on Gemma 3 270M they meet what 128 give, means within an eighth
and spreads within a half."""

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
        report["model"]["files"] = _files(console, opened)
        report["model"]["loud"] = _loud(console, opened)
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
            ("config.json", _configuration(opened)),
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
        "configuration": {
            "translated": list(notes(opened.model).translated),
            "not_taken_up": [asdict(claim) for claim in notes(opened.model).claims],
        },
        "memory": memory,
        "writers": [_writer(writer) for writer in writers],
    }


def _configuration(opened: Opened) -> str:
    """What mlx-lm's class was told under another name, and what it does not take up."""
    known = notes(opened.model)
    if not known.translated and not known.claims:
        return "taken up"
    parts = []
    if known.translated:
        parts.append(f"translated for mlx-lm: {', '.join(known.translated)}")
    for claim in known.claims:
        size = "" if claim.beyond is None else f" (texts of more than {claim.beyond} tokens)"
        parts.append(f"not taken up: {claim}{size or (' (small)' if claim.minor else '')}")
    return "; ".join(parts)


def _files(console: Console, opened: Opened) -> dict[str, Any]:
    """Which files are the weights, which only look like them, and what an export leaves behind."""
    folder = opened.folder
    used = [file.name for file in weight_files(folder).files]
    beside = sorted(set(beside_index(folder).values()))
    ignored, behind = weight_like(folder), left_behind(folder)
    rows = [("weights", _several(used))]
    if beside:
        rows.append(("beside them", f"{', '.join(beside)}: not loaded, copied by an export"))
    rows.append(("ignored", ", ".join(ignored) or "no file that looks like weights"))
    others = [name for name in behind if name not in ignored]
    if others:
        rows.append(("not copied", ", ".join(others)))
    console.line()
    console.pairs("files", rows)
    return {"weights": used, "beside": beside, "ignored": ignored, "not_copied": behind}


def _several(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) < 4 else f"{names[0]} to {names[-1]} ({len(names)})"


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


def _loud(console: Console, opened: Opened) -> dict[str, Any]:
    """Loud coordinates of the stream: what the weights predict, and what a few prompts show."""
    scales, unread = writer_scales(opened.model)
    _, harmless = measuring_paths(opened.folder)
    prompts = load_prompts(harmless)[:LOUD_PROMPTS]
    moments = ActivationMoments()
    for _, values in stream_activations(opened.model, opened.tokenizer, prompts):
        moments.update(values[:, :, 0])
    mean = np.array(moments.mean)
    marked = loud_coordinates(mean, np.array(moments.variance))
    console.line()
    console.pairs(
        "loud coordinates",
        [
            ("by weights", _by_weights(scales, unread)),
            (f"by {moments.count} prompts", _by_prompts(marked, mean)),
        ],
    )
    return {
        "weights": [scale.to_dict() for scale in scales if scale.loud],
        "strongest_writer": max(scales, key=lambda s: s.ratio).to_dict() if scales else None,
        "unread_writers": unread,
        "prompts": moments.count,
        "activations": [one.to_dict() for one in marked],
    }


def _by_weights(scales: Sequence[WriterScale], unread: Sequence[str]) -> str:
    rest = f" ({len(unread)} writers are packed in a form that is not read)" if unread else ""
    if not scales:
        return f"not known{rest}"
    top = max(scales, key=lambda scale: scale.ratio)
    if not top.loud:
        return f"no loud coordinate: every writer's strongest is at most {top.ratio:.1f} times " + (
            f"its median{rest}"
        )
    loud = [scale for scale in scales if scale.loud]
    names = ", ".join(
        f"{coordinate} (blocks {_ranges([s.layer for s in loud if s.coordinate == coordinate])})"
        for coordinate, _ in Counter(scale.coordinate for scale in loud).most_common(3)
    )
    return (
        f"coordinate {names}; {top.path} writes {top.coordinate} {top.ratio:.0f} times as strongly "
        f"as its median coordinate (rows {top.row_ratio:.1f}, post-norm gain {top.gain_ratio:.0f})"
        f"{rest}"
    )


def _by_prompts(marked: Sequence[LoudCoordinate], mean: np.ndarray) -> str:
    """The loud coordinates, three at most; without any, one that stands out and stays put."""
    if not marked:
        steady = np.argwhere(standing_out(mean))
        if not len(steady):
            return "no loud coordinate"
        sizes = ratios(mean)
        residual, coordinate = max(steady, key=lambda place: sizes[tuple(place)])
        return (
            f"no loud coordinate; {coordinate} stands out in residual {residual} "
            f"({sizes[residual, coordinate]:.0f} times the median) but hardly moves between "
            "prompts, which cancels in a difference"
        )
    named = []
    for coordinate, _ in Counter(one.coordinate for one in marked).most_common(3):
        at = [one for one in marked if one.coordinate == coordinate]
        top = max(at, key=lambda one: one.mean_ratio)
        named.append(
            f"coordinate {coordinate} in residuals {_ranges([one.residual for one in at])} (in "
            f"{top.residual} mean {top.mean_ratio:.0f}, spread {top.spread_ratio:.0f} times the "
            "median)"
        )
    return "; ".join(named) + (
        "; measure with --method masked_mean_difference or variance_scaled, or --clip-quantile auto"
    )


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
