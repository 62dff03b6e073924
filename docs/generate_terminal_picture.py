"""The README's picture: `vauban demo` on a real terminal, as an SVG. Runs the demo.

    pip install pyte
    python docs/generate_terminal_picture.py

A pseudo-terminal runs the command, pyte keeps the screen that it draws, rich writes the SVG.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import pty
import re
import shutil
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pyte
from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
PICTURE = ROOT / "docs" / "assets" / "demo.svg"
COLUMNS, LINES = 104, 90
THEME = TerminalTheme(
    (24, 27, 32), (222, 226, 231),
    [(60, 66, 75), (255, 123, 134), (79, 209, 184), (240, 185, 90), (116, 179, 255),
     (200, 150, 250), (100, 200, 220), (222, 226, 231)],
    [(125, 133, 144), (255, 160, 168), (120, 230, 210), (250, 210, 130), (150, 200, 255),
     (220, 180, 255), (140, 225, 240), (255, 255, 255)],
)  # fmt: skip


def screen_of(command: list[str]) -> pyte.Screen:
    """What a terminal of COLUMNS x LINES shows when the command has ended."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", LINES, COLUMNS, 0, 0))
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(COLUMNS)}
    process = subprocess.Popen(
        command, stdin=follower, stdout=follower, stderr=follower, env=environment
    )
    os.close(follower)
    screen = pyte.Screen(COLUMNS, LINES)
    stream = pyte.ByteStream(screen)
    while True:
        try:
            data = os.read(leader, 65536)
        except OSError:  # Linux says so when the other end has closed
            break
        if not data:
            break
        stream.feed(data)
    if process.wait():
        sys.exit(f"{command} ended with {process.returncode}:\n" + "\n".join(screen.display))
    return screen


def as_text(screen: pyte.Screen) -> Text:
    """The screen's lines with their colours, without empty lines at the end."""
    text = Text()
    last = max(n for n, line in enumerate(screen.display) if line.strip())
    for number in range(last + 1):
        row = screen.buffer[number]
        for column in range(len(screen.display[number].rstrip())):
            cell = row[column]
            words = [] if cell.fg == "default" else [_colour(cell.fg)]
            words += ["bold"] * cell.bold
            text.append(cell.data, style=" ".join(words))
        text.append("\n")
    return text


def _colour(name: str) -> str:
    known = {"brown": "yellow", "brightbrown": "bright_yellow"}
    name = known.get(name, name)
    if re.fullmatch("[0-9a-f]{6}", name):
        return f"#{name}"
    return name.replace("bright", "bright_") if "bright_" not in name else name


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=PICTURE)
    parser.add_argument("command", nargs="*", help="another command to show")
    options = parser.parse_args()
    # The picture shows paths: from the repository's root they name no machine.
    os.chdir(ROOT)
    if Path("output").exists():
        sys.exit("output exists; move it away first")
    command = options.command or [sys.executable, "-m", "vauban", "demo", "-o", "output"]
    screen = screen_of(command)
    shutil.rmtree("output", ignore_errors=True)
    text = as_text(screen)
    console = Console(width=COLUMNS, record=True, file=open(os.devnull, "w"))  # noqa: SIM115
    console.print(text)
    shown = " ".join(["vauban", *command[3:]]) if not options.command else " ".join(command)
    svg = console.export_svg(title=f"$ {shown}", theme=THEME)
    # The page brings its own font: nothing is fetched.
    svg = re.sub(r"@font-face \{.*?\}", "", svg, flags=re.S)
    svg = svg.replace("Fira Code", "ui-monospace, SFMono-Regular, Menlo, Consolas")
    options.output.write_text(svg, encoding="utf-8")
    print(f"{options.output}: {len(svg) / 1000:.0f} kB")


if __name__ == "__main__":
    main()
