"""The output folder appears complete or not at all."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import load_plain, save_checkpoint, unit
from vauban.export import staged


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
