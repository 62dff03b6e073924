"""Every update rule against its dense float64 form, and what the rules promise."""

import mlx.core as mx
import numpy as np
import pytest

from vauban.errors import InputError, VaubanWarning
from vauban.knowledge import (
    KeyStats,
    emmet_update,
    penalty,
    projected,
    protected_directions,
    prune,
    rect,
    ridge_update,
    rome_update,
    sphere,
)

D0, D1 = 48, 20


def made(seed: int = 0, u: int = 6, n: int = 9):
    rng = np.random.default_rng(seed)
    scales = np.logspace(0.5, -2, D0)
    turn = np.linalg.qr(rng.standard_normal((D0, D0)))[0]
    tokens = rng.standard_normal((2000, D0)) * scales @ turn
    c = tokens.T @ tokens / len(tokens)
    draw = lambda *shape: rng.standard_normal(shape)  # noqa: E731
    return c, draw(u, D0), draw(u, D1), draw(n, D0)


def off(got: mx.array, expected: np.ndarray) -> float:
    return float(np.abs(np.array(got) - expected).max() / np.abs(expected).max())


def stats_of(c: np.ndarray) -> KeyStats:
    return KeyStats.from_moment(mx.array(c.astype(np.float32)), count=2000, layer=0)


DENSE = {
    "memit": (dict(lam=50.0), lambda c, p: 50.0 * c),
    "encore": (dict(lam=50.0, lam_n=2.0), lambda c, p: 50.0 * c + 2.0 * np.eye(D0)),
    "ridge": (dict(l2=3.0), lambda c, p: 3.0 * np.eye(D0)),
    "alphaedit": (dict(tau=0.02, l2=3.0), lambda c, p: 3.0 * np.eye(D0)),
    "betaedit": (dict(tau=0.02, l2=3.0, lam=5.0), lambda c, p: 3.0 * np.eye(D0) + 5.0 * c),
}


@pytest.mark.parametrize("n", [0, 9, 60])
@pytest.mark.parametrize("method", DENSE)
def test_every_method_is_its_dense_form(method, n):
    c, k, r, past = made(n=n)
    settings, dense = DENSE[method]
    values, vectors = np.linalg.eigh(c)
    p = np.eye(D0)
    if "tau" in settings:
        null = vectors[:, values < settings["tau"]]
        p = null @ null.T
    # As the methods' papers write it: R KᵀP (Kp KpᵀP + K KᵀP + M)⁻¹ with facts in columns.
    expected = r.T @ k @ p @ np.linalg.inv((past.T @ past + k.T @ k) @ p + dense(c, p))
    got = ridge_update(k, r, penalty=penalty(stats_of(c), method, **settings), past_keys=past)
    assert off(got, expected) <= 2e-4


def test_rome_and_emmet_are_their_dense_forms_and_meet_their_facts():
    c, k, r, _ = made()
    inverse = np.linalg.inv(c)
    row = k[:1] @ inverse
    rule = penalty(stats_of(c), "memit")
    got = rome_update(k[0], r[0], penalty=rule)
    assert off(got, r[:1].T @ row / (row @ k[0])) <= 2e-4
    assert off(got @ mx.array(k[0].astype(np.float32)), r[0]) <= 1e-4
    a = np.linalg.inv(15000.0 * c + 20.0 * np.eye(D0))
    rule = penalty(stats_of(c), "encore", lam=15000.0)
    expected = r.T @ np.linalg.inv(k @ a @ k.T + 0.1 * np.eye(6)) @ k @ a
    assert off(emmet_update(k, r, penalty=rule), expected) <= 2e-4
    exact = emmet_update(k, r, penalty=rule, slack=0.0)
    assert off(mx.array(k.astype(np.float32)) @ exact.T, r) <= 1e-4
    with pytest.raises(InputError, match="one fact"):
        rome_update(k, r, penalty=rule)


@pytest.mark.parametrize("method", DENSE)
def test_facts_one_by_one_with_history_are_the_joint_solution_in_any_order(method):
    c, k, r, _ = made()
    rule = penalty(stats_of(c), method, **DENSE[method][0])
    joint = ridge_update(k, r, penalty=rule)
    for order in (range(6), [3, 0, 5, 1, 4, 2]):
        total, seen = np.zeros((D1, D0)), []
        for i in order:
            residual = r[i] - total @ k[i]
            past = k[seen] if seen else None
            total = total + np.array(ridge_update(k[i], residual, penalty=rule, past_keys=past))
            seen.append(i)
        assert off(mx.array(total), np.array(joint)) <= 1e-5


