"""The one-liners, against the rooms they call."""

import mlx.core as mx
import numpy as np
import pytest

import vauban
from vauban import quick
from vauban.errors import InputError
from vauban.evaluation import is_refusal
from vauban.prompts import model_prompt_sets


@pytest.fixture(scope="module")
def loaded(organism):
    return organism


@pytest.fixture(scope="module")
def direction(loaded):
    return quick.measure_direction(*loaded)


@pytest.fixture(scope="module")
def harmful() -> str:
    rows = vauban.load_labelled_prompts(model_prompt_sets(vauban.organism_path("dense")).eval)
    return next(row.prompt for row in rows if row.label == "harmful")


def test_measuring_uses_the_sets_of_the_model_folder(loaded, direction):
    sets = model_prompt_sets(vauban.organism_path("dense"))
    expected = vauban.measure(
        *loaded,
        vauban.load_prompts(sets.harmful),
        vauban.load_prompts(sets.harmless),
        layer="answers",
        positions="post_instruction",
    )
    assert direction.layer_index == expected.layer_index
    assert mx.allclose(direction.direction, expected.direction, atol=1e-5)


def test_a_probe_is_the_projection_of_the_last_token(loaded, direction, harmful):
    model, tokenizer = loaded
    probe = quick.probe_prompt(model, tokenizer, harmful, direction)
    tokens = mx.array([vauban.encode_chat(tokenizer, harmful)])
    residual = np.array(vauban.forward(model, tokens).residual[0, :, 0], dtype=np.float64)
    expected = residual @ np.array(direction.direction, dtype=np.float64)
    np.testing.assert_allclose(probe.projections, expected, rtol=1e-4, atol=1e-4)
    # A raw array of any length along the direction is the same question.
    again = quick.probe_prompt(model, tokenizer, harmful, 3.0 * direction.direction)
    np.testing.assert_allclose(again.projections, probe.projections, rtol=1e-4, atol=1e-4)


def test_the_last_token_of_a_scan_is_the_probe(loaded, direction, harmful):
    scan = quick.scan(*loaded, harmful, direction)
    probe = quick.probe_prompt(*loaded, harmful, direction)
    assert scan.residual_index == direction.residual_index
    assert len(scan.tokens) == len(scan.projections) > 3
    assert scan.projections[-1] == pytest.approx(probe.projections[scan.residual_index], rel=1e-3)
    with pytest.raises(InputError, match="direction_layer"):
        quick.scan(*loaded, harmful, direction.direction)
    with pytest.raises(InputError, match="blocks 0 to"):
        quick.scan(*loaded, harmful, direction.direction, 99)


def test_a_scan_without_a_text_is_the_surface_of_the_models_rows(loaded, direction, monkeypatch):
    rows = vauban.load_surface_prompts(vauban.organism_path("dense") / "prompts/surface.jsonl")
    few = rows[::24]
    monkeypatch.setattr("vauban.quick.inspect_direction.load_surface_prompts", lambda path: few)
    scan = quick.scan(*loaded, direction.direction, direction.layer_index)
    expected = vauban.scan_surface(*loaded, direction, few)
    assert [point.row for point in scan.points] == few
    assert [p.answer for p in scan.points] == [p.answer for p in expected.points]
    if direction.position == -1:
        assert scan.points == expected.points
    with pytest.raises(InputError, match="pass layer"):
        quick.scan(*loaded, direction.direction)


def test_a_system_prompt_goes_through_probe_and_steer(direction, harmful):
    model, plain = quick.load(vauban.organism_path("dense"))
    _, other = quick.load(vauban.organism_path("dense"), system_prompt="Be brief.")
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": harmful}]
    spoken = quick.probe_prompt(model, other, harmful, direction)
    np.testing.assert_allclose(
        spoken.projections, quick.probe_prompt(model, plain, messages, direction).projections
    )
    assert spoken.projections != quick.probe_prompt(model, plain, harmful, direction).projections


def test_steering_takes_the_refusal_out(loaded, direction, harmful):
    assert is_refusal(quick.steer_prompt(*loaded, harmful, direction, alpha=0.0, max_tokens=24))
    assert not is_refusal(quick.steer_prompt(*loaded, harmful, direction, max_tokens=24))


def test_abliterate_writes_a_model_and_leaves_the_one_in_memory(loaded, harmful, tmp_path):
    model, tokenizer = loaded
    before = vauban.generate(model, tokenizer, [harmful], max_tokens=24)
    done = quick.abliterate(model, tokenizer, vauban.organism_path("dense"), tmp_path / "out")
    assert done.export.direction_left < 0.02 and str(tmp_path / "out") in done.summary()
    assert vauban.generate(model, tokenizer, [harmful], max_tokens=24) == before
    written, _ = vauban.load(tmp_path / "out")
    found = quick.evaluate(model, written, tokenizer, [harmful], max_tokens=16)
    assert found.refusal_rate_original == 1.0 and found.refusal_rate_modified == 0.0
    assert found.num_prompts == found.num_harmless == 1


def test_as_many_harmless_prompts_as_harmful_ones_are_compared(loaded):
    model, tokenizer = loaded
    found = quick.evaluate(model, (), tokenizer, ["one", "two", "three"], max_tokens=2)
    assert (found.num_prompts, found.num_harmless) == (3, 3)


def test_geometry_of_known_directions():
    a, b = mx.array([1.0, 0.0, 0.0]), mx.array([0.0, 2.0, 0.0])
    found = quick.analyze_geometry({"a": a, "b": b, "ab": a + 0.5 * b})
    np.testing.assert_allclose(
        found.cosines, [[1, 0, 0.5**0.5], [0, 1, 0.5**0.5], [0.5**0.5, 0.5**0.5, 1]], atol=1e-6
    )
    assert found.independent == (("a", "b"),)
    assert 1.0 < found.rank < 2.0
    assert quick.compare(a, -3.0 * a).degrees == pytest.approx(180.0)


@pytest.mark.parametrize(
    "given",
    [{"a": mx.ones(3)}, {"a": mx.ones(3), "b": mx.ones(4)}, {"a": mx.ones(3), "b": mx.zeros(3)}],
)
def test_directions_that_cannot_be_compared(given):
    with pytest.raises(InputError):
        quick.analyze_geometry(given)
