"""Whose names and shapes an export has, on checkpoints as Hugging Face stores them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.utils import load_model

import vauban
from tests.architectures.build import build, configuration
from tests.export.checkpoints import save_checkpoint, save_shards, unit
from vauban._arrays import flat_parameters
from vauban.export.tensor_files import stored_tensors
from vauban.models import check_safetensors, weight_files

Weights = dict[str, mx.array]
_W = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


def _experts(weights: Weights, name_of: Callable[[str], str] = str) -> Weights:
    """Stacks as single modules: an independent account of what transformers writes."""
    split: Weights = {}
    for name, value in weights.items():
        head, stack, rest = name.partition(".switch_mlp.")
        if not stack:
            split[name] = value
            continue
        projection, _, part = rest.partition(".")
        for e in range(value.shape[0]):
            split[f"{head}.experts.{e}.{name_of(projection)}.{part}"] = value[e]
    return split


def _vision(weights: Weights) -> Weights:
    named = {}
    for name, value in weights.items():
        head = name.replace("language_model.model.", "model.language_model.")
        named[head.replace("language_model.lm_head", "lm_head")] = value
    tower = {f"model.visual.blocks.0.{n}.weight": mx.random.normal((8, 8)) for n in ("qkv", "proj")}
    return named | tower


def _linear_attention(weights: Weights) -> Weights:
    """Qwen 3.5: gains are stored less one, convolutions with their channels elsewhere."""
    norms = ("input_layernorm", "post_attention_layernorm", "model.norm", "q_norm", "k_norm")
    stored = {}
    for name, value in weights.items():
        if "conv1d.weight" in name:
            value = value.moveaxis(1, 2)
        if name.endswith(tuple(f"{n}.weight" for n in norms)):
            value = value - 1.0
        stored[name] = value
    more = {"mtp.layers.0.input_layernorm.weight": mx.random.normal((64,))}
    return _vision(stored) | more


def _gpt2(weights: Weights) -> Weights:
    turned = ("c_attn.weight", "c_proj.weight", "c_fc.weight")
    return {
        n.removeprefix("model."): v.T if n.endswith(turned) else v for n, v in weights.items()
    } | {"h.0.attn.bias": mx.ones((1, 1, 8, 8))}


def _llama4(weights: Weights) -> Weights:
    stored = {}
    for name, value in weights.items():
        if ".experts.gate_proj." in name:
            up = weights[name.replace("gate_proj", "up_proj")]
            both = mx.concatenate([value.swapaxes(1, 2), up.swapaxes(1, 2)], axis=-1)
            stored[name.replace("gate_proj.weight", "gate_up_proj")] = both
        elif ".experts.down_proj." in name:
            stored[name.removesuffix(".weight")] = value.swapaxes(1, 2)
        elif ".experts.up_proj." not in name:
            stored[name] = value
    return stored | {"vision_model.patch.weight": mx.random.normal((4, 4))}


FOREIGN: dict[str, Callable[[Weights], Weights]] = {
    "mixtral": lambda w: _experts(w, _W.__getitem__),
    "qwen3_moe": _experts,
    "qwen3_vl": _vision,
    "qwen3_5": _linear_attention,
    "gpt2": _gpt2,
    "llama4": _llama4,
}


def foreign(folder: Path, name: str, shards: int = 3, config: dict[str, Any] | None = None) -> Path:
    """A tiny checkpoint in float32 under the names of transformers, with an index."""
    folder.mkdir()
    config = config or configuration(name)
    named = FOREIGN[name](flat_parameters(build(name, config=config)))
    weights = {n: mx.contiguous(v) for n, v in named.items()}
    mx.eval(weights)
    save_shards(folder, weights, shards, "pt")
    (folder / "config.json").write_text(json.dumps(config))
    for file in vauban.organism_path("dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def raw(folder: Path) -> dict[str, bytes]:
    return {n: b"".join(t.chunks()) for n, t in stored_tensors(folder).items()}


def formats(folder: Path) -> set[str]:
    """What the weight files say of their names."""
    files = weight_files(folder).files
    return {check_safetensors(file)["__metadata__"]["format"] for file in files}


def logits(folder: Path) -> np.ndarray:
    return np.array(load_model(folder)[0](mx.array([[1, 5, 7, 9, 3]])))


def cut_logits(source: Path, plan: vauban.EditPlan) -> np.ndarray:
    """Of the source edited in memory: the figure that every layout has to give."""
    model = load_model(source)[0]
    return np.array(plan.apply(model)(mx.array([[1, 5, 7, 9, 3]])))


@pytest.mark.parametrize("name", FOREIGN)
def test_the_sources_names_shapes_and_bytes_are_kept(tmp_path: Path, name: str) -> None:
    source = foreign(tmp_path / "source", name)
    mx.save_safetensors(str(source / "mtp.safetensors"), {"mtp.head.weight": mx.ones((4, 4))})
    index_file = source / "model.safetensors.index.json"
    index = json.loads(index_file.read_text())
    index["weight_map"]["mtp.head.weight"] = "mtp.safetensors"
    index_file.write_text(json.dumps(index))
    model, _ = load_model(source)
    plan = vauban.plan_cut(model, unit(), embedding=False)
    report = plan.export(source, tmp_path / "out", calibrate=False)
    assert report.ok and report.layout == "same" and report.untouched_identical
    assert not report.notes
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert {n: (t.dtype, t.shape, t.file.name) for n, t in before.items()} == {
        n: (t.dtype, t.shape, t.file.name) for n, t in after.items()
    }
    bytes_before, bytes_after = raw(source), raw(tmp_path / "out")
    changed = {n for n in before if bytes_before[n] != bytes_after[n]}
    # As many tensors as there are writers, of a stack one for each expert.
    modules = dict(model.named_modules())
    experts = [modules[u.path].weight.shape for u in plan.updates]
    one_by_one = name in ("mixtral", "qwen3_moe")
    biases = sum(u.bias for u in plan.updates)
    assert len(changed) == biases + sum(s[0] if len(s) == 3 and one_by_one else 1 for s in experts)
    written = json.loads((tmp_path / "out" / index_file.name).read_text())
    assert written["weight_map"] == index["weight_map"]
    assert (tmp_path / "out/mtp.safetensors").read_bytes() == (
        source / "mtp.safetensors"
    ).read_bytes()
    # Programs that read the word may take it for a sign of whose names these are.
    assert formats(tmp_path / "out") == formats(source) == {"pt"}
    assert np.abs(logits(tmp_path / "out") - cut_logits(source, plan)).max() < 1e-4
    assert np.abs(logits(tmp_path / "out") - logits(source)).max() > 1e-3
    assert vauban.verify_export(tmp_path / "out", source=source).ok


@pytest.mark.parametrize("name", FOREIGN)
def test_mlx_lms_names_on_request(tmp_path: Path, name: str) -> None:
    source = foreign(tmp_path / "source", name)
    model, _ = load_model(source)
    plan = vauban.plan_cut(model, unit(), embedding=False)
    report = plan.export(source, tmp_path / "out", layout="mlx", calibrate=False)
    assert report.ok and report.layout == "mlx" and formats(tmp_path / "out") == {"mlx"}
    written = stored_tensors(tmp_path / "out")
    assert flat_parameters(model).keys() <= written.keys()
    # What mlx-lm does not load is a copy, or is named.
    extra = {
        n for n in raw(source) if n.startswith(("model.visual", "mtp.", "vision", "h.0.attn.b"))
    }
    kept = extra & written.keys()
    assert all(raw(tmp_path / "out")[n] == raw(source)[n] for n in kept)
    assert all(any(n.split(".")[0] in note for note in report.notes) for n in extra - kept)
    assert np.abs(logits(tmp_path / "out") - cut_logits(source, plan)).max() < 1e-4


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_from_mlx_lms_names_to_those_of_transformers_and_back(tmp_path: Path, name: str) -> None:
    source = foreign(tmp_path / "source", name)
    plan = vauban.plan_cut(load_model(source)[0], unit(), embedding=False)
    plan.export(source, tmp_path / "same")
    mlx_source = tmp_path / "mlx"
    # Nothing of it is edited: a plan of strength 0.
    idle = vauban.plan_cut(load_model(source)[0], unit(), alpha=0.0, embedding=False)
    idle.export(source, mlx_source, layout="mlx")
    again = vauban.plan_cut(load_model(mlx_source)[0], unit(), embedding=False)
    report = again.export(mlx_source, tmp_path / "hf", layout="hf")
    assert report.ok and report.layout == "hf" and formats(tmp_path / "hf") == {"pt"}
    assert raw(tmp_path / "hf") == raw(tmp_path / "same")
    assert vauban.verify_export(tmp_path / "hf", source=mlx_source).ok
    assert raw(mlx_source).keys() == flat_parameters(load_model(source)[0]).keys()
    # A source with the names of transformers stays as it is.
    plan.export(source, tmp_path / "hf2", layout="hf")
    assert raw(tmp_path / "hf2") == raw(tmp_path / "same")


def test_a_layout_that_is_not_possible_is_refused_by_name(tmp_path: Path) -> None:
    packed = save_checkpoint(tmp_path / "packed", "llama", bits=4)
    plan = vauban.plan_cut(load_model(packed)[0], unit())
    with pytest.raises(vauban.InputError, match=r"'hf' is not possible.*packed matrix"):
        plan.export(packed, tmp_path / "out", layout="hf", calibrate=False)
    other = save_checkpoint(tmp_path / "glm4", "glm4")
    plan = vauban.plan_cut(load_model(other)[0], unit())
    with pytest.raises(vauban.InputError, match="names for glm4; take 'same' or 'mlx'"):
        plan.export(other, tmp_path / "out", layout="hf")
    with pytest.raises(vauban.InputError, match="layout is 'torch'; expected one of same, mlx, hf"):
        plan.export(other, tmp_path / "out", layout="torch")
    assert not (tmp_path / "out").exists()


def test_an_edit_that_the_sources_layout_cannot_hold_is_said(tmp_path: Path) -> None:
    """mlx-lm stacks the weights of single experts, not their scales."""
    source = foreign(tmp_path / "source", "qwen3_moe", shards=1)
    plan = vauban.plan_cut(load_model(source)[0], unit())
    report = plan.export(source, tmp_path / "out", "8bit")
    assert report.ok and report.layout == "mlx"
    assert "does not take up model.layers.1.mlp.experts.0.down_proj.biases" in report.notes[0]
    assert report.notes[0] in report.summary()
    assert "model.layers.1.mlp.switch_mlp.down_proj.scales" in stored_tensors(tmp_path / "out")
    # mixtral's are stacked with their scales, and so can be written.
    source = foreign(tmp_path / "mixtral", "mixtral", shards=1)
    plan = vauban.plan_cut(load_model(source)[0], unit(), embedding=False)
    report = plan.export(source, tmp_path / "out2", "8bit")
    assert report.ok and report.layout == "same"
    name = "model.layers.0.block_sparse_moe.experts.1.w2.scales"
    assert name in stored_tensors(tmp_path / "out2")


@pytest.mark.parametrize("name", ["qwen3_vl", "mixtral"])
def test_packed_checkpoints_and_floats_of_them(tmp_path: Path, name: str) -> None:
    """Scales and offsets bear the source's names too, and go where a matrix becomes floats."""
    import mlx.nn as nn

    model = build(name)
    nn.quantize(model, group_size=32, bits=4)
    source = foreign(tmp_path / "source", name)
    weights = FOREIGN[name](flat_parameters(model))
    mx.eval(weights)
    save_shards(source, weights, 3)
    packing = {"group_size": 32, "bits": 4}
    (source / "config.json").write_text(json.dumps(configuration(name) | {"quantization": packing}))
    plan = vauban.plan_cut(load_model(source)[0], unit(), embedding=False)
    report = plan.export(source, tmp_path / "out", calibrate=False)
    assert report.ok and report.layout == "same" and report.direction_left < 1e-3
    assert raw(tmp_path / "out").keys() == raw(source).keys()
    floats = plan.export(source, tmp_path / "floats", "float")
    assert floats.ok and floats.layout == "same"
    assert np.abs(logits(tmp_path / "floats") - cut_logits(source, plan)).max() < 1


