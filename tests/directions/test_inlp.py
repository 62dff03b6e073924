"""INLP against a scikit-learn loop in full dimension, and the theorems of its projection."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression
from sklearn.svm import LinearSVC

import vauban
from vauban.directions.inlp import _distinct, _split, fit_inlp_batch

CLASSIFIERS = {
    "logistic": lambda: LogisticRegression(C=0.1, solver="newton-cholesky", tol=1e-10),
    "svm": lambda: LinearSVC(C=0.1, dual=False, tol=1e-10, max_iter=100_000),
}


def planted(n: int, d: int, k: int, seed: int = 0, shift: float = 3.0) -> Any:
    """A concept of k dimensions: orthogonal class shifts of falling size, (X, y, axes (k, d))."""
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    axes = np.linalg.qr(rng.normal(size=(d, k)))[0].T
    X = rng.normal(size=(n, d)) + 0.5
    # Independent noise along each axis: no single classifier reads them all at once.
    for j in range(k):
        X += np.outer((y - 0.5) * shift + rng.normal(size=n) * j, axes[j])
    return X.astype(np.float32), y, axes


def reference(X: np.ndarray, y: np.ndarray, kind: str, steps: int, seed: int = 0) -> Any:
    """Ravfogel et al.'s loop with full-dimensional scikit-learn fits and projectors (d, d)."""
    x = X.astype(np.float64)
    train, dev = _split(y.astype(bool), _distinct(x), 0.2, seed)
    x = x / (np.linalg.norm(x[train], axis=1).mean() / x.shape[1] ** 0.5)
    P, rows, accuracies = np.eye(x.shape[1]), [], []
    for _ in range(steps):
        fitted = CLASSIFIERS[kind]().fit(x[train] @ P, y[train])
        accuracies.append(fitted.score(x[dev] @ P, y[dev]))
        rows.append(fitted.coef_[0] / np.linalg.norm(fitted.coef_[0]))
        q = np.linalg.qr(np.array(rows).T)[0]
        P = np.eye(x.shape[1]) - q @ q.T
    return np.array(rows), np.array(accuracies), len(dev)


@pytest.mark.parametrize("kind", ["logistic", "svm"])
@pytest.mark.parametrize(("n", "d"), [(120, 300), (240, 40)])
def test_equals_a_loop_in_full_dimension(kind: str, n: int, d: int) -> None:
    X, y, _ = planted(n, d, 4)
    found = vauban.fit_inlp(mx.array(X), mx.array(y), kind=kind, min_accuracy=0.0, max_rank=6)
    rows, accuracies, n_dev = reference(X, y, kind, 6)
    assert np.abs(np.array(found.accuracies) - accuracies).max() <= 2.0 / n_dev + 1e-9
    cosines = np.linalg.svd(np.array(found.directions) @ np.linalg.qr(rows.T)[0])[1]
    assert cosines.min() > 1 - 1e-3
    # Not only the span: each direction, in the order of extraction.
    assert np.abs((np.array(found.directions) * rows).sum(1)).min() > 1 - 1e-3


def test_projection_has_the_rank_of_the_accepted_classifiers() -> None:
    """No rank inflation: with float32 projectors summed up, 10 directions have become 36."""
    X, y, _ = planted(100, 256, 3)
    found = vauban.fit_inlp(mx.array(X), mx.array(y), min_accuracy=0.0, max_rank=10)
    V = np.array(found.directions, dtype=np.float64)
    P = np.array(found.projection(), dtype=np.float64)
    assert found.rank == len(found.accuracies) == 10
    assert np.abs(V @ V.T - np.eye(10)).max() <= 1e-5
    assert int((np.linalg.svd(np.eye(256) - P)[1] > 1e-4).sum()) == 10
    assert np.abs(P @ P - P).max() <= 1e-5 and np.abs(V @ P).max() <= 1e-5


def test_rank_k_removes_the_first_k_as_they_were_found() -> None:
    """An SVD of I - P would return any rotation of V: the class gap along v_1 would stay."""
    X, y, _ = planted(160, 64, 3)
    found = vauban.fit_inlp(mx.array(X), mx.array(y), min_accuracy=0.0, max_rank=4)
    v = np.array(found.directions[0])
    gap = X[y == 1].mean(0) - X[y == 0].mean(0)
    first = np.array(found.projection(rank=1))
    assert abs(v @ first @ gap) <= 1e-4 * abs(v @ gap)
    others = np.array(found.directions[1:])
    assert np.allclose(others @ first @ gap, others @ gap, atol=1e-4)
    flipped = np.array(found.projection(rank=1, alpha=2.0))
    assert np.isclose(v @ flipped @ gap, -(v @ gap), rtol=1e-3)
    assert np.allclose(flipped @ flipped, np.eye(64), atol=1e-5)
    assert np.allclose(found.projection(rank=0), np.eye(64))