def test_an_update_has_the_rank_of_its_facts_and_none_without_residuals():
    c, k, r, past = made()
    rule = penalty(stats_of(c), "memit")
    delta = np.array(ridge_update(k, r, penalty=rule, past_keys=past), dtype=np.float64)
    assert np.linalg.matrix_rank(delta, tol=1e-5 * np.linalg.norm(delta, 2)) == 6
    assert not np.any(np.array(ridge_update(k, 0 * r, penalty=rule)))


def test_protected_directions_see_nothing_and_a_high_tau_is_the_plain_ridge():
    c, k, r, _ = made()
    stats = stats_of(c)
    rule = penalty(stats, "alphaedit", rank=7, l2=1.0)
    delta = ridge_update(k, r, penalty=rule)
    assert rule.protected.shape == (7, D0)
    assert float(mx.linalg.norm(delta @ rule.protected.T) / mx.linalg.norm(delta)) < 1e-5
    plain = ridge_update(k, r, penalty=penalty(stats, "ridge", l2=1.0))
    with pytest.warns(VaubanWarning, match="protects none"):
        free = penalty(stats, "alphaedit", tau=1e9, l2=1.0)
    assert off(ridge_update(k, r, penalty=free), np.array(plain)) <= 1e-6
    assert float(mx.abs(projected(plain, rule) @ rule.protected.T).max()) < 1e-6
    with pytest.raises(InputError, match="100 %"):
        penalty(stats, "alphaedit", tau=1e-12)
    with pytest.raises(InputError, match="expected one of"):
        penalty(stats, "alphaedit", tau=0.1, rank=3)
    with pytest.raises(InputError, match="no setting"):
        penalty(stats, "memit", l2=1.0)


@pytest.mark.parametrize("choice", [dict(tau=8.0), dict(rank=20), dict(energy=0.6)])
def test_the_iteration_finds_what_the_decomposition_finds(choice):
    rng = np.random.default_rng(1)
    turn = np.linalg.qr(rng.standard_normal((260, 260)))[0]
    c = mx.array((turn * np.logspace(1.5, -3, 260)) @ turn.T)
    whole = protected_directions(c, **choice)
    quick = protected_directions(c, **choice, direct=32)
    assert whole.shape == quick.shape
    missing = whole - (whole @ quick.T) @ quick
    assert float(mx.linalg.norm(missing, axis=1).max()) < 2e-3


def test_energy_protects_the_fewest_directions_with_that_share():
    c = np.diag([4.0, 3.0, 2.0, 1.0])
    assert len(protected_directions(mx.array(c), energy=0.7)) == 2
    assert len(protected_directions(mx.array(c), energy=0.71)) == 3


def test_filters_are_what_their_papers_say():

    rng = np.random.default_rng(2)
    w, delta = rng.standard_normal((D1, D0)), 3 * rng.standard_normal((D1, D0))
    kept = np.array(rect(delta, w))
    share = np.abs(delta / (w + 1e-8))
    assert np.count_nonzero(kept) == round(0.4 * D1 * D0)
    assert share[kept != 0].min() >= share[kept == 0].max()
    values = np.linalg.svd(np.array(prune(delta, w)), compute_uv=False)
    before, top = np.linalg.svd(delta, compute_uv=False), np.linalg.norm(w, 2)
    expected = np.where(before > top, np.log(np.maximum(before, top) / top) + top, before)
    assert (before > top).any() and np.allclose(np.sort(values), np.sort(expected), rtol=1e-4)
    unit = w / np.linalg.norm(w, axis=1, keepdims=True)
    eigenvalues, vectors = np.linalg.eigh(unit.T @ unit)
    got, first = np.array(sphere(delta, w, eta=0.5, alpha=1.0)), vectors[:, -1]
    assert np.abs(got @ first).max() < 1e-4
    assert np.allclose(got @ vectors[:, 0], delta @ vectors[:, 0], atol=1e-4)
    assert eigenvalues[-1] > 0


def test_key_stats_survive_a_file_and_refuse_what_is_no_moment(tmp_path):
    stats = stats_of(made()[0])
    again = KeyStats.load(stats.save(tmp_path / "layer_0.vauban"))
    assert mx.array_equal(again.moment, stats.moment) and again.count == 2000
    with pytest.raises(InputError, match="not symmetric"):
        KeyStats.from_moment(mx.array([[1.0, 5.0], [0.0, 1.0]]), 1, 0)
    (tmp_path / "other").write_text("no statistics")
    with pytest.raises(InputError, match="no key statistics"):
        KeyStats.load(tmp_path / "other")
