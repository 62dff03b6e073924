"""Capability benchmarks (MMLU, ARC) by lm-eval, on a model under run-time interventions.

Knows task names, protocols and how results are counted; the model's side is `lm_eval_model`, the
tasks are lm-eval's and the files in `tasks/`. Needs the extra `bench`.
"""

from __future__ import annotations

import difflib
import functools
import importlib.util
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.nn as nn

from vauban._common import Progress
from vauban._results import to_plain
from vauban.errors import InputError
from vauban.evaluation.intervals import wilson_interval
from vauban.interventions import Intervention
from vauban.study.figures import Metric

TASKS_DIR = Path(__file__).parent / "tasks"
"""lm-eval task files that vauban brings."""

LM_EVAL_NAMES: Mapping[str, str] = {"arc_cloze": "arc_challenge"}
"""Names of ours for protocols of lm-eval. ARC has two that are not comparable: `arc_cloze` scores
the text of each choice behind "Question: ...\\nAnswer:", `arc_letter5` the letters A to D behind
the listed choices, four-choice questions only, five fixed examples."""

# Metrics that count a question right or wrong; the first one that a task has is taken.
_COUNTED = ("acc", "exact_match")


@dataclass(frozen=True)
class BenchmarkResult:
    """`correct` of `n` questions: accuracy `acc` with its standard error and 95 % Wilson interval.

    `name` is the caller's name of the task, `task` lm-eval's; `version` and `num_fewshot` are the
    task's. A group (MMLU) pools its questions; `subtasks` holds (correct, n) of each part.
    `others` are further metrics as lm-eval reports them (acc_norm).
    """

    name: str
    task: str
    acc: float
    correct: int
    n: int
    stderr: float | None
    interval: tuple[float, float]
    version: str
    num_fewshot: int | None
    subtasks: dict[str, tuple[int, int]] = field(default_factory=dict)
    others: dict[str, float] = field(default_factory=dict)

    def metric(self) -> Metric:
        """Accuracy as a `Metric`, higher is better."""
        return Metric.rate(self.name, self.correct, self.n, better="higher", unit="questions")

    def summary(self) -> str:
        return f"{self.metric().summary()}; {self.task} v{self.version}, {self.num_fewshot}-shot"

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def run_benchmarks(
    model: nn.Module,
    tokenizer: Any,
    tasks: Sequence[str] = ("mmlu", "arc_cloze"),
    *,
    num_fewshot: int | None = 5,
    limit: int | None = None,
    include_path: str | os.PathLike[str] | None = None,
    interventions: Iterable[Intervention] = (),
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, BenchmarkResult]:
    """Run lm-eval tasks on `model` under `interventions`: {name of the task: result}.

    Args:
        tasks: lm-eval task or group names, or `arc_cloze` and `arc_letter5` (`LM_EVAL_NAMES`).
        num_fewshot: examples in the context; None leaves it to each task.
        limit: questions per task, of a group per subtask; for trying out.
        include_path: a folder with task files of your own, searched first.
        seed: draws the examples where a task draws them.

    Scored by log-likelihood, plain text, no chat template. The data come from the Hub through
    lm-eval, unless the task files name local ones. lm-eval writes its own log and bars.

    Raises InputError without lm-eval (extra `bench`), for unknown tasks, for data that cannot be
    loaded and for tasks that count nothing right or wrong; CheckError when the logits are NaN.

    Sources: Hendrycks et al. 2021 (MMLU), Clark et al. 2018 (ARC), Gao et al. (lm-eval harness).
    """
    if isinstance(tasks, str) or not tasks:
        raise InputError(f"tasks is {tasks!r}; expected a list of task names that is not empty")
    names = {name: LM_EVAL_NAMES.get(name, name) for name in tasks}
    check_benchmarks(tasks, include_path)
    import lm_eval

    from vauban.study.lm_eval_model import InterventionLM

    try:
        returned = lm_eval.simple_evaluate(
            model=InterventionLM(model, tokenizer, interventions, progress=progress),
            tasks=sorted(set(names.values())),
            task_manager=_task_manager(list(names.values()), include_path),
            num_fewshot=num_fewshot,
            limit=limit,
            # Examples are drawn from `seed`; no global seed is set.
            fewshot_random_seed=seed,
            random_seed=None,
            numpy_random_seed=None,
            torch_random_seed=None,
            # The standard error is computed from the counts, below.
            bootstrap_iters=0,
        )
    except OSError as error:  # what datasets and the Hub raise is of this family
        raise InputError(
            f"the data of {', '.join(tasks)} could not be loaded ({type(error).__name__}: "
            f"{error}). They come from the Hugging Face Hub; check the connection, or give "
            "task files with local data by include_path."
        ) from error
    assert returned is not None
    return {name: _result(name, task, returned) for name, task in names.items()}


