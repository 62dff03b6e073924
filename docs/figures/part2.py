"""Pictures of part 2: the top of a demo run's report, as a browser shows it in both schemes."""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from drawing import ASSETS

SCHEME = "prefers-color-scheme: dark"


def main() -> None:
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    from tests.browser import browser

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        subprocess.run(
            [
                sys.executable, "-m", "vauban", "demo", "-o", "demo",
                "--max-tokens", "40", "--num-prompts", "16",
            ],
            cwd=folder, check=True, capture_output=True,
        )  # fmt: skip
        page = (folder / "demo" / "report.html").read_text(encoding="utf-8")
        assert SCHEME in page
        for scheme, rule in (("light", "not all"), ("dark", "all")):
            shown = folder / f"{scheme}.html"
            shown.write_text(page.replace(f"({SCHEME})", rule), encoding="utf-8")
            subprocess.run(
                [
                    browser(), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
                    "--no-first-run", f"--user-data-dir={folder / 'profile'}",
                    "--window-size=1000,1030",
                    f"--screenshot={ASSETS / f'part2-report-{scheme}.png'}", shown.as_uri(),
                ],
                check=True, capture_output=True, timeout=120,
            )  # fmt: skip


if __name__ == "__main__":
    main()
