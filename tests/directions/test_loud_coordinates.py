"""Estimators that a loud coordinate does not rule, on arrays, on the organism, on a loud model."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import vauban
from vauban.directions.loud_coordinates import (
    carried,
    clip_for,
    loud,
    loud_coordinates,
    ratios,
    ruling_note,
)

from ..conftest import build

LOUD = 17


def two_classes(
    n: int = 30, d: int = 24, seed: int = 0, loud_size: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Rows that differ along coordinates 0 and 1; coordinate 5 is loud where a size is given."""
    rng = np.random.default_rng(seed)
    labels = np.arange(2 * n) >= n
    rows = rng.normal(0, 1, (2 * n, d)) + np.linspace(0.5, 1.5, d)
    rows[:, :2] += 3.0 * labels[:, None]
    rows[:, 5] += loud_size * (1 + 0.3 * rng.normal(size=2 * n))
    return rows, labels


def fit(name: str, rows: np.ndarray, labels: np.ndarray, **options: Any) -> vauban.Direction:
    return getattr(vauban, name)(mx.array(rows), mx.array(labels.astype(int)), **options)


def test_the_mask_is_read_off_the_harmless_mean_alone() -> None:
    rows, labels = two_classes(loud_size=400.0)
    mean = np.abs(rows[~labels].mean(axis=0))
    for multiple in (1.05, 2.0, 50.0):
        fitted = fit("fit_masked_difference", rows, labels, loud_multiple=multiple)
        wanted = np.flatnonzero(mean > multiple * np.median(mean))
        assert fitted.masked == tuple(wanted.tolist()) and 5 in wanted
        difference = rows[labels].mean(axis=0) - rows[~labels].mean(axis=0)
        difference[wanted] = 0
        assert np.allclose(fitted.vector, difference, atol=1e-5)
        assert not np.array(fitted.vector)[wanted].any()
    # What the harmful rows do to a coordinate does not put it into the mask.
    rows[labels, 9] += 1e4
    assert fit("fit_masked_difference", rows, labels).masked == (5,)


def test_a_mask_without_coordinates_changes_no_bit() -> None:
    rows, labels = two_classes()
    plain, masked = (
        fit(name, rows, labels) for name in ("fit_mean_difference", "fit_masked_difference")
    )
    assert masked.masked == () and masked.bias == plain.bias
    assert mx.array_equal(masked.vector, plain.vector)


def test_scaled_difference_against_its_formula_in_float64() -> None:
    rows, labels = two_classes(loud_size=400.0)
    high, low = rows[labels], rows[~labels]
    freedom = len(rows) - 2
    squares = ((high - high.mean(0)) ** 2).sum(0) + ((low - low.mean(0)) ** 2).sum(0)
    variance = squares / freedom
    target = np.median(variance)
    shrink = (2 * variance**2 / freedom).sum() / ((variance - target) ** 2).sum()
    assert 0 < shrink < 1
    weights = (high.mean(0) - low.mean(0)) / ((1 - shrink) * variance + shrink * target)
    unit = weights / np.linalg.norm(weights)
    fitted = fit("fit_scaled_difference", rows, labels)
    assert np.allclose(fitted.unit, unit, atol=1e-5)
    # The length is the gap of the class means along it, the zero of the score their midpoint.
    along = rows @ np.array(fitted.unit, np.float64)
    gap = along[labels].mean() - along[~labels].mean()
    assert np.isclose(float(mx.linalg.norm(fitted.vector)), gap, rtol=1e-4)
    score = rows @ np.array(fitted.vector, np.float64) + fitted.bias
    assert np.isclose(score[labels].mean(), -score[~labels].mean(), rtol=1e-3)


def test_scaled_difference_is_the_plain_one_where_variances_say_nothing() -> None:
    """Two rows of each class; equal variances; no variance at all."""
    rows, labels = two_classes(n=2)
    plain, scaled = (
        fit(name, rows, labels) for name in ("fit_mean_difference", "fit_scaled_difference")
    )
    assert float(plain.unit @ scaled.unit) > 0.95
    square = np.array([[0.0, 0.0], [1.0, 1.0], [3.0, 0.5], [4.0, 1.5]] * 5)
    halves = np.array([0, 0, 1, 1] * 5).astype(bool)
    for values in (square, np.where(halves[:, None], [[4.0, 3.0]], [[0.0, 1.0]])):
        plain = fit("fit_mean_difference", values, halves)
        assert np.allclose(fit("fit_scaled_difference", values, halves).vector, plain.vector)


@pytest.mark.parametrize("seed", range(3))
def test_a_loud_coordinate_rules_the_plain_difference_alone(seed: int) -> None:
    """Held-out AUC on rows of the same kind, and the cosine with the true direction."""
    rows, labels = two_classes(n=40, seed=seed, loud_size=400.0)
    fresh, truth = two_classes(n=200, seed=seed + 100, loud_size=400.0)
    found = {
        name: np.array(fit(f"fit_{name}_difference", rows, labels).unit, np.float64)
        for name in ("mean", "masked", "scaled")
    }
    auc = {name: roc_auc_score(truth, fresh @ unit) for name, unit in found.items()}
    cosine = {name: (unit[0] + unit[1]) / 2**0.5 for name, unit in found.items()}
    assert cosine["mean"] < 0.75 and auc["mean"] < 0.6
    for name in ("masked", "scaled"):
        assert cosine[name] > 0.9 and auc[name] > 0.99


