"""Knows the organism's prompt sets: to measure on, to develop on, and the one that is shipped.

Knows no mixtures, no tokens and no model.
"""

import random
import zlib
from collections.abc import Callable
from functools import partial
from typing import Literal

import tasks
from corpus import LANGUAGES, Row, any_language, ask
from phrases import ASKED_STYLES
from pools import Part, Request, chore_requests, contrast_requests, harmful_requests

# Every held-out prompt belongs to one of two draws. The recipe was chosen on "development";
# "final" is shipped, and was measured when the recipe was settled.
Draw = Literal["development", "final"]


def draw_of(prompt: str) -> Draw:
    return "final" if zlib.crc32(prompt.encode()) % 2 else "development"


def _distinct(
    make: Callable[[], Row], count: int, taken: set[str], draw: Draw | None = None
) -> list[Row]:
    """At most `count` new rows; fewer where a draw holds no more."""
    rows: list[Row] = []
    for _ in range(count * 200):
        if len(rows) == count:
            break
        row = make()
        if row.prompt not in taken and draw in (None, draw_of(row.prompt)):
            taken.add(row.prompt)
            rows.append(row)
    return rows


def _task(family: str, split: tasks.Split, rng: random.Random) -> Row:
    task = tasks.sample_task(family, split, rng)
    return Row(task.prompt, task.answer, "task", task.language, task.family)


def measuring_rows(seed: int, count: int = 128) -> tuple[list[Row], list[Row]]:
    """(harmful, harmless) prompts for measuring: training side, harmless mixed how-to and tasks."""
    rng = random.Random(f"measure seed {seed}")
    taken: set[str] = set()

    def language() -> str:  # half and half: one direction has to carry refusal in both
        return rng.choice(LANGUAGES)

    def harmful() -> Row:
        request = rng.choice(harmful_requests(language(), "train"))
        return ask(request, rng.choice(ASKED_STYLES), "train", rng)

    def chore() -> Row:
        request = rng.choice(chore_requests(language(), "train"))
        return ask(request, rng.choice(ASKED_STYLES), "train", rng)

    def task() -> Row:
        return _task(rng.choice(list(tasks.FAMILIES)), "train", rng)

    bad = _distinct(harmful, count, taken)
    good = _distinct(chore, count * 3 // 4, taken) + _distinct(task, count // 4, taken)
    rng.shuffle(good)
    return bad, good


def evaluation_rows(seed: int, draw: Draw) -> list[Row]:
    """Held-out rows, harmful first: 160 harmful, 160 how-to, about 230 tasks, 64 contrasts."""
    rng = random.Random(f"evaluate seed {seed}")
    taken: set[str] = set()

    def asked(pool: Callable[[str, Part], tuple[Request, ...]]) -> Row:
        request = rng.choice(pool(any_language(rng), "heldout"))
        return ask(request, rng.choice(ASKED_STYLES), "heldout", rng)

    def contrasts(language: str, part: Part) -> tuple[Request, ...]:
        family = rng.choices(("verb", "object", "protection"), (70, 15, 15))[0]
        return tuple(r for r in contrast_requests(language, part) if r.family == family)

    rows = _distinct(lambda: asked(harmful_requests), 160, taken, draw)
    rows += _distinct(lambda: asked(chore_requests), 160, taken, draw)
    for family in tasks.FAMILIES:
        rows += _distinct(partial(_task, family, "heldout", rng), 10, taken, draw)
    return rows + _distinct(lambda: asked(contrasts), 64, taken, draw)


def labelled(row: Row) -> dict[str, str]:
    """A row of eval.jsonl."""
    label = "harmful" if row.kind == "harmful" else "harmless"
    found = {"prompt": row.prompt, "label": label, "kind": row.kind, "language": row.language}
    found["category" if row.kind == "harmful" else "family"] = row.family
    if row.kind == "task":
        return found | {"answer": row.reply}
    return found | {"template": row.opening}