def test_a_planted_concept_is_found() -> None:
    X, y, axes = planted(600, 64, 2, shift=5.0)
    found = vauban.fit_inlp(mx.array(X), mx.array(y))
    inside = np.linalg.norm(np.array(found.directions[:1]) @ axes.T, axis=1)
    assert found.rank >= 1 and inside.min() > 0.9
    erased = X @ np.array(found.projection())
    probe = LogisticRegression(max_iter=2000).fit(erased[:400], y[:400])
    before = LogisticRegression(max_iter=2000).fit(X[:400], y[:400])
    assert before.score(X[400:], y[400:]) > 0.95 > 0.75 > probe.score(erased[400:], y[400:])


def test_permuted_labels_find_nothing() -> None:
    X, y, _ = planted(128, 200, 1)
    ranks = []
    for seed in range(20):
        order = np.random.default_rng(seed).permutation(len(y))
        ranks.append(vauban.fit_inlp(mx.array(X), mx.array(y[order]), seed=seed).rank)
    assert max(ranks) <= 1 and sum(r > 0 for r in ranks) <= 2


def test_a_failing_classifier_is_not_removed() -> None:
    X, y, _ = planted(128, 200, 1)
    found = vauban.fit_inlp(mx.array(X), mx.array(y), patience=3)
    failed = [a for a in found.tried if a < found.threshold]
    assert len(failed) >= 3 and found.tried[-3:] == tuple(failed[-3:])
    assert found.rank == len(found.tried) - len(failed)
    assert all(a >= found.threshold for a in found.accuracies)
    assert np.isclose(found.threshold, found.majority + 1.0 / np.sqrt(26), atol=1e-9)


def test_the_scale_of_a_layer_does_not_matter() -> None:
    X, y, _ = planted(100, 120, 2)
    small = vauban.fit_inlp(mx.array(X), mx.array(y))
    large = vauban.fit_inlp(mx.array(37.0 * X), mx.array(y))
    assert small.accuracies == large.accuracies
    assert np.abs((small.directions * large.directions).sum(1)).min() > 1 - 1e-4
    assert np.isclose(large.scale / small.scale, 37.0, rtol=1e-4)


def test_batch_equals_single_problems() -> None:
    X = np.stack([planted(60, 40, 2, seed=s)[0] for s in range(6)], axis=1).reshape(60, 3, 2, 40)
    y = planted(60, 40, 2)[1]
    seen: list[tuple[str, int, int]] = []
    found = fit_inlp_batch(
        mx.array(X), mx.array(y), max_rank=3, progress=lambda *step: seen.append(step)
    )
    assert seen == [("inlp", i + 1, 6) for i in range(6)]
    assert sorted(found) == [(i, j) for i in range(3) for j in range(2)]
    for (i, j), result in found.items():
        alone = vauban.fit_inlp(mx.array(X[:, i, j]), mx.array(y), max_rank=3)
        assert alone.accuracies == result.accuracies
        assert np.allclose(alone.directions, result.directions, atol=1e-6)


def test_repeated_prompts_leave_the_held_out_part() -> None:
    X, y, _ = planted(60, 20, 1)
    X[30:] = X[:30]
    with pytest.warns(vauban.VaubanWarning, match="held-out rows stand in the training part"):
        vauban.fit_inlp(mx.array(X), mx.array(y))
    # The embedding of a template's token is the same for all prompts: no repetition by itself.
    several = np.stack([planted(60, 20, 1)[0], np.ones((60, 20), np.float32)], axis=1)
    found = fit_inlp_batch(mx.array(several), mx.array(y))
    assert found[(1,)].rank == 0 and found[(1,)].directions.shape == (0, 20)
    assert found[(1,)].projection().shape == (20, 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: vauban.fit_inlp(X, mx.ones(30)), "both classes"),
        (lambda X, y: vauban.fit_inlp(X[:4], y[:4]), "at least 3 rows of each"),
        (lambda X, y: vauban.fit_inlp(mx.ones((30, 4)), y), "distinct"),
        (lambda X, y: vauban.fit_inlp(X, y, min_accuracy="best"), "'auto' or a number"),
        (lambda X, y: vauban.fit_inlp(X, y, dev_fraction=1.5), "dev_fraction"),
        (lambda X, y: vauban.fit_inlp(X, y, max_rank=0), "max_rank is 0"),
        (lambda X, y: vauban.fit_inlp(X, y).projection(rank=40), "rank is 40"),
        (lambda X, y: fit_inlp_batch(X, y), "axis in between"),
    ],
)
@pytest.mark.filterwarnings("ignore::vauban.VaubanWarning")
def test_bad_input(call: Any, message: str) -> None:
    X, y, _ = planted(30, 10, 1)
    with pytest.raises(vauban.InputError, match=message):
        call(mx.array(X), mx.array(y))
