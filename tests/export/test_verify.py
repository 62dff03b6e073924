"""What the read-back says of a folder, and that it finds what was broken in one."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from mlx_lm.utils import load_model, save_config, save_model

import vauban
from tests.architectures.build import build, configuration
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from vauban._arrays import load_arrays, save_arrays

Weights = dict[str, mx.array]


def tamper(folder: Path, change: Callable[[Weights], Weights]) -> None:
    """Replace tensors of an exported file of one shard."""
    file = folder / "model.safetensors"
    arrays = dict(mx.load(str(file)))
    mx.eval(arrays)
    mx.save_safetensors(str(file), {**arrays, **change(arrays)}, {"format": "mlx"})


def test_report_names_the_files_as_they_are(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", shards=2)
    report = vauban.plan_cut(load_plain(source), unit(), embedding=True).export(
        source, tmp_path / "out"
    )
    for file, digest in report.files.items():
        assert hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() == digest
    assert len(report.files) == 2
    again = vauban.verify_export(tmp_path / "out", source=source)
    assert again.to_dict() == report.to_dict()


def test_verification_finds_a_writer_that_was_not_cut(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    vauban.plan_cut(load_plain(source), unit(), embedding=True).export(source, tmp_path / "out")
    original = mx.load(str(source / "model.safetensors"))
    tampered = mx.load(str(tmp_path / "out" / "model.safetensors"))
    name = "model.layers.2.mlp.down_proj.weight"
    mx.eval(tampered)
    mx.save_safetensors(
        str(tmp_path / "out" / "model.safetensors"), {**tampered, name: original[name]}
    )
    report = vauban.verify_export(tmp_path / "out", source=source)
    assert not report.ok and report.writers["model.layers.2.mlp.down_proj"] > 0.99
    with pytest.raises(vauban.CheckError, match=r"layers\.2\.mlp\.down_proj"):
        report.check()
    mx.save_safetensors(
        str(tmp_path / "out" / "model.safetensors"),
        {**tampered, "model.norm.weight": tampered["model.norm.weight"] * 2},
    )
    assert vauban.verify_export(tmp_path / "out", source=source).untouched_identical is False


def test_a_partial_cut_is_not_taken_for_a_failed_one(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    model = load_plain(source)
    report = vauban.plan_cut(model, unit(), sparse=0.1).export(source, tmp_path / "out")
    assert report.ok and report.expected_left is None and report.direction_left > 0.3
    half = vauban.plan_cut(model, unit(), alpha=0.5).export(source, tmp_path / "half")
    assert half.ok and abs(half.direction_left - 0.5) < 0.02


PARTIAL = {
    "alpha 2": {"alpha": 2.0},
    "alpha -1": {"alpha": -1.0},
    "half": {"alpha": 0.5},
    "one block left out": {"layer_weights": {0: 0.0}},
    "rows": {"sparse": 0.3},
    "row norms": {"norm_preserve": "row"},
    "column norms at half": {"norm_preserve": "column", "alpha": 0.5},
}


@pytest.mark.parametrize("bits", [0, 4])
@pytest.mark.parametrize("name", sorted(PARTIAL))
def test_a_writer_is_judged_by_what_was_planned_for_it(
    tmp_path: Path, name: str, bits: int
) -> None:
    """The uncut matrix in place of the cut one, where the plan leaves part of the direction."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits)
    plan = vauban.plan_cut(load_plain(source), unit(), **PARTIAL[name])
    report = plan.export(source, tmp_path / "out", precision="float")
    assert report.ok and report.writers == pytest.approx(dict(plan.leakage().writers), abs=0.01)
    assert plan.export(source, tmp_path / "same").ok
    path = plan.updates[-1].path
    uncut = vauban.models.anatomy(load_plain(source)).layers[3].mlp.down_proj
    matrix = mx.dequantize(
        uncut.weight, uncut.scales, uncut.biases, 32, bits
    ) if bits else uncut.weight  # fmt: skip
    tamper(tmp_path / "out", lambda w: {f"{path}.weight": matrix.astype(mx.bfloat16)})
    report = vauban.verify_export(tmp_path / "out", source=source)
    assert not report.ok and report.missed[path] > 0.1
    with pytest.raises(vauban.CheckError, match=r"layers\.3\.mlp\.down_proj is off by"):
        report.check()


