"""Interruptions and a full disk: one line, the right exit code, nothing left behind."""

import resource
import signal
import subprocess
import sys

import pytest

import vauban

KEPT = "out.direction.vauban"
# Nothing is chosen by answers: the direction is measured at once.
GIVEN = ("--layer", "auto", "--alpha", "1", "--no-controls")


@pytest.mark.parametrize(
    ("after", "number"),
    [
        ("  plan ", signal.SIGINT),
        ("measure ", signal.SIGINT),
        ("evaluate ", signal.SIGINT),
        ("  plan ", signal.SIGTERM),
    ],
)
def test_an_interrupted_run_leaves_the_direction_at_most(tmp_path, environment, after, number):
    given = GIVEN if after == "evaluate " else ()
    process = subprocess.Popen(
        [sys.executable, "-m", "vauban", "demo", "-o", "out", *given],
        cwd=tmp_path,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A runner in the background hands down an ignored SIGINT, which Python would keep.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith(after):
            process.send_signal(number)
            break
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130
    first, *rest = said.strip().splitlines()
    assert first == "vauban: interrupted; nothing half-written is left."
    if after == "evaluate ":
        # The direction had been measured by then.
        assert [path.name for path in tmp_path.iterdir()] == ["out.direction.vauban"]
        assert rest == [f"the measured direction is kept in {KEPT}; --direction {KEPT} goes on "
                        "from it."]  # fmt: skip
        vauban.DirectionResult.load(tmp_path / KEPT)
    else:
        assert not rest and not list(tmp_path.iterdir())


def test_a_disk_without_room_leaves_the_direction_alone(tmp_path, environment):
    # A limit on the size of files stops the writer in the middle of the weights, as a full disk
    # does.
    done = subprocess.run(
        [sys.executable, "-m", "vauban", "demo", "-o", "out", *GIVEN, "--num-prompts", "8"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000)),
    )
    assert done.returncode == 2, done.stderr
    assert "room" in done.stderr or "full" in done.stderr
    assert "Traceback" not in done.stderr and KEPT in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == [KEPT]