def test_a_dictionary_of_weights_goes_back_into_the_sources_layout(tmp_path: Path) -> None:
    source = foreign(tmp_path / "source", "qwen3_5")
    weights = flat_parameters(load_model(source)[0])
    name = next(n for n in weights if n.endswith("mlp.down_proj.weight"))
    vauban.export_model(source, {**weights, name: 2 * weights[name]}, tmp_path / "out")
    before, after = raw(source), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = [n for n in before if before[n] != after[n]]
    assert changed == [name.replace("language_model.model.", "model.language_model.")]


def test_edited_facts_go_back_into_the_sources_layout(tmp_path: Path) -> None:
    config = configuration("qwen3_vl")
    config["text_config"]["vocab_size"] = 2048
    source = foreign(tmp_path / "source", "qwen3_vl", config=config)
    settings = vauban.EditSettings(method="rome", layers=[1], steps=2)
    editor = vauban.Editor(*vauban.load(source), settings, None)
    editor.edit([vauban.Fact("{} likes", "the cat", " tea")])
    editor.export(source, tmp_path / "out")
    before, after = raw(source), raw(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = [name for name in before if before[name] != after[name]]
    assert changed == ["model.language_model.layers.1.mlp.down_proj.weight"]


def test_files_that_go_along_and_files_that_are_named(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    (source / "README.md").write_text("---\nlicense: apache-2.0\n---\n# The source\n")
    (source / "USE_POLICY.md").write_text("policy")
    (source / "images").mkdir()
    (source / "images" / "logo.png").write_bytes(b"png")
    (source / "big.bin.index").write_bytes(bytes(2_000_000))
    (source / "original").mkdir()
    for stray in (
        "pytorch_model.bin",
        "model.gguf",
        "original/consolidated.00.pth",
        "x.safetensors",
    ):
        (source / stray).write_bytes(b"weights")
    (source / "run.json").write_text("{}")
    plan = vauban.plan_cut(load_model(source)[0], unit())
    report = plan.export(source, tmp_path / "out")
    out = tmp_path / "out"
    assert (out / "SOURCE_README.md").read_text() == (source / "README.md").read_text()
    assert (out / "USE_POLICY.md").exists() and (out / "images/logo.png").read_bytes() == b"png"
    assert not (out / "run.json").exists() and not (out / "README.md").exists()
    assert [f.name for f in out.rglob("*.safetensors")] == ["model.safetensors"]
    (note,) = report.notes
    assert note == (
        "not copied: big.bin.index, model.gguf, original/consolidated.00.pth, pytorch_model.bin, "
        "x.safetensors"
    )
