"""Two finished runs side by side: figures, and answers to the same prompts in pairs.

Reads documents and answers; opens no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from vauban._results import to_plain
from vauban.comparison.run_folder import ANSWERS_FILE, read_answers, read_run
from vauban.errors import InputError
from vauban.evaluation import SHORT_NAMES, Figure, PairedResult, find_figure, paired_verdicts
from vauban.evaluation.named_figures import Better, with_ratio
from vauban.prompts import conversation_text

# name: (labels, key of the answers' rows)
_TESTS = {
    "refusal": (("harmful",), "refused_modified"),
    "harmless_refused": (("harmless",), "refused_modified"),
    "degenerate": (("harmful", "harmless"), "degenerate_modified"),
}


@dataclass(frozen=True)
class FigurePair:
    """One figure of both runs. `direction` says which way is better ("lower", "higher" or None),
    `better` on which side it is ("a", "b"; None where equal, not measured, or neither)."""

    name: str
    meaning: str
    direction: Better | None
    a: Figure
    b: Figure
    better: Literal["a", "b"] | None


@dataclass(frozen=True)
class RunComparison:
    """Two runs: `a` stands for "before" in the paired tests, `b` for "after".

    Attributes:
        a, b: what each run is: its folder, model and prompt sets.
        figures: those of `SHORT_NAMES` that at least one run has.
        paired: for each of refusal, harmless_refused and degenerate the test over the common
            prompts that have a verdict in both runs; None without such prompts.
        common: prompts that both runs evaluated, by label.
        only_a, only_b: prompts that one run alone evaluated.
        notes: sentences that a reader has to know.

    >>> import vauban
    >>> test = vauban.paired_test([True, True], [True, False])
    >>> found = RunComparison({}, {}, (), {"refusal": test}, {"harmful": 2}, 0, 0, ())
    >>> found.to_dict()["paired"]["refusal"]["only_before"]
    1
    """

    a: Mapping[str, Any]
    b: Mapping[str, Any]
    figures: tuple[FigurePair, ...]
    paired: Mapping[str, PairedResult | None]
    common: Mapping[str, int]
    only_a: int
    only_b: int
    notes: tuple[str, ...]

    def summary(self) -> str:
        lines = [f"a: {self.a['folder']} ({self.a['model']})"]
        lines += [f"b: {self.b['folder']} ({self.b['model']})"]
        for pair in self.figures:
            better = f"; {pair.better} is better" if pair.better else ""
            lines.append(f"{pair.name}: {shown_figure(pair.a)}, {shown_figure(pair.b)}{better}")
        for name, test in self.paired.items():
            if test:
                lines.append(f"{name} in pairs: {test.summary()}")
        return "\n".join([*lines, *self.notes])

    def to_dict(self) -> dict[str, Any]:
        plain: dict[str, Any] = to_plain(self)
        return plain


def compare_runs(run_a: str | Path, run_b: str | Path) -> RunComparison:
    """Compare the folders of two runs of `vauban MODEL`, `vauban CONFIG.toml` or `vauban search`.

    Prompts are matched by label and text. Runs that were evaluated on other prompts are compared on
    the common ones alone, which are counted; without `answers.jsonl` the figures stand alone.

    Raises:
        InputError: a folder without run.json, a run of another kind, an answers file that is cut
            off or broken (with its line).

    >>> import json, tempfile
    >>> from pathlib import Path
    >>> row = {"label": "harmful", "prompt": "Rob a shop.", "degenerate_modified": False}
    >>> with tempfile.TemporaryDirectory() as place:
    ...     for name, refused in (("a", True), ("b", False)):
    ...         (folder := Path(place, name)).mkdir()
    ...         _ = (folder / "answers.jsonl").write_text(
    ...             json.dumps({**row, "refused_modified": refused})
    ...         )
    ...         figures = {"refusal_rate_modified": float(refused), "num_prompts": 1}
    ...         run = {"model": {"name": "m"}, "evaluation": {**figures, "num_harmless": 0}}
    ...         _ = (folder / "run.json").write_text(json.dumps(run))
    ...     found = compare_runs(f"{place}/a", f"{place}/b")
    >>> found.paired["refusal"].only_before
    1
    """
    folders = [Path(run_a), Path(run_b)]
    documents = [read_run(folder) for folder in folders]
    notes: list[str] = []
    rows = [
        _answers(folder, document, notes)
        for folder, document in zip(folders, documents, strict=True)
    ]
    models = [document["model"].get("name") for document in documents]
    if models[0] != models[1]:
        notes.append(f"the runs changed different models: {models[0]} and {models[1]}")
    modes = [document["evaluation"].get("refusal_mode") for document in documents]
    if modes[0] != modes[1]:
        notes.append(f"refusal was told by {modes[0]} in a and by {modes[1]} in b")
    left, right = rows
    shared = [key for key in left if key in right]
    only = len(left) - len(shared), len(right) - len(shared)
    if left and right and any(only):
        notes.append(
            f"the runs share {len(shared)} prompts; {only[0]} are in a alone, {only[1]} in b "
            "alone: the pairs are over the common ones, the figures over each run's own"
        )  # fmt: skip
    labels = sorted({label for label, _ in shared})
    return RunComparison(
        a=_identity(folders[0], documents[0]),
        b=_identity(folders[1], documents[1]),
        figures=tuple(_figures(*documents)),
        paired={
            name: paired_verdicts(*([side[k][key] for k in shared if k[0] in of] for side in rows))
            for name, (of, key) in _TESTS.items()
        },
        common={label: sum(key[0] == label for key in shared) for label in labels},
        only_a=only[0],
        only_b=only[1],
        notes=tuple(notes),
    )


def shown_figure(figure: Figure) -> str:
    """A figure with its interval as a line of text shows it.

    >>> shown_figure(Figure("kl", "kl", 0.01234, (0.01, 0.02)))
    '0.0123 [0.01, 0.02]'
    """
    if figure.estimate is None:
        return "–"
    ends = figure.interval
    return f"{figure.estimate:.3g}" + (f" [{ends[0]:.3g}, {ends[1]:.3g}]" if ends else "")


def _answers(
    folder: Path, document: Mapping[str, Any], notes: list[str]
) -> dict[tuple[str, str], dict[str, Any]]:
    """The answers by (label, prompt); {} where the run folder holds none."""
    file = folder / ANSWERS_FILE
    if not file.is_file():
        notes.append(f"{file} is not there: no pairs, the figures stand alone")
        return {}
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    listed = read_answers(folder, document)
    for row in listed:
        rows.setdefault((str(row["label"]), conversation_text(row["prompt"])), row)
    if len(rows) < len(listed):
        repeated = len(listed) - len(rows)
        notes.append(f"{file}: {repeated} prompts stand twice and count once in the pairs")
    return rows


def _identity(folder: Path, document: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "folder": str(folder),
        "model": document["model"].get("name"),
        "prompts": document.get("prompts"),
        "versions": document.get("versions"),
    }


def _figures(a: Mapping[str, Any], b: Mapping[str, Any]) -> Iterable[FigurePair]:
    for name, short in SHORT_NAMES.items():
        sides = [_figure(document, name) for document in (a, b)]
        if any(side.estimate is not None for side in sides):
            better = _better(short.better, sides[0].estimate, sides[1].estimate)
            yield FigurePair(name, short.meaning, short.better, sides[0], sides[1], better)


def _figure(document: Mapping[str, Any], name: str) -> Figure:
    """A figure of a run; without an estimate where the run has none."""
    try:
        return find_figure(with_ratio(document), name)
    except InputError:
        return Figure(name, SHORT_NAMES[name].path, None, None)


def _better(direction: Better | None, a: float | None, b: float | None) -> Literal["a", "b"] | None:
    if direction is None or a is None or b is None or a == b or math.isnan(a) or math.isnan(b):
        return None
    return "a" if (a < b) == (direction == "lower") else "b"
