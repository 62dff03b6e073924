"""The refusal surface of a run: which rows, the two directions, before and after a change.

Values in and values out, like the other stages; what is written is put together in `files`.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vauban._common import Progress
from vauban.config import RunConfig
from vauban.directions import DirectionResult
from vauban.errors import InputError
from vauban.evaluation import (
    SurfaceComparison,
    SurfacePrompt,
    SurfaceScan,
    compare_surfaces,
    load_surface_prompts,
    measure_harmfulness,
    scan_surface,
    surface_path,
)
from vauban.interventions import Intervention
from vauban.pipeline.prompt_sets import PromptSet
from vauban.pipeline.stages import Opened, judge_of, tell
from vauban.report import plot_surface

ANSWERS, PICTURE = "surface.jsonl", "surface.png"


def surface_rows(config: RunConfig, folder: Path | None) -> list[SurfacePrompt]:
    """The rows that the configuration names, else the model's own, else the bundled ones."""
    given = config.surface.rows
    if given == "default":
        return load_surface_prompts()
    return load_surface_prompts(given or surface_path(folder))


def surface_stage(
    opened: Opened,
    config: RunConfig,
    result: DirectionResult,
    rows: Sequence[SurfacePrompt],
    harmful: PromptSet,
    harmless: PromptSet,
    changes: Sequence[Intervention] | None,
    *,
    progress: Progress | None = None,
) -> SurfaceScan | SurfaceComparison:
    """Scan the rows; with `changes` also under them, compared."""
    settings, total = config.surface, len(rows) * (1 if changes is None else 2)
    done = 0

    def step(_: str, at: int, n: int) -> None:
        tell(progress, "surface", done + at, total)

    harmfulness = measure_harmfulness(
        opened.model, opened.tokenizer, list(harmful.prompts), list(harmless.prompts), result,
        batch_size=config.measure.batch_size, seed=config.seed,
    )  # fmt: skip
    options: dict[str, Any] = {
        "harmfulness": harmfulness,
        "max_tokens": settings.max_tokens,
        "phrases": config.eval.refusal_phrases,
        "judge": judge_of(opened, config),
        "progress": step,
    }
    before = scan_surface(opened.model, opened.tokenizer, result, rows, **options)
    if changes is None:
        return before
    done = len(rows)
    after = scan_surface(
        opened.model, opened.tokenizer, result, rows, interventions=changes, **options
    )
    return compare_surfaces(before, after)


def write_surface(folder: Path, surface: SurfaceScan | SurfaceComparison) -> str | None:
    """Write the answers and, where matplotlib is installed, the maps; why there are no maps."""
    if isinstance(surface, SurfaceComparison):
        sides = {"before": surface.before, "after": surface.after}
    else:
        sides = {"before": surface}
    with (folder / ANSWERS).open("w", encoding="utf-8") as stream:
        for side, scan in sides.items():
            for point in scan.points:
                line = {"side": side, **point.to_dict(), "answer": point.answer}
                stream.write(json.dumps(line, ensure_ascii=False) + "\n")
    try:
        plot_surface(surface, folder / PICTURE)
    except InputError as error:
        return str(error)
    return None
