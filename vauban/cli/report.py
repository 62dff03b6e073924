"""The verb that writes a run's HTML report again: `report RUN`. No model is loaded."""

import argparse
from pathlib import Path

from vauban.cli.console import Console
from vauban.errors import InputError
from vauban.report import byte_size, write_report


def report(options: argparse.Namespace) -> int:
    """Write the report of a finished run, and say where it is."""
    target = Path(options.output) if options.output else Path(options.run) / "report.html"
    # The run's own report is made from the same files and may be made again.
    if options.output and target.exists() and not options.force:
        raise InputError(f"{target} exists; choose another path or give --force")
    path = write_report(options.run, target)
    console = Console(as_json=options.json)
    size = path.stat().st_size
    console.line(f"written to {path} ({byte_size(size)})", "green")
    console.document({"report": str(path), "bytes": size})
    return 0
