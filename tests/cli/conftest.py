"""What the terminal's tests share: the organism, and `vauban` as a user starts it."""

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
