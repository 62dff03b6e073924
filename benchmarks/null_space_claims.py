"""What holds of the null-space projection's claims: AlphaEdit's experiments on the facts organism.

56 facts in batches of 8 at blocks 1 and 2, strict rates (the likeliest token). In order: what the
change does to keys of plain text, by the share of tr C that is protected; how far the stream moves;
batch sizes; keys of two relations protected, four asked for; the projector's cost; a penalty in
the projection's place, at strengths that are a factor of four apart.

    python benchmarks/null_space_claims.py [FILE]

FILE (docs/figures/null_space_claims.json) gets the figures that docs/figures/facts.py draws.
"""

from __future__ import annotations

import json
import sys
import time
import warnings
from pathlib import Path

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np
from facts import EDITS, LAYERS, rates, strict

from vauban.evaluation import hidden_shift
from vauban.knowledge import (
    Editor,
    EditSettings,
    KeyStats,
    collect_key_stats,
    load_facts,
    protected_directions,
)

FILE = Path(__file__).resolve().parents[1] / "docs" / "figures" / "null_space_claims.json"
PATH = vauban.organism_path("facts")
FACTS = load_facts(PATH / "facts.jsonl")
BATCH, ENERGIES = 8, (0.5, 0.9, 0.99)
RELATIONS = tuple(dict.fromkeys(fact.id.rsplit("-", 1)[1] for fact in FACTS))
FACTOR = (1 / 16, 1 / 4, 1, 4, 16)


def sentences(relations: tuple[str, ...] = RELATIONS, part: slice = slice(None)) -> list[str]:
    """Every fact of these relations in every phrasing, as plain text."""
    chosen = [f for f in FACTS if f.id.rsplit("-", 1)[1] in relations][part]
    return [f"{text} {f.target_true} ." for f in chosen for text in (f.text, *f.paraphrases)]


def moments(texts: list[str]) -> dict[int, KeyStats]:
    model, tokenizer = vauban.load(PATH)
    return collect_key_stats(model, tokenizer, texts, LAYERS)


def edited(stats: dict[int, KeyStats], **changes):
    """(editor, seconds) after the edits."""
    model, tokenizer = vauban.load(PATH)
    settings = EditSettings(**{"layers": LAYERS, "batch_size": BATCH, **changes})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", vauban.VaubanWarning)
        editor = Editor(model, tokenizer, settings, stats)
        started = time.process_time()
        editor.edit(FACTS[:EDITS])
    return editor, time.process_time() - started


def seen(editor: Editor, stats: dict[int, KeyStats]) -> float:
    """√(tr ΔCΔᵀ / tr WCWᵀ), worst block: what the change adds to the outputs on keys of `stats`."""
    shares = []
    for layer in LAYERS:
        c = np.array(stats[layer].moment, dtype=np.float64)
        w = editor.weights.original[layer].astype(np.float64)
        delta = editor.weights.current(layer) - w
        shares.append(np.sqrt(np.sum(delta @ c * delta) / np.sum(w @ c * w)))
    return float(max(shares))


def along_protected(editor: Editor) -> float:
    """‖ΔU‖/‖Δ‖, worst block."""
    parts = [0.0]
    for layer in LAYERS:
        basis = np.array(editor.penalties[layer].protected, dtype=np.float64)
        delta = editor.weights.current(layer) - editor.weights.original[layer]
        parts.append(float(np.linalg.norm(delta @ basis.T) / np.linalg.norm(delta)))
    return max(parts)


def scored(editor: Editor) -> dict[str, float]:
    return rates(editor.model, editor.tokenizer, FACTS)


def shown(name: str, row: dict) -> dict:
    print(f"  {name:24s}", json.dumps({k: round(v, 4) for k, v in row.items()}), flush=True)
    return row


