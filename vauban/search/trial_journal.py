"""Finished trials on disk, in optuna's journal format, and the sampler that proposes the next one.

Only finished trials are written, each as one line: what a killed process was working on leaves no
trace, and is proposed again with the same parameters. Knows optuna; knows no model.
"""

from __future__ import annotations

import fcntl
import json
import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any

from vauban._extras import need
from vauban.errors import InputError, shown
from vauban.search.front import Trial
from vauban.search.space import Span

STUDY = "vauban search"
_IDENTITY, _WARM = "identity", "warm_start"
# Trials before the sampler has something to model; the known cuts come first and count.
STARTUP = 12


class TrialJournal:
    """The finished trials of one search, in order, and the known cuts that it begins with.

    path      a file, made where it does not exist; None keeps everything in memory
    identity  what the search depends on, JSON-safe; a file of another search is an InputError that
              names the difference, and is not written to

    The file is locked while the journal is open, so that two processes cannot share it.
    """

    def __init__(
        self, path: str | Path | None, identity: Mapping[str, Any], bounds: Mapping[str, Span],
        choices: Mapping[str, Sequence[Any]], objectives: Sequence[str],
    ) -> None:  # fmt: skip
        optuna = need("optuna", "search", "the search")
        self._optuna, self._objectives = optuna, tuple(objectives)
        kinds = optuna.distributions
        self._distributions: dict[str, Any] = {
            **{name: kinds.FloatDistribution(*ends) for name, ends in bounds.items()},
            **{name: kinds.CategoricalDistribution(tuple(v)) for name, v in choices.items()},
        }
        self.trials: list[Trial] = []
        self.warm_start: list[dict[str, Any]] | None = None
        """Parameters of the known cuts; None until they are recorded."""
        self._frozen: list[Any] = []
        self._study: Any = None
        self._lock: int | None = None
        if path is not None:
            self._open(Path(path), identity)

    def begin(self, warm_start: Sequence[Mapping[str, Any]]) -> None:
        """Record the known cuts, before the first trial."""
        self.warm_start = [dict(parameters) for parameters in warm_start]
        if self._study is not None:
            with _quiet(self._optuna):
                self._study.set_user_attr(_WARM, self.warm_start)

    def propose(self, seed: int) -> dict[str, Any]:
        """The parameters of the next trial: a known cut, or what TPE draws from all before it.

        The sampler is made anew for each trial, seeded with `seed` plus its number, so that a trial
        depends on the finished ones alone (tree-structured Parzen estimator: Bergstra et al. 2011;
        several objectives: Ozaki et al. 2022).
        """
        number, known = len(self.trials), self.warm_start or []
        if number < len(known):
            return dict(known[number])
        optuna = self._optuna
        with _quiet(optuna):
            sampler = optuna.samplers.TPESampler(
                seed=seed + number, multivariate=True, n_startup_trials=STARTUP
            )
            study = optuna.create_study(
                directions=["minimize"] * len(self._objectives), sampler=sampler
            )
            # To the sampler a stopped trial is one with what was measured of it.
            study.add_trials(self._frozen)
            return dict(study.ask(self._distributions).params)

    def add(self, trial: Trial) -> None:
        """Record a finished trial."""
        if self._study is not None:
            with _quiet(self._optuna):
                self._study.add_trial(self._freeze(trial, stopped=trial.state == "pruned"))
        self._take(trial)

    def close(self) -> None:
        """Let another process have the file."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def _take(self, trial: Trial) -> None:
        self.trials.append(trial)
        self._frozen.append(self._freeze(trial, stopped=False))

    def _freeze(self, trial: Trial, *, stopped: bool) -> Any:
        trials = self._optuna.trial
        state = trials.TrialState.PRUNED if stopped else trials.TrialState.COMPLETE
        figures = {name: v for name, v in trial.to_dict().items() if name != "parameters"}
        return trials.create_trial(
            state=state, values=None if stopped else trial.values(self._objectives),
            params=dict(trial.parameters), distributions=self._distributions,
            user_attrs={"vauban": figures},
        )  # fmt: skip

    def _open(self, path: Path, identity: Mapping[str, Any]) -> None:
        self._lock = _locked(path)
        try:
            if path.stat().st_size:
                _check_format(path)
                _drop_cut_line(path)
            self._study = self._load(path, identity)
        except BaseException:
            self.close()
            raise

    def _load(self, path: Path, identity: Mapping[str, Any]) -> Any:
        optuna = self._optuna
        journal = optuna.storages.journal
        with _quiet(optuna):
            storage = optuna.storages.JournalStorage(
                journal.JournalFileBackend(str(path), lock_obj=_FileLocked())
            )
            names = [summary.study_name for summary in optuna.get_all_study_summaries(storage)]
            if names not in ([], [STUDY]):
                raise InputError(f"{path} holds optuna's study {names[0]!r}, not a search's trials")
            study = optuna.create_study(
                storage=storage, study_name=STUDY, load_if_exists=True,
                directions=["minimize"] * len(self._objectives),
            ) if not names else optuna.load_study(study_name=STUDY, storage=storage)  # fmt: skip
            known = study.user_attrs.get(_IDENTITY)
            # As it will be read back: JSON has lists alone.
            given = json.loads(json.dumps(identity))
            if known is not None or study.trials:
                _check_identity(path, known or {}, given)
            else:
                study.set_user_attr(_IDENTITY, given)
            self.warm_start = study.user_attrs.get(_WARM)
            names = [field.name for field in fields(Trial)]
            for frozen in study.trials:
                figures = frozen.user_attrs["vauban"]
                known_figures = {n: figures[n] for n in names if n != "parameters"}
                self._take(Trial(parameters=dict(frozen.params), **known_figures))
        return study


def _check_identity(path: Path, known: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    for name in {**known, **given}:
        before, now = known.get(name), given.get(name)
        if before == now:
            continue
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            _check_identity(
                path,
                {f"{name}, {k}": v for k, v in before.items()},
                {f"{name}, {k}": v for k, v in now.items()},
            )
        raise InputError(
            f"{path} belongs to another search: {name} is {shown(before)} in the file and "
            f"{shown(now)} here. Nothing was changed; choose another storage file"
        )


def _check_format(path: Path) -> None:
    with path.open("rb") as stream:
        head = stream.read(64)
    if not head.startswith(b'{"op_code":'):
        raise InputError(f"{path} is no journal of a search; choose another storage file")


def _drop_cut_line(path: Path) -> None:
    """Take away a last line that a killed process has not finished; optuna would stumble on it."""
    with path.open("rb+") as stream:
        content = stream.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            stream.truncate(whole)


def _locked(path: Path) -> int:
    """A descriptor that holds the file's lock; the system lets go of it when a process dies."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise InputError(f"{path}: the storage cannot be opened: {error.strerror}") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise InputError(f"{path} is in use by another search") from error
    return descriptor


class _FileLocked:
    """A lock for optuna's backend that does nothing: the file is locked as long as it is open.

    optuna's own lock files outlive a killed process and hold the next one up for half a minute.
    """

    def acquire(self) -> bool:
        return True

    def release(self) -> None:
        return None


@contextmanager
def _quiet(optuna: Any) -> Iterator[None]:
    """optuna without lines on the terminal and without notes that an argument is experimental."""
    level = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            yield
    finally:
        optuna.logging.set_verbosity(level)
