"""Writes leace.npz: what the concept-erasure package (0.2.4, float64) makes of small data sets.

Needs torch and concept-erasure, which the tests do not. Run this file to write it again.
"""

from pathlib import Path
from typing import Any

import numpy as np

# name: (rows, width, classes); "wide" has fewer rows than components.
CASES = {"tall": (80, 16, 2), "wide": (24, 48, 2), "classes": (60, 12, 3)}


def data(n: int, d: int, k: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    y = np.arange(n) % k
    mix = rng.normal(size=(d, d)) / d**0.5
    X = rng.normal(size=(n, d)) @ mix + rng.normal(size=(k, d))[y] + 2.0
    return X.astype(np.float32), y.astype(np.int32)


def erased(X: np.ndarray, y: np.ndarray) -> dict[str, np.ndarray]:
    """The package's results for one data set."""
    import torch
    from concept_erasure import LeaceEraser, OracleEraser

    x: Any = torch.tensor(X).double()
    k = int(y.max()) + 1
    z: Any = torch.tensor(y).long()
    z = torch.nn.functional.one_hot(z, k) if k > 2 else z
    found = {
        "shrunk": LeaceEraser.fit(x, z, shrinkage=True)(x),
        "plain": LeaceEraser.fit(x, z, shrinkage=False)(x),
        "linear": LeaceEraser.fit(x, z, shrinkage=True, affine=False)(x),
        "orth": LeaceEraser.fit(x, z, method="orth")(x),
        "oracle": OracleEraser.fit(x, z)(x, z),
    }
    return {name: value.numpy() for name, value in found.items()}


def main() -> None:
    arrays = {}
    for seed, (name, (n, d, k)) in enumerate(CASES.items()):
        X, y = data(n, d, k, seed)
        arrays |= {f"{name}.X": X, f"{name}.y": y}
        arrays |= {f"{name}.{kind}": value for kind, value in erased(X, y).items()}
    np.savez_compressed(Path(__file__).with_name("leace.npz"), **arrays)


if __name__ == "__main__":
    main()
