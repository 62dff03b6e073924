"""What stands on disk after an export, read back independently with mlx-lm and NumPy."""

import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import vauban
from tests.architectures import build as architectures
from tests.conftest import build, random_tokens
from vauban._arrays import flat_parameters
from vauban.export import check_adaptable, staged
from vauban.export.adapter import adapter_left
from vauban.export.checkpoint import open_source
from vauban.export.tensors import stored_tensors


def unit(size: int = 64) -> mx.array:
    d = mx.random.normal((size,), key=mx.random.key(3))
    return d / mx.linalg.norm(d)


def save_checkpoint(
    folder: Path, name: str, *, bits: int = 0, dtype: mx.Dtype = mx.bfloat16, shards: int = 1
) -> Path:
    """A tiny model as mlx-lm would have saved it, with the organism's tokenizer."""
    model = build(name)
    config = {"model_type": name.split("_bias")[0], **vars(model.args)}
    config = {k: v for k, v in config.items() if isinstance(v, int | float | str | bool | list)}
    config["num_hidden_layers"], config["vocab_size"] = 4, 160
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
        config["quantization"] = {"group_size": 32, "bits": bits}
    folder.mkdir(parents=True)
    weights = {
        k: v.astype(dtype) if mx.issubdtype(v.dtype, mx.floating) else v
        for k, v in flat_parameters(model).items()
    }
    names = sorted(weights)
    index = {}
    for i in range(shards):
        file = (
            "model.safetensors" if shards == 1 else f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        )
        part = {n: weights[n] for n in names[i::shards]}
        index |= dict.fromkeys(part, file)
        mx.save_safetensors(str(folder / file), part, {"format": "mlx"})
    if shards > 1:
        text = json.dumps({"metadata": {}, "weight_map": index})
        (folder / "model.safetensors.index.json").write_text(text)
    (folder / "config.json").write_text(json.dumps(config))
    for file in vauban.organism_path("dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    return folder


def matrix_of(module: nn.Module) -> mx.array:
    """The float32 matrix of a plain or packed module, by mlx's own kernel."""
    if "scales" not in module:
        return module.weight.astype(mx.float32)
    return mx.dequantize(
        module.weight,
        module.scales.astype(mx.float32),
        module.biases.astype(mx.float32),
        group_size=module.group_size,
        bits=module.bits,
    )


def load_plain(folder: Path) -> nn.Module:
    """As any user of mlx-lm opens it."""
    return mlx_lm.load(str(folder))[0]


@pytest.mark.parametrize(
    ("name", "bits", "shards"),
    [("llama", 0, 1), ("llama_bias", 0, 3), ("qwen3", 0, 1), ("qwen3", 4, 2), ("qwen3_moe", 4, 1),
     ("qwen3_moe", 0, 2), ("gemma2", 0, 1), ("gemma2", 8, 1), ("olmo2", 0, 1)],
)  # fmt: skip
def test_exported_folder_is_the_planned_edit(
    tmp_path: Path, name: str, bits: int, shards: int
) -> None:
    source = save_checkpoint(tmp_path / "source", name, bits=bits, shards=shards)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit())
    report = plan.export(source, tmp_path / "out")
    assert report.ok and report.untouched_identical is True
    assert report.modules_edited == report.modules_present == len(vauban.residual_writers(model))
    assert report.direction_left <= 0.01
    tokens = random_tokens(1, 14)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    exported, _ = vauban.load(tmp_path / "out")
    if not bits:
        # Both run in float32; the rounding of the edited weights to bfloat16 is what differs.
        difference = float(mx.abs(vauban.forward(exported, tokens).logits - virtual).max())
        uncut = float(mx.abs(vauban.forward(model, tokens).logits - virtual).max())
        assert difference <= 0.05 * uncut
    written = load_plain(tmp_path / "out")
    # Independent reading: each writer's output direction, in NumPy from the file.
    modules = dict(written.named_modules())
    for writer in vauban.residual_writers(written):
        weight = np.array(matrix_of(modules[writer.path]), dtype=np.float64)
        u = np.array(unit(), dtype=np.float64)
        u = u * np.array(writer.gain) if writer.gain is not None else u
        u = u / np.linalg.norm(u)
        rows = weight if writer.kind == "embedding" else np.swapaxes(weight, -1, -2)
        assert np.linalg.norm(rows @ u) <= 0.01 * np.linalg.norm(rows), writer.path


