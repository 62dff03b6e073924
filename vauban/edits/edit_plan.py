"""A planned edit as a value: tried at run time, made in memory, measured, or written.

Knows models through `vauban.models`; decides nothing about what is cut.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vauban._common import Progress, probe_tokens
from vauban.edits.heads import read_head, untie
from vauban.edits.modules import (
    float_module,
    module_weight,
    refuse_unknown_packing,
    repacked_module,
)
from vauban.edits.packed import Rounding
from vauban.edits.storing import PRECISIONS, store_packed
from vauban.edits.streamed import edited_rows
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add, Intervention, ModuleOutputs, ModuleWeights
from vauban.models import (
    anatomy,
    batches,
    folder_of,
    forget,
    forward,
    residual_writers,
    unpacked_shape,
)


@dataclass(frozen=True, eq=False)
class Leakage:
    """What is left: per writer ‖U W'‖/‖U W‖, and at most |d.h|/‖h‖ in the stream."""

    writers: Mapping[str, float]
    stream: float

    @property
    def worst(self) -> float:
        return max(self.writers.values(), default=0.0)

    def summary(self) -> str:
        return f"direction left: at most {self.worst:.1e} per writer, stream {self.stream:.1e}"

    def to_dict(self) -> dict[str, Any]:
        return {"writers": dict(self.writers), "worst": self.worst, "stream": self.stream}


def check_storage(precision: str | None, rounding: Rounding) -> None:
    """InputError for a storage format or a rounding that does not exist."""
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected None or one of {PRECISIONS[1:]}")
    if rounding not in get_args(Rounding):
        raise InputError(f"rounding is {rounding!r}; expected one of {get_args(Rounding)}")


