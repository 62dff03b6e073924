"""INLP in the span of the rows against a scikit-learn loop in full dimension.

    python benchmarks/inlp.py                      # 32 layers x 256 prompts x d 4096, 32 directions
    python benchmarks/inlp.py --width 512 --layers 4 --directions 8

Both sides see the same split, scale and C and are forced to the same number of directions. Results
are compared first, on the leading 4: held-out accuracies and the span. Past those the weights are
so small that scikit-learn's stopping tolerance, and not the data, decides where they point. The
loop is run on `--sample` layers and its time extrapolated to all of them, which is printed as such.
"""

# isort: off
import vauban  # before mlx.core and NumPy's BLAS
# isort: on

import argparse
import time

import mlx.core as mx
import numpy as np
from sklearn.linear_model import LogisticRegression

from vauban.directions.inlp import _distinct, _split
from vauban.directions.linear import row_scale

C = 0.1


def activations(prompts: int, layers: int, width: int) -> tuple[mx.array, np.ndarray]:
    """(n, layers, d) with a common mean, a falling spectrum and a class difference per layer."""
    rng = np.random.default_rng(0)
    y = np.arange(prompts) % 2
    found = []
    for layer in range(layers):
        u = rng.normal(size=(4, width)) / width**0.5
        spectrum = 8.0 / (1.0 + np.arange(width) / 16.0)
        x = rng.normal(size=(prompts, width)) * spectrum
        x += 0.5 + (y[:, None] - 0.5) * (np.array([8.0, 5.0, 4.0, 3.0]) @ u)
        found.append((1.0 + layer) * x)
    return mx.array(np.stack(found, axis=1).astype(np.float32)), y


def loop(rows: np.ndarray, y: np.ndarray, steps: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Ravfogel et al.'s loop: a fit in d dimensions, then the rows off all directions so far."""
    x = rows.astype(np.float64)
    train, dev = _split(y.astype(bool), _distinct(x), 0.2, 0)
    x = x / row_scale(x[train])
    basis = np.zeros((0, x.shape[1]))
    accuracies = []
    for _ in range(steps):
        projected = x - (x @ basis.T) @ basis
        fitted = LogisticRegression(C=C, tol=1e-8, max_iter=1000).fit(projected[train], y[train])
        accuracies.append(fitted.score(projected[dev], y[dev]))
        w = fitted.coef_[0]
        if not np.linalg.norm(w) > 0:
            raise SystemExit(f"scikit-learn's weights are zero after {len(basis)} directions")
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        basis = np.vstack([basis, w / np.linalg.norm(w)])
    return basis, np.array(accuracies), len(dev)


def clocks() -> np.ndarray:
    """Wall and CPU seconds; on a machine that others use the latter is the steadier one."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--prompts", type=int, default=256)
    parser.add_argument("--width", type=int, default=4096)
    parser.add_argument("--directions", type=int, default=32)
    parser.add_argument("--sample", type=int, default=1, help="layers that the loop is run on")
    args = parser.parse_args()
    X, y = activations(args.prompts, args.layers, args.width)
    mx.eval(X)

    began = clocks()
    found = vauban.fit_inlp_batch(
        X, mx.array(y), C=C, min_accuracy=0.0, max_rank=args.directions, patience=args.directions
    )
    ours = clocks() - began

    spent = np.zeros(2)
    for layer in range(args.sample):
        began = clocks()
        basis, accuracies, held = loop(np.array(X[:, layer]), y, args.directions)
        spent += clocks() - began
        result = found[(layer,)]
        gaps = np.abs(np.array(result.accuracies) - accuracies) * held
        leading = min(4, args.directions)
        inner = np.array(result.directions[:leading], dtype=np.float64) @ basis[:leading].T
        cosine = np.linalg.svd(inner)[1].min()
        print(
            f"layer {layer}: {result.rank} directions on both sides; first {leading}: held-out "
            f"accuracies differ by at most {gaps[:leading].max():.0f} of {held} prompts, smallest "
            f"principal cosine {cosine:.6f} (all {len(gaps)}: at most {gaps.max():.0f} prompts)"
        )
        agree = gaps[:leading].max() <= 2.001 and cosine >= 1 - 1e-3
        if result.rank != args.directions or not agree:
            raise SystemExit("the two sides disagree; the times below would compare nothing")
    theirs = spent / args.sample * args.layers
    print(
        f"for {args.layers} layers, wall s (CPU s):\n"
        f"vauban        {ours[0]:8.1f} ({ours[1]:.1f})\n"
        f"scikit-learn  {theirs[0]:8.1f} ({theirs[1]:.1f}), extrapolated from {args.sample}\n"
        f"ratio         {theirs[0] / ours[0]:8.1f} ({theirs[1] / ours[1]:.1f})"
    )


if __name__ == "__main__":
    main()
