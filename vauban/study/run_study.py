"""The study's order: fit, choose, measure every condition, ask what further directions encode.

One model after another; every finished piece is recorded, so that a killed study goes on where it
was. The folder appears when everything is written. Prints nothing.
"""

from __future__ import annotations

import gc
import hashlib
import json
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from vauban._common import Progress
from vauban.config import StudyConfig
from vauban.directions import NoCandidate
from vauban.errors import InputError, VaubanWarning
from vauban.export import check_output, check_place, staged
from vauban.models import weight_files
from vauban.pipeline.preflight import open_folder
from vauban.pipeline.prompt_sets import LABELS, EvalSet, PromptSet, eval_set, prompt_set
from vauban.pipeline.provenance import hash_files, system, versions
from vauban.pipeline.stages import Opened, model_name, open_model
from vauban.report import json_safe
from vauban.study.chart import family_chart, require_charts
from vauban.study.composition import compose
from vauban.study.conditions import NEEDED, Condition, conditions
from vauban.study.figures import Metric
from vauban.study.fits import Fits, fit
from vauban.study.further_directions import FurtherDirection, further_directions
from vauban.study.instruments import Instruments
from vauban.study.journal import Journal
from vauban.study.matched_choice import Choice, Selected, choose
from vauban.study.page import study_page
from vauban.study.tables import study_table

FORMAT = 2
"""The version of study.json's layout."""


@dataclass(frozen=True)
class StudyResult:
    """A finished study. `document` is what study.json holds."""

    output_dir: Path
    document: Mapping[str, Any]
    seconds: float
    resumed: int
    """Pieces of work that an earlier, killed run of the same study had finished."""

    def to_dict(self) -> dict[str, Any]:
        return {**self.document, "output_dir": str(self.output_dir), "seconds": self.seconds}

    def summary(self) -> str:
        """One table per model and the folder, as plain lines."""
        parts = [study_table(block) for block in self.document["models"]]
        return "\n\n".join([*parts, f"written to {self.output_dir}"])