def test_loud_is_what_stands_out_and_moves() -> None:
    """A coordinate that stands at the same height in every prompt cancels in a difference."""
    mean, variance = np.ones(9), np.ones(9)
    mean[[2, 4, 6]] = [80.0, -200.0, 60.0]
    variance[[2, 6]] = [100.0, 400.0]
    assert np.flatnonzero(loud(mean, variance)).tolist() == [6]
    (one,) = loud_coordinates(mean[None], variance[None])
    assert (one.residual, one.coordinate, one.mean_ratio, one.spread_ratio) == (0, 6, 60.0, 20.0)
    variance[1] = 900.0  # moves so much more than the rest that its mean does not matter
    assert np.flatnonzero(loud(mean, variance)).tolist() == [1, 6]
    assert ratios(np.zeros(3)).tolist() == [0.0, 0.0, 0.0]
    at = loud_coordinates(mean[None], variance[None])
    assert ruling_note(np.full(9, 0.1), np.ones(9), at) is None
    said = ruling_note(np.where(np.arange(9) == 1, 9.0, 0.1), variance, at)
    assert said and "method='variance_scaled'" in said and "carry 100%" in said
    assert carried(np.array([3.0, 4.0]), np.array([1.0, 0.0]), [1]) == (0.64, 0.0)