def check_benchmarks(
    tasks: Sequence[str], include_path: str | os.PathLike[str] | None = None
) -> None:
    """Raise InputError early for what would stop `run_benchmarks`: no lm-eval, no such task.

    Whether a task's data can be loaded is not checked.
    """
    if importlib.util.find_spec("lm_eval") is None:
        raise InputError(
            "benchmarks need lm-eval, which is not installed:  pip install 'vauban[bench]'"
        )
    _task_manager([LM_EVAL_NAMES.get(name, name) for name in tasks], include_path)


def _task_manager(names: Sequence[str], include_path: Any) -> Any:
    """An index that knows all `names`; lm-eval's own 13 000 files are read only where needed."""
    from lm_eval.tasks import TaskManager

    folders = [str(TASKS_DIR)]
    if include_path is not None:
        folder = Path(include_path)
        if not folder.is_dir():
            raise InputError(f"include_path {str(folder)!r} is no folder")
        folders.insert(0, str(folder.resolve()))
    given = TaskManager(include_path=folders, include_defaults=False)
    if all(name in given.all_tasks for name in names):
        return given
    known = [*given.all_tasks, *_default_tasks().all_tasks]
    unknown = [name for name in names if name not in known]
    if unknown:
        close = difflib.get_close_matches(unknown[0], known, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise InputError(f"lm-eval knows no task {unknown[0]!r}{hint}")
    return _default_tasks() if include_path is None else TaskManager(include_path=folders)


@functools.lru_cache(maxsize=1)
def _default_tasks() -> Any:
    """lm-eval's own tasks and ours; it takes seconds to read them, so the index is kept."""
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=str(TASKS_DIR))


def _result(name: str, task: str, raw: Mapping[str, Any]) -> BenchmarkResult:
    """Count the questions of a task, or of all the parts of a group."""
    leaves = _leaves(task, raw)
    counted = {leaf: _count(leaf, raw["samples"][leaf]) for leaf in leaves}
    correct = sum(k for k, _ in counted.values())
    n = sum(total for _, total in counted.values())
    acc = correct / n
    shots = {raw["n-shot"].get(leaf) for leaf in leaves}
    reported = raw["results"].get(task, {})
    others = {
        key.removesuffix(",none"): float(value)
        for key, value in reported.items()
        if key.endswith(",none") and "stderr" not in key and isinstance(value, float)
        and key.removesuffix(",none") not in _COUNTED
    }  # fmt: skip
    return BenchmarkResult(
        name=name,
        task=task,
        acc=acc,
        correct=correct,
        n=n,
        stderr=math.sqrt(acc * (1 - acc) / (n - 1)) if n > 1 else None,
        interval=wilson_interval(correct, n),
        version=str(raw["versions"].get(task, "")),
        num_fewshot=shots.pop() if len(shots) == 1 else None,
        subtasks=counted if leaves != [task] else {},
        others=others,
    )


def _leaves(task: str, raw: Mapping[str, Any]) -> list[str]:
    """The tasks below `task` that have questions."""
    if task in raw["samples"]:
        return [task]
    below = raw.get("group_subtasks", {}).get(task, [])
    leaves = [leaf for part in below for leaf in _leaves(part, raw)]
    if not leaves:
        raise InputError(f"lm-eval returned no questions for {task!r}; name the task, not a tag")
    return leaves


def _count(task: str, samples: Sequence[Mapping[str, Any]]) -> tuple[int, int]:
    """(right, all) over the questions of one task, by the first metric that counts."""
    metric = next((m for m in _COUNTED if samples and m in samples[0]), None)
    if metric is None:
        raise InputError(f"{task} measures none of {', '.join(_COUNTED)} per question")
    values = [float(sample[metric]) for sample in samples]
    if any(value not in (0.0, 1.0) for value in values):
        raise InputError(f"{task}: {metric} is no right or wrong per question")
    return int(sum(values)), len(values)
