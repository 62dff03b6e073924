"""Measuring: indices, layer choice, streaming against raw, zero point, bad input."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score, silhouette_score

import vauban
from vauban.activations import winsorize
from vauban.directions import separation
from vauban.directions.class_moments import split_prompts
from vauban.directions.measure import _choose, _result, model_name, residual_limit


def test_directions_are_differences_of_raw_means(organism: Any, organism_prompts: Any) -> None:
    """Against NumPy float64 over activations collected one prompt at a time."""
    model, tokenizer = organism
    sets = [organism_prompts["harmful"][:9], organism_prompts["harmless"][:8]]
    result = vauban.measure(model, tokenizer, *sets, layer=2)
    means = []
    for prompts in sets:
        rows = []
        for prompt in prompts:
            tokens = mx.array([vauban.encode_chat(tokenizer, prompt)])
            residual = vauban.forward(model, tokens, logits=False).residual
            rows.append(np.array(residual[0, 1:, 0], dtype=np.float64))
        means.append(np.mean(rows, axis=0))
    raw = means[0] - means[1]
    got = np.array(result.directions) * np.array(result.norms)[:, None]
    scale = np.abs(raw).max()
    assert np.abs(got - raw).max() <= 1e-4 * scale
    assert np.allclose(result.cosine_scores, np.linalg.norm(raw, axis=1), rtol=1e-4)
    assert result.layer_index == 2 and result.residual_index == 3
    assert np.allclose(result.direction, raw[2] / np.linalg.norm(raw[2]), atol=1e-4)
    assert np.allclose(result.harmless_mean(4), means[1][4], atol=1e-4 * scale)
    along = [float(m[2] @ np.array(result.direction)) for m in means]
    assert np.isclose(result.projections["harmful"], along[0], rtol=1e-3)
    assert np.isclose(result.projections["harmless"], along[1], rtol=1e-3)


@pytest.mark.parametrize(("harmful", "harmless"), [(12, 12), (12, 5), (5, 12), (4, 4)])
def test_winsorized_store_with_nothing_to_clip_equals_streaming(
    organism: Any, organism_prompts: Any, harmful: int, harmless: int
) -> None:
    """Also where one class is too small to hold prompts out."""
    model, tokenizer = organism
    sets = organism_prompts["harmful"][:harmful], organism_prompts["harmless"][:harmless]
    streamed = vauban.measure(model, tokenizer, *sets)
    stored = vauban.measure(model, tokenizer, *sets, clip_quantile=1e-9)
    assert stored.layer_index == streamed.layer_index
    assert np.allclose(stored.directions, streamed.directions, atol=1e-4)
    for name in streamed.scores:
        assert np.allclose(stored.scores[name], streamed.scores[name], rtol=1e-3, atol=1e-4), name
    clipped = vauban.measure(model, tokenizer, *sets, clip_quantile=0.05)
    assert not np.allclose(clipped.norms, streamed.norms, rtol=1e-3)


def test_measuring_moves_by_exactly_k_raw_differences(measured: Any, organism: Any) -> None:
    """Add.from_result and residual_index agree with where the direction was measured."""
    model, tokenizer = organism
    tokens = mx.array([vauban.encode_chat(tokenizer, "Hello there")])
    r = measured.residual_index
    plain = vauban.forward(model, tokens).residual[0, r, 0]
    change = vauban.Add.from_result(measured, 2.0)
    moved = vauban.forward(model, tokens, interventions=[change]).residual[0, r, 0]
    raw = measured.directions[measured.layer_index] * measured.norms[measured.layer_index]
    assert np.allclose(moved - plain, 2.0 * raw, atol=1e-4 * float(mx.abs(raw).max()))


def test_save_and_load_keep_everything(measured: Any, tmp_path: Any) -> None:
    path = measured.save(tmp_path / "direction.safetensors")
    again = vauban.DirectionResult.load(path)
    assert again.to_dict() == measured.to_dict()
    for name in ("direction", "directions", "norms", "means"):
        assert mx.array_equal(getattr(again, name), getattr(measured, name))
    assert [p.name for p in tmp_path.iterdir()] == ["direction.safetensors"]
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(vauban.InputError, match="safetensors"):
        vauban.DirectionResult.load(path)
    mx.save_safetensors(str(tmp_path / "other.safetensors"), {"x": mx.ones(2)})
    with pytest.raises(vauban.InputError, match="no direction file"):
        vauban.DirectionResult.load(tmp_path / "other.safetensors")


def test_automatic_choice_ignores_the_last_fifth_and_prefers_the_earlier() -> None:
    assert [residual_limit(n) for n in (1, 4, 6, 10, 32)] == [1, 3, 4, 8, 25]
    table = np.array([[9.0], [1.0], [3.0], [3.0], [2.0], [8.0], [9.0]])
    assert _choose(table, "auto", 6) == (2, 0)
    assert _choose(np.array([[0, 0], [1, 4], [4, 1]]), "auto", 2) == (1, 1)
    assert _choose(table, 5, 6) == (6, 0)
    with pytest.raises(vauban.InputError, match="blocks 0 to 5"):
        _choose(table, 6, 6)


def test_held_out_third_is_disjoint_and_seeded() -> None:
    prompts = [f"prompt {i}" for i in range(30)]
    fitting, held_out = split_prompts(prompts, 0)
    assert len(held_out) == 10 and not set(fitting) & set(held_out)
    assert sorted(fitting + held_out) == list(range(30))
    assert split_prompts(prompts, 0) == (fitting, held_out) != split_prompts(prompts, 1)


def test_a_repeated_prompt_is_never_both_fitted_and_held_out() -> None:
    prompts = [f"prompt {i % 9}" for i in range(36)]
    fitting, held_out = split_prompts(prompts, 0)
    assert sorted(fitting + held_out) == list(range(36)) and len(held_out) == 12
    assert not {prompts[i] for i in fitting} & {prompts[i] for i in held_out}
    # Four distinct prompts are too few, however often they stand there.
    fitting, held_out = split_prompts(prompts[:4] * 4, 0)
    assert fitting is held_out and len(fitting) == 16


def test_scores_against_scikit_learn() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 1, (40, 3)), rng.normal([0.0, 1.0, 5.0], 1.5, (25, 3))
    labels = np.r_[np.zeros(40), np.ones(25)]
    for i in range(3):
        line = np.r_[a[:, i], b[:, i]]
        assert np.isclose(separation.auc(a, b)[i], roc_auc_score(labels, line))
        assert np.isclose(separation.silhouette(a, b)[i], silhouette_score(line[:, None], labels))
    pooled = np.sqrt((39 * a.var(0, ddof=1) + 24 * b.var(0, ddof=1)) / 63)
    assert np.allclose(separation.cohens_d(a, b), (b.mean(0) - a.mean(0)) / pooled)
    assert separation.auc(np.zeros((3, 1)), np.zeros((3, 1)))[0] == 0.5


def test_winsorize_against_numpy() -> None:
    values = mx.random.normal((6, 3, 2, 50), key=mx.random.key(0)) ** 3
    done = np.array(winsorize(values, 0.1))
    for r in range(3):
        part = np.array(values[:, r])
        low, high = np.quantile(part, [0.1, 0.9])
        assert np.allclose(done[:, r], np.clip(part, low, high))
    assert winsorize(values, 0.0) is values
    with pytest.raises(vauban.InputError):
        winsorize(values, 0.5)


def test_zero_on_the_wrong_side_is_said() -> None:
    """ORGANISM's trap: +47 / -61, zero is nearer to the harmful mean."""
    means = mx.array([[[-61.0, 1.0]], [[47.0, 1.0]]])
    raw = means[1] - means[0]
    table = {n: np.ones(1) for n in ("gap", "cohens_d", "auc", "cosine", "silhouette")}
    sets = {"harmful": ["a"] * 8, "harmless": ["b"] * 8}
    found = _result(None, None, raw, means, table, 0, -1, 0.0, 0, sets, [])  # type: ignore[arg-type]
    assert any("zero is not on the harmless side" in w for w in found.warnings)
    safe = mx.array([[[-21.0, 1.0]], [[80.0, 1.0]]])
    found = _result(None, None, safe[1] - safe[0], safe, table, 0, -1, 0.0, 0, sets, [])  # type: ignore[arg-type]
    assert found.warnings == ()
    assert found.projections == {"harmless": -21.0, "harmful": 80.0}


