"""Reading a direction from anything that holds one, and the algebra of bases."""

from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from vauban import quick
from vauban._common import largest, probe_tokens
from vauban.errors import InputError
from vauban.linalg import as_basis, as_direction, as_vector, project_out, unit

V = mx.array([3.0, 0.0, -4.0])
ROWS = np.random.default_rng(0).normal(size=(2, 5))


@pytest.mark.parametrize(
    "value",
    [
        V,
        V.astype(mx.bfloat16),
        np.array(V, dtype=np.float64),
        [3, 0, -4],
        [[3.0, 0.0, -4.0]],
        SimpleNamespace(basis=V[None]),
        SimpleNamespace(direction=V, directions=mx.eye(3)),
        SimpleNamespace(directions=V[None]),
        SimpleNamespace(vector=V),
    ],
)
def test_a_direction_is_read_from_whatever_holds_one(value: Any) -> None:
    assert np.allclose(as_direction(value, "test"), [0.6, 0.0, -0.8])
    assert np.allclose(as_vector(value, "test"), V)
    assert as_basis(value, "test").shape == (1, 3)
    assert as_basis(value, "test").dtype == mx.float32


def test_bases_span_their_rows_and_keep_the_first_ones_sense() -> None:
    basis = np.array(as_basis(ROWS, "test"))
    assert np.allclose(basis @ basis.T, np.eye(2), atol=1e-6)
    assert np.allclose(ROWS - ROWS @ basis.T @ basis, 0, atol=1e-6)
    assert basis[0] @ ROWS[0] == pytest.approx(np.linalg.norm(ROWS[0]))
    h = mx.array(np.random.default_rng(1).normal(size=(2, 4, 5)).astype(np.float32))
    assert mx.abs(project_out(h, mx.array(basis)) @ mx.array(ROWS.T)).max().item() <= 1e-5


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (None, "expected an array"),
        ("auto", "expected an array"),
        (mx.zeros(3), "is zero"),
        (mx.array([1.0, float("nan"), 0.0]), "NaN or inf"),
        (mx.zeros((0, 3)), "empty basis"),
        (mx.ones((1, 2, 3)), r"expected \(d,\) or \(k, d\)"),
        (mx.ones((4, 3)), r"expected \(d,\) or \(k, d\)"),
        (mx.stack([V, 2 * V]), "linearly dependent"),
        (mx.ones(4), "4 components; the residual stream has 3"),
        (SimpleNamespace(left=V, right=V), "oblique map"),
    ],
)
def test_what_names_no_direction_is_refused(value: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        as_basis(value, "test", 3)
    with pytest.raises(InputError, match="2 directions are given"):
        as_direction(mx.eye(3)[:2], "test")


def test_quick_compares_and_steers_with_anything_that_holds_a_direction() -> None:
    X = mx.random.normal((20, 6), key=mx.random.key(0)) + mx.arange(20)[:, None] % 2
    fitted = vauban.fit_mean_difference(X, mx.arange(20) % 2)
    assert quick.compare(fitted, fitted.vector).cosine == pytest.approx(1.0)
    assert quick.compare(fitted, [-float(v) for v in fitted.vector]).degrees == pytest.approx(180.0)
    found = vauban.analyze_geometry({"fitted": fitted, "numpy": np.array(fitted.vector)})
    assert found.cosines[0][1] == pytest.approx(1.0)
    assert max(vauban.principal_angles(fitted, SimpleNamespace(direction=fitted.vector))) < 1e-4


def test_unit_is_exact_in_float64() -> None:
    assert abs(np.linalg.norm(unit(ROWS[0], "test")) - 1.0) <= 1e-15


def test_probe_tokens_stay_within_the_vocabulary() -> None:
    for walk in range(3):
        ids = probe_tokens(400, 160, walk)
        assert len(ids) == 400 and min(ids) >= 0 and max(ids) < 160
    assert probe_tokens(5, 1000) != probe_tokens(5, 1000, 1)


def test_the_largest_value_does_not_pass_over_nan() -> None:
    nan = float("nan")
    assert max(0.0, nan) == 0.0
    assert np.isnan(largest([0.0, nan])) and np.isnan(largest([nan, 1.0]))
    assert largest([0.5, 2.0]) == 2.0 and largest([]) == 0.0
