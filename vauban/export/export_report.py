"""What stands in an exported folder, as a value that says whether it is what was planned."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

from vauban.errors import CheckError
from vauban.export.compare_logits import LogitsCompared

# bfloat16 storage alone misses 2 to 5e-3 of a direction; float16, float32 and packed far less.
LIMIT = 0.02


@dataclass(frozen=True)
class ExportReport:
    """What stands in an exported folder.

    direction_left      largest ‖U Ŵ‖/‖U W‖ over the edited modules, read from the file
    writers             the same per edited module; |1 - alpha| is what a plain cut leaves
    missed              ‖U (Ŵ - W')‖/‖U W‖ per edited module: how far what it writes is from what
                        was planned, its sign included; of an edited bias how far it is from the
                        planned one, as a share of what the cut changes in it
    expected_left       what the plan leaves at most; None where it leaves part on purpose
    stored              per edited module its format and, where packed, what the rounding did
    modules_edited      residual writers the plan edited; `modules_present` all there are
    untouched_identical whether every other tensor has the source's bytes, an untied head those of
                        the table it was given; None without a source; `differs` names the first
    layout              whose names and shapes the weights have: "same", "mlx" or "hf"
    notes               what of the source could not be kept, a sentence each
    programs            those that open the folder
    logits_difference   from the run-time cut, as a share of what the cut changes; None unmeasured
    logits_limit        what `ok` allows there; None where it is no ground for a judgement

    >>> import tempfile, mlx.core as mx, vauban
    >>> source = vauban.organism_path("dense")
    >>> model, _ = vauban.load(source)
    >>> plan = vauban.plan_cut(model, mx.ones(128))
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     report = plan.export(source, f"{folder}/cut")
    >>> report.ok, report.modules_edited, report.direction_left < 1e-2
    (True, 12, True)
    """

    folder: str
    direction_left: float
    modules_edited: int
    modules_present: int
    untouched_identical: bool | None
    writers: dict[str, float]
    missed: dict[str, float]
    expected_left: float | None
    precision: str
    stored: dict[str, dict[str, Any]]
    files: dict[str, str]
    bytes: int
    differs: str | None = None
    layout: str = "same"
    notes: tuple[str, ...] = ()
    programs: tuple[str, ...] = ()
    logits_difference: float | None = None
    logits_limit: float | None = None

    @property
    def ok(self) -> bool:
        """The file holds what was planned."""
        return not self._wrong()

    def check(self) -> ExportReport:
        """Self, or CheckError saying what is not as it should be."""
        wrong = self._wrong()
        if wrong:
            raise CheckError(f"{self.folder}: {wrong}")
        return self

    def _wrong(self) -> str:
        """What is not as it was planned; "" where all is."""
        if self.untouched_identical is False:
            return f"tensors that should not change differ from the source, {self.differs} first"
        # `not <=` holds for NaN too, which `max` would pass over.
        beyond = {path: missed for path, missed in self.missed.items() if not missed <= LIMIT}
        if beyond:
            worst = max(beyond, key=lambda path: beyond[path])
            left = f"; {self.writers[worst]:.1%} is left" if worst in self.writers else ""
            return (
                f"{worst} is off by {self.missed[worst]:.1%} of the direction from what was "
                f"planned{left}; expected at most {LIMIT:.1%}"
            )
        difference, limit = self.logits_difference, self.logits_limit
        if difference is not None and limit is not None and not difference <= limit:
            return (
                f"the logits differ from the run-time cut by {difference:.1%} of what the cut "
                f"changes; expected at most {limit:.1%}"
            )
        return ""

    def with_logits(self, compared: LogitsCompared, *, packed: bool, exact: bool) -> ExportReport:
        """The same report with the logits compared, and judged unless edited modules are `packed`.

        `exact`: every edited matrix is stored in float32.
        """
        limit = None if packed else compared.limit(exact=exact)
        return replace(self, logits_difference=compared.share, logits_limit=limit)

    def summary(self) -> str:
        same = {True: "untouched tensors identical", False: "UNTOUCHED TENSORS DIFFER", None: ""}
        parts = [
            f"direction left {self.direction_left:.2e}",
            f"{self.modules_edited} of {self.modules_present} writers edited",
            self._storage(),
            same[self.untouched_identical],
            f"{self.bytes / 1e6:.1f} MB" if self.bytes >= 1e5 else f"{self.bytes / 1e3:.1f} kB",
        ]
        return "\n".join(["; ".join(p for p in parts if p), *self.notes])

    def _storage(self) -> str:
        """How the edited modules are stored, as a count per format."""
        counts: dict[str, int] = {}
        for facts in self.stored.values():
            name = f"{facts['bits']}-bit {facts['mode']}" if "bits" in facts else facts["mode"]
            counts[name] = counts.get(name, 0) + 1
        return "stored as " + ", ".join(f"{n} {name}" for name, n in counts.items())

    def to_dict(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "folder"}
