"""A run whose cut is searched for: the search, its front on held-out prompts, then the stages of
every run with the best cut.

Knows configurations; what a trial is, `vauban.search` knows. Prints nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx

from vauban._arrays import floats
from vauban._common import Progress
from vauban._extras import need
from vauban.config import RunConfig
from vauban.directions import DirectionResult
from vauban.directions import measure as estimate
from vauban.errors import CheckError, InputError
from vauban.export import check_place
from vauban.pipeline.kept_direction import kept_direction
from vauban.pipeline.run import RunPlan, RunResult, finish_run, open_run
from vauban.search import SearchResult, SearchSpace, Strength, Trial, search
from vauban.search.plots import front_page, front_picture
from vauban.search.space import strength_of
from vauban.search.trials import check_options, prompt_parts

REPORT_FILES = ("search.json", "search.html", "search.png")


@dataclass(frozen=True)
class SearchSettings:
    """What `vauban search` says beyond a run's configuration.

    trials, timeout, kl_limit and objectives are those of `vauban.search`.

    storage  the journal of the search; None: a file beside the output folder
    rescore  at most so many cuts of the front, those that cost least by the rule of the choices,
             are scored again on the held-out prompts
    plots    whether plotly and matplotlib draw the front

    Raises InputError for an option that is none.
    """

    trials: int = 60
    timeout: float | None = None
    kl_limit: float | None = None
    objectives: tuple[str, ...] = ("refused", "kl")
    storage: Path | None = None
    rescore: int = 8
    plots: bool = True

    def __post_init__(self) -> None:
        complete = check_options(self.trials, self.timeout, self.kl_limit, self.objectives)
        object.__setattr__(self, "objectives", complete)
        if self.rescore < 0:
            raise InputError(f"rescore is {self.rescore}; expected 0 or more cuts")

    def journal(self, config: RunConfig) -> Path:
        """The storage file."""
        output = Path(config.output.dir)
        return self.storage or output.with_name(f"{output.name}.journal")


@dataclass(frozen=True)
class SearchRun:
    """What `run_search` did: the search, and the run with its best cut.

    `run` is None where there is no cut to write: the model does not refuse, or the search was
    interrupted. `files` are what was saved beside the output folder then.
    """

    result: SearchResult
    run: RunResult | None
    files: tuple[Path, ...]


@dataclass(frozen=True)
class SearchedStrength:
    """A trial's strengths, as a run records chosen strengths."""

    strength: Strength
    trial: Trial
    tried: int

    def to_dict(self) -> dict[str, Any]:
        return {
            "strength": self.strength.to_dict(), "trials": [self.trial.to_dict()],
            "tried": self.tried, "kind": "trials", "notes": [],
        }  # fmt: skip


