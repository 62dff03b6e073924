"""The output folder appears complete or not at all."""

import dataclasses
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from tests.killed import export_again_and_again, started
from vauban._arrays import flat_parameters
from vauban.export import checkpoint, staged
from vauban.export.source import open_source


def test_existing_output_inside_source_and_force(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
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


def test_of_a_link_the_folder_behind_it_is_written(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "disk" / "real" / "stale").write_text("old")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "disk" / "real")
    report = plan.export(source, link, force=True)
    assert report.folder == str(link) and link.is_symlink()
    assert vauban.verify_export(tmp_path / "disk" / "real", source=source).ok
    assert [p.name for p in (tmp_path / "disk").iterdir()] == ["real"]
    assert not (link / "stale").exists()
    # A link to a folder that is still to come.
    to_come = tmp_path / "to come"
    to_come.symlink_to(tmp_path / "disk" / "new")
    plan.export(source, to_come)
    assert vauban.verify_export(tmp_path / "disk" / "new").ok
    inside = tmp_path / "inside"
    inside.symlink_to(source / "out")
    with pytest.raises(vauban.InputError, match="lies in the source"):
        plan.export(source, inside)


def test_a_tilde_is_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    report = plan.export(source, "~/cut")
    assert report.folder == str(tmp_path / "home" / "cut")
    assert vauban.verify_export("~/cut", source=source).folder == report.folder
    weights = dict(vauban.cut(flat_parameters(load_plain(source)), unit(), range(4)))
    assert vauban.export_model(source, weights, "~/weights") == tmp_path / "home" / "weights"


@pytest.mark.parametrize("stale", ["model-00009-of-00009.safetensors", "config.json"])
@pytest.mark.parametrize("precision", ["same", "adapter"])
def test_write_refuses_a_folder_that_holds_a_model(
    tmp_path: Path, stale: str, precision: str
) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    out = tmp_path / "out"
    with pytest.raises(vauban.InputError, match="expected an existing one"):
        plan.write(source, out, precision)
    out.mkdir()
    (out / stale).write_text("another model's")
    with pytest.raises(vauban.InputError, match=f"holds a model already \\({stale}\\)"):
        plan.write(source, out, precision)
    assert [p.name for p in out.iterdir()] == [stale]
    (out / stale).unlink()
    (out / "notes.txt").write_text("kept")
    assert plan.write(source, out, precision).ok and (out / "notes.txt").read_text() == "kept"


def test_what_cannot_be_recorded_is_refused_before_a_shard_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    plan = dataclasses.replace(plan, settings={**plan.settings, "alpha": np.float32(1.0)})
    written: list[Path] = []
    monkeypatch.setattr(checkpoint, "write_safetensors", lambda path, *rest: written.append(path))
    (tmp_path / "folder").mkdir()
    for write in (plan.export, plan.write):
        folder = tmp_path / "folder"
        with pytest.raises(vauban.InputError, match=r"settings cannot be recorded.*float32"):
            write(source, folder)
        assert not list(folder.iterdir())
    assert not written


def test_sources_that_are_not_the_plans_model(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    with pytest.raises(vauban.InputError, match="export is None; expected the folder or Hub id"):
        plan.export(None, tmp_path / "out")
    with pytest.raises(vauban.InputError, match="expected the folder or Hub id"):
        open_source(None)
    other = save_checkpoint(tmp_path / "other", "qwen3_moe")
    for precision in ("same", "adapter"):
        with pytest.raises(vauban.InputError, match=r"has no writer model\.layers\.0\.mlp\.down"):
            plan.export(other, tmp_path / "out", precision)
        with pytest.raises(vauban.InputError, match="have 64 coordinates"):
            plan.export(vauban.organism_path("dense"), tmp_path / "out", precision)
    tied = vauban.plan_cut(
        load_plain(save_checkpoint(tmp_path / "tied", "qwen3")), unit(), embedding=True
    )  # fmt: skip
    assert tied.embedding == "untie"
    tied.export(tmp_path / "tied", tmp_path / "untied")
    with pytest.raises(vauban.InputError, match="has its own matrix"):
        tied.export(tmp_path / "untied", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_killed_at_any_moment_there_is_no_folder_or_a_complete_one(tmp_path: Path) -> None:
    """SIGKILL at 20 random moments of the export of one and the same model."""
    source = save_checkpoint(tmp_path / "source", "qwen3_moe", shards=3)
    work = tmp_path / "work"
    work.mkdir()
    rng = random.Random(0)
    complete = 0
    expected: set[str] | None = None
    span = 0.0
    # The first round is not killed: it tells how long one export takes on this machine.
    for number in range(21):
        process, hearing = started(export_again_and_again, source, work / "out")
        hearing.recv()
        began = time.perf_counter()
        if number == 0:
            hearing.recv()
            span = time.perf_counter() - began
        else:
            time.sleep(rng.uniform(0.0, 1.4 * span))
        process.kill()
        process.join()
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
    assert 0 < complete < 20
    # The next export clears what the killed ones left beside it.
    vauban.plan_cut(load_plain(source), mx.ones(64), embedding=True).export(source, work / "out")
    assert [p.name for p in work.iterdir()] == ["out"]


def test_licence_and_policy_go_with_the_weights_and_progress_is_told(tmp_path: Path) -> None:
    source = save_checkpoint(tmp_path / "source", "llama")
    terms = ("LICENSE", "LICENSE.md", "NOTICE", "USE_POLICY.md", "COPYING.txt")
    for name in terms:
        (source / name).write_text(f"terms of {name}")
    (source / "notes.md").write_text("a stranger's")
    plan = vauban.plan_cut(load_plain(source), unit(), embedding=True)
    steps: list[tuple[str, int, int]] = []
    plan.export(source, tmp_path / "out", progress=lambda *step: steps.append(step))
    for name in terms:
        assert (tmp_path / "out" / name).read_text() == f"terms of {name}"
    # Small files of any kind come along too.
    assert (tmp_path / "out" / "notes.md").read_text() == "a stranger's"
    n = len(plan.updates)
    expected = [(stage, i, n) for stage in ("write", "read back") for i in range(1, n + 1)]
    assert steps == expected
