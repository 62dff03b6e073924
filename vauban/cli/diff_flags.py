"""The flags of `vauban diff`. Parses and explains; imports nothing heavy."""

import argparse


def add_comparing(parser: argparse.ArgumentParser) -> None:
    """Two folders, a direction to compare with, and the prompts."""
    parser.add_argument("base", metavar="BASE", help="a folder or a Hub id")
    parser.add_argument(
        "edited", metavar="EDITED", help="another one, or an adapter of BASE as mlx-lm writes it"
    )
    parser.add_argument(
        "--direction", metavar="FILE",
        help="compare what the changes share with a direction that `vauban measure` saved",
    )  # fmt: skip
    parser.add_argument(
        "--behaviour", action="store_true",
        help="compare the answers to BASE's held-out prompts, too",
    )  # fmt: skip
    parser.add_argument("--prompt", "-p", action="append", help="compare the answers to a prompt")
    parser.add_argument("--prompts", metavar="FILE", help="the same for a file of prompts")
    parser.add_argument(
        "--max-tokens", "-m", type=int, default=100, help="longest answer (default: 100)"
    )
    parser.add_argument(
        "--num-prompts", type=int, metavar="N", help="held-out prompts of each class, at most"
    )
    parser.add_argument(
        "--json", nargs="?", const=True, default=False, metavar="FILE",
        help="write the comparison to a JSON file; without FILE print it and nothing else",
    )  # fmt: skip
