"""Two models compared: their folders, then their behaviour on the same prompts in pairs.

Loads both; the weights' comparison is `folder_diff`'s, the figures are the evaluation room's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vauban._common import Progress
from vauban.comparison.folder_diff import FolderDiff, compare_folders
from vauban.errors import InputError
from vauban.evaluation import EvalResult, PairedResult, evaluate, paired_verdicts
from vauban.models import load


@dataclass(frozen=True)
class ModelDiff:
    """What differs between two models; `evaluation` and the paired tests are None without prompts.

    `refusal` pairs the verdicts on the given prompts, `over_refusal` those on the harmless ones; a
    test is None where no prompt has a verdict on both sides.

    >>> import vauban
    >>> organism = vauban.organism_path("dense")
    >>> found = vauban.diff_models(organism, organism)
    >>> found.folders.conclusion, found.evaluation is None
    ('weights equal', True)
    """

    folders: FolderDiff
    evaluation: EvalResult | None = None
    refusal: PairedResult | None = None
    over_refusal: PairedResult | None = None

    @property
    def conclusion(self) -> str:
        return self.folders.conclusion

    def summary(self) -> str:
        lines = [self.folders.summary()]
        if self.evaluation is not None:
            lines.append(self.evaluation.summary())
        for name, test in (("refusal", self.refusal), ("over-refusal", self.over_refusal)):
            if test is not None:
                lines.append(f"{name} in pairs: {test.summary()}")
        return "\n".join(lines)

    def to_dict(self) -> dict[str, Any]:
        parts = {
            "evaluation": self.evaluation, "refusal": self.refusal,
            "over_refusal": self.over_refusal,
        }  # fmt: skip
        return {
            **self.folders.to_dict(),
            **{name: None if part is None else part.to_dict() for name, part in parts.items()},
        }


def check_comparable(folders: FolderDiff) -> None:
    """InputError for models that give a text other tokens: their answers are not compared."""
    if not folders.settings.same_tokens:
        raise InputError(
            f"the behaviour of {folders.base} and {folders.edited} cannot be compared: "
            f"{folders.settings.tokenizer}. Their weights can (leave the prompts out)"
        )


def diff_models(
    base: str | Path,
    edited: str | Path,
    *,
    tokenizer: Any = None,
    prompts: Sequence[Any] | None = None,
    harmless: Sequence[Any] | None = None,
    max_tokens: int = 100,
    direction: Any = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> ModelDiff:
    """`compare_folders`, and with prompts both models' answers, likelihoods and paired tests.

    Args:
        tokenizer: both models'; None: the base's.
        prompts: requests whose refusals are compared; None: the folders alone.
        harmless: requests that should be answered; None: the bundled ones.

    Raises:
        InputError: models with other vocabularies or tokenizers, where there are prompts, and
            what `compare_folders` raises.

    >>> import vauban
    >>> organism = vauban.organism_path("dense")
    >>> options = {"prompts": ["Rob a shop."], "harmless": ["Say hello."], "max_tokens": 4}
    >>> diff_models(organism, organism, **options).refusal.difference
    0.0
    """
    folders = compare_folders(base, edited, direction=direction, seed=seed, progress=progress)
    if prompts is None:
        return ModelDiff(folders)
    check_comparable(folders)
    model, own = load(base)[:2]
    changed = load(base, adapter_path=str(edited)) if folders.adapter else load(edited)
    result = evaluate(
        model, changed[0], tokenizer or own, prompts, max_tokens=max_tokens, harmless=harmless,
        progress=progress,
    )  # fmt: skip
    return ModelDiff(folders, result, *(_paired(result, kind) for kind in ("harmful", "harmless")))


def _paired(result: EvalResult, kind: str) -> PairedResult | None:
    rows = result.answers[kind]
    return paired_verdicts(
        (row["refused_original"] for row in rows), (row["refused_modified"] for row in rows)
    )
