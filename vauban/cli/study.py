"""`vauban study CONFIG.toml`: what is compared, the tables, and where everything was written."""

import argparse
import shlex
import sys

from vauban.cli import run_lines
from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import load_study
from vauban.pipeline.stages import Opened
from vauban.report import seconds


def study(options: argparse.Namespace) -> int:
    """Run a study and put its tables on the terminal."""
    from vauban.study import run_study
    from vauban.study.tables import study_rows

    config = load_study(options.config, settings(options))
    console = Console(as_json=options.json)

    def on_model(path: str, opened: Opened) -> None:
        rows = [
            ("device", run_lines.device_line(opened.device)),
            *run_lines.model_lines(opened.info),
            ("forward pass", run_lines.forward_line(opened.check)),
            ("compare", f"{', '.join(config.study.methods)} in {', '.join(config.study.scopes)}"),
        ]
        console.pairs(f"study of {path}", rows)

    with console.progress() as progress:
        result = run_study(config, progress=progress, on_model=on_model)
    for block in result.document["models"]:
        console.line()
        console.line(block["model"], "bold")
        headings, rows, notes = study_rows(block)
        console.grid(headings, rows)
        for note in notes:
            console.line(note)
        for text in block["warnings"]:
            console.warning(text)
    if result.resumed:
        console.line(f"{result.resumed} pieces were taken over from a run that had stopped")
    console.line(f"written to {result.output_dir} in {seconds(result.seconds)}", "green")
    console.line("next:")
    opener = "open" if sys.platform == "darwin" else "xdg-open"
    console.command(f"{opener} {shlex.quote(str(result.output_dir / 'study.html'))}")
    console.document(result.to_dict())
    return 0
