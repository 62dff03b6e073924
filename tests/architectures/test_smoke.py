"""A few families that between them meet every mechanism: for the oldest mlx-lm that is admitted.

`test_families` holds every family of the newest version to more; this file alone runs in the
environment of the oldest, where a family that does not exist yet is passed over.
"""

import importlib.util

import pytest

from tests.architectures.build import module_of
from tests.architectures.expected import LEAKS, SMOKE
from tests.architectures.measure import measure


def exists(name: str) -> bool:
    return importlib.util.find_spec(f"mlx_lm.models.{module_of(name)}") is not None


@pytest.mark.parametrize("name", SMOKE)
def test_a_family_from_forward_to_cut(name: str) -> None:
    if not exists(name):
        pytest.skip(f"this mlx-lm has no {name}")
    found = measure(name)
    assert not found.refused, found.refused
    assert found.parity <= 1e-5
    assert found.padding <= 1e-4
    assert found.prefix is None or found.prefix <= 1e-4
    assert found.capture is None or found.capture <= 1e-4
    assert found.probe.missed == () and found.probe.invented == ()
    assert found.leak <= 1e-5 or name in LEAKS
    assert found.generated


def test_nearly_all_of_them_exist() -> None:
    assert sum(map(exists, SMOKE)) >= len(SMOKE) - 2