def run_study(
    config: StudyConfig,
    *,
    progress: Progress | None = None,
    on_model: Callable[[str, Opened], None] | None = None,
) -> StudyResult:
    """Compare interventions x scopes with matched selection on one or more models.

    Seed study: Rocchetti & Ferrara 2026 (arXiv 2606.13720), difference in means against INLP, with
    its rank inflation, lost order and cancelling flips put right and shown beside.

    Writes study.json (every figure raw, with interval, change and better direction), table.md,
    chart.png and study.html into `config.output.dir`, which must not exist unless `force`.

    Raises InputError for prompts, texts, models or an output folder that cannot be used; a study
    that was killed goes on when it is started again with the same configuration.
    """
    started = time.monotonic()
    check_output(config.output.dir, force=config.output.force)
    # The chart needs matplotlib: a missing one is an error before the long work.
    require_charts()
    _check_models(config)
    check_place(config.output.dir)
    key = _key(config)
    with staged(
        config.output.dir, force=config.output.force, resume_key=key, keep_interrupted=True
    ) as folder:
        journal = Journal(folder, key)
        blocks = [
            _one_model(path, config, journal, _within(progress, model_name(path)), on_model)
            for path in config.study.models
        ]
        document = json_safe(
            {
                "format": FORMAT,
                "configuration": config.to_dict(),
                "versions": versions(),
                "system": system(),
                "models": blocks,
            }
        )
        (folder / "study.json").write_text(
            json.dumps(document, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )
        tables = "\n\n".join(study_table(block, markdown=True) for block in blocks)
        (folder / "table.md").write_text(tables + "\n", encoding="utf-8")
        family_chart(document["models"], folder / "chart.png")
        (folder / "study.html").write_text(study_page(document), encoding="utf-8")
        resumed = journal.resumed
        journal.close()
    seconds = round(time.monotonic() - started, 2)
    return StudyResult(Path(config.output.dir), document, seconds, resumed)


def _check_models(config: StudyConfig) -> None:
    """Every model's and the guard's files, before the first one is studied for hours."""
    guard = config.guard.model
    for path in [*config.study.models, *([guard] if guard and guard != "stand-in" else [])]:
        open_folder(path)


def _one_model(
    path: str,
    config: StudyConfig,
    journal: Journal,
    progress: Progress | None,
    on_model: Callable[[str, Opened], None] | None,
) -> dict[str, Any]:
    """Everything of one model as JSON values; from the journal alone where it is all there."""
    done = f"{path}: done"
    if done in journal:
        return journal.once(done, dict)
    opened = open_model(
        path,
        chat_template_args=config.study.chat_template_args,
        system_prompt=config.data.system_prompt,
        progress=progress,
    )
    if on_model:
        on_model(path, opened)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", VaubanWarning)
        block = _measure_model(path, opened, config, journal, progress)
    texts = [str(w.message) for w in caught if issubclass(w.category, VaubanWarning)]
    block["warnings"] = list(dict.fromkeys([*texts, *_unread(block["conditions"])]))
    del opened
    gc.collect()
    mx.clear_cache()
    return journal.once(done, lambda: json_safe(block))


def _measure_model(
    path: str, opened: Opened, config: StudyConfig, journal: Journal, progress: Progress | None
) -> dict[str, Any]:
    model, tokenizer, folder = opened.model, opened.tokenizer, opened.folder
    sets = {label: prompt_set(config, label, folder) for label in LABELS}
    _check_overlap(sets, rows := eval_set(config, folder))
    fitted, validation = _split(sets, config)
    instruments = Instruments.prepare(model, tokenizer, rows, config)
    fits = fit(model, tokenizer, fitted["harmful"], fitted["harmless"], config, progress)
    choices = _choices(path, opened, fits, validation, config, journal, progress)
    todo = conditions(fits, choices, config)
    facts: dict[str, Any] = {}
    if config.study.composition and "ablation" in choices:
        facts, more = compose(
            model, tokenizer, fits, choices["ablation"], fitted["harmful"], fitted["harmless"],
            (rows.texts("harmful"), rows.texts("harmless")),
        )  # fmt: skip
        todo += more
    measured = []
    for number, condition in enumerate(todo):
        if progress:
            progress("conditions", number, len(todo))
        figures = journal.once(f"{path}: {condition.name}", partial(_one, instruments, condition))
        measured.append({**condition.to_dict(), **figures})
    _add_deltas(measured)
    if progress:
        progress("conditions", len(todo), len(todo))
    further: list[FurtherDirection] = []
    if config.study.further and "nullspace" in choices:
        further = further_directions(model, tokenizer, fits, choices["nullspace"].key, rows)
    return {
        "model": model_name(path),
        "info": opened.info.to_dict(),
        "forward": opened.check.to_dict(),
        "weights": hash_files(weight_files(folder).files, stage="hash", progress=progress),
        "prompts": {label: prompts.to_dict() for label, prompts in sets.items()},
        "split": {
            name: {label: len(part) for label, part in parts.items()}
            for name, parts in (("fitted", fitted), ("validation", validation))
        },
        "held_out": rows.to_dict(),
        "choices": {name: choice.to_dict() for name, choice in choices.items()},
        "inlp": _inlp_facts(fits, choices),
        "conditions": measured,
        "composition": facts,
        "further": [direction.to_dict() for direction in further],
    }


def _unread(conditions: Sequence[Mapping[str, Any]]) -> list[str]:
    """A sentence where a guard's verdicts could not be read: they are never counted as safe."""
    guards = [c["guard"] for c in conditions if c["guard"]]
    unparsed = sum(g["unparsed"] for g in guards)
    if not unparsed:
        return []
    return [
        f"{guards[0]['judge']}: {unparsed} of {sum(g['n'] for g in guards)} verdicts could not be "
        "read; they are in the denominator and counted apart, see guard.unparsed of study.json"
    ]


def _one(instruments: Instruments, condition: Condition) -> dict[str, Any]:
    return json_safe(instruments.measure(condition.remove, condition.induce))


def _within(progress: Progress | None, name: str) -> Progress | None:
    """The same callable with the name of a part before each stage."""
    if progress is None:
        return None
    return lambda stage, done, total: progress(f"{name}: {stage}", done, total)


def _add_deltas(measured: Sequence[dict[str, Any]]) -> None:
    """Give every figure its change from the baseline's, and the gain that its direction makes."""
    baseline = {m["name"]: _metric(m) for m in measured[0]["metrics"]}
    for condition in measured:
        for figure in condition["metrics"]:
            figure["delta"] = _metric(figure).delta(baseline[figure["name"]]).to_dict()


def _metric(figure: Mapping[str, Any]) -> Metric:
    given = {name: value for name, value in figure.items() if name != "delta"}
    return Metric(**{**given, "interval": given["interval"] and tuple(given["interval"])})


def _choices(
    path: str, opened: Opened, fits: Fits, validation: Mapping[str, list[str]],
    config: StudyConfig, journal: Journal, progress: Progress | None,
) -> dict[Selected, Choice]:  # fmt: skip
    """The matched choice of every method that the configuration needs.

    A method without any candidate is left out, with a warning: other models may have one.
    """

    def choose_or_say(method: Selected) -> dict[str, Any]:
        try:
            choice = choose(
                opened.model, opened.tokenizer, method, fits, validation["harmful"],
                validation["harmless"], config, _within(progress, method),
            )  # fmt: skip
        except NoCandidate as error:
            return {"omitted": str(error)}
        return json_safe(choice.to_dict())

    choices: dict[Selected, Choice] = {}
    for method in dict.fromkeys(NEEDED[m] for m in config.study.methods if m in NEEDED):
        record = journal.once(f"{path}: choice of {method}", partial(choose_or_say, method))
        if "omitted" in record:
            text = f"what stands on the choice of {method} is left out: {record['omitted']}"
            warnings.warn(text, VaubanWarning, stacklevel=2)
        else:
            choices[method] = Choice.from_dict(record, method, fits)
    return choices


def _inlp_facts(fits: Fits, choices: Mapping[Selected, Choice]) -> dict[str, Any]:
    """The rank of INLP at every place, and everything about the chosen one."""
    ranks = [
        {"position": p, "residual": r, "rank": found.rank, "accuracies": list(found.accuracies)}
        for (p, r), found in fits.inlp.items()
    ]
    chosen = choices.get("nullspace")
    return {"ranks": ranks, "chosen": fits.inlp[chosen.key].to_dict() if chosen else None}


def _split(
    sets: Mapping[str, PromptSet], config: StudyConfig
) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """(fitted, validation) prompts by class: seeded, disjoint, as many of each class to fit."""
    distinct = {label: list(dict.fromkeys(given.prompts)) for label, given in sets.items()}
    for label, prompts in distinct.items():
        repeated = len(sets[label].prompts) - len(prompts)
        if repeated:
            warnings.warn(
                f"{repeated} of the {len(sets[label].prompts)} {label} prompts are repetitions; "
                "they are left out, or one could be fitted on and validated with",
                VaubanWarning,
                stacklevel=2,
            )
    smallest = min(map(len, distinct.values()))
    wanted = config.study.validation
    if smallest - wanted < 8:
        raise InputError(
            f"{smallest} distinct prompts in the smaller class: {wanted} are set aside for "
            f"selection and {smallest - wanted} remain to fit; expected at least 8. Lower "
            "[study] validation or give more prompts"
        )
    fitted, validation = {}, {}
    for label, prompts in distinct.items():
        order = np.random.default_rng(config.seed).permutation(len(prompts))
        shuffled = [prompts[i] for i in order]
        validation[label] = shuffled[:wanted]
        fitted[label] = shuffled[wanted:smallest]
    return fitted, validation


def _check_overlap(sets: Mapping[str, PromptSet], rows: EvalSet) -> None:
    """Refuse prompts that are in both classes, or in both the fit and the evaluation."""
    both = set(sets["harmful"].prompts) & set(sets["harmless"].prompts)
    if both:
        raise InputError(f"{len(both)} prompts are in both classes, first {sorted(both)[0]!r}")
    measured = {prompt for prompts in sets.values() for prompt in prompts.prompts}
    kinds = ("harmful", "harmless", "how_to")
    shared = [prompt for kind in kinds for prompt in rows.texts(kind) if prompt in measured]
    if shared:
        raise InputError(
            f"{len(shared)} held-out prompts are fitted on too, first {shared[0]!r}; take them "
            "out of one of the two sets"
        )


def _key(config: StudyConfig) -> str:
    """A digest of what the results depend on: configuration, versions, the files it names."""
    digest = hashlib.sha256()
    settings = config.to_dict()
    settings.pop("output")
    digest.update(json.dumps([settings, versions()], sort_keys=True).encode())
    for path in (*config.study.models, *_files(config)):
        folder = Path(path)
        names = sorted(folder.rglob("*")) if folder.is_dir() else [folder]
        for name in names:
            if name.is_file():
                stat = name.stat()
                digest.update(f"{name} {stat.st_size} {stat.st_mtime_ns}".encode())
    return digest.hexdigest()


def _files(config: StudyConfig) -> Sequence[str]:
    given = (config.data.harmful, config.data.harmless, config.data.eval)
    texts = (config.texts.plain, config.texts.chat, config.guard.model, config.bench.include_path)
    return [v for v in (*given, *texts) if isinstance(v, str)]