def test_a_writer_that_was_protected_is_judged_as_well(tmp_path: Path) -> None:
    source = vauban.organism_path("dense")
    model, tokenizer = vauban.load(source)
    keys = vauban.collect_preservation_keys(model, tokenizer, ["What is two and two?"])
    plan = vauban.plan_cut(model, unit(128), preserve=vauban.Preserve(keys, rank=4))
    assert plan.export(source, tmp_path / "out").ok
    name = f"{plan.updates[0].path}.weight"
    # The unprotected cut removes more than was planned.
    w = mx.load(str(source / "model.safetensors"))[name].astype(mx.float32)
    u = unit(128)
    tamper(tmp_path / "out", lambda _: {name: (w - u[:, None] * (u @ w)).astype(mx.bfloat16)})
    report = vauban.verify_export(tmp_path / "out")
    assert not report.ok and report.direction_left < 1.0


def test_biases_are_read_back(tmp_path: Path) -> None:
    """GPT-2's writers have biases, which write the direction at every token."""
    source = tmp_path / "source"
    source.mkdir()
    save_model(source, build("gpt2"))
    save_config(configuration("gpt2"), source / "config.json")
    plan = vauban.plan_cut(load_model(source)[0], unit(), embedding=True)
    assert sum(u.bias for u in plan.updates) == 8
    report = plan.export(source, tmp_path / "out")
    named = {f"{u.path}.bias" for u in plan.updates if u.bias}
    assert {n for n in report.missed if n.endswith(".bias")} == named
    original = mx.load(str(source / "model.safetensors"))
    tamper(tmp_path / "out", lambda _: {n: original[n] for n in named})
    report = vauban.verify_export(tmp_path / "out")
    assert report.direction_left < 1e-5
    assert all(report.missed[n] == pytest.approx(1.0) for n in named)
    with pytest.raises(vauban.CheckError, match=r"\.bias is off by 100"):
        report.check()


@pytest.mark.parametrize("bits", [0, 4])
def test_an_untied_head_is_compared_with_the_table_it_was_given(tmp_path: Path, bits: int) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=bits)
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    assert plan.export(source, tmp_path / "out").untouched_identical is True
    part = "lm_head.scales" if bits else "lm_head.weight"
    tamper(tmp_path / "out", lambda w: {part: w[part] * 0})
    report = vauban.verify_export(tmp_path / "out", source=source)
    assert report.untouched_identical is False and report.differs == part
    with pytest.raises(vauban.CheckError, match=part.replace(".", r"\.")):
        report.check()


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_with_the_plan_the_logits_are_judged(tmp_path: Path, dtype: mx.Dtype) -> None:
    """Also where nothing else could tell: a final norm that is not compared with a source."""
    source = save_checkpoint(tmp_path / "source", "llama", dtype=dtype)
    plan = vauban.plan_cut(vauban.load(source)[0], unit(), embedding=True)
    plan.export(source, tmp_path / "out")
    for tokenizer in (tmp_path / "out").glob("tokenizer*"):
        tokenizer.unlink()
    report = vauban.verify_export(tmp_path / "out", plan=plan).check()
    assert report.logits_difference < (1e-4 if dtype == mx.float32 else 0.05)
    assert report.logits_limit < (0.02 if dtype == mx.float32 else 1.0)
    tamper(tmp_path / "out", lambda w: {"model.norm.weight": w["model.norm.weight"] * -1})
    assert vauban.verify_export(tmp_path / "out").ok
    with pytest.raises(vauban.CheckError, match="the logits differ from the run-time cut"):
        vauban.verify_export(tmp_path / "out", plan=plan).check()


def test_packed_logits_are_measured_and_not_judged(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", bits=4)
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    plan.export(source, tmp_path / "out")
    report = vauban.verify_export(tmp_path / "out", plan=plan)
    assert report.ok and report.logits_difference > 0.0 and report.logits_limit is None


def test_folders_without_a_record_of_a_plan(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    model = load_plain(source)
    weights = dict(vauban.cut(vauban._arrays.flat_parameters(model), unit(), range(4)))
    folder = vauban.export_model(source, weights, tmp_path / "out")
    with pytest.raises(vauban.InputError, match="What export_model wrote holds the weights it was"):
        vauban.verify_export(folder)
    plan = vauban.plan_cut(model, unit(), embedding=True)
    plan.export(source, tmp_path / "planned")
    record = tmp_path / "planned" / "edit.vauban"
    arrays, facts = load_arrays(record)
    save_arrays(record, arrays, {**facts, "format": "vauban.edit/1"})
    with pytest.raises(vauban.InputError, match=r"'vauban\.edit/1'; expected 'vauban\.edit/2'"):
        vauban.verify_export(tmp_path / "planned")
