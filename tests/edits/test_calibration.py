"""Rounding that minds what a matrix reads: its parts against definitions, and what it buys."""

import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

import vauban
from tests.architectures.build import build
from tests.edits.test_null_space import Letters
from vauban.edits import Update, pack_edited
from vauban.edits.modules import unpack
from vauban.errors import InputError
from vauban.evaluation.likelihood import compare_sequences as compare
from vauban.evaluation.sequences import Scored
from vauban.export import calibrate
from vauban.generation import eos_ids, generate_tokens
from vauban.models import anatomy, module_inputs, output_gradients
from vauban.rounding import Energy, InputMoments


def packed(rows: int, columns: int, bits: int = 4, **form: Any) -> nn.Module:
    linear = nn.Linear(columns, rows, bias=False)
    linear.weight = 0.02 * mx.random.normal((rows, columns), key=mx.random.key(0))
    return linear.to_quantized(bits=bits, **form)


def correlated(n: int, size: int) -> np.ndarray:
    """Inputs that live mostly in a few directions, as a trained model's do."""
    random = np.random.default_rng(0)
    basis = random.normal(size=(24, size)) / np.arange(1, 25)[:, None]
    x: np.ndarray = random.normal(size=(n, 24)) @ basis + 0.05 * random.normal(size=(n, size))
    return x.astype(np.float32)


def matrix(module: nn.Module, arrays: Any = None) -> mx.array:
    found = module if arrays is None else arrays
    return unpack(
        found["weight"], found["scales"], found.get("biases"), module.group_size, module.bits,
        getattr(module, "mode", "affine"),
    )  # fmt: skip


@pytest.mark.parametrize(
    "form",
    [
        {"group_size": 64, "bits": 4},
        {"group_size": 32, "bits": 3},
        {"group_size": 128, "bits": 8},
        {"group_size": 16, "bits": 4, "mode": "nvfp4"},
        {"group_size": 32, "bits": 4, "mode": "mxfp4"},
    ],
)
def test_outputs_are_nearer_and_the_direction_is_out(form: dict[str, Any]) -> None:
    """On fresh inputs of the same kind; exact, and without a substitute, as without calibration."""
    module = packed(256, 256, **form)
    u = mx.random.normal((1, 256), key=mx.random.key(1))
    plain = Update("weight", 0, "mlp", u / mx.linalg.norm(u), 1.0, None, False)
    inputs = correlated(1500, 256)
    energy = InputMoments(256, 256).update(inputs[:1000]).energy()
    target = plain.weight(matrix(module))

    def wrong(*energies: Energy) -> float:
        found = pack_edited(module, plain, energies)
        assert found.left <= 1e-3 and found.leak <= 0.15
        difference = matrix(module, found.arrays) - target
        return float(mx.linalg.norm(difference @ mx.array(inputs[1000:]).T))

    assert wrong(energy) <= 0.75 * wrong()


def test_inputs_that_are_all_alike_change_little() -> None:
    """With nothing to gain the feedback costs little: E[x xᵀ] = 1."""
    module = packed(256, 256, group_size=64)
    u = mx.random.normal((1, 256), key=mx.random.key(1))
    plain = Update("weight", 0, "mlp", u / mx.linalg.norm(u), 1.0, None, False)
    white = Energy(np.zeros((1, 256), np.float32), np.ones(256, np.float32), 1)
    calibrated = pack_edited(module, plain, (white,))
    assert calibrated.error <= 1.15 * pack_edited(module, plain).error


def test_a_table_is_rounded_where_its_rows_matter() -> None:
    table = nn.Embedding(300, 128)
    table.weight = 0.02 * mx.random.normal((300, 128), key=mx.random.key(3))
    module = table.to_quantized(group_size=64, bits=4)
    u = mx.random.normal((1, 128), key=mx.random.key(1))
    plain = Update("weight", -1, "embedding", u / mx.linalg.norm(u), 1.0, None, False)
    gradients = correlated(800, 128)
    energy = InputMoments(128, 128).update(gradients).energy()
    target = plain.weight(matrix(module))

    def wrong(*energies: Energy) -> float:
        found = pack_edited(module, plain, energies)
        assert found.left <= 1e-3
        difference = matrix(module, found.arrays) - target
        return float(mx.linalg.norm(difference @ mx.array(gradients).T))

    assert wrong(energy) <= 0.75 * wrong()


def test_a_calibrated_table_loses_several_directions_as_well() -> None:
    table = nn.Embedding(200, 256)
    table.weight = 0.02 * mx.random.normal((200, 256), key=mx.random.key(3))
    module = table.to_quantized(group_size=64, bits=4)
    basis = np.linalg.qr(np.random.default_rng(0).normal(size=(256, 2)))[0].T.astype(np.float32)
    energy = InputMoments(256, 128).update(correlated(800, 256)).energy()
    update = Update("weight", -1, "embedding", mx.array(basis), 1.0, None, False)
    assert pack_edited(module, update, (energy,)).left <= 3e-4


def test_a_model_without_gradients_says_that_its_table_is_not_calibrated() -> None:
    model = build("deepseek_v41")
    size = anatomy(model).d_model
    plan = vauban.plan_cut(model, mx.random.normal((size,), key=mx.random.key(1)), embedding=True)
    calibrated = plan.calibrated(Letters(), ["ab", "cde"], max_tokens=1)
    table = calibrated.updates[0]
    assert table.writes_rows and table.path not in calibrated.inputs
    assert f"{table.path} is rounded without calibration" in calibrated.summary()
    assert all(calibrated.inputs[u.path] for u in calibrated.updates if not u.writes_rows)


