"""Run the code of a documentation page as it is printed."""

import contextlib
import re
import subprocess
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A folded solution (pymdownx.details): its lines stand four spaces in.
FOLDED = re.compile(r"^\?\?\?.*\n((?: {4}.*\n|[ \t]*\n)+)", re.MULTILINE)


def blocks_of(page: Path) -> list[tuple[str, str]]:
    """(language, code) of every fenced block, in order, folded ones too."""
    text = page.read_text(encoding="utf-8") + "\n"
    return BLOCK.findall(FOLDED.sub(lambda match: textwrap.dedent(match[1]), text))


def run_blocks(page: Path, folder: Path, environment: dict[str, str] | None = None) -> None:
    """Run a page's blocks in their order, in `folder`."""
    with contextlib.chdir(folder):
        run_code(blocks_of(page), page.name, environment)


def run_code(
    blocks: list[tuple[str, str]], name: str, environment: dict[str, str] | None = None
) -> None:
    """Python blocks share their names; shell blocks run in the folder where those stand."""
    names: dict[str, object] = {}
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(compile(code, name, "exec"), names)
        elif language == "shell":
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                env=environment,
                check=True,
                capture_output=True,
                timeout=240,
            )
