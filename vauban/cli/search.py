"""`vauban search MODEL`: the live front, what became of it on fresh prompts, the run with the best.

Takes finished values and a console; decides wording and order.
"""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import make_config
from vauban.pipeline.search_run import REPORT_FILES, SearchSettings, run_search
from vauban.report import decimal, percent, rate_with_interval
from vauban.search import Rescored, SearchResult, Trial
from vauban.search.front import describe_front
from vauban.search.rescore import FreshScore
from vauban.search.space import strength_of

HEADINGS = ("trial", "refused", "over-refused", "degenerate", "KL", "residual", "attention", "mlp")
# Rows of the table that changes while the search runs.
LIVE_ROWS = 12


def search(options: argparse.Namespace) -> int:
    """Search, show the front, export the best cut; 130 after Ctrl-C, with the front so far."""
    config = make_config({**settings(options), ("model", "path"): options.model})
    console = Console(as_json=options.json)
    plots = all(importlib.util.find_spec(name) for name in ("plotly", "matplotlib"))
    if not plots:
        console.warning("the front is not drawn: pip install 'vauban[plots]' for the plots")
    chosen = SearchSettings(
        trials=options.trials,
        timeout=options.timeout,
        kl_limit=options.kl_limit,
        objectives=tuple(part.strip() for part in options.objectives.split(",")),
        storage=Path(options.storage) if options.storage else None,
        rescore=options.rescore,
        plots=plots,
    )
    journal = chosen.journal(config)
    if journal.exists():
        console.line(f"going on from {journal}")
    plan_line = f"search {chosen.trials} cuts for {describe_front(chosen.objectives)}"
    with console.progress() as stages:

        def on_trial(trial: Trial, front: Sequence[Trial]) -> None:
            stages.table(HEADINGS, [_row(t) for t in front[:LIVE_ROWS]])

        done = run_search(
            config,
            chosen,
            progress=stages,
            on_plan=lambda plan: run_lines.header(console, plan, plan_line),
            on_trial=on_trial,
            on_result=lambda result: front(console, result),
        )
    result = done.result
    if done.run is not None:
        fresh(console, result)
        run_lines.outcome(console, done.run)
        page = done.run.output_dir / REPORT_FILES[1]
        if plots:
            console.command(run_lines.open_command(page))
        console.document(done.run.to_dict())
        return 0 if done.run.gates is None or done.run.gates.ok else 1
    console.document({**result.to_dict(), "output_dir": None})
    if result.stopped == "no refusal":
        console.line(result.summary())
        return 0
    for file in done.files:
        console.line(f"saved {file}")
    console.line(f"interrupted; the same command goes on from {journal}", "yellow")
    return 130


def front(console: Console, result: SearchResult) -> None:
    """The front of the search; the best of it is marked where the limit leaves one."""
    pruned = sum(trial.state == "pruned" for trial in result.trials)
    console.line()
    console.line(
        f"{len(result.trials)} trials, {pruned} of them stopped early; the front of "
        f"{describe_front(result.objectives)}:",
        "bold",
    )
    limit = result.kl_limit
    within = [trial for trial in result.front if limit is None or trial.kl <= limit]
    best = result.best().number if within else None
    console.grid(HEADINGS, [_row(trial, best) for trial in result.front])
    prompts = max(trial.prompts for trial in result.trials)
    console.line(
        f"on {prompts} harmful validation prompts, {percent(result.baseline['refused'])} of which "
        "are refused without a cut; KL of the first token, * the best, trial 0 the default cut",
        "dim",
    )


def fresh(console: Console, result: SearchResult) -> None:
    """The front on the held-out prompts, against the default cut."""
    again = result.rescored
    if again is None:
        return
    harmful, harmless = again.prompts["harmful"], again.prompts["harmless"]
    console.line()
    console.line(f"on {harmful} harmful and {harmless} harmless prompts that no trial saw:", "bold")
    headings = ("cut", "refused", "over-refused", "KL", "only refused by", "exact p")
    scores = [again.unchanged, again.default]
    scores += [score for score in again.front if score.number]
    console.grid(headings, [_fresh_row(score, again) for score in scores])
    console.line(
        "only refused by: prompts that the default cut alone, and this cut alone, leaves refused; "
        "p of McNemar's exact test, not corrected for the number of cuts",
        "dim",
    )
    console.line(_lost(again))
    for note in again.notes:
        console.warning(note)
    console.line()


def _lost(again: Rescored) -> str:
    def change(loss: dict[str, float]) -> str:
        return f"{100 * loss['refused']:+.1f} points refused, KL {loss['kl']:+.4f}"

    mine, default = change(dict(again.loss)), change(dict(again.default_loss))
    if again.winner == 0:
        return f"the best cut is the default one; against the validation prompts: {mine}"
    return (
        f"against the validation prompts the best cut loses {mine}; the default cut, which was not "
        f"picked by them, {default}"
    )


def _row(trial: Trial, best: int | None = None) -> list[str]:
    strength = strength_of(trial.parameters)
    kernels = [
        f"{k.peak:.2f}" if k.peak == k.floor else f"{k.peak:.2f}→{k.floor:.2f} @ {k.centre:.1f}"
        for k in (strength.attention, strength.mlp)
    ]
    over = "–" if trial.over_refused is None else percent(trial.over_refused)
    return [
        f"{trial.number}{' *' if trial.number == best else ''}",
        percent(trial.refused),
        over,
        percent(trial.degenerate),
        decimal(trial.kl, 2),
        f"{trial.parameters['residual']:.2f}",
        *kernels,
    ]


def _fresh_row(score: FreshScore, again: Rescored) -> list[str]:
    name = "none" if score.number is None else f"trial {score.number}"
    pair = score.paired
    return [
        f"{name} (default)" if score.number == 0 else name,
        rate_with_interval(score.refused, score.refused_interval),
        rate_with_interval(score.over_refused, score.over_refused_interval),
        decimal(score.kl, 2),
        "–" if pair is None else f"{pair.only_before} / {pair.only_after}",
        "–" if pair is None else decimal(pair.p_value, 2),
    ]