def test_gradients_are_those_of_the_log_likelihood(organism: Any) -> None:
    """Against finite differences along a random direction, of the tokens that were drawn."""
    model, _ = organism
    path = anatomy(model).embedding_path
    tokens = mx.array([[1, 268, 201, 447, 1082]])
    key = mx.random.key(4)
    found = output_gradients(model, [path], tokens, key=key)[path]
    assert found.shape == (5, 128)
    drawn = mx.random.categorical(model(tokens).astype(mx.float32), key=key)
    embedding = dict(model.named_modules())[path]
    along = mx.random.normal((5, 128), key=mx.random.key(5))

    def likelihood(step: float) -> float:
        h = embedding(tokens) + step * along
        logits = model(tokens, input_embeddings=h).astype(mx.float32)
        chosen = mx.take_along_axis(logits, drawn[..., None], -1)[..., 0]
        return float((chosen - mx.logsumexp(logits, -1)).sum())

    expected = (likelihood(1e-3) - likelihood(-1e-3)) / 2e-3
    assert float((found * along).sum()) == pytest.approx(expected, rel=2e-2)
    assert type(embedding) is type(dict(model.named_modules())[path])


def test_random_tokens_stand_in_for_prompts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nearer to the float cut on prompts than without them, and the same every time.

    The first call is the model's first forward pass, whose checks must not be read.
    """
    monkeypatch.setattr(calibrate, "_RANDOM_TEXTS", (24, 16))
    model, tokenizer = vauban.load(vauban.organism_path("4bit"))
    prompts = ["Name a colour.", "Tell me about rivers.", "How do I cook rice?"]
    texts = [vauban.encode_chat(tokenizer, prompt) for prompt in prompts]
    scored = [Scored(ids, 1) for ids in texts]
    plan = vauban.plan_cut(model, mx.random.normal((128,), key=mx.random.key(1)), embedding=True)
    calibrated = plan.calibrated()
    assert "random tokens" in calibrated.summary()
    assert calibrated.settings["calibration"]["tokens"] == 24 * 16
    again = plan.calibrated()
    assert all(
        np.array_equal(read[0].factor, again.inputs[path][0].factor)
        for path, read in calibrated.inputs.items()
    )
    reference = plan.apply(copy.deepcopy(model), "float")
    near, far = (
        compare(reference, p.apply(copy.deepcopy(model), calibrate=False), scored).kl
        for p in (calibrated, plan)
    )
    assert near < far
    with pytest.raises(InputError, match="None for random tokens"):
        plan.calibrated(tokenizer, [])
    with pytest.raises(InputError, match="need the tokenizer"):
        plan.calibrated(prompts=prompts)


@pytest.mark.parametrize("kind", ["4bit", "moe"])
def test_a_calibrated_plan_has_read_the_cut_model(kind: str) -> None:
    """Prompts and answers through the float cut, expert by expert; the same figures every time."""
    model, tokenizer = vauban.load(vauban.organism_path(kind))
    plan = vauban.plan_cut(model, mx.random.normal((128,), key=mx.random.key(1)), embedding=True)
    prompts = ["Name a colour.", "Tell me about rivers."]
    calibrated = plan.calibrated(tokenizer, prompts, max_tokens=3)
    assert calibrated.settings["calibration"]["prompts"] == 2 and calibrated.notes == plan.notes
    edited = plan.apply(copy.deepcopy(model), "float")
    texts = [vauban.encode_chat(tokenizer, prompt) for prompt in prompts]
    answers = generate_tokens(edited, texts, eos=eos_ids(tokenizer), max_tokens=3)
    rows: dict[tuple[str, int], list[np.ndarray]] = {}

    def read(path: str, x: mx.array, experts: mx.array | None) -> None:
        routed = np.zeros(len(x), int) if experts is None else np.array(experts)
        for expert in set(routed.tolist()):
            rows.setdefault((path, expert), []).append(np.array(x)[routed == expert])

    matrices = [u for u in calibrated.updates if not u.writes_rows]
    with module_inputs(edited, [u.path for u in matrices], read):
        for text, answer in zip(texts, answers, strict=True):
            mx.eval(edited(mx.array([text + answer])))
    for update in matrices:
        for expert, energy in enumerate(calibrated.inputs[update.path]):
            if energy is None:
                assert (update.path, expert) not in rows
                continue
            x = np.concatenate(rows[update.path, expert]).astype(np.float64)
            assert energy.rows == len(x)
            size = (x**2).mean(0)
            found = (energy.factor.astype(np.float64) ** 2).sum(0) + energy.rest
            assert np.abs(found - size).max() <= 1e-3 * size.max()
    table = calibrated.updates[0]
    assert table.writes_rows and calibrated.inputs[table.path][0] is not None
    again = plan.calibrated(tokenizer, prompts, max_tokens=3)
    for path, read in calibrated.inputs.items():
        for a, b in zip(read, again.inputs[path], strict=True):
            assert (a is None) == (b is None)
            assert a is None or b is None or np.array_equal(a.factor, b.factor)


def test_calibration_needs_prompts(organism: Any) -> None:
    model, tokenizer = organism
    plan = vauban.plan_cut(model, mx.random.normal((128,)))
    with pytest.raises(InputError, match="no calibration prompts"):
        plan.calibrated(tokenizer, [])
