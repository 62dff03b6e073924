"""Folders changed in known ways are named for what they are: real mlx-lm checkpoints, no mocks."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, sharded
from vauban.comparison import FolderDiff, compare_folders, diff_models
from vauban.comparison.stored_parameters import stored_parameters
from vauban.errors import InputError, ModelError

ORGANISM = vauban.organism_path("dense")
Weights = dict[str, mx.array]


def copied(source: Path, folder: Path, change: Callable[[Weights], None] | None = None) -> Path:
    """A folder as plain code edits it: load the arrays, change some, save."""
    shutil.copytree(source, folder)
    if change:
        weights = dict(mx.load(str(source / "model.safetensors")))
        change(weights)
        mx.eval(weights)
        mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


def add(weights: Weights, name: str, delta: np.ndarray) -> None:
    weights[name] = (weights[name].astype(mx.float32) + mx.array(delta)).astype(weights[name].dtype)


def writers(diff: FolderDiff) -> set[str]:
    return {change.name for change in diff.changes}


def test_equal_folders_and_shards_are_equal(tmp_path: Path) -> None:
    diff = compare_folders(ORGANISM, sharded(ORGANISM, tmp_path / "shards", 3))
    assert diff.same and diff.conclusion == "weights equal" and diff.equal == diff.tensors == 68


def test_a_cut_of_half_the_writers_is_a_cut_along_its_direction(tmp_path: Path) -> None:
    model, _ = vauban.load(ORGANISM)
    d = mx.random.normal((128,), key=mx.random.key(3))
    plan = vauban.plan_cut(model, d, layers=range(3), alpha=0.7, embedding=False)
    plan.export(ORGANISM, tmp_path / "cut")
    diff = compare_folders(ORGANISM, tmp_path / "cut", direction=d)
    (output, *_) = diff.shared
    assert len(output.members) == 6 and output.cut and output.rank == 1
    assert output.strengths == pytest.approx((0.7, 0.7), abs=0.02)
    assert output.matches is not None and output.matches > 0.99
    assert all(c.rank == 1 and c.low_rank for c in diff.changes)
    assert diff.findings[0].startswith("a cut of one direction in 6 writers, strength 0.7")
    # An independent reading of the size.
    name = "model.layers.1.mlp.down_proj.weight"
    before, after = (
        np.array(mx.load(str(f / "model.safetensors"))[name].astype(mx.float32), np.float64)
        for f in (ORGANISM, tmp_path / "cut")
    )
    change = next(c for c in diff.changes if c.name == name)
    expected = np.linalg.norm(after - before) / np.linalg.norm(before)
    assert change.relative == pytest.approx(expected, rel=1e-5)
    exact = np.linalg.svd(after - before, compute_uv=False)
    assert change.singular_values[0] == pytest.approx(exact[0], rel=1e-2)


@pytest.mark.parametrize("name", ["gemma3_text", "olmo2"])
def test_a_cut_behind_post_norms_is_one_direction(tmp_path: Path, name: str) -> None:
    """Each writer loses normalize(g ∘ d) with a gain of its own; d is what they share."""
    source = save_checkpoint(tmp_path / "source", name, dtype=mx.float32)
    d = mx.random.normal((64,), key=mx.random.key(3))
    plan = vauban.plan_cut(load_plain(source), d, embedding=False)
    plan.export(source, tmp_path / "cut")
    diff = compare_folders(source, tmp_path / "cut", direction=d)
    (output, *_) = diff.shared
    assert (len(output.members), output.of, output.behind_norms, output.rank) == (8, 8, 8, 1)
    assert output.cosine > 0.999 and output.matches is not None and output.matches > 0.999
    assert diff.findings[0].startswith(
        "a cut of one direction in 8 writers, strength 1.00, divided"
    )
    assert output.to_dict()["behind_norms"] == 8

    def plainly(weights: Weights) -> None:
        unit = np.array(d / mx.linalg.norm(d), np.float64)
        for written in output.members:
            before = np.array(weights[written], np.float64)
            add(weights, written, (-np.outer(unit, unit @ before)).astype(np.float32))

    # A cut that leaves the gains out of account is one direction as it stands in the matrices.
    plain = compare_folders(source, copied(source, tmp_path / "plain", plainly), direction=d)
    assert (len(plain.shared[0].members), plain.shared[0].behind_norms) == (8, 0)
    assert plain.shared[0].matches is not None and plain.shared[0].matches > 0.999


def test_a_four_bit_cut_is_both(tmp_path: Path) -> None:
    model, _ = vauban.load(vauban.organism_path("4bit"))
    d = mx.random.normal((128,), key=mx.random.key(3))
    vauban.plan_cut(model, d, embedding=False).export(vauban.organism_path("4bit"), tmp_path / "c")
    alike = compare_folders(vauban.organism_path("4bit"), tmp_path / "c", direction=d)
    assert not alike.formats and len(alike.changes) == 12
    assert alike.findings[0].startswith("a cut of one direction in 12 writers, strength ")
    other = compare_folders(ORGANISM, tmp_path / "c", direction=d)
    assert other.findings[0].startswith("requantized: BF16 became 4-bit affine g64 in 43 tensors")
    assert other.findings[1].startswith("a cut of one direction in 12 writers, strength ")
    assert other.shared[0].matches is not None and other.shared[0].matches > 0.95


def test_requantized_alone_is_no_cut() -> None:
    diff = compare_folders(ORGANISM, vauban.organism_path("4bit"))
    assert diff.findings[0].startswith("requantized: BF16 became 4-bit affine g64")
    assert len(diff.findings) == 1 and not diff.shared
    assert diff.settings.quantization == ("none", "4-bit affine g64")


def test_packed_rows_are_those_of_mlx(tmp_path: Path) -> None:
    for mode, bits, group in (("affine", 3, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32)):
        w = mx.random.normal((40, 64), key=mx.random.key(1))
        arrays = mx.quantize(w, group_size=group, bits=bits, mode=mode)
        names = ("weight", "scales", "biases")
        folder = tmp_path / f"{mode}{bits}"
        folder.mkdir()
        mx.save_safetensors(
            str(folder / "model.safetensors"),
            {f"a.{n}": x for n, x in zip(names, arrays, strict=False)},
        )
        form = {"quantization": {"bits": bits, "group_size": group, "mode": mode}}
        (parameter,) = stored_parameters(folder, form).values()
        exact = mx.dequantize(*arrays, group_size=group, bits=bits, mode=mode)
        rows = parameter.rows(7, 29)
        assert np.allclose(rows, np.array(exact.astype(mx.float32))[7:29], atol=1e-6)
        # No value was rounded by more than a step, and half of a step is typical.
        steps = parameter.steps(rows, 7, 29)
        error = np.abs(rows - np.array(w)[7:29])
        assert np.quantile(error / steps, 0.98) <= 1.0 and np.median(error / steps) > 0.1


@pytest.mark.parametrize("seed", [0, 1])
def test_a_random_low_rank_edit_has_no_common_direction(tmp_path: Path, seed: int) -> None:
    rng = np.random.default_rng(seed)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(5)]

    def change(weights: Weights) -> None:
        for name in names:
            left, right = rng.standard_normal((128, 4)), rng.standard_normal((4, 256))
            add(weights, name, 0.01 * left @ right)

    diff = compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "e", change))
    assert writers(diff) == set(names) and all(c.rank == 4 for c in diff.changes)
    wanted = "a low-rank change (up to rank 4) without a common direction in 5 matrices"
    assert diff.findings == (wanted,)


def test_rank_one_on_two_writers_is_named_with_both(tmp_path: Path) -> None:
    u, rng = np.random.default_rng(2).standard_normal(128), np.random.default_rng(3)
    names = ["model.layers.2.self_attn.o_proj.weight", "model.layers.4.mlp.down_proj.weight"]

    def change(weights: Weights) -> None:
        for name, sign in zip(names, (1, -1), strict=True):
            width = weights[name].shape[1]
            add(weights, name, sign * 0.02 * np.outer(u, rng.standard_normal(width)))

    diff = compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "e", change), direction=u)
    assert diff.shared[0].members == tuple(names) and not diff.shared[0].cut
    assert diff.findings == ("a change along one direction in 2 writers",)
    assert diff.shared[0].matches is not None and diff.shared[0].matches > 0.99


def test_noise_on_every_tensor_is_a_fine_tune(tmp_path: Path) -> None:
    rng = np.random.default_rng(4)

    def change(weights: Weights) -> None:
        for name, value in weights.items():
            add(weights, name, 0.02 * rng.standard_normal(value.shape))

    diff = compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "e", change))
    assert diff.conclusion == "every tensor changed: a fine-tune"


def test_another_template_alone(tmp_path: Path) -> None:
    folder = copied(ORGANISM, tmp_path / "e")
    file = folder / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config["chat_template"] = config["chat_template"] + "\n{# another #}"
    file.write_text(json.dumps(config))
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    diff = compare_folders(ORGANISM, folder)
    assert diff.same_weights and not diff.same
    assert diff.findings[:2] == ("weights equal", "the template differs")
    assert diff.settings.generation == {"temperature": (None, 0.7)}


def test_another_type_with_equal_values(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        weights |= {n: w.astype(mx.float32) for n, w in weights.items()}

    diff = compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "e", change))
    assert diff.conclusion == "stored as another type: BF16 became F32 in 68 tensors"
    assert not diff.changes and diff.equal == 68


@pytest.mark.parametrize("bits", [0, 4])
def test_an_adapter_is_the_weights_that_it_adds(tmp_path: Path, bits: int) -> None:
    source = save_checkpoint(tmp_path / "base", "qwen3_moe", bits=bits)
    model, _ = vauban.load(source)
    d = mx.random.normal((64,), key=mx.random.key(8))
    plan = vauban.plan_cut(model, d, embedding=False)
    plan.export(source, tmp_path / "adapter", precision="adapter")
    diff = compare_folders(source, tmp_path / "adapter", direction=d)
    assert diff.adapter and all(c.rank == 1 and c.low_rank for c in diff.changes)
    (output, *_) = diff.shared
    assert output.cut and output.strengths == pytest.approx((1.0, 1.0), abs=1e-3)
    assert output.matches == pytest.approx(1.0, abs=1e-4)
    # Four experts a block, each a matrix of its own.
    assert len(output.members) == 4 * (1 + 4)


def test_another_vocabulary_or_tokenizer_is_refused_for_behaviour_alone(tmp_path: Path) -> None:
    changed = copied(ORGANISM, tmp_path / "e")
    file = changed / "tokenizer.json"
    document = json.loads(file.read_text())
    vocabulary = document["model"]["vocab"]
    a, b = list(vocabulary)[300:302]
    vocabulary[a], vocabulary[b] = vocabulary[b], vocabulary[a]
    file.write_text(json.dumps(document))
    diff = compare_folders(ORGANISM, changed)
    assert diff.same_weights and not diff.settings.same_tokens
    assert diff.settings.tokenizer.startswith("other tokenizer of equal size: 2 of ")
    with pytest.raises(InputError, match="cannot be compared: other tokenizer of equal size"):
        diff_models(ORGANISM, changed, prompts=["Say hello."])
    del vocabulary[a]
    file.write_text(json.dumps(document))
    with pytest.raises(InputError, match="cannot be compared: other vocabulary: "):
        diff_models(ORGANISM, changed, prompts=["Say hello."])


def test_another_shape_and_missing_tensors_are_listed(tmp_path: Path) -> None:
    def change(weights: Weights) -> None:
        del weights["model.norm.weight"]
        weights["extra"] = mx.ones((3,))
        weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:2000]

    diff = compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "e", change))
    assert diff.only_base == ("model.norm.weight",) and diff.only_edited == ("extra",)
    assert diff.shapes == {"model.embed_tokens.weight": ((2560, 128), (2000, 128))}
    assert diff.findings[0].startswith("another set of tensors: 1 tensors only in the base")


def test_bad_folders_are_refused_by_name(tmp_path: Path) -> None:
    broken = copied(ORGANISM, tmp_path / "e")
    file = broken / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ModelError, match=r"model\.safetensors holds .* bytes, its header promises"):
        compare_folders(ORGANISM, broken)
    with pytest.raises(InputError, match="direction has 64 components; the residual stream has"):
        compare_folders(ORGANISM, ORGANISM, direction=mx.ones((64,)))

    def spoil(weights: Weights) -> None:
        weights["model.norm.weight"] = weights["model.norm.weight"] * mx.nan

    with pytest.raises(ModelError, match=r"model\.norm\.weight holds NaN or inf"):
        compare_folders(ORGANISM, copied(ORGANISM, tmp_path / "n", spoil))
    packed = copied(vauban.organism_path("4bit"), tmp_path / "p")
    config = json.loads((packed / "config.json").read_text())
    config["quantization"]["bits"] = 8
    (packed / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelError, match=r"says 8-bit affine g64 of .* do not fit"):
        compare_folders(ORGANISM, packed)
    peft = tmp_path / "peft"
    peft.mkdir()
    (peft / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="PEFT's: fuse it"):
        compare_folders(ORGANISM, peft)


_MEMORY = """
import sys, vauban
from pathlib import Path
from vauban.comparison import compare_folders

def memory(what):
    facts = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(facts[what].split()[0]) / 1024

before = memory("VmRSS")
diff = compare_folders(sys.argv[1], sys.argv[2])
assert [c.rank for c in diff.changes] == [1], diff.changes
print(memory("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux's memory figures")
def test_memory_stays_below_the_largest_tensor_and_600_mb(tmp_path: Path) -> None:
    rows, width = 120_000, 512  # 123 MB in bfloat16, 246 MB in float32
    rng = np.random.default_rng(0)
    table = mx.random.normal((rows, width), key=mx.random.key(0)).astype(mx.bfloat16)
    term = mx.array(np.outer(rng.standard_normal(rows), rng.standard_normal(width)) * 0.1)
    for name, value in (("a", table), ("b", (table + term.astype(mx.float32)).astype(mx.bfloat16))):
        folder = tmp_path / name
        folder.mkdir()
        mx.save_safetensors(str(folder / "model.safetensors"), {"lm_head.weight": value})
        (folder / "config.json").write_text('{"model_type": "llama", "hidden_size": 512}')
    done = subprocess.run(
        [sys.executable, "-c", _MEMORY, str(tmp_path / "a"), str(tmp_path / "b")],
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert float(done.stdout) <= 123 + 600