@pytest.mark.parametrize(
    ("harmful", "harmless", "arguments", "message"),
    [
        ([], ["a", "b"], {}, "harmful prompt set is empty"),
        (["a"], ["b", "c"], {}, "one prompt"),
        (["a", "b"], ["b", "a"], {}, "are the same"),
        (["a", "b"], ["b", "c"], {}, "in both sets"),
        (["a", "a"], ["a ", "a "], {"layer": 99}, "blocks 0 to"),
        (["a", "b"], ["c", "d"], {"layer": "best"}, "expected 'auto'"),
        (["a", "b"], ["c", "d"], {"method": "magic"}, "mean_difference"),
        (["a", "b"], ["c", "d"], {"positions": (1,)}, "negative"),
        (["a", "b"], ["c", "d"], {"positions": "first"}, "post_instruction"),
        (["a", "b"], ["c", "d"], {"positions": (-400,)}, "lies before its start"),
        (["a", "b"], ["c", "d"], {"clip_quantile": 0.7}, "clip_quantile"),
    ],
)
def test_bad_input(
    organism: Any, harmful: list[str], harmless: list[str], arguments: Any, message: str
) -> None:
    with pytest.raises(vauban.InputError, match=message):
        vauban.measure(*organism, harmful, harmless, **arguments)


