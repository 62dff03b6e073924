"""Every method on the facts organism: 56 edits, one after the other.

Prints strict rates (the likeliest token) on the edited prompts, their paraphrases, all other facts,
of them the same people's and other people's, the leak (what a mean key sees of the change) and how
far the weights moved. `--bits 4` edits a packed model and reads the written folder back.

    python benchmarks/facts.py [--bits 4] [--methods memit_seq alphaedit ...]
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.utils import quantize_model, save

from vauban.evaluation.facts import target_scores
from vauban.knowledge import Editor, EditSettings, Fact, collect_key_stats, load_facts

LAYERS, EDITS, GROUP = (1, 2), 56, 32
# A method's name, the rule, and settings beside the defaults.
METHODS = {
    "memit_seq": {},
    # What `vauban edit` does by default.
    "memit_seq, own words": {"keep": 8},
    "memit": {"method": "memit"},
    "alphaedit": {"method": "alphaedit", "energy": 0.9},
    "ridge": {"method": "ridge"},
    "memit_seq+P": {"filter": "project", "energy": 0.9},
    "memit+P": {"method": "memit", "filter": "project", "energy": 0.9},
    "encore": {"method": "encore", "lam_n": 0.1},
    "betaedit": {"method": "betaedit", "energy": 0.9},
    "sphere": {"method": "alphaedit", "energy": 0.9, "filter": "sphere"},
    "rect": {"method": "memit", "filter": "rect"},
    "prune": {"method": "memit", "filter": "prune"},
    "rome": {"method": "rome"},
    "emmet": {"method": "emmet", "lam_n": 0.1},
}


def strict(model: nn.Module, tokenizer, pairs: list[tuple[str, str]]) -> float:
    scores = target_scores(model, tokenizer, pairs)
    return sum(hit for _, hit in scores) / len(pairs)


def rates(model: nn.Module, tokenizer, facts: list[Fact]) -> dict[str, float]:
    """Strict efficacy, paraphrase, and what stayed of the other facts."""
    edited = facts[:EDITS]
    people = {fact.subject for fact in edited}
    rest = [(f.subject, text, f.target_true) for f in facts[EDITS:]
            for text in (f.text, *f.paraphrases)]  # fmt: skip
    return {
        "efficacy": strict(model, tokenizer, [(f.text, f.target_new) for f in edited]),
        "paraphrase": strict(
            model, tokenizer, [(text, f.target_new) for f in edited for text in f.paraphrases]
        ),
        "other facts": strict(model, tokenizer, [(t, a) for _, t, a in rest]),
        "same people": strict(model, tokenizer, [(t, a) for who, t, a in rest if who in people]),
        "other people": strict(
            model, tokenizer, [(t, a) for who, t, a in rest if who not in people]
        ),
    }


def opened(bits: int | None, folder: Path) -> Path:
    """The organism, or a packed copy of it."""
    path = vauban.organism_path("facts")
    if bits is None:
        return path
    model, tokenizer, config = vauban.load(path, return_config=True)
    model.set_dtype(mx.float32)
    model, config = quantize_model(model, config, GROUP, bits)
    save(folder, path, model, tokenizer, config)
    return folder


def edited(path: Path, changes: dict, count: int = EDITS):
    """(editor, report, facts) after `count` edits, one a batch."""
    model, tokenizer = vauban.load(path)
    facts = load_facts(vauban.organism_path("facts") / "facts.jsonl")
    texts = [f"{text} {f.target_true} ." for f in facts for text in (f.text, *f.paraphrases)]
    stats = collect_key_stats(model, tokenizer, texts, LAYERS)
    settings = EditSettings(**{"layers": LAYERS, "batch_size": 1, **changes})
    editor = Editor(model, tokenizer, settings, stats)
    return editor, editor.edit(facts[:count]), facts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bits", type=int)
    parser.add_argument("--methods", nargs="+", default=list(METHODS))
    parser.add_argument("--set", nargs="*", default=[], metavar="NAME=NUMBER")
    options = parser.parse_args()
    extra = {name: json.loads(value) for name, value in (text.split("=") for text in options.set)}
    with tempfile.TemporaryDirectory() as temporary:
        path = opened(options.bits, Path(temporary) / "packed")
        model, tokenizer = vauban.load(path)
        facts = load_facts(vauban.organism_path("facts") / "facts.jsonl")
        show("before", rates(model, tokenizer, facts))
        true = [(f.text, f.target_true) for f in facts[:EDITS]]
        print(f"  the edited facts before: {strict(model, tokenizer, true):.1%}", flush=True)
        for name in options.methods:
            started = time.perf_counter()
            editor, report, _ = edited(path, METHODS[name] | extra)
            model = editor.model
            if options.bits is not None:
                written = editor.export(path, Path(temporary) / name, force=True)
                model, _ = vauban.load(written)
            show(name, rates(model, tokenizer, facts))
            leaks = ", ".join(f"{one.leak:.3f}" for one in report.layers)
            sizes = ", ".join(f"{one.change:.0%}" for one in report.layers)
            span = time.perf_counter() - started
            print(f"  change {sizes}, leak {leaks}, {span:.0f} s", flush=True)


def show(name: str, found: dict[str, float]) -> None:
    print(f"{name:12s}", *(f"{word} {rate:.1%}" for word, rate in found.items()), flush=True)


if __name__ == "__main__":
    main()