def test_float32_export_is_exact(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", dtype=mx.float32)
    report = vauban.plan_cut(load_plain(source), unit()).export(source, tmp_path / "out")
    assert report.direction_left <= 1e-6


def test_untouched_tensors_keep_their_bytes(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama", shards=2)
    plan = vauban.plan_cut(load_plain(source), unit(), layers=[1], embedding=False)
    plan.export(source, tmp_path / "out")
    before, after = stored_tensors(source), stored_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    changed = {n for n in before if b"".join(before[n].chunks()) != b"".join(after[n].chunks())}
    assert changed == {
        "model.layers.1.self_attn.o_proj.weight",
        "model.layers.1.mlp.down_proj.weight",
    }


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


def test_a_checkpoint_in_hugging_faces_layout(tmp_path: Path) -> None:
    """Experts stored one by one are stacked by mlx-lm on loading; the export holds its layout."""
    source = save_checkpoint(tmp_path / "source", "qwen3_moe")
    weights = mx.load(str(source / "model.safetensors"))
    split = {}
    for name, value in weights.items():
        if "switch_mlp" in name:
            for e in range(value.shape[0]):
                split[name.replace("switch_mlp", f"experts.{e}")] = value[e]
        else:
            split[name] = value
    mx.eval(split)
    mx.save_safetensors(str(source / "model.safetensors"), split, {"format": "pt"})
    plan = vauban.plan_cut(load_plain(source), unit())
    report = plan.export(source, tmp_path / "out")
    assert report.ok and report.modules_edited == report.modules_present
    assert "model.layers.0.mlp.switch_mlp.down_proj.weight" in stored_tensors(tmp_path / "out")


def test_export_model_writes_packed_writers_as_floats(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=4)
    model = load_plain(source)
    done = vauban.cut(flat_parameters(model), unit(), range(4))
    folder = vauban.export_model(source, done, tmp_path / "out")
    written = load_plain(folder)
    assert not hasattr(written.model.layers[0].mlp.down_proj, "scales")
    assert hasattr(written.model.layers[0].mlp.up_proj, "scales")
    assert (
        mx.abs(unit() @ written.model.layers[0].mlp.down_proj.weight.astype(mx.float32)).max()
        < 0.02
    )
    config = json.loads((folder / "config.json").read_text())
    assert config["quantization"]["model.layers.0.mlp.down_proj"] is False


def test_export_model_checks_the_dictionary(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    weights = flat_parameters(load_plain(source))
    name = "model.layers.0.mlp.down_proj.weight"
    cases = [
        ({n: v for n, v in weights.items() if n != name}, "lack model.layers.0.mlp.down_proj"),
        ({**weights, "extra.weight": mx.ones(1)}, r"hold extra\.weight"),
        ({**weights, name: mx.ones((3, 3))}, r"has shape \(3, 3\)"),
        ({**weights, name: mx.full((64, 96), float("nan"))}, "NaN or inf"),
    ]
    for bad, message in cases:
        with pytest.raises(vauban.InputError, match=message):
            vauban.export_model(source, bad, tmp_path / "out")
        assert sorted(p.name for p in tmp_path.iterdir()) == ["source"]


def test_existing_output_inside_source_and_force(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit())
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "stale.safetensors").write_text("old")
    with pytest.raises(vauban.InputError, match="exists"):
        plan.export(source, tmp_path / "out")
    assert (tmp_path / "out" / "stale.safetensors").read_text() == "old"
    plan.export(source, tmp_path / "out", force=True)
    assert not (tmp_path / "out" / "stale.safetensors").exists()
    with pytest.raises(vauban.InputError, match="lies in the source"):
        plan.export(source, source / "out")
    with pytest.raises(vauban.InputError, match="lies in the source"):
        plan.export(source, source, force=True)
    with pytest.raises(vauban.InputError, match="holds the source"):
        plan.export(source, tmp_path, force=True)


def test_a_failure_keeps_the_old_folder_and_nothing_half_written(tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "kept").write_text("yes")
    for error in (RuntimeError, KeyboardInterrupt, OSError):
        with pytest.raises(error), staged(out, force=True) as folder:
            (folder / "half").write_text("no")
            raise error
        assert [p.name for p in tmp_path.iterdir()] == ["out"]
        assert (out / "kept").read_text() == "yes"


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    import errno

    with pytest.raises(vauban.InputError, match="disk is full"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_for_real(tmp_path: Path) -> None:
    """Writing past a file size limit of the process, as a full disk would stop it."""
    source = save_checkpoint(tmp_path / "source", "llama")
    code = (
        "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "import vauban, mlx.core as mx\n"
        "model, _ = vauban.load(sys.argv[1])\n"
        "plan = vauban.plan_cut(model, mx.ones(64))\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))\n"
        "plan.export(sys.argv[1], sys.argv[2])\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(source), str(tmp_path / "out")],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode != 0 and "File too large" in done.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_killed_at_any_moment_there_is_no_folder_or_a_complete_one(tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of the export of one and the same model."""
    source = save_checkpoint(tmp_path / "source", "qwen3_moe", shards=3)
    code = (
        "import sys, vauban, mlx.core as mx\n"
        "model, _ = vauban.load(sys.argv[1])\n"
        "plan = vauban.plan_cut(model, mx.ones(64))\n"
        "for number in range(1000):\n"
        "    print(number, flush=True)\n"
        "    plan.export(sys.argv[1], f'{sys.argv[2]}/out', force=True)\n"
    )
    work = tmp_path / "work"
    work.mkdir()
    rng = random.Random(0)
    complete = 0
    expected: set[str] | None = None
    run = None
    span = 0.0
    try:
        # The first round is not killed: it tells how long one export takes on this machine.
        for number in range(21):
            with subprocess.Popen(
                [sys.executable, "-c", code, str(source), str(work)],
                stdout=subprocess.PIPE, text=True,
            ) as run:  # fmt: skip
                assert run.stdout is not None
                run.stdout.readline()
                started = time.perf_counter()
                if number == 0:
                    run.stdout.readline()
                    span = time.perf_counter() - started
                else:
                    time.sleep(rng.uniform(0.0, 1.4 * span))
                os.kill(run.pid, signal.SIGKILL)
            out = work / "out"
            if number == 0:
                shutil.rmtree(out)
                continue
            # Aim again: a busy machine makes one export longer and the next one shorter.
            span *= 0.7 if out.exists() else 1.3
            if out.exists():
                complete += 1
                names = {str(p.relative_to(out)) for p in out.rglob("*")}
                expected = expected or names
                assert names == expected
                assert vauban.verify_export(out, source=source).ok
                shutil.rmtree(out)
    finally:
        if run is not None and run.poll() is None:
            run.kill()
    assert 0 < complete < 20
    # The next export clears what the killed ones left beside it.
    vauban.plan_cut(load_plain(source), mx.ones(64)).export(source, work / "out")
    assert [p.name for p in work.iterdir()] == ["out"]


@pytest.mark.parametrize(
    ("name", "bits"), [("llama", 0), ("llama", 4), ("qwen3_moe", 0), ("qwen3_moe", 4), ("gemma", 0)]
)
def test_an_adapter_is_the_same_cut(tmp_path: Path, name: str, bits: int) -> None:
    """Rank 1 per writer, experts and embedding included, opened by mlx-lm's own loader."""
    source = save_checkpoint(tmp_path / "source", name, bits=bits, dtype=mx.float32)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit())
    report = plan.export(source, tmp_path / "out", precision="adapter")
    assert report.ok and report.precision == "adapter" and report.direction_left <= 1e-5
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "adapter_config.json",
        "adapters.safetensors",
    ]
    adapted, _ = mlx_lm.load(str(source), adapter_path=str(tmp_path / "out"))
    tokens = random_tokens(1, 13)
    virtual = vauban.forward(model, tokens, interventions=plan.virtual()).logits
    scale = float(mx.abs(virtual).max())
    assert float(mx.abs(adapted(tokens) - virtual).max()) <= 2e-3 * scale
    uncut = float(mx.abs(model(tokens) - virtual).max())
    assert uncut > 0.02 * scale


def test_what_an_adapter_cannot_hold_is_refused(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama_bias")
    model = load_plain(source)
    tied = save_checkpoint(tmp_path / "tied", "qwen3")
    for plan, path, message in (
        (vauban.plan_cut(model, unit()), source, "has a bias"),
        (vauban.plan_cut(model, unit(), norm_preserve="column"), source, "low-rank"),
        (vauban.plan_cut(load_plain(tied), unit()), tied, "tied head"),
    ):
        with pytest.raises(vauban.InputError, match=message):
            plan.export(path, tmp_path / "out", precision="adapter")
        assert not (tmp_path / "out").exists()
    plan = vauban.plan_cut(load_plain(tied), unit(), embedding="tied")
    assert plan.export(tied, tmp_path / "out", precision="adapter").ok
    with pytest.raises(vauban.InputError, match="precision"):
        plan.export(tied, tmp_path / "other", precision="2bit")
    ternary = vauban.plan_cut(architectures.build("bitnet"), unit())
    with pytest.raises(vauban.InputError, match="BitLinear"):
        check_adaptable(ternary)


def test_an_adapter_is_read_back_from_its_file(tmp_path: Path) -> None:
    """What mlx-lm makes of the folder counts, not what was meant to be in it."""
    path = save_checkpoint(tmp_path / "source", "qwen3_moe", bits=4)
    plan = vauban.plan_cut(load_plain(path), unit())
    folder = tmp_path / "out"
    plan.export(path, folder, precision="adapter")
    source = open_source(path)
    assert max(adapter_left(plan, source, folder).values()) <= 1e-5
    file = folder / "adapters.safetensors"
    arrays = dict(mx.load(str(file)))
    halved = {name: v / 2 if name.endswith("lora_b") else v for name, v in arrays.items()}
    mx.save_safetensors(str(file), halved, {"format": "mlx"})
    assert adapter_left(plan, source, folder) == pytest.approx(
        {u.path: 0.5 for u in plan.updates}, abs=1e-4
    )
    mx.save_safetensors(str(file), {**arrays, "model.nowhere.lora_a": mx.ones((1,))})
    with pytest.raises(vauban.CheckError, match="nowhere"):
        adapter_left(plan, source, folder)
    config = json.loads((folder / "adapter_config.json").read_text())
    config["lora_parameters"]["keys"].pop()
    (folder / "adapter_config.json").write_text(json.dumps(config))
    mx.save_safetensors(
        str(file), {n: v for n, v in arrays.items() if plan.updates[-1].path not in n}
    )
    with pytest.raises(vauban.CheckError, match=plan.updates[-1].path):
        adapter_left(plan, source, folder)
    with pytest.raises(vauban.InputError, match="adapter_path"):
        vauban.verify_export(folder, source=path)


@pytest.mark.parametrize("bits", [3, 4])
def test_a_packed_export_keeps_its_format_and_loses_the_direction(
    tmp_path: Path, bits: int
) -> None:
    """Same bits, same size, direction gone; 8 bits and float where asked."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=bits)
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, unit())
    same = plan.export(source, tmp_path / "same")
    assert same.direction_left <= 1e-3
    assert {f["bits"] for f in same.stored.values()} == {bits}
    sizes = [
        sum(f.stat().st_size for f in folder.glob("*.safetensors") if f.name != "edit.safetensors")
        for folder in (source, tmp_path / "same")
    ]
    assert abs(sizes[1] - sizes[0]) <= 1e-3 * sizes[0]
    wide = plan.export(source, tmp_path / "wide", precision="8bit")
    assert wide.direction_left <= 1e-3 and {f["bits"] for f in wide.stored.values()} == {8}
    assert load_plain(tmp_path / "wide").model.layers[1].mlp.down_proj.bits == 8
    assert load_plain(tmp_path / "wide").model.layers[1].mlp.up_proj.bits == bits
    loose = plan.export(source, tmp_path / "float", precision="float")
    assert all(f["mode"] == "float" for f in loose.stored.values())
    # Packing naively instead would leave most of a weak direction in the matrix.
    module = model.model.layers[1].mlp.down_proj
    before = matrix_of(module)
    target = before - unit()[:, None] * (unit() @ before)
    naive = mx.quantize(target, group_size=32, bits=bits)
    left = unit() @ mx.dequantize(*naive, group_size=32, bits=bits)
    assert float(mx.linalg.norm(left) / mx.linalg.norm(unit() @ before)) > 100 * same.direction_left


def test_an_untied_head_keeps_the_packing_of_the_embedding(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "qwen3", bits=4)
    model, _ = vauban.load(source)
    report = vauban.plan_cut(model, unit()).export(source, tmp_path / "out")
    written = load_plain(tmp_path / "out")
    assert report.ok and written.lm_head.bits == 4
    assert mx.array_equal(written.lm_head.weight, model.model.embed_tokens.weight)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_a_partial_cut_is_not_taken_for_a_failed_one(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    model = load_plain(source)
    report = vauban.plan_cut(model, unit(), sparse=0.1).export(source, tmp_path / "out")
    assert report.ok and report.expected_left is None and report.direction_left > 0.3
    half = vauban.plan_cut(model, unit(), alpha=0.5).export(source, tmp_path / "half")
    assert half.ok and abs(half.direction_left - 0.5) < 0.02


def test_a_killed_export_is_taken_up_where_it_stopped(tmp_path: Path) -> None:
    """The shard that was finished keeps its file; another plan starts afresh."""
    source = save_checkpoint(tmp_path / "source", "llama", bits=4, shards=3)
    # Die in the second shard, as a SIGKILL would: nothing cleans up.
    code = (
        "import os, sys, vauban, mlx.core as mx\n"
        "from vauban.export import checkpoint\n"
        "model, _ = vauban.load(sys.argv[1])\n"
        "plan = vauban.plan_cut(model, mx.ones(64))\n"
        "write, calls = checkpoint.write_safetensors, []\n"
        "def dying(path, *rest):\n"
        "    calls.append(path)\n"
        "    if len(calls) == 2:\n"
        "        path.write_bytes(b'half')\n"
        "        os._exit(9)\n"
        "    return write(path, *rest)\n"
        "checkpoint.write_safetensors = dying\n"
        "plan.export(sys.argv[1], sys.argv[2])\n"
    )
    for ones in (True, False):
        out = tmp_path / f"out-{ones}"
        done = subprocess.run(
            [sys.executable, "-c", code, str(source), str(out)],
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 9, done.stderr
        (left,) = tmp_path.glob(f".{out.name}.partial-*")
        first = left / "model-00001-of-00003.safetensors"
        stamp = first.stat().st_ino
        model, _ = vauban.load(source)
        direction = mx.ones(64) if ones else unit()
        report = vauban.plan_cut(model, direction).export(source, out)
        assert report.ok and report.untouched_identical is True and report.direction_left <= 1e-3
        kept = (out / first.name).stat().st_ino == stamp
        assert kept is ones
        assert not list(tmp_path.glob(".*")) and not list(out.glob(".*"))
