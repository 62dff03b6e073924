"""A real browser for pages that a test looks at."""

import shutil
import subprocess
from pathlib import Path

import pytest

_NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
_MAC = Path("/Applications/Google Chrome.app/Contents/MacOS/Google Chrome")


def browser() -> str:
    """The path of one; skips the test where there is none."""
    known = next((path for name in _NAMES if (path := shutil.which(name))), None)
    if known is None and _MAC.is_file():
        known = str(_MAC)
    if known is None:
        pytest.skip(f"no browser to show the page with: none of {', '.join(_NAMES)}")
    return known


def dump(page: Path, profile: Path, width: int = 1200) -> str:
    """The document after its scripts have run."""
    done = subprocess.run(
        [
            browser(), "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run",
            "--disable-background-networking", "--disable-component-update", "--disable-sync",
            f"--window-size={width},900", f"--user-data-dir={profile}", "--dump-dom",
            page.as_uri(),
        ],
        capture_output=True,
        text=True,
        timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout
