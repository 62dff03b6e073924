"""Classifier weights and the geometric median against scikit-learn, SciPy and the definitions."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from sklearn.discriminant_analysis import LinearDiscriminantAnalysis
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import vauban
from vauban.directions.classifiers import shrinkage, solve


def blobs(n: int, d: int, seed: int = 0, shift: float = 3.0) -> tuple[np.ndarray, np.ndarray]:
    """Rows about a common mean, the classes `shift` apart along a random unit vector."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    u = rng.normal(size=d)
    X = rng.normal(size=(n, d)) + 3.0 + shift * np.outer(y - 0.5, u / np.linalg.norm(u))
    return X.astype(np.float32), y


@pytest.mark.parametrize(("n", "d"), [(60, 150), (150, 20)])
@pytest.mark.parametrize(
    ("kind", "oracle"),
    [
        ("logistic", LogisticRegression(C=0.3, solver="newton-cholesky", tol=1e-10)),
        ("svm", LinearSVC(C=0.3, dual=False, tol=1e-10, max_iter=100_000)),
    ],
)
def test_weights_are_scikit_learns(n: int, d: int, kind: str, oracle: Any) -> None:
    X, y = blobs(n, d)
    found = vauban.fit_classifier(mx.array(X), mx.array(y), kind=kind, C=0.3, scale=1.0)
    oracle.fit(X.astype(np.float64), y)
    w = oracle.coef_[0]
    assert np.abs(np.array(found.vector) - w).max() <= 1e-4 * np.abs(w).max()
    assert abs(found.bias - oracle.intercept_[0]) <= 1e-3 * max(1.0, abs(oracle.intercept_[0]))


@settings(max_examples=40, deadline=None)
@given(
    n=st.integers(4, 110),
    r=st.integers(1, 110),
    size=st.sampled_from([1e-2, 1.0, 1e3, 1e5]),
    kind=st.sampled_from(["logistic", "svm"]),
    seed=st.integers(0, 9),
)
def test_a_solution_is_at_its_minimum(n: int, r: int, size: float, kind: str, seed: int) -> None:
    """The gradient of the objective that the docstring names is gone.

    Fewer rows than dimensions and more of them, and rows as large as massive activations.
    """
    rng = np.random.default_rng(seed)
    labels = np.arange(n) % 2 == 1
    x = rng.normal(size=(n, r)) * size ** rng.uniform(0.5, 1.0)
    x += np.outer(labels, rng.normal(size=r)) * size
    w, bias = solve(kind, x, labels, 0.1)
    sign = np.where(labels, 1.0, -1.0)

    def gradient(w: np.ndarray, bias: float) -> np.ndarray:
        margin = sign * (x @ w + bias)
        if kind == "logistic":
            first = -0.1 * sign * np.exp(-np.logaddexp(0.0, margin))
        else:
            first = -0.2 * sign * np.maximum(0.0, 1.0 - margin)
        return np.append(w + first @ x, first.sum() + (bias if kind == "svm" else 0.0))

    start = np.linalg.norm(gradient(np.zeros_like(w), 0.0))
    assert np.linalg.norm(gradient(w, bias)) <= 1e-6 * start


@pytest.mark.parametrize(("n", "d"), [(60, 150), (150, 20)])
def test_discriminant_is_scikit_learns_at_the_same_shrinkage(n: int, d: int) -> None:
    X, y = blobs(n, d)
    x = X.astype(np.float64)
    inside = x - np.stack([x[y == 0].mean(0), x[y == 1].mean(0)])[y]
    eigenvalues = np.linalg.eigvalsh(inside.T @ inside / n)
    a, _ = shrinkage(np.maximum(eigenvalues, 0), n, d)
    oracle = LinearDiscriminantAnalysis(solver="lsqr", shrinkage=1 - a).fit(x, y)
    found = vauban.fit_classifier(mx.array(X), mx.array(y), kind="lda", scale=1.0)
    assert 0 < a < 1
    assert np.allclose(found.vector, oracle.coef_[0], rtol=1e-3, atol=1e-5)
    assert np.isclose(found.bias, oracle.intercept_[0], rtol=1e-3)


