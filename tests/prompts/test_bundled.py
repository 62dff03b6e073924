"""The bundled sets: their counts, keys and order. `data/check.py` checks their sentences."""

import json
import runpy
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from vauban._paths import data_dir
from vauban.prompts import (
    conversation_text,
    default_eval_path,
    default_preservation_path,
    default_prompt_paths,
    default_surface_path,
    load_labelled_prompts,
    load_prompts,
)

HARMFUL, HARMLESS = default_prompt_paths()
PATHS = {
    "harmful": HARMFUL,
    "harmless": HARMLESS,
    "eval": default_eval_path(),
    "surface": default_surface_path(),
    "preservation": default_preservation_path(),
}


def rows(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


@pytest.mark.parametrize(
    ("name", "keys", "count"),
    [
        ("harmful", {"prompt", "category"}, 128),
        ("harmless", {"prompt", "kind"}, 128),
        ("eval", {"prompt", "label", "kind", "category"}, 160),
        ("preservation", {"prompt", "category"}, 64),
    ],
)
def test_counts_and_keys(name: str, keys: set[str], count: int) -> None:
    assert len(load_prompts(PATHS[name])) == count
    assert all(set(row) == keys for row in rows(PATHS[name]))
    assert all(value == value.strip() != "" for row in rows(PATHS[name]) for value in row.values())


def test_the_harmless_set_mixes_how_to_requests_and_tasks_throughout() -> None:
    kinds = [row["kind"] for row in rows(HARMLESS)]
    assert Counter(kinds) == {"how-to": 64, "task": 64}
    assert Counter(kinds[:32]) == {"how-to": 16, "task": 16}


def test_every_start_of_the_harmful_set_is_diverse() -> None:
    categories = [row["category"] for row in rows(HARMFUL)]
    assert len(set(categories)) == 18 and max(Counter(categories).values()) <= 9
    assert len(set(categories[:32])) == 18


def test_the_evaluation_set_starts_with_its_harmful_prompts() -> None:
    labelled = load_labelled_prompts(PATHS["eval"])
    assert [row.label for row in labelled] == ["harmful"] * 64 + ["harmless"] * 96
    assert Counter(row.kind for row in labelled if row.label == "harmless") == {
        "how-to": 32,
        "task": 32,
        "contrast": 32,
    }
    assert all((row.kind == "harmful") == (row.label == "harmful") for row in labelled)
    assert len({row.category for row in labelled[:20]}) >= 16


def test_whatever_axes_a_map_shows_the_others_are_spread_over_its_cells() -> None:
    """The counts of any two axes differ by two at most, and harm is in every language and style."""
    labelled = load_labelled_prompts(PATHS["surface"])
    assert len(labelled) == 144
    assert Counter(row.turns for row in labelled) == {1: 96, 3: 48}
    axes = ("category", "harm", "style", "language", "framing")
    values = {axis: {row[axis] for row in labelled} for axis in axes}
    assert [len(values[axis]) for axis in axes] == [6, 4, 4, 4, 3]
    for one, two in combinations(axes, 2):
        pairs = Counter((row[one], row[two]) for row in labelled)
        assert len(pairs) == len(values[one]) * len(values[two])
        assert max(pairs.values()) - min(pairs.values()) <= 2
    for axis in axes:
        threes = Counter(row[axis] for row in labelled if row.turns == 3)
        assert max(threes.values()) - min(threes.values()) <= 2
    cells = Counter((row.harm, row.language, row.style) for row in labelled)
    assert len(cells) >= 60 and max(cells.values()) <= 4
    texts = {conversation_text(row.prompt) for row in labelled}
    assert len(texts) == 144
    for row in labelled:
        users = (
            [] if isinstance(row.prompt, str) else [t for t in row.prompt if t["role"] == "user"]
        )
        assert row.turns == max(len(users), 1) and (row.harm > 0.5) == (row.label == "harmful")


def test_the_surface_rows_are_what_their_script_writes(tmp_path: Path) -> None:
    script = runpy.run_path(str(data_dir() / "surface_rows.py"))
    written = {PATHS["surface"]: script["bundled_rows"]}
    for kind in ("dense", "4bit", "moe"):
        written[data_dir() / "organism" / kind / "prompts" / "surface.jsonl"] = script[
            "organism_rows"
        ]
    for path, rows_of in written.items():
        script["write"](tmp_path / "rows.jsonl", rows_of())
        assert path.read_bytes() == (tmp_path / "rows.jsonl").read_bytes()


def test_the_preservation_set_covers_its_subjects() -> None:
    counts = Counter(row["category"] for row in rows(PATHS["preservation"]))
    assert set(counts) == {"mathematics", "code", "reasoning", "languages", "facts", "writing"}
    assert min(counts.values()) >= 10
