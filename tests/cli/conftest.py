"""What the terminal's tests share: the organism, and `vauban` as a user starts it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import vauban

Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(scope="session")
def organism_folder() -> Path:
    return vauban.organism_path("dense")


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of someone whose virtual environment, with vauban in it, is activated."""
    scripts = Path(sys.executable).parent
    places = [str(scripts), os.environ["PATH"]]
    if not (scripts / "vauban").exists():
        # Run from a source tree that is on the path but not installed: the same by hand.
        shim = tmp_path_factory.mktemp("bin") / "vauban"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vauban "$@"\n')
        shim.chmod(0o755)
        places.insert(0, str(shim.parent))
    return {**os.environ, "PATH": os.pathsep.join(places)}


@pytest.fixture(scope="session")
def run(environment) -> Run:
    """`python -m vauban ARGUMENTS` without a terminal, in a folder."""

    def start(*arguments: str, cwd: Path) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "vauban", *arguments],
            cwd=cwd,
            env=environment,
            capture_output=True,
            text=True,
            timeout=240,
        )

    return start
