"""`vauban.search`: one cut after another at run time, for a front of refusal against cost.

Known cuts come first, then what TPE proposes; a trial stops as soon as it cannot join the front.
Nothing is written but the journal. Knows models and prompts; prints nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._common import Progress
from vauban.directions.class_moments import split_prompts
from vauban.directions.measure import VALIDATION
from vauban.errors import InputError
from vauban.models import anatomy, describe, residual_writers
from vauban.prompts import post_instruction_positions
from vauban.search.direction_table import DirectionTable, read_directions
from vauban.search.front import Trial, check_objectives, front_of
from vauban.search.known_cuts import known_cuts
from vauban.search.result import Bound, SearchResult, plan_of
from vauban.search.scoring import Scorer
from vauban.search.short_answers import Refusal, ShortAnswers
from vauban.search.space import SearchSpace
from vauban.search.trial_journal import TrialJournal

REFUSES_FROM = 0.2
"""A model that refuses a smaller share of the harmful prompts does not refuse."""
FORMAT = 1
"""The version of what a storage file records."""

Watch = Callable[[Trial, Sequence[Trial]], None]
"""Called with every finished trial and the front."""


def search(
    model: nn.Module,
    tokenizer: Any,
    harmful: Sequence[Any],
    harmless: Sequence[Any],
    *,
    trials: int = 60,
    space: SearchSpace | None = None,
    evaluation: tuple[Sequence[Any], Sequence[Any]] | None = None,
    kl_limit: float | None = None,
    seed: int = 0,
    storage: str | Path | None = None,
    timeout: float | None = None,
    progress: Progress | None = None,
    objectives: Sequence[str] = ("refused", "kl"),
    max_tokens: int = 24,
    refusal: Refusal | None = None,
    batch_size: int | None = None,
    on_trial: Watch | None = None,
) -> SearchResult:
    """Search cuts for the front of refusal against first-token KL (and over-refusal, perplexity).

    Directions are measured on `harmful` and `harmless` but a held-out third (at most 32 of each
    class), on which the trials are scored; or on all of them, with `evaluation` = (harmful,
    harmless) prompts to score on. A trial is a point of `space`: its cut acts at run time, harmless
    prompts give the first-token KL, harmful ones answer greedily with `max_tokens` in rounds of 8,
    32, 128, ... Degenerate answers count as refused. After each round a trial that even at best
    would be dominated by an earlier one, or by no cut at all, is stopped (state "pruned"). Trial 0
    is the default cut of quick mode (`choose_by_answers`, `choose_strength`; a tied embedding is
    left alone); it follows at .8, .6, .5 and .4 times that strength, then come runners-up of those
    choices, then proposals of a multivariate TPE over all objectives.

    `trials` counts all trials, those of an earlier process among them: with a `storage` file a
    killed search goes on, and ends with the trials that it would have had unbroken. `timeout`
    (seconds) starts no further trial. Ctrl-C ends the trials likewise, with what is finished.
    `kl_limit` is for `best`. `objectives` may add "over_refused" and "perplexity" (of the unchanged
    answers to harmless prompts). `refusal(text) -> bool` replaces `is_refusal`; a storage file does
    not record it. `on_trial(trial, front)` is called after every trial.

    Raises InputError for fewer than 8 validation prompts of a class, for a storage file of another
    model, space, seed or other prompts, which is left as it is, for options that are none, and
    where optuna is not installed.

    >>> import vauban
    >>> folder = vauban.organism_path("dense")
    >>> model, tokenizer = vauban.load(folder)
    >>> files = [folder / "prompts" / f"{name}.jsonl" for name in ("harmful", "harmless")]
    >>> bad, good = (vauban.load_prompts(file)[:24] for file in files)
    >>> result = search(model, tokenizer, bad, good, trials=2, max_tokens=8)
    >>> [trial.number for trial in result.trials]
    [0, 1]
    """
    chosen = check_options(trials, timeout, kl_limit, objectives)
    began = time.monotonic()
    n_layers = anatomy(model).n_layers
    fitting, tested = prompt_parts(harmful, harmless, evaluation, seed)
    if space is None:
        packed = describe(model).quantization is not None
        space = SearchSpace(norm_modes=(None,)) if packed else SearchSpace()
    space = space.resolved(n_layers, tuple(post_instruction_positions(tokenizer)))
    answers = ShortAnswers(
        model, tokenizer, *tested, max_tokens=max_tokens, refusal=refusal, seed=seed,
        batch_size=batch_size,
    )  # fmt: skip
    scorer = Scorer(answers, chosen)
    identity = {
        "format": FORMAT,
        "model": _model_identity(model),
        "prompts": {
            f"{use} {name}": {"count": len(part), "sha256": _hash(part)}
            for use, parts in (("measuring", fitting), ("validation", tested))
            for name, part in zip(("harmful", "harmless"), parts, strict=True)
        },
        "space": space.to_dict(),
        "objectives": list(chosen),
        "seed": seed,
        "max_tokens": max_tokens,
    }
    journal = TrialJournal(storage, identity, space.bounds(n_layers), space.choices(), chosen)
    try:
        _lap(scorer, "prepare", began)
        unchanged = asdict(scorer.unchanged(progress))
        baseline = {
            name: unchanged[name]
            for name in ("refused", "over_refused", "degenerate", "perplexity")
        }

        def result(stopped: str, table: DirectionTable | None = None) -> SearchResult:
            bound = None
            if table is not None:
                seen = frozenset(str(p) for part in (*fitting, *tested) for p in part)
                bound = Bound(
                    model, tokenizer, lambda t: _direction(table, t.parameters), seen, refusal,
                    batch_size,
                )  # fmt: skip
            return SearchResult(
                tuple(journal.trials), chosen, baseline, kl_limit, stopped, space, identity,
                dict(scorer.seconds), bound=bound,
            )  # fmt: skip

        if baseline["refused"] < REFUSES_FROM:
            return result("no refusal")
        lap = time.monotonic()
        table = read_directions(
            model, tokenizer, *fitting, positions=space.positions or (),
            estimators=space.estimators, batch_size=batch_size, progress=progress,
        )  # fmt: skip
        lap = _lap(scorer, "directions", lap)
        deadline = None if timeout is None else began + timeout
        if deadline is not None and lap >= deadline:
            return result("timeout", table)
        if journal.warm_start is None:
            journal.begin(
                known_cuts(
                    model, tokenizer, table, space, *(part[:VALIDATION] for part in tested),
                    max_tokens=max_tokens, refusal=refusal, seed=seed, batch_size=batch_size,
                    progress=progress,
                )
            )  # fmt: skip
            _lap(scorer, "known cuts", lap)
        stopped = _run(
            model, table, scorer, journal, trials, seed, deadline, progress, on_trial
        )  # fmt: skip
        return result(stopped, table)
    finally:
        journal.close()


def check_options(
    trials: int, timeout: float | None, kl_limit: float | None, objectives: Sequence[str]
) -> tuple[str, ...]:
    """The objectives, complete; InputError for an option that is none."""
    if trials < 1 or (timeout is not None and not timeout > 0):
        raise InputError(f"trials is {trials}, timeout {timeout}; expected at least 1, and above 0")
    if kl_limit is not None and not (math.isfinite(kl_limit) and kl_limit > 0):
        raise InputError(f"kl_limit is {kl_limit}; expected a KL above 0")
    return check_objectives(objectives)


def _run(
    model: nn.Module, table: DirectionTable, scorer: Scorer, journal: TrialJournal, trials: int,
    seed: int, deadline: float | None, progress: Progress | None, on_trial: Watch | None,
) -> str:  # fmt: skip
    """Go on to so many trials; why it ended."""
    resumed = len(journal.trials)

    def answered(_: int = 0) -> None:
        if progress and resumed < trials:
            progress("search", len(journal.trials) - resumed, trials - resumed)

    try:
        answered()
        while (number := len(journal.trials)) < trials:
            lap = time.monotonic()
            if deadline is not None and lap >= deadline:
                return "timeout"
            parameters = journal.propose(seed)
            lap = _lap(scorer, "proposals", lap)
            change = plan_of(model, _direction(table, parameters), parameters).virtual()
            _lap(scorer, "plans", lap)
            rivals = [t.values(scorer.objectives) for t in journal.trials if _complete(t)]
            figures = scorer.score(change, rivals, answered)
            trial = Trial(number=number, parameters=parameters, **asdict(figures))
            journal.add(trial)
            if on_trial:
                on_trial(trial, front_of(journal.trials, scorer.objectives))
            answered()
    except KeyboardInterrupt:
        return "interrupted"
    return "trials"


def _complete(trial: Trial) -> bool:
    return trial.state == "complete"


def _direction(table: DirectionTable, parameters: Any) -> mx.array:
    """A trial's unit direction (d,)."""
    return table.unit(parameters["estimator"], parameters["position"], parameters["residual"])


