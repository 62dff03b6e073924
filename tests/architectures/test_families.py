"""Every family of mlx-lm on a tiny model: forward, rows, capture, writers, cut, generation, lens.

One test per configuration, which lists every property that does not hold; the totals at the end
name the families behind them.
"""

import importlib.util
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import mlx_lm
import pytest

from tests.architectures.build import module_of, names
from tests.architectures.expected import (
    EQUAL_LENGTHS,
    LEAKS,
    LENS,
    NO_SITES,
    NO_TAP,
    PREFIX_NOT_SHARED,
    REFUSED,
)
from tests.architectures.measure import Facts, measure
from vauban.models.families import NOT_CUTTABLE

DOCS = Path(__file__).resolve().parents[2] / "docs"


def differs(value: float | None, bound: float) -> bool:
    """Whether a measured difference is out of bounds; written so that NaN and None are."""
    return value is None or not value <= bound


def failures(name: str, found: Facts) -> list[str]:
    """What does not hold for a configuration, each with what was measured."""
    probe = found.probe
    gains_known = module_of(name) in NOT_CUTTABLE
    low, high = (LEAKS.get(name, 0.0) * share for share in (0.8, 1.25))
    rules = {
        # The forward pass is the model's own, by the loop or the tap.
        f"path {found.path}": found.path in ("manual", "tap"),
        f"logits differ by {found.parity}": not differs(found.parity, 1e-5),
        # Rows padded on the right, and behind a common prefix read once, are single prompts.
        f"padded rows differ by {found.padding}": not differs(found.padding, 1e-4),
        f"prefix shared: {found.prefix}": (found.prefix is None) == (name in PREFIX_NOT_SHARED),
        f"prefix differs by {found.prefix}": found.prefix is None
        or not differs(found.prefix, 1e-4),
        # The loop sees what the tap sees.
        f"tap: {found.capture}": (found.capture is None) == (name in NO_TAP),
        f"loop and tap differ by {found.capture}": found.capture is None
        or not differs(found.capture, 1e-4),
        # Writers are those that the numeric probe finds, with the same gains.
        f"writers missed {probe.missed}, invented {probe.invented}": not probe.missed
        and not probe.invented,
        f"gains differ by {probe.gains}": not differs(probe.gains, 1e-3) or gains_known,
        # A full cut empties the stream.
        f"leak {found.leak}": low <= found.leak <= max(high, 1e-5),
        # A change at attention_output and mlp_output arrives with every multiplier and norm.
        f"sites: {found.sites}": NO_SITES[name] in found.sites
        if name in NO_SITES
        else found.sites == "exact",
        # Generation of uneven prompts gives the answers of single ones.
        "generation differs from single prompts": found.generated,
        f"uneven batches: {found.uneven}": found.uneven == (name not in EQUAL_LENGTHS),
        # The last residual, read by the final norm and the head, gives the logits.
        f"lens differs by {found.lens}": not differs(found.lens, 1e-2 if name in LENS else 1e-5),
    }
    return [rule for rule, holds in rules.items() if not holds]


@pytest.mark.parametrize("name", names())
def test_a_family_from_forward_to_generation(name: str) -> None:
    found = measure(name)
    if name not in REFUSED:
        assert not found.refused, found.refused
        assert failures(name, found) == []
    elif "Metal" not in REFUSED[name] or not mx.metal.is_available():
        assert REFUSED[name] in found.refused and name in found.refused


def share(good: Callable[[Facts], bool]) -> tuple[float, list[str]]:
    """The share of all configurations for which `good` holds, and the others by name."""
    others = [name for name in names() if measure(name).refused or not good(measure(name))]
    return 1 - len(others) / len(names()), others


def test_totals() -> None:
    """The project's promise over all configurations, refused ones counted as failures."""
    assert len({module_of(name) for name in names()}) >= 120
    rules = {
        "manual and exact": (0.97, lambda f: f.path == "manual" and f.parity <= 1e-5),
        "padded rows": (0.97, lambda f: f.padding <= 1e-4),
        "shared prefix": (0.97, lambda f: f.prefix is not None and f.prefix <= 1e-4),
        "capture": (0.97, lambda f: f.capture is not None and f.capture <= 1e-4),
        "writers": (0.98, lambda f: not f.probe.missed and not f.probe.invented),
        "cut": (0.92, lambda f: f.leak <= 1e-5),
        "generation": (0.97, lambda f: f.generated),
        "lens": (0.97, lambda f: f.lens <= 1e-5),
    }
    for rule, (wanted, good) in rules.items():
        reached, others = share(good)
        assert reached >= wanted, f"{rule}: {reached:.1%} without {others}"


def test_the_page_which_models_work_is_what_is_measured() -> None:
    """For the version of mlx-lm that it names; the figures are those of the tests above."""
    page = (DOCS / "models.md").read_text(encoding="utf-8")
    if f"mlx-lm {mlx_lm.__version__}." not in page or mx.metal.is_available():
        pytest.skip("the page was written for another mlx-lm or another machine")
    spec = importlib.util.spec_from_file_location("page", DOCS / "generate_models_page.py")
    generator = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generator)
    assert page == generator.render()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parity": float("nan")}, "logits differ by nan"),
        ({"padding": 1e-3}, "padded rows differ"),
        ({"prefix": None}, "prefix shared: None"),
        ({"prefix": 1.0}, "prefix differs"),
        ({"capture": None}, "tap: None"),
        ({"leak": 0.1}, "leak 0.1"),
        ({"leak": float("nan")}, "leak nan"),
        ({"sites": "arrives 2.000 times"}, "sites: arrives"),
        ({"generated": False}, "generation differs"),
        ({"uneven": False}, "uneven batches"),
        ({"lens": None}, "lens differs by None"),
    ],
)
def test_what_does_not_hold_is_listed(change: dict[str, object], message: str) -> None:
    """The list itself can fail: one figure that is off is one line."""
    from dataclasses import replace

    found = replace(measure("llama"), **change)
    listed = failures("llama", found)
    assert len(listed) == 1 and message in listed[0]
