"""Run the code of a documentation page as it is printed."""

import contextlib
import os
import re
import subprocess
import tempfile
import textwrap
from pathlib import Path

from vauban.cli import main

ROOT = Path(__file__).resolve().parents[2]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
# A folded solution (pymdownx.details): its lines stand four spaces in.
FOLDED = re.compile(r"^\?\?\?.*\n((?: {4}.*\n|[ \t]*\n)+)", re.MULTILINE)
# In a page's shell `vauban` is answered by the process that runs the page: a new one would spend
# two seconds on its imports. tests/cli starts it as a user does.
ANSWERED = r"""
vauban() {
    local code
    printf '%s\0' "$PWD" "$@" >&"$CALL"
    echo >&"$CALL"
    read -r code <&"$ANSWER"
    cat "$SAID/stderr" >&2
    cat "$SAID/stdout"
    return "$code"
}
"""


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
            run_shell(code, environment)


def run_shell(code: str, environment: dict[str, str] | None = None) -> None:
    """A shell block in the working folder, with `vauban` answered by this process."""
    call, calling = os.pipe()
    answering, answer = os.pipe()
    with tempfile.TemporaryDirectory() as said, tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            ["bash", "-euo", "pipefail", "-c", ANSWERED + code],
            env={
                **(os.environ if environment is None else environment),
                **{"CALL": str(calling), "ANSWER": str(answering), "SAID": said},
            },
            pass_fds=(calling, answering),
            stdout=output,
            stderr=output,
        )
        os.close(calling)
        os.close(answering)
        # The calls end with the shell.
        with open(call, "rb") as calls, open(answer, "wb", buffering=0) as answers:
            for line in calls:
                folder, *arguments = line.decode().split("\0")[:-1]
                answers.write(f"{_answered(arguments, folder, Path(said))}\n".encode())
        output.seek(0)
        assert process.wait(timeout=240) == 0, output.read()


def _answered(arguments: list[str], folder: str, said: Path) -> int:
    with (
        contextlib.chdir(folder),
        (said / "stdout").open("w") as out,
        (said / "stderr").open("w") as err,
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        return main(arguments)
