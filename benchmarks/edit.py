"""Processor seconds and peak memory of an edit of facts, against the published form of the step.

The published form takes one fact at a time and runs all tokens through all blocks at every step of
a value. Values are compared before anything is timed. Also: the growth of a solve with the length
of the history, and the time of the projector where d0 is that of a large model.

    python benchmarks/edit.py [--facts 8] [--large]
"""

from __future__ import annotations

import argparse
import resource
import time

import vauban  # before mlx: OpenBLAS

# isort: split
import mlx.core as mx
import numpy as np

from vauban.knowledge import (
    Fact,
    KeyStats,
    ValueSettings,
    ValueTask,
    encode_fact,
    optimise_values,
    penalty,
    protected_directions,
    ridge_update,
    target_ids,
)
from vauban.knowledge.tasks import kl_row

CONTEXTS = ("{}", *(f"{text} . {{}}" for text in (
    "Tell me the name of a river", "The boat is red today", "Where is the old lamp",
    "I need help to paint a boat", "You see the garden behind the house",
)))  # fmt: skip
WORDS = ["lamp", "boat", "river", "garden", "house", "table", "rope", "chisel"]
TARGETS = ["red", "old", "paint", "colour", "river", "boat", "help", "name"]


def published_value(model, task, layer: int, s: ValueSettings) -> np.ndarray:
    """z of one fact: every prompt alone, all of its tokens, all blocks, at every step."""
    target = list(task.target)
    rows = [(list(row.tokens) + target[:-1], row.pivot) for row in task.prompts]

    def run(tokens, pivot, delta):
        """Logits (T, V), and the stream behind block `layer` at the pivot before the change."""
        x = model.model.embed_tokens(mx.array([tokens]))
        for index, block in enumerate(model.model.layers):
            x = block(x, "causal", None)
            if index == layer:
                h = x[0, pivot]
                x = x + (mx.arange(len(tokens)) == pivot)[None, :, None] * delta
        x = model.model.norm(x)
        tied = model.args.tie_word_embeddings
        return (model.model.embed_tokens.as_linear(x) if tied else model.lm_head(x))[0], h

    def logs(tokens, pivot, delta):
        logits = run(tokens, pivot, delta)[0]
        return logits - mx.logsumexp(logits, -1, keepdims=True)

    delta = mx.zeros(model.args.hidden_size)
    h0 = run(*rows[0], delta)[1]
    kl = list(task.kept[0].tokens)
    base = logs(kl, task.kept[0].pivot, delta)[-1]
    norm = mx.linalg.norm(h0)

    def loss(d):
        total = 0.0
        for (tokens, pivot), row in zip(rows, task.prompts, strict=True):
            scores = logs(tokens, pivot, d)
            for i, token in enumerate(target):
                total -= scores[len(row.tokens) - 1 + i, token] / len(target) / len(rows)
        now = logs(kl, task.kept[0].pivot, d)[-1]
        total += s.kl_factor * (mx.exp(now) * (now - base)).sum()
        return total + s.weight_decay * mx.sqrt((d**2).sum() + 1e-20) / norm**2

    step, mean, square = mx.value_and_grad(loss), mx.zeros(delta.shape), mx.zeros(delta.shape)
    for number in range(s.steps):
        value, slope = step(delta)
        if float(value) < 5e-2 or number == s.steps - 1:
            break
        mean, square = 0.9 * mean + 0.1 * slope, 0.999 * square + 0.001 * slope**2
        hat = mx.sqrt(square / (1 - 0.999 ** (number + 1))) + 1e-8
        delta = delta - s.lr * mean / (1 - 0.9 ** (number + 1)) / hat
        size = mx.linalg.norm(delta)
        delta = mx.where(size > s.clamp * norm, delta * (s.clamp * norm / size), delta)
        mx.eval(delta, mean, square)
    return np.array(h0 + delta, dtype=np.float64)