def run_search(
    config: RunConfig,
    settings: SearchSettings,
    *,
    progress: Progress | None = None,
    on_plan: Callable[[RunPlan], None] | None = None,
    on_trial: Callable[[Trial, Sequence[Trial]], None] | None = None,
    on_result: Callable[[SearchResult], None] | None = None,
) -> SearchRun:
    """Search cuts, score the front again on the held-out prompts, export the best cut.

    The search measures and scores on the measuring prompts; the held-out ones of the evaluation no
    trial sees. `on_result` is called with the search's trials before anything else is done.

    Raises as `run` and `vauban.search`; CheckError where no trial keeps the limit of KL. The front
    is saved beside the output folder then, as it is after Ctrl-C.
    """
    need("optuna", "search", "the search")
    journal = settings.journal(config)
    if journal.is_dir():
        raise InputError(f"--storage {journal} is a folder; expected a file")
    check_place(journal)
    plan = open_run(config, progress=progress, on_plan=on_plan)
    opened = plan.opened
    prompts = list(plan.harmful.prompts), list(plan.harmless.prompts)
    # Restored norms are no low-rank change, which is all that an adapter holds.
    space = SearchSpace(norm_modes=(None,)) if config.output.precision == "adapter" else None
    result = search(
        opened.model, opened.tokenizer, *prompts, trials=settings.trials, seed=config.seed,
        kl_limit=settings.kl_limit, space=space, storage=journal, timeout=settings.timeout,
        objectives=settings.objectives, batch_size=config.measure.batch_size, progress=progress,
        on_trial=on_trial,
    )  # fmt: skip
    if result.stopped == "no refusal":
        return SearchRun(result, None, ())
    if on_result and result.trials:
        on_result(result)
    if result.stopped == "interrupted":
        return SearchRun(result, None, _save_beside(config, settings, result))
    try:
        best = result.best()
    except CheckError as error:
        saved = _save_beside(config, settings, result)
        raise CheckError(f"{error}. What was found is in {saved[0]}") from error
    cheapest = sorted(result.front, key=lambda trial: trial.cost())[: settings.rescore]
    rescored = result.rescore(
        plan.held_out.texts("harmful"), plan.held_out.texts("harmless"),
        trials=[trial for trial in result.front if trial in (*cheapest, best)], progress=progress,
    )  # fmt: skip
    result = replace(result, rescored=rescored)
    norms = best.parameters["norm_mode"]
    cut = config.cut.model_copy(update={"norm_preserve": norms, "alpha": "auto"})

    def write_report(folder: Path) -> None:
        save_report(result, folder, plots=settings.plots)

    changed = replace(plan, config=config.model_copy(update={"cut": cut}))
    strength = SearchedStrength(strength_of(best.parameters), best, len(result.trials))
    direction = _direction_result(plan, result, best, progress)
    with kept_direction(direction, Path(config.output.dir)):
        done = finish_run(
            changed,
            direction,
            strength,
            sections={"search": {**result.to_dict(), "best": best.number}},
            write_more=write_report,
            progress=progress,
        )
    return SearchRun(result, done, ())


def save_report(
    result: SearchResult, folder: Path, *, prefix: str = "", plots: bool = True
) -> tuple[Path, ...]:
    """Write search.json and, with `plots`, search.html and search.png; the files."""
    json_file, page, picture = (folder / f"{prefix}{name}" for name in REPORT_FILES)
    files = [result.save(json_file)]
    if plots and result.trials:
        files += [front_page(result, page), front_picture(result, picture)]
    return tuple(files)


def _save_beside(
    config: RunConfig, settings: SearchSettings, result: SearchResult
) -> tuple[Path, ...]:
    """Save a search without a run as OUTPUT.search.json and so on."""
    output = Path(config.output.dir)
    output.parent.mkdir(parents=True, exist_ok=True)
    return save_report(result, output.parent, prefix=f"{output.name}.", plots=settings.plots)


def _direction_result(
    plan: RunPlan, result: SearchResult, best: Trial, progress: Progress | None
) -> DirectionResult:
    """The trial's direction with the statistics of its estimator and position.

    They are those of the nearest residual; the direction itself may lie between two.
    """
    prompts = list(plan.harmful.prompts), list(plan.harmless.prompts)
    (harmful, harmless), _ = prompt_parts(*prompts, None, plan.config.seed)
    residual, position = float(best.parameters["residual"]), int(best.parameters["position"])
    measured = estimate(
        plan.opened.model, plan.opened.tokenizer, harmful, harmless, seed=plan.config.seed,
        method=best.parameters["estimator"], layer=round(residual) - 1, positions=(position,),
        batch_size=plan.config.measure.batch_size, progress=progress,
    )  # fmt: skip
    direction = result.direction(best)
    along = floats((measured.means[:, measured.layer_index] * direction).sum(axis=-1))
    return replace(
        measured,
        direction=mx.array(direction),
        projections={"harmless": along[0], "harmful": along[1]},
        provenance={**measured.provenance, "search": {"trial": best.number, "residual": residual}},
    )
