"""Which programs open an exported folder. Knows names and formats; opens nothing.

What is said holds by the load matrix of the tests (`docs/opens-where.md`).
"""

from __future__ import annotations

from collections.abc import Iterable

from vauban.export.source import Source
from vauban.export.transformers_names import AS_TRANSFORMERS

MLX_LM, SWIFT, MLX_VLM = "mlx-lm", "MLX Swift apps", "mlx-vlm"
TRANSFORMERS, LLAMA_CPP, PEFT = "transformers", "llama.cpp's converter", "PEFT"
PROGRAMS = (MLX_LM, SWIFT, MLX_VLM, TRANSFORMERS, LLAMA_CPP, PEFT)


def programs_of(source: Source, names: Iterable[str], layout: str) -> tuple[str, ...]:
    """The programs that open a folder with tensors of these `names`, made from `source`.

    transformers and llama.cpp's converter take floats under transformers' names: those of a source
    that mlx-lm has to convert are, and so are those of families that mlx-lm names alike. mlx-vlm
    takes models with a vision tower whose tensors are there.
    """
    names = set(names)
    opens = [MLX_LM, SWIFT]
    if "vision_config" in source.config and any("vis" in name for name in names):
        opens.append(MLX_VLM)
    packed = any(name.endswith(".scales") for name in names)
    alike = source.config.get("model_type") in AS_TRANSFORMERS
    as_stored = layout in ("same", "hf") and not source.same_layout
    stacked = any(".switch_mlp." in name for name in names)
    if not packed and not stacked and (alike or as_stored):
        opens += [TRANSFORMERS, LLAMA_CPP]
    return tuple(opens)
