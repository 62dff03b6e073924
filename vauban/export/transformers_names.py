"""The names that transformers has for the parameters of an mlx-lm model, where they are known.

Knows families by their `model_type`; writes nothing.
"""

from __future__ import annotations

from collections.abc import Mapping

from vauban.export.origins import Origin
from vauban.export.source import Source
from vauban.export.tensor_files import LateTensors

_MIXTRAL = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}
# Families whose modules mlx-lm names as transformers does, experts aside.
AS_TRANSFORMERS = frozenset({
    "llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text", "phi3", "olmo",
    "olmo2", "olmo3", "smollm3", "granite", "cohere", "cohere2", "starcoder2", "stablelm",
    "helium", "seed_oss", "mixtral", "qwen2_moe", "qwen3_moe", "olmoe",
})  # fmt: skip


class NoPlace(Exception):
    """A tensor that has no place in a layout."""


def transformers_names(source: Source, edited: Mapping[str, LateTensors]) -> dict[str, Origin]:
    """{parameter: the names that transformers has for it} of a source with mlx-lm's names.

    Raises NoPlace for packed matrices and for families that are not known.
    """
    packed = [name for name in source.parameters if name.endswith(".scales")]
    if packed:
        raise NoPlace(f"{packed[0]} belongs to a packed matrix, which transformers does not read")
    if any(part == "scales" for item in edited.values() for part, *_ in item.expected_arrays):
        raise NoPlace("transformers does not read packed matrices, which precision '8bit' makes")
    kind = str(source.config.get("model_type"))
    if kind not in AS_TRANSFORMERS:
        raise NoPlace(f"vauban does not know transformers' names for {kind}")
    origins = {}
    for name, value in source.parameters.items():
        names: tuple[str, ...] = (name,)
        if ".switch_mlp." in name:
            head, _, rest = name.partition(".switch_mlp.")
            projection, _, part = rest.partition(".")
            if kind == "mixtral":
                projection = _MIXTRAL[projection]
            count = range(value.shape[0])
            names = tuple(f"{head}.experts.{e}.{projection}.{part}" for e in count)
        origins[name] = Origin(names)
    return origins
