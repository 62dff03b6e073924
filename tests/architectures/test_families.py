"""Every family of mlx-lm on a tiny model: forward, rows, capture, writers, cut, generation.

One measurement per configuration (`measure`), one assertion per property; the totals at the end
name the families behind them.
"""

from typing import Any

import pytest

from tests.architectures.build import module_of, names
from tests.architectures.expected import (
    EQUAL_LENGTHS,
    LEAKS,
    NO_SITES,
    NO_TAP,
    PREFIX_NOT_SHARED,
    REFUSED,
)
from tests.architectures.measure import Facts, measure
from vauban.models.families import NOT_CUTTABLE

RUNNING = [name for name in names() if name not in REFUSED]


def facts(name: str) -> Facts:
    found = measure(name)
    assert not found.refused, found.refused
    return found


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_refused_by_name(name: str) -> None:
    import mlx.core as mx

    if "Metal" in REFUSED[name] and mx.metal.is_available():
        pytest.skip("this machine has Metal")
    found = measure(name)
    assert REFUSED[name] in found.refused and name in found.refused


@pytest.mark.parametrize("name", RUNNING)
def test_forward_equals_the_models_own(name: str) -> None:
    found = facts(name)
    assert found.path in ("manual", "tap")
    assert found.parity <= 1e-5


@pytest.mark.parametrize("name", RUNNING)
def test_rows_equal_single_prompts(name: str) -> None:
    """Padded on the right, and behind a common prefix read once."""
    found = facts(name)
    assert found.padding <= 1e-4
    assert (found.prefix is None) == (name in PREFIX_NOT_SHARED)
    assert found.prefix is None or found.prefix <= 1e-4


@pytest.mark.parametrize("name", RUNNING)
def test_the_loop_sees_what_the_tap_sees(name: str) -> None:
    found = facts(name)
    assert (found.capture is None) == (name in NO_TAP)
    assert found.capture is None or found.capture <= 1e-4


@pytest.mark.parametrize("name", RUNNING)
def test_writers_are_those_the_probe_finds(name: str) -> None:
    probe = facts(name).probe
    assert probe.missed == () and probe.invented == ()
    assert probe.gains <= 1e-3 or module_of(name) in NOT_CUTTABLE


@pytest.mark.parametrize("name", RUNNING)
def test_a_full_cut_empties_the_stream(name: str) -> None:
    leak = facts(name).leak
    if name in LEAKS:
        assert LEAKS[name] * 0.8 <= leak <= LEAKS[name] * 1.25
    else:
        assert leak <= 1e-5


@pytest.mark.parametrize("name", RUNNING)
def test_a_change_of_a_blocks_term_arrives_in_the_stream(name: str) -> None:
    """At attention_output and mlp_output, with every multiplier and norm where it belongs."""
    found = facts(name)
    assert NO_SITES[name] in found.sites if name in NO_SITES else found.sites == "exact"


@pytest.mark.parametrize("name", RUNNING)
def test_uneven_generation_equals_single_prompts(name: str) -> None:
    found = facts(name)
    assert found.generated
    assert found.uneven == (name not in EQUAL_LENGTHS)


def share(good: Any) -> tuple[float, list[str]]:
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
    }
    for rule, (wanted, good) in rules.items():
        reached, others = share(good)
        assert reached >= wanted, f"{rule}: {reached:.1%} without {others}"
