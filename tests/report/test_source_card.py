"""A card hands on what the source's card says of license, languages, tags and origin."""

from pathlib import Path

import yaml

from vauban.report import source_card
from vauban.report.source_card import front_matter

CARD = """---
license: other
license_name: someone-license
license_link: LICENSE
language: [en, fr]
tags: [chat, mlx]
base_model: someone/base
datasets: [x]
---
# A model
"""


def head(model: dict, **options: bool) -> dict:
    text = front_matter(model, "interpretability", **options)
    assert text.startswith("---\n") and text.endswith("---\n")
    fields = yaml.safe_load(text.strip("-\n"))
    assert isinstance(fields, dict)
    return fields


def test_a_hub_model_is_the_base_and_its_license_stays(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    fields = head({"hub_id": "someone/model", "card": source_card(tmp_path)})
    assert fields["base_model"] == "someone/model"
    assert fields["base_model_relation"] == "finetune"
    assert fields["license_name"] == "someone-license" and fields["license_link"] == "LICENSE"
    assert fields["language"] == ["en", "fr"] and "datasets" not in fields
    assert fields["tags"] == ["chat", "mlx", "vauban", "interpretability"]


def test_a_local_folder_hands_on_its_own_base(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(CARD)
    fields = head({"hub_id": None, "card": source_card(tmp_path)}, adapter=True)
    assert fields["base_model"] == "someone/base" and fields["base_model_relation"] == "adapter"


def test_no_card_and_a_damaged_one(tmp_path: Path) -> None:
    assert source_card(tmp_path) is None
    (tmp_path / "README.md").write_text("---\nlicense: [a\n---\n")
    assert source_card(tmp_path) == {}
    (tmp_path / "README.md").write_text("# no front matter\n")
    assert source_card(tmp_path) == {}
    fields = head({"hub_id": None, "card": {}})
    assert "base_model" not in fields and fields["library_name"] == "mlx"
