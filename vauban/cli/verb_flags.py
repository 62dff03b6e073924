"""The flags of steer, surface, compare and report. Imports nothing heavy."""

import argparse

from vauban.cli.search_flags import finite


def add_steering(parser: argparse.ArgumentParser) -> None:
    amount = parser.add_mutually_exclusive_group()
    amount.add_argument(
        "--alpha", type=finite, default=1.0,
        help="share of the direction taken out at every layer: 1 all, 2 reflects (default: 1)",
    )  # fmt: skip
    amount.add_argument(
        "--add", type=finite, metavar="K", help="add K times the raw difference at its residual"
    )
    parser.add_argument(
        "--max-tokens", "-m", type=int, default=100, help="longest answer (default: 100)"
    )


def add_runs(parser: argparse.ArgumentParser) -> None:
    """Two run folders."""
    parser.add_argument("run_a", metavar="RUN_A", help="the folder of a run: it holds run.json")
    parser.add_argument("run_b", metavar="RUN_B", help="another one")


def add_surface(parser: argparse.ArgumentParser) -> None:
    """A model, a direction, rows, and where the map goes."""
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hub id")
    parser.add_argument(
        "--direction", metavar="FILE",
        help="the refusal direction, as `vauban measure` saves it (default: measured now)",
    )  # fmt: skip
    parser.add_argument(
        "--cut",
        action="store_true",
        help="scan again with the direction cut at run time, and compare; nothing is changed",
    )
    parser.add_argument(
        "--axes", default="harm,language", metavar="A,B",
        help="the axes of the table that is printed (default: harm,language)",
    )  # fmt: skip
    parser.add_argument(
        "--max-tokens", "-m", type=int, default=40, help="longest answer (default: 40)"
    )
    parser.add_argument(
        "-o", "--output-dir", metavar="DIR",
        help="write the map, the answers and, with the extra plots, heat maps into this folder",
    )  # fmt: skip
    parser.add_argument("--force", action="store_true", help="replace the folder if it exists")


def add_report(parser: argparse.ArgumentParser) -> None:
    """A run folder and where its report goes."""
    parser.add_argument("run", metavar="RUN", help="the folder of a run: it holds run.json")
    parser.add_argument(
        "-o", "--output", metavar="FILE", help="where to; default: RUN/report.html, made again"
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it exists")
