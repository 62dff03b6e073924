"""What each way of rounding leaves of a cut direction in packed weights, and at what price.

Checks the packing, then prints bits × strength × method; `--uniform` takes weights as mlx
initialises them, `--large` adds a 4096 × 14336 matrix.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban.edits import Update, pack_edited
from vauban.edits.exact import round_plainly
from vauban.edits.modules import unpack

GROUP = 64
METHODS = ("naive", "plain", "two-sided")
# Seconds for one 4096 × 14336 matrix of 4 bits on two CPU cores.
TARGETS = {"two-sided": 7.5}


@dataclass(frozen=True)
class Figures:
    """One rounding, read back in float32: see `vauban.edits.Packed` for left, error and leak.

    seconds and processor seconds hold the cut, the rounding and the packing; of the exact methods
    the choice of grids and their own reading back, too.
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
            target = self.update.weight(self.before)
            if method == "naive":
                packed, scales, biases = mx.quantize(target.astype(mx.bfloat16), GROUP, self.bits)
            else:
                scales, biases = self.module.scales, self.module.biases
                packed = round_plainly(target, scales, biases, group_size=GROUP, bits=self.bits)
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
    """What the table rests on: our packing is MLX's, the float32 cut and the reports are right."""
    for bits in (3, 4, 8):
        case = Case(256, 256, bits, 3.0)
        before, module = case.before, case.module
        again = round_plainly(before, module.scales, module.biases, group_size=GROUP, bits=bits)
        read = case.read(again, module.scales, module.biases)
        assert mx.array_equal(read, before), f"{bits} bits: rounding a stored matrix changed it"
        left = case.update.share_left(case.update.weight(before), before)
        assert left < 1e-6, f"{bits} bits: the float32 cut leaves {left:.1e}"
        said, found = pack_edited(module, case.update), case.figures("two-sided")
        apart = abs(said.error - found.error) + abs(said.leak - found.leak)
        assert apart < 1e-4, f"{bits} bits: pack_edited reports other figures than are read here"
    print(f"vauban {vauban.__version__}: stored matrices come back code for code, the float32 cut")
    print("leaves < 1e-6, and what pack_edited reports is what is read back here")


def table(size: int, uniform: bool) -> dict[tuple[int, int, str], Figures]:
    found = {}
    print(f"\n{size} x {size}, group {GROUP}, bfloat16 scales, {os.cpu_count()} cores")
    heads = "".join(f"{head:>9}" for head in ("left", "error", "/ naive", "leak", "s", "cpu s"))
    print(f"bits strength  {'method':10}{heads}")
    for bits in (3, 4, 8):
        for strength in (1, 3, 8):
            case = Case(size, size, bits, strength, uniform)
            for method in METHODS:
                f = found[bits, strength, method] = case.figures(method)
                print(
                    f"{bits:4} {strength:8}  {method:10}{f.left:9.1e}{f.error:9.4f}"
                    f"{f.error / found[bits, strength, 'naive'].error:9.2f}{f.leak:9.3f}"
                    f"{f.seconds:9.2f}{f.processor:9.2f}",
                    flush=True,
                )
    return found


def large() -> dict[str, Figures]:
    case = Case(4096, 14336, 4, 1.0)
    print("\n4096 x 14336, 4 bits, strength 1; a pass over it in NumPy, one core, for comparison:")
    values = np.ones((4096, 14336), np.float32)
    started, processor = time.perf_counter(), time.process_time()
    np.rint(values, out=values)
    print(
        f"  {time.perf_counter() - started:.3f} s, {time.process_time() - processor:.3f} s of "
        "processor time"
    )
    found = {}
    for method, target in TARGETS.items():
        # The first run of a process pays for its memory pages; an export does so once.
        first = case.figures(method)
        f = found[method] = case.figures(method)
        print(
            f"  {method:10} {f.seconds:5.1f} s, {f.processor:.1f} s of processor time (first run "
            f"{first.seconds:.1f} s; target {target} s on two CPU cores)  left {f.left:.1e}  "
            f"error {f.error:.4f}  leak {f.leak:.3f}",
            flush=True,
        )
    return found


def worst(found: dict[tuple[int, int, str], Figures], timed: dict[str, Figures]) -> None:
    """The figures furthest from what is wanted."""

    def largest(value: Callable[[Figures, Figures], float], method: str) -> float:
        return max(
            value(f, found[bits, strength, "naive"])
            for (bits, strength, name), f in found.items()
            if name == method
        )

    print("\nworst of the table")
    for method in ("two-sided",):
        print(
            f"  {method:10} left {largest(lambda f, n: f.left, method):.1e}, "
            f"{largest(lambda f, n: f.left / n.left, method):.1e} of naive's; "
            f"error {largest(lambda f, n: f.error / n.error, method):.2f} of naive's; "
            f"leak {largest(lambda f, n: f.leak, method):.3f}"
        )
    for method, f in timed.items():
        print(f"  {method:10} {f.seconds / TARGETS[method]:.2f} of its target time (large)")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--size", type=int, default=2048, help="rows and columns (default 2048)")
    parser.add_argument("--uniform", action="store_true", help="uniform weights, not Gaussian")
    parser.add_argument("--large", action="store_true", help="also time a 4096 x 14336 matrix")
    arguments = parser.parse_args()
    check()
    found = table(arguments.size, arguments.uniform)
    worst(found, large() if arguments.large else {})


if __name__ == "__main__":
    main()
