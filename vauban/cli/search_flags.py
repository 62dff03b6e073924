"""The flags of `vauban search` beyond a run's settings, and numbers as flags give them."""

import argparse
import math


def add_searching(parser: argparse.ArgumentParser) -> None:
    """The model, and how long, by which figures and from which file it is searched."""
    parser.add_argument("model", metavar="MODEL", help="a folder or a Hub id")
    parser.add_argument(
        "--trials", type=int, default=60, metavar="N",
        help="cuts to try, those of an interrupted search among them (default: 60)",
    )  # fmt: skip
    parser.add_argument(
        "--timeout", type=finite, metavar="SECONDS", help="start no further trial after so long"
    )
    parser.add_argument(
        "--kl-limit", type=finite, metavar="KL",
        help="export the least refusing cut whose first-token KL keeps this limit; default: the "
        "one that costs least, a KL of 0.1 as much as a tenth of the prompts refused",
    )  # fmt: skip
    parser.add_argument(
        "--objectives", default="refused,kl", metavar="NAMES",
        help="of refused, kl, over_refused, perplexity (default: refused,kl)",
    )  # fmt: skip
    parser.add_argument(
        "--storage", metavar="FILE",
        help="the finished trials, from which a killed search goes on; default: OUTPUT.journal",
    )  # fmt: skip
    parser.add_argument(
        "--rescore", type=int, default=8, metavar="N",
        help="cuts of the front that are scored again on the held-out prompts (default: 8)",
    )  # fmt: skip


def finite(text: str) -> float:
    """A flag's number; argparse would take nan and inf."""
    value = float(text)
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"{text} is no finite number")
    return value