def projection(half: dict[int, KeyStats]) -> dict:
    """C from half of the facts, seen on the other half."""
    inside, outside = half, moments(sentences(part=slice(128, None)))
    original, tokenizer = vauban.load(PATH)
    prompts = [f.text for f in FACTS[EDITS:] if f.subject not in {e.subject for e in FACTS[:EDITS]}]
    rows = {}
    for energy in (None, *ENERGIES):
        chosen = {"energy": energy} if energy else {"tau": 1e9}
        editor, _ = edited(half, method="alphaedit", **chosen)
        shift = hidden_shift(original, editor.model, tokenizer, prompts, LAYERS[-1])
        rows[str(energy or 0)] = shown(f"{energy or 0:.0%} of tr C", {
            "directions": float(len(editor.penalties[LAYERS[-1]].protected)),
            "along protected": along_protected(editor), "seen inside": seen(editor, inside),
            "seen outside": seen(editor, outside), "moved": shift.relative, "cka": shift.cka,
            "ellipse": shift.inside, **scored(editor),
        })  # fmt: skip
    for name, changes in {
        "memit_seq": {}, "memit_seq+P": {"filter": "project", "energy": 0.9},
    }.items():  # fmt: skip
        editor, _ = edited(half, **changes)
        shift = hidden_shift(original, editor.model, tokenizer, prompts, LAYERS[-1])
        rows[name] = shown(name, {
            "seen inside": seen(editor, inside), "seen outside": seen(editor, outside),
            "moved": shift.relative, "cka": shift.cka, "ellipse": shift.inside, **scored(editor),
        })  # fmt: skip
    return rows


def sizes(stats: dict[int, KeyStats]) -> dict:
    """All facts in one batch and in batches of 8; benchmarks/facts.py has them one by one."""
    rows = {}
    for method, options in {"memit_seq": {}, "alphaedit": {"energy": 0.9}}.items():
        for size in (BATCH, EDITS):
            editor, span = edited(stats, method=method, batch_size=size, **options)
            rows[f"{method} {size}"] = shown(
                f"{method}, batches of {size}", {"s a fact": span / EDITS, **scored(editor)}
            )
    return rows


def completeness() -> dict:
    """Keys of two relations protected; what stays of these and of the other two."""
    stats = moments(sentences(RELATIONS[:2]))
    rows = {}
    for name, changes in {
        "alphaedit": {"method": "alphaedit", "energy": 0.9}, "memit_seq": {},
    }.items():  # fmt: skip
        editor, _ = edited(stats, **changes)
        row = {}
        for part, relations in (("covered", RELATIONS[:2]), ("not covered", RELATIONS[2:])):
            rest = [f for f in FACTS[EDITS:] if f.id.rsplit("-", 1)[1] in relations]
            pairs = [(text, f.target_true) for f in rest for text in (f.text, *f.paraphrases)]
            row[part] = strict(editor.model, editor.tokenizer, pairs)
        rows[name] = shown(name, {**row, **scored(editor)})
    return rows


def cost() -> dict:
    """Processor seconds of 48 leading directions, by iteration and by all eigenvectors."""
    rng, rows = np.random.default_rng(0), {}
    for size in (512, 1024, 2048, 4096, 8192):
        factor = rng.standard_normal((size, 48)).astype(np.float32) / np.sqrt(size)
        c = (factor * np.logspace(1, -1, 48).astype(np.float32)) @ factor.T
        c[np.diag_indices(size)] += 1e-3
        moment = mx.array(c)
        row = {}
        for name, direct in (("iteration", 32), ("all", 1 << 20)):
            if name == "iteration" or size <= 2048:
                started = time.process_time()
                protected_directions(moment, tau=0.1, direct=direct)
                row[name] = time.process_time() - started
        rows[str(size)] = shown(f"d0 {size}", row)
    return rows


def regularisers(stats: dict[int, KeyStats]) -> dict:
    """A penalty on all directions against one on those that are not protected."""
    width = len(stats[LAYERS[-1]].moment)
    trace = float(mx.diag(stats[LAYERS[-1]].moment).sum())
    kinds = {
        "lambda C": lambda f: {"lam": f * width / 16},
        "l2 I": lambda f: {"method": "alphaedit", "tau": 1e9, "l2": f * trace / 16},
        "projection": lambda f: {"method": "alphaedit", "energy": 0.9, "l2": f * trace / 160},
    }
    return {
        name: {
            str(factor): shown(f"{name} x {factor:g}", scored(edited(stats, **make(factor))[0]))
            for factor in FACTOR
        }
        for name, make in kinds.items()
    }


def main() -> None:
    path = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    every, half = moments(sentences()), moments(sentences(part=slice(0, 128)))
    results: dict[str, dict] = {}
    for name, make in {
        "cost": cost, "projection": lambda: projection(half),
        "completeness": completeness, "sizes": lambda: sizes(every),
        "regularisers": lambda: regularisers(every),
    }.items():  # fmt: skip
        print(name, flush=True)
        results[name] = make()
        path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