@dataclass(frozen=True, eq=False)
class EditPlan:
    """A planned edit: nothing is changed until `apply` or `export`.

    `embedding` is what happens to it: "cut" (untied), "untie" (the head keeps the old matrix),
    "tied" (the shared matrix is cut, the head changes with it) or "kept".
    """

    updates: tuple[Update, ...]
    basis: mx.array
    embedding: Literal["cut", "untie", "tied", "kept"]
    head_path: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    _model: Any = None
    constants: tuple[Add, ...] = ()
    """What an affine cut puts into the stream instead (`affine`)."""

    @property
    def model(self) -> nn.Module:
        """The model that was planned for."""
        return self._model

    def virtual(self) -> tuple[Intervention, ...]:
        """The same change at run time: give it to `generate`, `forward` or `evaluate`.

        A plain cut is made at the writers' outputs and costs no memory. Norm modes, sparse rows
        and protected inputs act inside the matrix: those writers run with their edited float
        matrix, computed once.
        """
        return (*self._cut_at_run_time(), *self.constants)

    def _cut_at_run_time(self) -> tuple[Intervention, ...]:
        tied = frozenset(
            u.path for u in self.updates if u.is_embedding and self.embedding == "tied"
        )
        outputs = {u.path: (u.basis, u.alpha) for u in self.updates if u.acts_on_outputs}
        inside = [u for u in self.updates if not u.acts_on_outputs]
        found: list[Intervention] = []
        if outputs:
            head = self._head_at_run_time({p: outputs[p] for p in tied if p in outputs})
            found.append(ModuleOutputs({**outputs, **head.factors}, head.heads))
        if inside:
            if tied - outputs.keys() and read_head(self._model).reader == "matrix":
                raise InputError(
                    f"{type(self._model).__module__}'s head reads the embedding's matrix itself, "
                    "which has no run-time form with norm_preserve; apply or export the plan"
                )
            modules = dict(self._model.named_modules())
            edited = {u.path: u.weight(module_weight(modules[u.path])) for u in inside}
            biases = {
                u.path: u.new_bias(modules[u.path].bias)
                for u in inside
                if u.bias and "bias" in modules[u.path]
            }
            found.append(ModuleWeights(edited, biases, tied))
        return tuple(found)

    @property
    def is_whole(self) -> bool:
        """A cut of every writer and table at α 1, which should leave nothing in the stream."""
        every = all(u.complete and u.alpha == 1.0 and not u.bias_left for u in self.updates)
        tables = self.embedding != "kept"
        return every and tables and len(self.updates) == len(residual_writers(self._model))

    def head_alone(self) -> tuple[Intervention, ...]:
        """What a hard-tied head changes by itself, the stream left as it is; () without one.

        Give it to `compare_likelihood` to see what the tie alone costs.
        """
        if self.embedding != "tied":
            return ()
        heads = {u.path: (u.basis, u.alpha) for u in self.updates if u.is_embedding}
        return (self._head_at_run_time(heads),)

    def _head_at_run_time(self, heads: Mapping[str, tuple[mx.array, float]]) -> ModuleOutputs:
        """The same cut of a head that shares the tables `heads`, made where it reads the stream.

        A head that reads the matrix directly, past the embedding's own method, has the final norm's
        output changed instead, which nothing else reads.
        """
        parts = anatomy(self._model)
        if parts.embedding_path not in heads or read_head(self._model).reader != "matrix":
            return ModuleOutputs({}, heads)
        paths = [p for p, m in self._model.named_modules() if m is parts.norm]
        if not paths:
            raise InputError(
                f"{type(self._model).__module__}'s head reads the embedding's matrix itself, "
                "behind no norm that could be changed instead; apply or export the plan"
            )
        return ModuleOutputs({paths[0]: heads[parts.embedding_path]}, {})

    def calibrated(
        self,
        tokenizer: Any = None,
        prompts: Sequence[Any] | None = None,
        *,
        max_tokens: int = 24,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> EditPlan:
        """The same plan, its packed writers to be rounded for what they read.

        The cut model answers `prompts` greedily with up to `max_tokens`; without prompts 64 texts
        of 32 random tokens stand in, which serve the embedding as well and the matrices less. Kept
        is, of every packed matrix (of all where the model in memory was unpacked to run faster),
        the second moment of its inputs over prompts and answers, of an expert that of its own
        tokens; of the embedding the Fisher information of its output, by gradients of the
        log-likelihood of tokens drawn with `seed`. Rounding then lets later columns make good what
        earlier ones did wrong (GPTQ, Frantar et al. 2022, arXiv 2210.17323), each column still
        exact along the direction, and moves the embedding's codes where that matters least: the cut
        model comes out nearer to the float cut where it is used.

        Raises InputError for an empty list of prompts, and for prompts without a tokenizer.

        >>> import vauban
        >>> model, tokenizer = vauban.load(vauban.organism_path("4bit"))
        >>> plan = vauban.plan_cut(model, mx.random.normal((128,)))
        >>> plan.calibrated(tokenizer, ["Name a colour."]).settings["calibration"]["modules"]
        13
        """
        from vauban.edits.calibration import calibrate

        return calibrate(
            self, tokenizer, prompts, max_tokens=max_tokens, seed=seed, progress=progress
        )

    def apply(
        self,
        model: nn.Module,
        precision: str | None = None,
        *,
        rounding: Rounding = "two-sided",
        calibrate: bool | None = None,
    ) -> nn.Module:
        """Edit `model` in place and return it.

        Packed writers stay packed, direction-exact (`precision` None or "same"); "8bit" packs
        edited modules with 8 bits, "float" unpacks them. What stays packed is rounded for what it
        reads, as `export` does it and unless `calibrate` is False or the rounding "fast"; the
        prompts are those of the folder that `vauban.load` read the plan's model from. Raises
        InputError before anything is changed for options that do not exist and for another model
        than the plan's.
        """
        check_storage(precision, rounding)
        if precision == "adapter":
            raise InputError(
                "precision 'adapter' is a folder, not a change in memory; export the plan with it "
                "and load the model with adapter_path="
            )
        self.check_modules(model, "the model")
        modules = dict(model.named_modules())
        for update in self.updates:
            refuse_unknown_packing(modules[update.path])
        updates = self.updates
        if (
            precision in (None, "same")
            and rounding == "two-sided"
            and any("scales" in modules[u.path] for u in updates)
        ):
            from vauban.edits.reading import with_inputs

            updates = with_inputs(self, folder_of(self.model), calibrate).updates
        if self.embedding == "untie":
            untie(model, modules)
        for update in updates:
            module = modules[update.path]
            stored = store_packed(module, update, precision, rounding)
            if stored is not None:
                edited = repacked_module(
                    module, stored.arrays, stored.bits, stored.group_size, stored.mode
                )
            else:
                rows = mx.concatenate(list(edited_rows(module, update)))
                shape = unpacked_shape(module)
                edited = float_module(module)
                edited.weight = rows.reshape(shape)
            if update.bias and "bias" in edited:
                edited.bias = update.new_bias(edited.bias)
            mx.eval(edited.parameters())
            if edited is not module:
                model.update_modules(tree_unflatten([(update.path, edited)]))
        forget(model)
        return model

    def check_modules(self, model: nn.Module, name: str) -> None:
        """InputError where `model` lacks a module of the plan, or has one of another width."""
        writers = {w.path: w for w in residual_writers(model)}
        for update in self.updates:
            width = int(update.basis.shape[1])
            if update.path not in writers:
                raise InputError(
                    f"{name} has no writer {update.path}; this plan was made for another model"
                )
            shape = writers[update.path].shape
            if shape[-1 if update.writes_rows else -2] != width:
                raise InputError(
                    f"{update.path} of {name} has shape {shape}; this plan was made for one whose "
                    f"{'rows' if update.writes_rows else 'outputs'} have {width} coordinates"
                )

    def leakage(self, model: nn.Module | None = None) -> Leakage:
        """Share of the direction left per writer, and in the stream on a fixed probe text.

        Analytic: each edited matrix is computed in float32, measured and dropped. The stream is
        read under the run-time cut at every residual.
        """
        model = model if model is not None else self._model
        self.check_modules(model, "the model")
        modules = dict(model.named_modules())
        writers = {}
        for update in self.updates:
            before = module_weight(modules[update.path])
            writers[update.path] = update.share_left(update.weight(before), before)
        return Leakage(writers, self.stream_leak(model))

    def stream_leak(
        self, model: nn.Module | None = None, token_lists: Sequence[Sequence[int]] | None = None
    ) -> float:
        """Largest |D h|/‖h‖ over all residuals under the run-time cut.

        Over every token of `token_lists` (held-out prompts, say), or of a fixed probe; without the
        constants of an affine cut.
        """
        model = model if model is not None else self._model
        if token_lists is None:
            token_lists = [probe_tokens(24, anatomy(model).vocabulary)]
        if not token_lists:
            raise InputError("token_lists is empty; expected at least one list of tokens")
        virtual = self._cut_at_run_time()
        worst = 0.0
        for batch in batches(token_lists, equal_lengths=True):
            out = forward(model, batch.tokens, positions="all", interventions=virtual, logits=False)
            assert out.residual is not None
            h = out.residual.astype(mx.float32)
            share = mx.linalg.norm(h @ self.basis.T, axis=-1) / mx.linalg.norm(h, axis=-1)
            worst = max(worst, float(share.max()))
        return worst

    def write(self, model_path: str | Path, folder: Path, precision: str | None = None) -> Any:
        """Write the edited checkpoint of `model_path` into `folder`; an `ExportReport`.

        Reads nothing for rounding by itself, as `export` does: calibrate the plan before.
        """
        from vauban.export import write_plan

        return write_plan(self, model_path, folder, precision)

    def export(
        self,
        model_path: str | Path,
        output_dir: str | Path,
        precision: str | None = None,
        force: bool = False,
        *,
        calibrate: bool | None = None,
    ) -> Any:
        """Write a complete folder that `mlx_lm.load` opens, and read back what is left in it.

        What stays packed is rounded for what it reads on measuring prompts (`calibrated`, on 64
        harmful and 64 harmless ones that the model's folder names, else bundled ones). `calibrate`
        None does so where the weights of the plan's model have been read and the folder has its
        tokenizer, and notes in `edit.safetensors` where not; True raises InputError where not;
        False rounds alike for any input. A plan that is calibrated already stays as it is.
        """
        from vauban.export import export_plan

        return export_plan(self, model_path, output_dir, precision, force, calibrate=calibrate)

    def summary(self) -> str:
        kinds: dict[str, int] = {}
        for update in self.updates:
            kinds[update.kind] = kinds.get(update.kind, 0) + 1
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines = [
            f"cut of {self.basis.shape[0]} direction(s) from {len(self.updates)} writers "
            f"({counts}), alpha {self.settings['alpha']}, embedding {self.embedding}"
        ]
        read = self.settings.get("calibration")
        if read:
            texts = f"{read['prompts']} prompts" if read["prompts"] else "random tokens"
            lines.append(f"packed writers rounded for what they read on {texts}")
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "embedding": self.embedding,
            "directions": int(self.basis.shape[0]),
            "writers": [
                {
                    "path": u.path,
                    "layer": u.layer,
                    "kind": u.kind,
                    "alpha": u.alpha,
                    "complete": u.complete,
                }
                for u in self.updates
            ],
            "notes": list(self.notes),
        }
