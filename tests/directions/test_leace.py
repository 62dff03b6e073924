"""Concept erasure against the concept-erasure package, and the theorems it rests on."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

import vauban
from tests.directions.make_leace_fixture import CASES, data, erased
from vauban.directions import fit_oracle

STORED = np.load(Path(__file__).with_name("leace.npz"))
FITS = {
    "shrunk": lambda X, y: vauban.fit_leace(X, y)(X),
    "plain": lambda X, y: vauban.fit_leace(X, y, shrinkage=False)(X),
    "linear": lambda X, y: vauban.fit_leace(X, y, affine=False)(X),
    "orth": lambda X, y: vauban.fit_mean_projection(X, y)(X),
    "oracle": lambda X, y: fit_oracle(X, y)(X, y),
}


def relative(ours: mx.array, theirs: np.ndarray, X: np.ndarray) -> float:
    """Largest difference, relative to the largest change that the eraser makes."""
    return float(np.abs(np.array(ours) - theirs).max() / np.abs(theirs - X).max())


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("kind", FITS)
def test_equals_the_package(name: str, kind: str) -> None:
    X, y = STORED[f"{name}.X"], STORED[f"{name}.y"]
    found = FITS[kind](mx.array(X), mx.array(y))
    assert relative(found, STORED[f"{name}.{kind}"], X) <= 1e-3


def test_equals_the_package_live() -> None:
    """On other data than the stored, wherever torch and concept-erasure are installed."""
    pytest.importorskip("concept_erasure")
    for seed, shape in enumerate(CASES.values()):
        X, y = data(*shape, seed + 50)
        for kind, theirs in erased(X, y).items():
            assert relative(FITS[kind](mx.array(X), mx.array(y)), theirs, X) <= 1e-3


def toy(n: int = 300, d: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    X, y = data(n, d, 2, seed)
    return X, y


@pytest.mark.parametrize("shape", [(300, 12), (40, 90)])
def test_no_linear_probe_beats_the_majority(shape: tuple[int, int]) -> None:
    X, y = toy(*shape)
    for fit in (vauban.fit_leace, vauban.fit_mean_projection):
        clean = np.array(fit(mx.array(X), mx.array(y))(mx.array(X)), dtype=np.float64)
        gap = np.abs(clean[y == 1].mean(0) - clean[y == 0].mean(0)).max()
        assert gap <= 1e-4 * np.abs(X[y == 1].mean(0) - X[y == 0].mean(0)).max()
        assert np.allclose(clean.mean(0), X.mean(0), atol=1e-4)
        if shape[0] > shape[1]:
            probe = LogisticRegression(tol=1e-10, max_iter=5000).fit(clean, y)
            assert np.abs(probe.coef_).max() <= 1e-3
            assert probe.score(clean, y) <= 0.51


def test_the_change_is_the_smallest_that_guards() -> None:
    """Oracle <= LEACE <= orthogonal projection in mean squared change (theorem 4.3)."""
    X, y = toy()
    change = {
        name: float(((np.array(FITS[name](mx.array(X), mx.array(y))) - X) ** 2).sum(1).mean())
        for name in ("oracle", "plain", "orth")
    }
    assert change["oracle"] <= change["plain"] * (1 + 1e-6)
    assert change["plain"] < change["orth"]
    # Any other read-out with the same left vector moves X further.
    fitted = vauban.fit_leace(mx.array(X), mx.array(y), shrinkage=False)
    left, right = np.array(fitted.left, np.float64)[:, 0], np.array(fitted.right, np.float64)[0]
    delta = X[y == 1].mean(0) - X[y == 0].mean(0)
    rng = np.random.default_rng(0)
    for _ in range(20):
        nudge = rng.normal(size=12) * 0.05
        # Still guarding: right . delta keeps its value.
        nudge -= delta * (nudge @ delta) / (delta @ delta)
        other = np.outer((X - X.mean(0)) @ (right + nudge), left)
        assert (other**2).sum(1).mean() > change["plain"]


def test_closed_form_of_the_binary_case() -> None:
    X, y = toy()
    x = X.astype(np.float64)
    delta = x[y == 1].mean(0) - x[y == 0].mean(0)
    a = np.linalg.solve(np.cov(x.T, bias=True), delta)
    a /= delta @ a
    fitted = vauban.fit_leace(mx.array(X), mx.array(y), shrinkage=False)
    left, right = np.array(fitted.left), np.array(fitted.right)
    cosine = abs(left[:, 0] @ delta) / np.linalg.norm(left) / np.linalg.norm(delta)
    assert fitted.rank == 1 and cosine > 1 - 1e-6
    assert np.allclose(
        left @ right, np.outer(delta, a), atol=1e-5 * np.abs(np.outer(delta, a)).max()
    )
    P = np.eye(12) - left @ right
    assert np.allclose(P @ P, P, atol=1e-5)


def test_equivariance() -> None:
    X, y = toy()
    base = np.array(FITS["shrunk"](mx.array(X), mx.array(y)))
    swapped = FITS["shrunk"](mx.array(X), mx.array(1 - y))
    assert np.allclose(swapped, base, atol=1e-5)
    moved = FITS["shrunk"](mx.array(5 * X + 3), mx.array(y))
    assert np.allclose(moved, 5 * base + 3, atol=1e-3)
    # One-hot labels say the same as 0 and 1.
    one_hot = FITS["shrunk"](mx.array(X), mx.array(np.eye(2)[y]))
    assert np.allclose(one_hot, base, atol=1e-4)


@pytest.mark.parametrize("shape", [(300, 12), (60, 150)])
def test_splince_keeps_the_other_label(shape: tuple[int, int]) -> None:
    """Cov(x, y) becomes 0 and Cov(x, keep) stays exactly; LEACE alone changes the latter."""
    X, y = toy(*shape)
    rng = np.random.default_rng(5)
    keep = ((y + (rng.random(len(y)) < 0.3)) % 2).astype(np.int32)
    X = X + np.outer(keep, rng.normal(size=shape[1])).astype(np.float32)

    def covariance(x: Any, label: np.ndarray) -> np.ndarray:
        x = np.array(x, dtype=np.float64)
        return (x - x.mean(0)).T @ (label - label.mean()) / len(label)

    fitted = vauban.fit_splince(mx.array(X), mx.array(y), mx.array(keep), shrinkage=False)
    clean = fitted(mx.array(X))
    size = np.abs(covariance(X, y)).max()
    assert np.abs(covariance(clean, y)).max() <= 1e-4 * size
    assert np.abs(covariance(clean, keep) - covariance(X, keep)).max() <= 1e-4 * size
    plain = vauban.fit_leace(mx.array(X), mx.array(y), shrinkage=False)(mx.array(X))
    assert np.abs(covariance(plain, keep) - covariance(X, keep)).max() > 1e-2 * size
    with pytest.raises(vauban.InputError, match="share a direction"):
        vauban.fit_splince(mx.array(X), mx.array(y), mx.array(1 - y))


def test_factors_are_thin_and_dtypes_are_kept() -> None:
    X, y = toy(30, 500)
    fitted = vauban.fit_leace(mx.array(X), mx.array(y))
    assert fitted.left.shape == (500, 1) and fitted.right.shape == (1, 500)
    assert 0 < fitted.shrinkage < 1
    for dtype in (mx.float16, mx.bfloat16):
        assert fitted(mx.array(X).astype(dtype)).dtype == dtype
    assert not np.array(vauban.fit_leace(mx.array(X), mx.array(y), affine=False).mean).any()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: vauban.fit_leace(X, mx.zeros(30)), "labels"),
        (lambda X, y: vauban.fit_leace(X, y + 1), "labels"),
        (lambda X, y: vauban.fit_leace(X, y[:4]), "shape"),
        (lambda X, y: vauban.fit_leace(X[0], y), "at least two rows"),
        (lambda X, y: vauban.fit_leace(mx.ones((30, 4)), y), "rows of X are equal"),
        (lambda X, y: vauban.fit_leace(X * mx.array(float("inf")), y), "NaN"),
        (lambda X, y: vauban.fit_mean_projection(mx.ones((30, 4)), y), "means are equal"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    X, y = toy(30, 6)
    with pytest.raises(vauban.InputError, match=message):
        call(mx.array(X), mx.array(y))