@pytest.mark.parametrize("kind", ["logistic", "svm", "lda"])
def test_one_c_fits_all_scales(kind: str) -> None:
    """Late layers have norms 40 times those of early ones; the direction must not feel it."""
    X, y = blobs(50, 80)
    small = vauban.fit_classifier(mx.array(X), mx.array(y), kind=kind)
    large = vauban.fit_classifier(mx.array(40 * X), mx.array(y), kind=kind)
    assert np.allclose(small.unit, large.unit, atol=1e-4)
    scores = np.array(mx.array(40 * X) @ large.vector) + large.bias
    assert ((scores > 0) == y).all()
    if kind != "lda":
        raw = [
            vauban.fit_classifier(mx.array(k * X), mx.array(y), kind=kind, scale=1.0).unit
            for k in (0.01, 40)
        ]
        assert abs(float((raw[0] * raw[1]).sum())) < 0.999


def test_shrinkage_is_clamped_and_optimal_in_its_family() -> None:
    """Bodnar's intensity brings the sample covariance closer to the truth than either end."""
    rng = np.random.default_rng(3)
    d, n = 40, 60
    truth = np.diag(np.linspace(0.2, 3.0, d))
    x = rng.normal(size=(n, d)) @ np.sqrt(truth)
    s = np.cov(x.T, bias=True)
    a, b = shrinkage(np.linalg.eigvalsh(s), n, d)
    errors = {
        k: np.linalg.norm(k * s + (1 - k) * np.trace(s) / d * np.eye(d) - truth) for k in (0, 1, a)
    }
    assert np.isclose(b, (1 - a) * np.trace(s) / d)
    assert errors[a] < min(errors[0], errors[1])
    assert shrinkage(np.ones(4), 2, 4)[0] == 0.0
    assert 0.0 <= shrinkage(np.array([1.0, 1.01]), 3, 2)[0] <= 1.0


def test_geometric_median_minimises_the_sum_of_distances() -> None:
    rng = np.random.default_rng(1)
    x = rng.normal(size=(31, 5)).astype(np.float32)
    x[0] *= 100

    def objective(m: np.ndarray) -> float:
        return float(np.linalg.norm(x.astype(np.float64) - m, axis=1).sum())

    best = minimize(objective, x.mean(0), method="BFGS", options={"gtol": 1e-9})
    found = np.array(vauban.geometric_median(mx.array(x)), dtype=np.float64)
    assert objective(found) <= best.fun + 1e-6
    # One outlier a hundred times as far moves the mean, not the median.
    assert np.linalg.norm(found) < 0.1 * np.linalg.norm(x.mean(0)) + 1.0


def test_geometric_median_may_be_a_data_point() -> None:
    x = mx.array([[0.0, 0], [1, 0], [-1, 0], [0, 1], [0, -1], [0, 0]])
    assert np.allclose(vauban.geometric_median(x), 0, atol=1e-6)
    # The mean starts on a data point that is not the median: it has to be left.
    x = mx.array([[0.0, 0.0], [-3, 0], [1, 0.1], [1, -0.1], [1, 0.0]])
    assert float(vauban.geometric_median(x)[0]) > 0.5


def test_median_difference_resists_outliers() -> None:
    X, y = blobs(60, 12, shift=4.0)
    X[:6:2] += 500.0
    robust = vauban.fit_geometric_median(mx.array(X), mx.array(y)).unit
    clean = vauban.fit_mean_difference(mx.array(X[6:]), mx.array(y[6:])).unit
    plain = vauban.fit_mean_difference(mx.array(X), mx.array(y)).unit
    assert float((robust * clean).sum()) > 0.9 > 0.5 > abs(float((plain * clean).sum()))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: vauban.fit_classifier(X, mx.zeros(20)), "both classes"),
        (lambda X, y: vauban.fit_classifier(X, y, kind="tree"), "kind is 'tree'"),
        (lambda X, y: vauban.fit_classifier(X, y, C=0), "C is 0"),
        (lambda X, y: vauban.fit_classifier(X, y, scale=-1.0), "scale is"),
        (lambda X, y: vauban.fit_classifier(X + float("nan"), y), "NaN"),
        (lambda X, y: vauban.fit_classifier(mx.ones((20, 3)), y), "no direction"),
        (lambda X, y: vauban.fit_geometric_median(mx.ones((20, 3)), y), "medians are equal"),
        (lambda X, y: vauban.geometric_median(X[0]), "expected"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    X, y = blobs(20, 4)
    with pytest.raises(vauban.InputError, match=message):
        call(mx.array(X), mx.array(y))
