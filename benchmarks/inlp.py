"""INLP in the span of the rows against a scikit-learn loop in full dimension.

    python benchmarks/inlp.py                      # 32 layers x 256 prompts x d 4096, 32 directions
    python benchmarks/inlp.py --width 512 --layers 4 --directions 8

Both sides see the same split, scale and C and are forced to the same number of directions. Every
step is compared first: its classifier (cosine), its held-out accuracy (to 2 prompts) and the span
of all of them (principal cosines, 1 - 1e-3). Step k of the loop removes vauban's first k
directions, so that both sides are asked the same: on separable rows a step multiplies what the
last one left of an error by about ten, and two float64 solvers that stop at 1e-10 part after some
twelve directions (measured). `--free` lets the loop remove its own and prints where they part.
The loop is run on `--sample` layers and its time extrapolated to all of them, printed as such.
"""

# isort: off
# isort: on

import argparse
import time

import mlx.core as mx
import numpy as np
from sklearn.linear_model import LogisticRegression

from vauban.directions.inlp import _distinct, _split, fit_inlp_batch

C = 0.1
WANTED = 10


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


def loop(
    rows: np.ndarray, y: np.ndarray, given: np.ndarray, free: bool
) -> tuple[np.ndarray, np.ndarray, int]:
    """Ravfogel et al.'s loop: a fit in d dimensions, then the rows off all directions so far."""
    x = rows.astype(np.float64)
    train, dev = _split(y.astype(bool), _distinct(rows), 0.2, 0)
    x = x / (np.linalg.norm(x[train], axis=1).mean() / x.shape[1] ** 0.5)
    found = np.zeros((0, x.shape[1]))
    accuracies = []
    for step in range(len(given)):
        basis = found if free else given[:step]
        projected = x - (x @ basis.T) @ basis
        fitted = LogisticRegression(C=C, tol=1e-8, max_iter=1000).fit(projected[train], y[train])
        accuracies.append(fitted.score(projected[dev], y[dev]))
        w = fitted.coef_[0]
        if not np.linalg.norm(w) > 0:
            raise SystemExit(f"scikit-learn's weights are zero after {step} directions")
        for _ in range(2):
            w = w - basis.T @ (basis @ w)
        found = np.vstack([found, w / np.linalg.norm(w)])
    return found, np.array(accuracies), len(dev)


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
    parser.add_argument("--free", action="store_true", help="the loop removes its own directions")
    args = parser.parse_args()
    X, y = activations(args.prompts, args.layers, args.width)
    mx.eval(X)

    began = clocks()
    found = fit_inlp_batch(
        X, mx.array(y), C=C, min_accuracy=0.0, max_rank=args.directions, patience=args.directions
    )
    ours = clocks() - began
    short = [layer for (layer,), result in found.items() if result.rank != args.directions]
    if short:
        raise SystemExit(f"layers {short} have fewer than {args.directions} directions")

    spent = np.zeros(2)
    for layer in range(args.sample):
        began = clocks()
        ours_here = np.array(found[(layer,)].directions, dtype=np.float64)
        theirs_here, accuracies, held = loop(np.array(X[:, layer]), y, ours_here, args.free)
        spent += clocks() - began
        gaps = np.abs(np.array(found[(layer,)].accuracies) - accuracies) * held
        cosines = np.abs((ours_here * theirs_here).sum(axis=1))
        span = np.linalg.svd(ours_here @ np.linalg.qr(theirs_here.T)[0])[1].min()
        parted = next((k for k, c in enumerate(cosines) if c < 1 - 1e-3), len(cosines))
        print(
            f"layer {layer}, {len(cosines)} directions: held-out accuracies differ by at most "
            f"{gaps.max():.0f} of {held} prompts, smallest cosine of a direction "
            f"{cosines.min():.8f}, of the spans {span:.8f}"
            + (f"; the first {parted} agree" if args.free else "")
        )
        agree = gaps.max() <= 2.001 and cosines.min() >= 1 - 1e-5 and span >= 1 - 1e-3
        if not args.free and not agree:
            raise SystemExit("the two sides disagree; the times below would compare nothing")
    theirs = spent / args.sample * args.layers
    rest = f"extrapolated from {args.sample}"
    print(
        f"for {args.layers} layers, wall s (CPU s):\n"
        f"vauban        {ours[0]:8.1f} ({ours[1]:.1f})\n"
        f"scikit-learn  {theirs[0]:8.1f} ({theirs[1]:.1f}), {rest}\n"
        f"ratio         {theirs[0] / ours[0]:8.1f} ({theirs[1] / ours[1]:.1f}), {WANTED} wanted"
    )


if __name__ == "__main__":
    main()
