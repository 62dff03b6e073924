"""The methods of `EditPlan` that call functions of later files and rooms, one line each.

This is the only file of the package that imports from its right. A plan stays a value: what tries,
applies, calibrates and writes it lives elsewhere, and is attached here so that users can write
`plan.export(...)`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mlx.nn as nn

from vauban._common import Progress
from vauban.interventions import Intervention

if TYPE_CHECKING:
    from vauban.edits.run_time import Leakage
    from vauban.export.calibrate import CalibratedPlan
    from vauban.export.export_report import ExportReport


class Conveniences:
    """Mixed into `EditPlan`; every method passes the plan on to the function that it names."""

    def virtual(self: Any) -> tuple[Intervention, ...]:
        """The same change at run time: give it to `generate`, `forward` or `evaluate`.

        A plain cut acts on the writers' outputs and costs no memory. Norm modes, sparse rows and
        protected inputs act inside the matrix: those writers run with their edited float matrix,
        which is computed once.
        """
        from vauban.edits.run_time import virtual

        return virtual(self)

    def head_alone(self: Any) -> tuple[Intervention, ...]:
        """What cutting a shared matrix changes in the head alone, the stream as it was; or ().

        Give it to `compare_likelihood` to see what the tie costs by itself.
        """
        from vauban.edits.run_time import head_alone

        return head_alone(self)

    def leakage(self: Any, model: nn.Module | None = None) -> Leakage:
        """Share of the direction that the planned edit leaves, per writer and in the stream.

        Each edited matrix is computed in float32, measured and dropped. The stream is read under
        the run-time cut, at every residual of a fixed probe text. Raises ModelError for NaN or inf
        in a matrix or in the stream.
        """
        from vauban.edits.run_time import leakage

        return leakage(self, model)

    def stream_leak(
        self: Any,
        model: nn.Module | None = None,
        token_lists: Sequence[Sequence[int]] | None = None,
    ) -> float:
        """Largest ‖D h‖/‖h‖ over all residuals and tokens under the run-time cut.

        `token_lists` None reads a fixed probe text. The constants of an affine cut do not count.
        Raises ModelError for NaN or inf in the stream.
        """
        from vauban.edits.run_time import stream_leak

        return stream_leak(self, model, token_lists)

    def calibrated(
        self: Any,
        tokenizer: Any = None,
        prompts: Sequence[Any] | None = None,
        *,
        max_tokens: int = 24,
        seed: int = 0,
        progress: Progress | None = None,
    ) -> CalibratedPlan:
        """The plan with what its packed writers read, which `apply` and `export` round for.

        The cut model answers `prompts` greedily with up to `max_tokens` tokens. Without prompts 64
        texts of 32 random tokens stand in; they serve the embedding as well, the matrices less.
        Every packed matrix gets the second moment of its inputs over prompts and answers, an expert
        that of the tokens routed to it. Rounding then lets later columns compensate for the errors
        of earlier ones (GPTQ, Frantar et al. 2022, arXiv 2210.17323); each column stays exact along
        the direction. The embedding gets the Fisher information of its output, from gradients of
        the log-likelihood of tokens drawn with `seed`, and its codes move where that is smallest.

        Raises InputError for an empty list of prompts, and for prompts without a tokenizer.

        >>> import mlx.core as mx, vauban
        >>> model, tokenizer = vauban.load(vauban.organism_path("4bit"))
        >>> plan = vauban.plan_cut(model, mx.random.normal((128,)))
        >>> plan.calibrated(tokenizer, ["Name a colour."]).settings["calibration"]["modules"]
        12
        """
        from vauban.export.calibrate import calibrate

        return calibrate(
            self, tokenizer, prompts, max_tokens=max_tokens, seed=seed, progress=progress
        )

    def apply(
        self: Any,
        model: nn.Module,
        precision: str | None = None,
        *,
        calibrate: bool | None = None,
        progress: Progress | None = None,
    ) -> nn.Module:
        """Edit `model` in place and return it.

        Packed writers stay packed, exact along the direction (`precision` None or "same"); "8bit"
        packs edited modules with 8 bits, "float" unpacks them. `calibrate` as for `export`; the
        prompts are those of the folder that `vauban.load` read the plan's model from, and a
        VaubanWarning says where nothing could be read.
        Raises InputError, before anything changes, for options that do not exist and for another
        model than the plan's.
        """
        from vauban.export.apply import apply_plan

        return apply_plan(self, model, precision, calibrate=calibrate, progress=progress)

    def write(
        self: Any,
        model_path: str | Path,
        folder: Path,
        precision: str | None = None,
        *,
        layout: str = "same",
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write the edited checkpoint of `model_path` into an existing `folder`; no calibration."""
        from vauban.export.write import write_plan

        return write_plan(self, model_path, folder, precision, layout=layout, progress=progress)

    def export(
        self: Any,
        model_path: str | Path,
        output_dir: str | Path,
        precision: str | None = None,
        force: bool = False,
        *,
        layout: str = "same",
        calibrate: bool | None = None,
        progress: Progress | None = None,
    ) -> ExportReport:
        """Write a complete folder that `mlx_lm.load` opens, and read back what it holds.

        `precision` "same" (None) keeps every module's format; "float", "8bit" and "adapter" are
        the others (`write_plan`). What stays packed is rounded for what it reads on measuring
        prompts (`calibrated`; 64 harmful and 64 harmless ones that the model's folder names, else
        bundled ones). `calibrate` None does so where the folder has a tokenizer of the model's
        vocabulary, and notes where it has none; True raises InputError there; False rounds alike
        for any input. A plan that is calibrated keeps what it has. `layout` "same" keeps the
        source's names and shapes, "mlx" takes mlx-lm's, "hf" transformers' (`write_plan`).

        Raises InputError, naming the modules, where the plan's model holds other weights than
        `model_path` stores: an adapter, or a change that was made in memory.
        """
        from vauban.export.write import export_plan

        return export_plan(
            self, model_path, output_dir, precision, force,
            layout=layout, calibrate=calibrate, progress=progress,
        )  # fmt: skip
