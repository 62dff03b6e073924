"""The model organism: its demands on a sample, its files, its prompts.

`data/check.py` checks the corpus it was trained on.
"""

import importlib
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import vauban

KINDS = ("dense", "4bit", "moe")
HERE = Path(vauban.organism_path("dense")).parent


@pytest.fixture(scope="module")
def evaluate() -> Any:
    """The organism's script of its demands, imported from beside its weights."""
    sys.path.insert(0, str(HERE))
    try:
        yield importlib.import_module("evaluate")
    finally:
        sys.path.remove(str(HERE))


@pytest.fixture(scope="module")
def table() -> dict[str, Any]:
    return {row["organism"]: row for row in json.loads((HERE / "results.json").read_text())}


@pytest.mark.parametrize("kind", KINDS)
def test_the_committed_table_holds_on_a_sample(evaluate: Any, table: Any, kind: str) -> None:
    """Each line on 32 held-out rows a kind, within what so few rows can say of it."""
    committed = table[kind]
    found = evaluate.evaluate(HERE / kind, committed["seed"], sample=32)
    assert found["residual"] == committed["residual"]
    for sampled, whole in zip(found["lines"], committed["lines"], strict=True):
        assert sampled["name"] == whole["name"]
        p, n = whole["measured"], sampled["rows"]
        spread = 3.5 * math.sqrt(max(p * (1 - p), 0.02) / n)
        assert abs(sampled["measured"] - p) <= spread, sampled["name"]


@pytest.mark.parametrize("kind", KINDS)
def test_the_chosen_residual_is_inside_the_limit(table: Any, kind: str) -> None:
    model, _ = vauban.load(vauban.organism_path(kind))
    assert 1 <= table[kind]["residual"] <= int(0.8 * len(model.layers))
    low, high = (table[kind]["projections"][name] for name in ("harmless", "harmful"))
    assert low + high > 0, "zero is on the harmless side of the direction"


@pytest.mark.parametrize("kind", KINDS)
def test_the_choice_of_residual_does_not_hang_on_the_measuring_set(
    evaluate: Any, table: Any, kind: str
) -> None:
    """On every set and split drawn anew the same residual; one set is measured again here."""
    assert len(table[kind]["redraws"]) >= 6
    for found in table[kind]["redraws"]:
        assert set(found["residuals"]) == {table[kind]["residual"]}
    again = evaluate.redraw(evaluate.Bench(HERE / kind, 8), 101)
    assert set(again["residuals"]) == {table[kind]["residual"]}


def test_the_files_are_small_and_named() -> None:
    size = sum(f.stat().st_size for kind in KINDS for f in (HERE / kind).rglob("*"))
    assert size <= 16_000_000
    for kind in KINDS:
        names = json.loads((HERE / kind / "vauban.json").read_text())
        for part in ("harmful", "harmless", "eval", "surface"):
            assert (HERE / kind / names[part]).is_file()
        writers = vauban.residual_writers(vauban.load(HERE / kind)[0])
        packed = [w.quantization for w in writers]
        assert all(packed) if kind == "4bit" else not any(packed)
        assert any(len(w.shape) == 3 for w in writers) == (kind == "moe")


def test_measuring_and_held_out_prompts_share_nothing() -> None:
    for kind in KINDS:
        folder = HERE / kind / "prompts"
        measuring = {
            p
            for name in ("harmful", "harmless")
            for p in vauban.load_prompts(folder / f"{name}.jsonl")
        }
        rows = vauban.load_labelled_prompts(folder / "eval.jsonl")
        assert not measuring & {row.prompt for row in rows}
        assert not measuring & {
            r.prompt for r in vauban.load_surface_prompts(folder / "surface.jsonl")
        }
        assert {row.extra["kind"] for row in rows} == {"harmful", "how-to", "task", "contrast"}
        assert [r.label for r in rows] == sorted(
            (r.label for r in rows), key=lambda s: s != "harmful"
        )
        assert {row.extra["language"] for row in rows} == {"en", "fr"}
        assert len({r.extra["family"] for r in rows if r.extra["kind"] == "task"}) >= 8
        assert len({r.extra["category"] for r in rows if r.label == "harmful"}) >= 8


@pytest.mark.parametrize("kind", KINDS)
def test_mlx_lm_generates_with_it(kind: str) -> None:
    """The plain command of mlx-lm, as a user types it."""
    rows = vauban.load_labelled_prompts(HERE / kind / "prompts" / "eval.jsonl")
    done = subprocess.run(
        [sys.executable, "-m", "mlx_lm", "generate", "--model", str(HERE / kind),
         "--prompt", rows[0].prompt, "--max-tokens", "24", "--verbose", "False"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert vauban.is_refusal(done.stdout)
