"""What the read-back says of a folder, and that it finds what was broken in one."""

import hashlib
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, unit


def test_report_names_the_files_as_they_are(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", shards=2)
    report = vauban.plan_cut(load_plain(source), unit()).export(source, tmp_path / "out")
    for file, digest in report.files.items():
        assert hashlib.sha256((tmp_path / "out" / file).read_bytes()).hexdigest() == digest
    assert len(report.files) == 2
    again = vauban.verify_export(tmp_path / "out", source=source)
    assert again.to_dict() == {**report.to_dict(), "precision": again.precision}


def test_verification_finds_a_writer_that_was_not_cut(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    vauban.plan_cut(load_plain(source), unit()).export(source, tmp_path / "out")
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
