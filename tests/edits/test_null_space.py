"""Null-space protection: what is preserved exactly, what it costs, and how keys are gathered."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import vauban
from tests.conftest import build, random_tokens
from vauban.edits.null_space import (
    KeyAccumulator,
    leak,
    least_squares_rows,
    null_space,
    removable_share,
)
from vauban.edits.preservation_keys import Preserve, collect_preservation_keys
from vauban.models import module_inputs


def massive_keys(n: int = 300, size: int = 512, seed: int = 0) -> mx.array:
    """Keys with a common mean and one component 300 times as large as the rest."""
    rng = np.random.default_rng(seed)
    keys = rng.normal(size=(n, size)) + 0.5 * rng.normal(size=size)
    keys[:, 3] *= 300
    return mx.array(keys.astype(np.float32))


@settings(max_examples=30, deadline=None)
@given(n=st.integers(1, 12), size=st.integers(13, 40), seed=st.integers(0, 999))
def test_every_preserved_input_is_untouched(n: int, size: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    keys = mx.array(rng.normal(size=(n, size)).astype(np.float32))
    space = null_space(keys, energy=1.0)
    delta = mx.array(rng.normal(size=(5, size)).astype(np.float32))
    assert leak(delta, space.project(delta), keys) <= 1e-5
    assert space.rank == n
    # The shortcut: one row vector is projected, the dense update never formed.
    d = mx.array(rng.normal(size=(7, 1)).astype(np.float32))
    v = np.array(space.basis, dtype=np.float64)
    dense = np.array(d @ delta[:1]) @ (np.eye(size) - v.T @ v)
    assert np.allclose(d @ space.project(delta[:1]), dense, atol=1e-4)


def test_massive_components_and_means_do_not_break_it() -> None:
    """A float32 Gram matrix finds 9 of 300 directions here; the QR and SVD find them all."""
    keys = massive_keys()
    space = null_space(keys, energy=1.0)
    assert space.rank == 300
    r = mx.random.normal((1, 512), key=mx.random.key(0))
    assert leak(r, space.project(r), keys) <= 1e-5


def test_energy_counts_and_higher_preserves_more() -> None:
    keys = massive_keys()
    r = mx.random.normal((1, 512), key=mx.random.key(0))
    ranks, leaks, shares = [], [], []
    for energy in (0.5, 0.9, 0.99, 0.99999, 0.9999999, 1.0):
        space = null_space(keys, energy=energy)
        taken = space.project(r)
        ranks.append(space.rank)
        leaks.append(leak(r, taken, keys))
        shares.append(removable_share(r, taken))
        # The bound: |K P x| <= s_{r+1} |P x|.
        rest = space.singular_values[space.rank].item() if space.rank < 300 else 0.0
        size = float(mx.linalg.norm(keys @ taken.T))
        assert size <= rest * float(mx.linalg.norm(taken)) * 1.01 + 1e-2
    assert ranks == sorted(ranks) and ranks[-1] == 300
    assert shares == sorted(shares, reverse=True) and leaks[-1] <= 1e-5
    assert null_space(keys, rank=7).rank == 7


def test_full_rank_is_an_error_that_names_it() -> None:
    keys = mx.random.normal((64, 32), key=mx.random.key(0))
    with pytest.raises(vauban.InputError, match="r = 32, d_in = 32"):
        null_space(keys, energy=1.0)
    for options, message in (
        ({"energy": 0.0}, "energy"),
        ({"rank": 0}, "rank"),
        ({"energy": 0.5, "rank": 3}, "not both"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            null_space(keys, **options)
    with pytest.raises(vauban.InputError, match="all zero"):
        null_space(mx.zeros((3, 8)))
    with pytest.raises(vauban.InputError, match="NaN"):
        null_space(mx.full((3, 8), float("nan")))


def test_the_accumulator_equals_all_rows_at_once() -> None:
    """Bounded memory: QR of what was seen so far, whatever the batches."""
    keys = massive_keys(700, 64)
    whole = null_space(keys, rank=20)
    accumulator = KeyAccumulator(64)
    for start in range(0, 700, 90):
        accumulator.update(keys[start : start + 90])
    found = accumulator.keys()
    assert found.rows == 700 and found.factor.shape[0] <= 2 * 64 + 90
    parts = null_space(found, rank=20)
    cosines = np.linalg.svd(np.array(whole.basis @ parts.basis.T))[1]
    assert cosines.min() >= 1 - 1e-3
    assert np.allclose(parts.singular_values[:20], whole.singular_values[:20], rtol=1e-3)


def test_sinks_are_kept_but_do_not_count_as_energy() -> None:
    rng = np.random.default_rng(0)
    keys = rng.normal(size=(40, 64)).astype(np.float32)
    sink = np.zeros((5, 64), np.float32)
    sink[:, 60] = 1e4
    rows = mx.array(np.concatenate([keys, sink]))
    counted = mx.array(np.r_[np.ones(40), np.zeros(5)].astype(bool))
    blind = null_space(rows, energy=0.9)
    assert blind.rank == 1
    seeing = null_space(KeyAccumulator(64).update(rows, counted).keys(), energy=0.9)
    assert seeing.rank > 10
    assert mx.abs(seeing.basis[:, 60]).max().item() > 0.99


def test_least_squares_removes_more_with_the_same_guarantee() -> None:
    """N6: on held-out inputs of the same kind less is left than after plain projection."""
    rng = np.random.default_rng(1)
    size = 96
    keys = mx.array(rng.normal(size=(48, size)).astype(np.float32))
    space = null_space(keys, energy=1.0)
    spread = rng.normal(size=(size, size)) / np.sqrt(size)
    concept = rng.normal(size=size)
    make = lambda n: (rng.normal(size=(n, 20)) @ spread[:20] * 2 + concept).astype(np.float32)  # noqa: E731
    train, held = mx.array(make(400)), mx.array(make(200))
    r = mx.array((concept + rng.normal(size=size)).astype(np.float32))[None]
    plain, fitted = space.project(r), least_squares_rows(r, space, train)
    wanted = held @ r.T

    def left(taken: mx.array) -> float:
        return float(mx.linalg.norm(wanted - held @ taken.T) / mx.linalg.norm(wanted))

    assert left(fitted) < 0.7 * left(plain)
    for taken in (plain, fitted):
        assert leak(r, taken, keys) <= 1e-4


def targets_beside(keys: mx.array) -> dict[str, mx.array]:
    """Targets that overlap with what is preserved: wholly, nearly, in part, not at all."""
    size = keys.shape[1]
    noise = mx.random.normal((4, size), key=mx.random.key(5))
    mixed = mx.random.normal((4, len(keys)), key=mx.random.key(2)) @ keys
    return {
        "preserved": keys[:3],
        "combinations": mixed,
        "nearly": mixed + 1e-3 * noise,
        "part": mx.concatenate([keys[:1], noise[:1]]),
        "own": noise,
        "more rows than inputs": mx.random.normal((3 * size, size), key=mx.random.key(6)),
    }


@pytest.mark.parametrize("case", sorted(targets_beside(mx.ones((5, 8)))))
@pytest.mark.parametrize("limit", [1.0, 4.0])
def test_fitted_rows_stay_bounded_and_keep_the_guarantee(case: str, limit: float) -> None:
    keys = mx.random.normal((5, 64), key=mx.random.key(0))
    space = null_space(keys, energy=1.0)
    r = mx.random.normal((2, 64), key=mx.random.key(1))
    q = least_squares_rows(r, space, targets_beside(keys)[case], limit=limit)
    size, had = mx.linalg.norm(q, axis=1), mx.linalg.norm(r, axis=1)
    assert (size <= limit * had * (1 + 1e-5)).all().item()
    lost = mx.linalg.norm(keys @ q.T, axis=0) / mx.linalg.norm(keys)
    assert (lost <= 1e-5 * had).all().item()
    if case == "own":
        targets = targets_beside(keys)[case]
        left = mx.linalg.norm(targets @ (r - q).T) / mx.linalg.norm(targets @ r.T)
        assert left.item() < 0.1


def test_targets_without_anything_in_them_ask_for_projection() -> None:
    keys = mx.random.normal((5, 64), key=mx.random.key(0))
    space, r = null_space(keys), mx.random.normal((1, 64), key=mx.random.key(1))
    assert mx.array_equal(least_squares_rows(r, space, mx.zeros((3, 64))), space.project(r))
    assert mx.array_equal(least_squares_rows(0 * r, space, keys), 0 * r)


def test_a_fit_depends_on_the_second_moment_alone() -> None:
    """Keys are kept as a triangular factor: it must give what the rows themselves give."""
    keys = mx.random.normal((5, 24), key=mx.random.key(0))
    space, r = null_space(keys), mx.random.normal((1, 24), key=mx.random.key(1))
    rows = mx.random.normal((200, 24), key=mx.random.key(2))
    factor = mx.array(np.linalg.qr(np.array(rows), mode="r"))
    whole, kept = (least_squares_rows(r, space, x) for x in (rows, factor))
    assert mx.abs(whole - kept).max().item() <= 1e-5


def test_numpy_and_lists_are_taken_and_wrong_shapes_named() -> None:
    keys = [[3.0, 0.0, 0.0], [0.0, 2.0, 0.0]]
    for matrix in (keys, np.array(keys), mx.array(keys)):
        space = null_space(matrix, energy=np.float32(1.0))
        for rows in ([1.0, 1.0, 1.0], np.ones(3), mx.ones(3)):
            assert space.project(rows).tolist() == [0.0, 0.0, 1.0]
    for call, message in (
        (lambda: space.project(mx.ones(2)), r"shape \(2,\); expected \(..., 3\)"),
        (lambda: space.project(mx.array(1.0)), r"expected \(..., 3\)"),
        (lambda: null_space("keys"), "expected an array"),
        (lambda: null_space(keys, rank=1.5), "rank is 1.5; expected an int"),
        (lambda: null_space(keys, energy="0.9"), "energy is '0.9'; expected a number"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            call()


@pytest.mark.parametrize("name", ["llama", "qwen3_moe", "gemma2"])
def test_module_inputs_are_what_the_modules_read(tiny: Any, name: str) -> None:
    """From the inputs and the weights the outputs follow, expert by expert."""
    model = tiny(name)
    writers = [w for w in vauban.residual_writers(model) if w.layer == 1]
    seen: dict[str, list[Any]] = {}

    def read(path: str, rows: mx.array, experts: mx.array | None) -> None:
        seen[path] = [rows, experts]

    tokens = random_tokens(2, 9)
    before = model(tokens)
    with module_inputs(model, [w.path for w in writers], read):
        during = model(tokens)
    assert mx.array_equal(before, during) and mx.array_equal(before, model(tokens))
    for writer in writers:
        rows, experts = seen[writer.path]
        assert rows.shape == (18 * (2 if experts is not None else 1), writer.shape[-1])
        assert (experts is not None) == (writer.kind == "expert")


@pytest.mark.parametrize("name", ["llama", "llama_bias", "qwen3_moe"])
@pytest.mark.parametrize("mode", ["project", "least_squares"])
def test_preserved_prompts_keep_their_logits_at_every_position(
    organism: Any, name: str, mode: str
) -> None:
    """N5: cutting ONE block changes nothing for the prompts whose keys were collected."""
    model, tokenizer = build(name), Letters()
    kept, other = ["ab", "cd"], ["the other prompt", "one more of them"]
    writers = [w for w in vauban.residual_writers(model) if w.layer == 2]
    keys = collect_preservation_keys(model, tokenizer, kept, writers)
    targets = collect_preservation_keys(model, tokenizer, other, writers)
    assert keys.n_tokens == 4 and "2 prompts" in keys.summary()
    preserve = Preserve(keys, energy=1.0, mode=mode, targets=targets)
    d = mx.random.normal((64,), key=mx.random.key(0))
    plan = vauban.plan_cut(model, d, layers=[2], preserve=preserve)
    assert plan.embedding == "kept"
    logits = {p: model(mx.array([tokenizer.encode(p)])) for p in kept + other}
    virtual = {
        p: vauban.forward(
            model, mx.array([tokenizer.encode(p)]), interventions=plan.virtual()
        ).logits
        for p in kept + other
    }
    plan.apply(model)
    for prompt in kept:
        after = model(mx.array([tokenizer.encode(prompt)]))
        assert mx.abs(after - logits[prompt]).max().item() <= 1e-3
        assert mx.abs(virtual[prompt] - after).max().item() <= 1e-4
    for prompt in other:
        after = model(mx.array([tokenizer.encode(prompt)]))
        assert mx.abs(after - logits[prompt]).max().item() > 1e-3
        assert mx.abs(virtual[prompt] - after).max().item() <= 1e-4


class Letters:
    """A template-free tokenizer of one id a character; the encoding path is the real one."""

    chat_template = None
    bos_token_id = None
    eos_token_id = None

    def encode(self, text: str, **options: Any) -> list[int]:
        return [ord(c) % 160 for c in text]


def test_preserve_excludes_what_would_break_it(tiny: Any) -> None:
    model = tiny("llama_bias")
    keys = collect_preservation_keys(model, Letters(), ["ab"])
    d = mx.ones(64)
    for options, message in (
        ({"embedding": True}, "embedding"),
        ({"norm_preserve": "column"}, "norms"),
        ({"biases": True}, "biases"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            vauban.plan_cut(model, d, preserve=keys, **options)
    plan = vauban.plan_cut(model, d, preserve=keys)
    assert not any(u.bias for u in plan.updates)
    assert plan.settings["biases"] is False
    assert "8 biases are left and write the direction" in plan.summary()
    with pytest.raises(vauban.InputError, match="no keys were collected"):
        one = collect_preservation_keys(model, Letters(), ["ab"], ["model.layers.0.mlp.down_proj"])
        vauban.plan_cut(model, d, preserve=one)
    with pytest.raises(vauban.InputError, match="needs targets"):
        Preserve(keys, mode="least_squares")
    with pytest.raises(vauban.InputError, match="no preservation prompts"):
        collect_preservation_keys(model, Letters(), [])


@pytest.mark.parametrize("norm", ["column", "row", "frobenius"])
@pytest.mark.parametrize("name", ["llama_bias", "qwen3_moe", "gemma"])
def test_norm_modes_have_their_run_time_form(tiny: Any, name: str, norm: Any) -> None:
    model = tiny(name)
    plan = vauban.plan_cut(model, mx.random.normal((64,)), norm_preserve=norm)
    tokens = random_tokens(1, 11)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    plan.apply(model)
    assert mx.abs(virtual - vauban.forward(model, tokens).logits).max().item() <= 1e-4


def test_sparse_plans_cut_the_chosen_rows_only(tiny: Any) -> None:
    model = tiny("llama")
    d = mx.random.normal((64,), key=mx.random.key(4))
    before = mx.array(model.model.layers[0].mlp.down_proj.weight)
    plan = vauban.plan_cut(model, d, sparse=0.25, embedding=False)
    assert 0.1 < plan.leakage().worst < 0.9
    plan.apply(model)
    changed = np.flatnonzero(
        np.abs(np.array(model.model.layers[0].mlp.down_proj.weight - before)).max(1) > 0
    )
    assert set(changed.tolist()) == set(np.argsort(-np.abs(np.array(d)))[:16].tolist())
