"""What the card of a source model hands on: its license, languages, tags, and what it was made of.

Reads the front matter of a README.md; knows no run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.repocard import metadata_load

_HANDED_ON = (
    "license", "license_name", "license_link", "language", "pipeline_tag", "base_model", "tags",
)  # fmt: skip


def source_card(folder: str | Path) -> dict[str, Any] | None:
    """The fields of a model folder's card that its descendants keep; None without a card.

    Front matter that is no YAML hands nothing on: it is the source's, and stops no run.
    """
    path = Path(folder) / "README.md"
    if not path.is_file():
        return None
    try:
        fields = metadata_load(path)
    except (yaml.YAMLError, ValueError, UnicodeDecodeError):
        return {}
    if not isinstance(fields, dict):
        return {}
    return {name: fields[name] for name in _HANDED_ON if fields.get(name)}


def front_matter(model: Mapping[str, Any], tag: str, *, adapter: bool = False) -> str:
    """A card's head as the Hub reads it: license, languages and tags of the source, its own `tag`,
    and what the model descends from.

    Args:
        model: the run document's "model", with "card" as `source_card` reads it.

    >>> print(front_matter({"hub_id": "a/b", "card": {"license": "mit"}}, "interpretability"))
    ---
    library_name: mlx
    license: mit
    tags:
    - mlx
    - vauban
    - interpretability
    base_model: a/b
    base_model_relation: finetune
    ---
    <BLANKLINE>
    """
    source = dict(model.get("card") or {})
    # The Hub rejects a base_model that is no repository id: a local folder hands on its own base.
    base = source.pop("base_model", None)
    tags = source.pop("tags", None)
    known = tags if isinstance(tags, list) else []
    fields = {
        "library_name": "mlx",
        **source,
        "tags": list(dict.fromkeys([*known, "mlx", "vauban", tag])),
    }
    if model.get("hub_id") or base:
        fields["base_model"] = model.get("hub_id") or base
        fields["base_model_relation"] = "adapter" if adapter else "finetune"
    return f"---\n{yaml.safe_dump(fields, sort_keys=False, allow_unicode=True)}---\n"
