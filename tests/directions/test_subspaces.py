"""PCA, measured subspaces, principal angles and geometry against NumPy, SciPy and scikit-learn."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scipy.linalg import subspace_angles
from sklearn.decomposition import PCA

import vauban


def rows(n: int = 40, d: int = 12, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % 2
    X = rng.normal(size=(n, d)) * np.linspace(2, 0.2, d) + np.outer(y, rng.normal(size=d)) + 1
    return X.astype(np.float32), y


def test_paired_components_are_those_of_the_differences() -> None:
    X, y = rows()
    found = vauban.fit_pca(mx.array(X), mx.array(y), 3)
    difference = (X[y == 1] - X[y == 0]).astype(np.float64)
    _, s, vt = np.linalg.svd(difference)
    assert np.allclose(found.singular_values, s[:3], rtol=1e-5)
    assert np.allclose(np.abs(np.array(found.basis) @ vt[:3].T), np.eye(3), atol=1e-4)
    assert np.allclose(found.explained_variance, (s**2 / (s**2).sum())[:3], rtol=1e-5)
    # The same as scikit-learn's PCA of all rows centred pair by pair (RepE's pca_center).
    middle = (X[y == 1] + X[y == 0]) / 2
    centred = np.concatenate([X[y == 1] - middle, X[y == 0] - middle])
    oracle = PCA(3).fit(centred)
    assert np.allclose(np.abs(np.array(found.basis) @ oracle.components_.T), np.eye(3), atol=1e-3)
    assert (np.array(found.basis) @ difference.mean(0) > 0).all()


def test_centred_components_are_scikit_learns() -> None:
    X, y = rows(40)
    found = vauban.fit_pca(mx.array(X), mx.array(y), 4, kind="centered")
    oracle = PCA(4).fit(X)
    assert np.allclose(np.abs(np.array(found.basis) @ oracle.components_.T), np.eye(4), atol=1e-3)
    assert np.allclose(found.explained_variance, oracle.explained_variance_ratio_, rtol=1e-3)


@pytest.mark.parametrize(("k", "m"), [(1, 1), (2, 3), (4, 2)])
def test_principal_angles_are_scipys(k: int, m: int) -> None:
    rng = np.random.default_rng(k)
    a, b = rng.normal(size=(k, 9)), rng.normal(size=(m, 9))
    b[0] = a[0] + 1e-3 * b[0]
    found = vauban.principal_angles(mx.array(a), mx.array(b))
    oracle = np.sort(np.degrees(subspace_angles(a.T, b.T)))
    assert len(found) == min(k, m) and np.allclose(found, oracle, atol=1e-4)
    mixed = rng.normal(size=(k, k)) @ a
    assert max(vauban.principal_angles(mx.array(a), mx.array(mixed))) <= 1e-3
    with pytest.raises(vauban.InputError, match="dependent"):
        vauban.principal_angles(mx.array(a[:1].repeat(2, 0)), mx.array(b))


def test_angles_take_results_of_estimators() -> None:
    X, y = rows()
    pca = vauban.fit_pca(mx.array(X), mx.array(y), 2)
    inlp = vauban.fit_inlp(mx.array(X), mx.array(y), min_accuracy=0.0, max_rank=2)
    found = vauban.principal_angles(pca, inlp)
    oracle = np.degrees(subspace_angles(np.array(pca.basis).T, np.array(inlp.directions).T))
    assert np.allclose(found, np.sort(oracle), atol=1e-3)


def test_geometry_is_the_one_of_quick() -> None:
    from vauban.quick import analyze_geometry

    assert analyze_geometry is vauban.analyze_geometry
    eye = mx.eye(3)
    found = vauban.analyze_geometry({"a": eye[0], "b": eye[1], "c": eye[0] + eye[1]})
    assert np.allclose(np.array(found.cosines)[2, :2], 0.5**0.5)
    assert found.independent == (("a", "b"),) and 1 < found.rank < 2


def test_measured_subspace(organism: Any, organism_prompts: Any, tmp_path: Any) -> None:
    model, tokenizer = organism
    sets = organism_prompts["harmful"][:24], organism_prompts["harmless"][:20]
    found = vauban.measure_subspace(model, tokenizer, *sets, top_k=3)
    single = vauban.measure(model, tokenizer, *sets)
    assert (found.layer_index, found.position) == (single.layer_index, single.position)
    assert found.basis.shape == (3, single.d_model)
    assert np.allclose(found.basis @ found.basis.T, np.eye(3), atol=1e-5)
    assert abs(float((found.basis[0] * single.direction).sum())) > 0.9
    assert found.explained_variance[0] > found.explained_variance[1]
    assert any("first 20 of each are paired" in w for w in found.warnings)
    both = []
    for prompts in (sets[0][:20], sets[1]):
        both.append(vauban.collect_activations(model, tokenizer, prompts).at(found.residual_index))
    s = np.linalg.svd(np.array(both[0] - both[1], dtype=np.float64))[1]
    assert np.allclose(found.singular_values, s[:3], rtol=1e-4)
    again = vauban.SubspaceResult.load(found.save(tmp_path / "subspace"))
    assert again.to_dict() == found.to_dict() and mx.array_equal(again.basis, found.basis)
    with pytest.raises(vauban.InputError, match="no direction file"):
        vauban.DirectionResult.load(tmp_path / "subspace.safetensors")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda X, y: vauban.fit_pca(X[1:], y[1:], 2), "equal numbers"),
        (lambda X, y: vauban.fit_pca(X, y, 13), "expected 1 to 12"),
        (lambda X, y: vauban.fit_pca(X, y, 0), "expected 1 to 12"),
        (lambda X, y: vauban.fit_pca(X, y, 2, kind="sparse"), "'paired' or 'centered'"),
        (lambda X, y: vauban.principal_angles(X[0], mx.ones(5)), "one width"),
        (lambda X, y: vauban.principal_angles(X[0], mx.zeros(12)), "direction 0 is zero"),
    ],
)
def test_bad_input(call: Any, message: str) -> None:
    X, y = rows()
    with pytest.raises(vauban.InputError, match=message):
        call(mx.array(X), mx.array(y))