def _lap(scorer: Scorer, name: str, since: float) -> float:
    """Count the time since then under a name; now."""
    now = time.monotonic()
    scorer.seconds[name] += now - since
    return now


def prompt_parts(
    harmful: Sequence[Any], harmless: Sequence[Any], evaluation: Any, seed: int
) -> tuple[list[list[Any]], list[list[Any]]]:
    """(harmful, harmless) to measure directions on, and to score trials on."""
    sets = [list(harmful), list(harmless)]
    if evaluation is not None:
        tested = [list(part) for part in evaluation]
        if len(tested) != 2:
            raise InputError(f"evaluation holds {len(tested)} sets; expected (harmful, harmless)")
        return sets, tested
    splits = [split_prompts(prompts, seed) for prompts in sets]
    fitting = [[p[i] for i in split[0]] for p, split in zip(sets, splits, strict=True)]
    tested = [[p[i] for i in split[1][:VALIDATION]] for p, split in zip(sets, splits, strict=True)]
    return fitting, tested


def _hash(prompts: Sequence[Any]) -> str:
    text = json.dumps(list(prompts), ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def _model_identity(model: nn.Module) -> dict[str, Any]:
    """What tells a model from another one, wherever its folder lies: its shape and its weights.

    Of every residual writer's matrix the first row is hashed: a fine-tuned model differs in these.
    """
    info = describe(model)
    modules, digest = dict(model.named_modules()), hashlib.sha256()
    for writer in residual_writers(model):
        row = modules[writer.path].weight.reshape(-1)[:256]
        wide = row if mx.issubdtype(row.dtype, mx.integer) else row.astype(mx.float32)
        digest.update(np.array(wide).tobytes())
    return {
        "type": info.model_type, "layers": info.n_layers, "width": info.d_model,
        "parameters": info.parameters, "quantization": info.quantization, "dtype": info.dtype,
        "weights": digest.hexdigest(),
    }  # fmt: skip
