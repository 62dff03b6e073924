"""Work that tests kill, in processes forked from one that has imported everything.

A new interpreter spends two seconds on imports. On macOS none may be forked from a process that has
looked at the GPU: a new one starts there.
"""

import multiprocessing
import sys
from multiprocessing.connection import Connection
from multiprocessing.context import BaseContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import vauban  # before mlx.core
import vauban.export
import vauban.search

# isort: split
# What is imported is shared by all.
import mlx.core as mx
import mlx_lm  # noqa: F401
import optuna  # noqa: F401


def started(work: Any, *arguments: Any) -> tuple[BaseProcess, Connection]:
    """A process that runs `work(*arguments, connection)`, and the end that hears from it."""
    context: BaseContext
    if sys.platform == "linux":
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([__name__])
    else:
        context = multiprocessing.get_context("spawn")
    hearing, telling = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(*arguments, telling), daemon=True)  # type: ignore[attr-defined]
    process.start()
    # From now on only the process holds this end: hearing ends with it.
    telling.close()
    return process, hearing


def export_again_and_again(source: Path, out: Path, telling: Connection) -> None:
    """One and the same cut; tells the number of every export before it."""
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, mx.ones(64))
    for number in range(1000):
        telling.send(number)
        plan.export(source, out, force=True)


def search_the_organism(storage: Path, telling: Connection) -> None:
    """Six trials with a journal; tells the number of every trial behind it."""
    folder = vauban.organism_path("dense")
    model, tokenizer = vauban.load(folder)
    files = [folder / "prompts" / f"{name}.jsonl" for name in ("harmful", "harmless")]
    vauban.search(
        model, tokenizer, *(vauban.load_prompts(file)[:24] for file in files),
        trials=6, max_tokens=6, seed=3, storage=storage,
        space=vauban.search.SearchSpace(residuals=(3, 5), positions=(-1,)),
        on_trial=lambda trial, front: telling.send(trial.number),
    )  # fmt: skip