def timed(work, repeats: int = 1):
    """(result, processor seconds, peak of mlx's memory above what stood before, in MB).

    Processor time, because other work on the machine does not count in it, and the least of
    `repeats`, because threads that wait for one another do.
    """
    spans = []
    mx.reset_peak_memory()
    before = mx.get_active_memory()
    for _ in range(repeats):
        started = time.process_time()
        result = work()
        spans.append(time.process_time() - started)
    return result, min(spans), (mx.get_peak_memory() - before) / 1e6


def values(count: int, steps: int, repeats: int) -> None:
    model, tokenizer = vauban.load(vauban.organism_path("dense"))
    layer = 2
    facts = [
        Fact("Where is the {} ? It is near the", word, target)
        for word, target in zip(WORDS[:count], TARGETS, strict=False)
    ]
    tasks = [
        ValueTask(
            tuple(encode_fact(tokenizer, fact, context) for context in CONTEXTS),
            target_ids(tokenizer, fact.text, fact.target_new), (kl_row(tokenizer, fact),), number,
        )
        for number, fact in enumerate(facts)
    ]  # fmt: skip
    s = ValueSettings(steps, 0.1, 0.5, 0.0625, 0.75)
    optimise_values(model, layer, tasks[:1], s)
    plain, slow, much = timed(lambda: [published_value(model, t, layer, s) for t in tasks], repeats)
    ours, fast, little = timed(lambda: optimise_values(model, layer, tasks, s), repeats)
    apart = max(np.abs(v.z - z).max() for v, z in zip(ours, plain, strict=True))
    assert apart <= 1e-4, f"the values differ by {apart}"
    each = slow / len(tasks), fast / len(tasks)
    print(f"values of {len(tasks)} facts, {steps} steps, apart by {apart:.1e} at most")
    print(f"  published form  {each[0]:.3f} s a fact, {much:.0f} MB")
    print(f"  vauban          {each[1]:.3f} s a fact, {little:.0f} MB")
    print(f"  {each[0] / each[1]:.1f} times faster")


def history(size: int) -> None:
    rng = np.random.default_rng(0)
    spectrum = np.logspace(0, -2, size)
    moment = mx.array(np.diag(spectrum).astype(np.float32))
    rule = penalty(KeyStats.from_moment(moment, 10 * size, 0), "memit")
    keys, residuals = rng.standard_normal((10, size)), rng.standard_normal((10, 64))
    ridge_update(keys, residuals, penalty=rule)
    print(f"a solve of 10 facts at d0 {size}")
    for count in (0, 250, 500, 1000):
        past = rng.standard_normal((count, size)) if count else None
        _, span, _ = timed(lambda past=past: ridge_update(
            keys, residuals, penalty=rule, past_keys=past
        ))  # fmt: skip
        print(f"  {count:5d} earlier facts: {span:.2f} s")


def projector(size: int) -> None:
    """A second moment of 40 strong directions on a decaying rest, as keys have."""
    rng = np.random.default_rng(0)
    factor = rng.standard_normal((size, 48)).astype(np.float32) / np.sqrt(size)
    strong = np.logspace(1, -1, 48).astype(np.float32)
    c = (factor * strong) @ factor.T
    c[np.diag_indices(size)] += 1e-3
    moment = mx.array(c)
    basis, span, _ = timed(lambda: protected_directions(moment, tau=0.1))
    vectors = np.array(basis)
    off = np.abs(vectors @ c - ((vectors @ c) @ vectors.T) @ vectors).max() / strong[0]
    print(f"projector at d0 {size}: {len(vectors)} directions in {span:.1f} s, off by {off:.1e}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--facts", type=int, default=8)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3, help="the least time counts")
    parser.add_argument("--large", action="store_true", help="the projector at 14336 too")
    options = parser.parse_args()
    values(options.facts, options.steps, options.repeats)
    history(1536)
    for size in (4096, *((14336,) if options.large else ())):
        projector(size)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(f"peak of the process {peak / 1e3:.0f} MB")


if __name__ == "__main__":
    main()
