"""What minding a matrix's inputs costs and buys: a 4-bit matrix rounded two-sided, and calibrated.

Checks first that the sketch of the inputs has their energies and that both roundings leave nothing
of the direction, then prints seconds and the error of the outputs on inputs that neither has read.
The inputs are drawn, with a spectrum that falls as 1/i^0.7 as activations' do: what is gained on a
model depends on its own.
"""

from __future__ import annotations

import argparse
import os
import time

import vauban  # before mlx: OpenBLAS

# isort: split
import numpy as np
from requantize import Case

from vauban.edits import pack_edited
from vauban.export.calibrate import RANK
from vauban.rounding import InputMoments

TOKENS, BATCH = 4000, 500


def inputs(columns: int, seed: int) -> np.ndarray:
    """(tokens, columns): 400 directions of falling size, the same for every seed, and noise."""
    spectrum = np.arange(1, 401) ** -0.7
    basis = np.random.default_rng(0).normal(size=(400, columns)) * spectrum[:, None]
    random = np.random.default_rng(seed)
    found = random.normal(size=(TOKENS, 400)).astype(np.float32) @ basis.astype(np.float32)
    found += 0.05 * random.normal(size=found.shape).astype(np.float32)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=14336)
    options = parser.parse_args()
    case = Case(options.rows, options.columns, 4, 1.0)
    read, fresh = inputs(options.columns, 1), inputs(options.columns, 2)

    started = time.perf_counter()
    moments = InputMoments(options.columns, RANK)
    for first in range(0, TOKENS, BATCH):
        moments.update(read[first : first + BATCH])
    energy = moments.energy()
    seconds = time.perf_counter() - started
    size = (energy.factor**2).sum(0) + energy.rest
    assert np.allclose(size, (read**2).mean(0), rtol=1e-3), "the sketch lost energy"
    print(f"vauban {vauban.__version__}, {os.cpu_count()} cores")
    print(f"{TOKENS} inputs sketched to rank {RANK} in {seconds:.1f} s, every energy kept")

    target = np.array(case.update.weight(case.before))
    wanted = target @ fresh.T
    found = {}
    for name, energies in (("two-sided", ()), ("calibrated", (energy,))):
        # The first of a process pays for memory pages.
        pack_edited(case.module, case.update, energies)
        started = time.perf_counter()
        packed = pack_edited(case.module, case.update, energies)
        seconds = time.perf_counter() - started
        assert packed.left < 1e-3, f"{name} leaves {packed.left:.1e} of the direction"
        arrays = packed.arrays
        stored = case.read(arrays["weight"], arrays["scales"], arrays["biases"])
        wrong = np.linalg.norm(np.array(stored) @ fresh.T - wanted) / np.linalg.norm(wanted)
        found[name] = (seconds, wrong)
        print(
            f"{name:11} {seconds:5.1f} s  left {packed.left:.1e}  leak {packed.leak:.3f}  error of "
            f"the weights {packed.error:.4f}, of the outputs {wrong:.4f}"
        )
    times, errors = zip(*found.values(), strict=True)
    print(
        f"calibrated: {times[1] / times[0]:.2f} of the time, "
        f"{errors[1] / errors[0]:.2f} of the error of the outputs"
    )


if __name__ == "__main__":
    main()