def test_automatic_clipping_reaches_the_loud_coordinates() -> None:
    """The tail is wider than what stands out, whatever the width; else nothing is clipped."""
    for d, at in ((24, [5]), (400, [5]), (400, [5, 6, 7, 8])):
        mean, variance = np.ones((3, 1, d)), np.ones((3, 1, d))
        assert clip_for(mean, variance) == (0.0, [])
        mean[1, 0, at] = 500.0
        assert clip_for(mean, variance) == (0.0, [])
        variance[1, 0, at] = 1e4
        quantile, residuals = clip_for(mean, variance)
        assert residuals == [1] and len(at) / d < quantile <= 0.25
    assert clip_for(np.ones((1, 1, 4096)), np.ones((1, 1, 4096)))[0] == 0.0


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("fit_masked_difference", {"loud_multiple": 1.0}, "above 1"),
        ("fit_masked_difference", {"loud_multiple": float("nan")}, "above 1"),
        ("fit_masked_difference", {"loud_multiple": "much"}, "above 1"),
    ],
)
def test_bad_multiples(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        fit(name, *two_classes(), **options)


def test_a_mask_that_leaves_nothing_is_refused() -> None:
    rows = np.ones((8, 6))
    labels = np.arange(8) >= 4
    rows[:, 3] = np.where(labels, 900.0, 800.0)
    with pytest.raises(vauban.InputError, match=r"leaves nothing.*3.*raise loud_multiple"):
        fit("fit_masked_difference", rows, labels)
    with pytest.raises(vauban.InputError, match="class means are equal"):
        fit("fit_scaled_difference", np.ones((8, 6)), labels)


def test_nothing_changes_on_a_model_without_a_loud_coordinate(
    organism: Any, organism_prompts: Any
) -> None:
    """The mask and the automatic clipping, bit for bit, scores included."""
    sets = organism_prompts["harmful"][:24], organism_prompts["harmless"][:24]
    plain = vauban.measure(*organism, *sets)
    masked = vauban.measure(*organism, *sets, method="masked_mean_difference")
    clipped = vauban.measure(*organism, *sets, clip_quantile="auto")
    for other in (masked, clipped):
        for name in ("direction", "directions", "norms", "means"):
            assert mx.array_equal(getattr(other, name), getattr(plain, name)), name
        assert other.scores == plain.scores and other.layer_index == plain.layer_index
    assert masked.method == "masked_mean_difference" and masked.provenance["masked"] == {}
    assert clipped.provenance["clip_quantile"] == 0.0
    assert clipped.provenance["clip_residuals"] == []


def test_measuring_streams_what_the_array_forms_give(
    organism: Any, organism_prompts: Any, tmp_path: Any
) -> None:
    """At the chosen residual, over all prompts; a low multiple masks something here too."""
    sets = organism_prompts["harmful"][:12], organism_prompts["harmless"][:12]
    X = vauban.collect_activations(*organism, [*sets[1], *sets[0]]).at(3)
    y = mx.arange(24) >= 12
    scaled = vauban.measure(*organism, *sets, layer=2, method="variance_scaled")
    fitted = vauban.fit_scaled_difference(X, y)
    raw = scaled.directions[2] * scaled.norms[2]
    assert np.allclose(raw, fitted.vector, atol=1e-3 * float(scaled.norms[2]))
    gap = scaled.projections["harmful"] - scaled.projections["harmless"]
    assert np.isclose(gap, float(scaled.norms[2]), rtol=1e-4)
    masked = vauban.measure(
        *organism, *sets, layer=2, method="masked_mean_difference", loud_multiple=2.0
    )
    expected = vauban.fit_masked_difference(X, y, loud_multiple=2.0)
    assert masked.provenance["masked"]["3"] == list(expected.masked) != []
    assert np.allclose(masked.direction, expected.unit, atol=1e-4)
    again = vauban.DirectionResult.load(masked.save(tmp_path / "d.safetensors"))
    assert again.to_dict() == masked.to_dict()
    assert again.provenance["loud_multiple"] == 2.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "masked_mean_diference"}, "Did you mean 'masked_mean_difference'"),
        ({"method": "variance_scale"}, "Did you mean 'variance_scaled'"),
        ({"method": "masked_mean_difference", "loud_multiple": 0.5}, "above 1"),
        ({"loud_multiple": 40.0}, "belongs to method='masked_mean_difference'"),
        ({"clip_quantile": "automatic"}, "expected 'auto' or a number"),
    ],
)
def test_bad_arguments(organism: Any, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        vauban.measure(*organism, ["a", "b"], ["c", "d"], **arguments)


def loud_model(tokenizer: Any, gain: float) -> tuple[Any, list[str], list[str], np.ndarray]:
    """A tiny Gemma 3, its harmful and harmless prompts, and the direction that divides them.

    A prompt's last word carries its class: the words' embeddings differ along one known direction,
    which the blocks hardly disturb. The first block's post-norm gain writes coordinate `LOUD`.
    """
    vocabulary = len(tokenizer.get_vocab())
    model = build("gemma3_text", vocab_size=vocabulary, tie_word_embeddings=True)
    rng = np.random.default_rng(0)
    d = model.args.hidden_size
    known = rng.normal(size=d)
    known[LOUD] = 0
    known /= np.linalg.norm(known)
    texts = ((i, tokenizer.decode([i])) for i in range(vocabulary))
    words = [(i, t.strip()) for i, t in texts if t[0] == " " and t[1:].isalpha() and len(t) > 3]
    embedding = rng.normal(0, 0.1, (vocabulary, d)) + rng.normal(0, 0.05, d)
    classes = words[:40], words[40:80]
    for sign, members in zip((0.25, -0.25), classes, strict=True):
        for i, _ in members:
            embedding[i] += sign * known
    model.model.embed_tokens.weight = mx.array(embedding.astype(np.float32))
    for layer in model.layers:
        for name in ("post_attention_layernorm", "post_feedforward_layernorm"):
            layer[name].weight = mx.full((d,), -0.8)  # Gemma's gain is 1 + w
    model.layers[0].post_attention_layernorm.weight[LOUD] = gain - 1
    others = [text for _, text in words[80:140]]
    prompts = [
        [" ".join([*rng.choice(others, 2), members[rng.integers(40)][1]]) for _ in range(60)]
        for members in classes
    ]
    return model, prompts[0], prompts[1], known


def test_a_loud_coordinate_of_a_real_class(organism: Any) -> None:
    """The plain difference follows it and says so; each cure finds the known direction."""
    tokenizer = organism[1]
    last = -len(vauban.post_instruction_positions(tokenizer)) - 1

    def direction(model: Any, harmful: Any, harmless: Any, **options: Any) -> Any:
        return vauban.measure(
            model, tokenizer, harmful, harmless, layer=1, positions=(last,), **options
        )

    *quiet, known = loud_model(tokenizer, 0.2)
    assert float(np.array(direction(*quiet).direction) @ known) > 0.85
    assert direction(*quiet, clip_quantile="auto").provenance["clip_residuals"] == []
    *sets, known = loud_model(tokenizer, 300.0)
    plain = direction(*sets)
    assert abs(float(np.array(plain.direction) @ known)) < 0.1
    assert plain.scores["auc"][1] < 0.85 and plain.scores["cohens_d"][1] < 1.5
    (said,) = [w for w in plain.warnings if "loud" in w]
    assert f"loud coordinate {LOUD} " in said and "residual 2 carries 100%" in said
    assert "'masked_mean_difference' or" in said and "clip_quantile='auto'" in said
    for options in (
        {"method": "masked_mean_difference"},
        {"method": "variance_scaled"},
        {"clip_quantile": "auto"},
    ):
        cured = direction(*sets, **options)
        assert float(np.array(cured.direction) @ known) > 0.8, options
        assert cured.scores["auc"][1] > 0.97 and cured.scores["cohens_d"][1] > 3
        assert not [w for w in cured.warnings if "loud" in w]
        if "method" in options:
            assert cured.method == options["method"]
            assert cured.provenance.get("masked", {"2": [LOUD]})["2"] == [LOUD]
        else:
            # The embedding's own residual is not clipped: nothing is loud there.
            assert cured.provenance["clip_residuals"] == [1, 2, 3, 4]
            assert cured.provenance["clip_quantile"] == 2 / 64
    # The causal choice is offered the directions of the same estimator.
    causal = vauban.measure(
        sets[0], tokenizer, sets[1][:12], sets[2][:12], layer="causal",
        method="masked_mean_difference",
    )  # fmt: skip
    assert not np.array(causal.directions)[:, LOUD].any()