def test_post_instruction_positions_keep_the_best(organism: Any, organism_prompts: Any) -> None:
    model, tokenizer = organism
    sets = organism_prompts["harmful"][:24], organism_prompts["harmless"][:24]
    result = vauban.measure(model, tokenizer, *sets, positions="post_instruction")
    offered = vauban.post_instruction_positions(tokenizer)
    assert len(offered) > 1 and result.position in offered
    alone = vauban.measure(model, tokenizer, *sets, positions=(result.position,))
    assert alone.layer_index == result.layer_index
    assert np.allclose(alone.direction, result.direction, atol=1e-4)
    for position in offered:
        other = vauban.measure(model, tokenizer, *sets, positions=(position,))
        best = max(other.scores["cohens_d"][: residual_limit(len(model.layers))])
        assert best <= max(result.scores["cohens_d"]) + 1e-3


def test_hub_snapshots_are_named_by_their_repository() -> None:
    class Named:
        name_or_path = "/home/me/.cache/huggingface/hub/models--org--name/snapshots/0123abcd"

    assert model_name(Named()) == "org/name"
    Named.name_or_path = "org/name"
    assert model_name(Named()) == "org/name"
    Named.name_or_path = "/models/mine"
    assert model_name(Named()) == "/models/mine"


def test_select_target_layers() -> None:
    values = [1.0, 5.0, 3.0, 3.0]
    assert vauban.select_target_layers(values, "all") == [0, 1, 2, 3]
    assert vauban.select_target_layers(values) == [1]
    assert vauban.select_target_layers([2.0, 2.0]) == [0, 1]
    assert vauban.select_target_layers(values, "top_k", top_k=2) == [1, 2]
    assert vauban.select_target_layers(values, "top_k", top_k=99) == [0, 1, 2, 3]
    for bad in ({"strategy": "best"}, {"strategy": "top_k", "top_k": 0}):
        with pytest.raises(vauban.InputError):
            vauban.select_target_layers(values, **bad)
    with pytest.raises(vauban.InputError):
        vauban.select_target_layers([])


def test_fit_mean_difference() -> None:
    X = mx.random.normal((10, 4), key=mx.random.key(0))
    y = mx.array([0, 1] * 5)
    fitted = vauban.fit_mean_difference(X, y)
    x = np.array(X, dtype=np.float64)
    assert np.allclose(fitted.vector, x[1::2].mean(0) - x[0::2].mean(0), atol=1e-6)
    middle = (x[1::2].mean(0) + x[0::2].mean(0)) / 2
    assert abs(float(np.array(fitted.vector) @ middle) + fitted.bias) <= 1e-5
    assert np.isclose(float(mx.linalg.norm(fitted.unit)), 1.0, atol=1e-6)
    for bad_y, message in (
        (mx.zeros(10), "both classes"),
        (mx.arange(10), "labels"),
        (y[:3], "shape"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            vauban.fit_mean_difference(X, bad_y)
    with pytest.raises(vauban.InputError, match="NaN"):
        vauban.fit_mean_difference(mx.where(X > 1, mx.nan, X), y)
    with pytest.raises(vauban.InputError, match="equal"):
        vauban.fit_mean_difference(mx.ones((4, 3)), mx.array([0, 1, 0, 1]))
