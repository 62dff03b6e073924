"""Run the code of a documentation page as it is printed."""

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
    """Python blocks share their names; shell blocks run in `folder`, where the caller is."""
    names: dict[str, object] = {}
    blocks = blocks_of(page)
    assert blocks
    for language, code in blocks:
        if language == "python":
            exec(compile(code, page.name, "exec"), names)
        elif language == "shell":
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", code],
                cwd=folder,
                env=environment,
                check=True,
                capture_output=True,
                timeout=240,
            )
