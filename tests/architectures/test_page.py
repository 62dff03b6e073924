"""The page "Which models work" says what is measured, for the version of mlx-lm that it names."""

import importlib.util
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

DOCS = Path(__file__).resolve().parents[2] / "docs"


def test_the_page_is_what_is_measured() -> None:
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    if f"mlx-lm {mlx_lm.__version__}." not in page or mx.metal.is_available():
        pytest.skip("the page was written for another mlx-lm or another machine")
    spec = importlib.util.spec_from_file_location("page", DOCS / "generate_models_page.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert page == generator.render()
