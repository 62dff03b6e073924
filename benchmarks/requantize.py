"""What naive and direction-exact rounding leave of a direction in packed weights, at what cost.

Checks what is reported, then prints bits × strength × method; `--uniform` takes weights as mlx
initialises them, `--large` adds a 4096 × 14336 matrix.
"""

from __future__ import annotations

import argparse
import os
import time
from dataclasses import dataclass
from functools import partial

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn

from vauban.edits import Update, pack_edited
from vauban.edits.modules import unpack

GROUP = 64
METHODS = ("naive", "two-sided")
# Seconds for one 4096 × 14336 matrix of 4 bits on two CPU cores.
TARGET = 7.5


@dataclass(frozen=True)
class Figures:
    """One rounding, read back in float32: see `vauban.edits.Packed` for left, error and leak.

    seconds and processor seconds hold the cut, the rounding and the packing; of the exact form the
    choice of grids and its own reading back, too.
    """

    left: float
    error: float
    leak: float
    seconds: float
    processor: float


class Case:
    """A packed random matrix that writes one direction `strength` times as strongly; its cut.

    Scales and offsets are bfloat16, as in most published 4-bit models.
    """

    def __init__(
        self, rows: int, columns: int, bits: int, strength: float, uniform: bool = False
    ) -> None:
        self.bits = bits
        keys = mx.random.split(mx.random.key(0), 2)
        u = mx.random.normal((1, rows), key=keys[0])
        self.u = u / mx.linalg.norm(u)
        linear = nn.Linear(1, 1, bias=False)
        draw = partial(mx.random.uniform, -1.0, 1.0) if uniform else mx.random.normal
        full = 0.02 * draw(shape=(rows, columns), key=keys[1])
        linear.weight = (full + (strength - 1.0) * (self.u.T @ (self.u @ full))).astype(mx.bfloat16)
        self.module = linear.to_quantized(group_size=GROUP, bits=bits)
        self.update = Update("weight", 0, "mlp", self.u, 1.0, None, False)
        mx.eval(self.module.parameters())

    def read(self, packed: mx.array, scales: mx.array, biases: mx.array) -> mx.array:
        return unpack(packed, scales, biases, GROUP, self.bits, "affine")

    @property
    def before(self) -> mx.array:
        return self.read(self.module.weight, self.module.scales, self.module.biases)

    def store(self, method: str) -> tuple[mx.array, mx.array, mx.array]:
        """Packed weight, scales and offsets of the cut matrix by one of `METHODS`."""
        if method == "two-sided":
            arrays = pack_edited(self.module, self.update).arrays
            packed, scales, biases = (arrays[n] for n in ("weight", "scales", "biases"))
        else:
            target = self.update.weight(self.before).astype(mx.bfloat16)
            packed, scales, biases = mx.quantize(target, GROUP, self.bits)
        mx.eval(packed, scales, biases)
        return packed, scales, biases

    def figures(self, method: str) -> Figures:
        started, processor = time.perf_counter(), time.process_time()
        stored = self.store(method)
        seconds, processor = time.perf_counter() - started, time.process_time() - processor
        before = self.before
        removed = self.u @ before
        target = before - self.u.T @ removed
        after = self.read(*stored)
        difference = after - target
        had = mx.linalg.norm(removed)
        return Figures(
            left=float(mx.linalg.norm(self.u @ after) / had),
            error=float(mx.linalg.norm(difference) / mx.linalg.norm(target)),
            leak=float(mx.linalg.norm(difference @ removed.T) / (had * had)),
            seconds=seconds,
            processor=processor,
        )


def check() -> None:
    """What the table rests on: the float32 cut and the figures that `pack_edited` reports."""
    for bits in (3, 4, 8):
        case = Case(256, 256, bits, 3.0)
        left = case.update.share_left(case.update.weight(case.before), case.before)
        assert left < 1e-6, f"{bits} bits: the float32 cut leaves {left:.1e}"
        said, read = pack_edited(case.module, case.update), case.figures("two-sided")
        apart = abs(said.error - read.error) + abs(said.leak - read.leak)
        assert apart < 1e-4, f"{bits} bits: pack_edited reports other figures than are read here"
    print(f"vauban {vauban.__version__}: the float32 cut leaves < 1e-6, and what pack_edited")
    print("reports is what is read back here")


def compare(case: Case, label: str) -> None:
    naive = case.figures("naive")
    for method in METHODS:
        f = naive if method == "naive" else case.figures(method)
        print(
            f"{label:14} {method:10}{f.left:9.1e}{f.error:9.4f}{f.error / naive.error:9.2f}"
            f"{f.leak:9.3f}{f.seconds:9.2f}{f.seconds / naive.seconds:9.1f}{f.processor:9.2f}",
            flush=True,
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns (default 2048)")
    parser.add_argument("--uniform", action="store_true", help="uniform weights, not Gaussian")
    parser.add_argument("--large", action="store_true", help="only time a 4096 x 14336 matrix")
    options = parser.parse_args()
    check()
    print(f"\ngroup {GROUP}, bfloat16 scales, {os.cpu_count()} cores")
    heads = ("left", "error", "/ naive", "leak", "s", "/ naive", "cpu s")
    print(f"bits strength  {'method':10}" + "".join(f"{head:>9}" for head in heads))
    if options.large:
        case = Case(4096, 14336, 4, 1.0)
        # The first run of a process pays for its memory pages; an export does so once.
        for label in ("4   1  first", "4   1  second"):
            compare(case, label)
        print(f"two-sided is to take at most {TARGET} s on two CPU cores")
        return
    for bits in (3, 4, 8):
        for strength in (1, 3, 8):
            case = Case(options.size, options.size, bits, strength, options.uniform)
            compare(case, f"{bits:4} {strength:8}")


if __name__ == "__main__":
    main()
