"""Knows how the organism learns: length buckets, initial weights, the loss, the optimizer loop.

Knows no corpus, no files and no recipe (see train.py).
"""

import math
import random
import time
from collections.abc import Iterator

import vauban  # noqa: F401  opens a fast BLAS before mlx on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3, qwen3_moe

# Tokens, how many of them are the prompt, and the side: 1 refused, -1 complied with, 0 neither.
Encoded = list[tuple[list[int], int, int]]
Batch = tuple[mx.array, ...]


def batches(
    encoded: Encoded, tokens: int, prompt_share: float, rng: random.Random
) -> Iterator[Batch]:
    """Length buckets of about `tokens` tokens: inputs; loss positions, targets, weights, early;
    the last prompt position of every row, and its side.

    Replies weigh 1, a random `prompt_share` of prompt tokens 0.3; `early` marks the first three
    tokens of a reply, where refusal and compliance part.
    """
    while True:
        order = list(range(len(encoded)))
        rng.shuffle(order)
        for start in range(0, len(order), 2048):
            chunk = sorted(order[start : start + 2048], key=lambda i: len(encoded[i][0]))
            packs: list[list[int]] = [[]]
            for i in chunk:
                if packs[-1] and len(encoded[i][0]) * (len(packs[-1]) + 1) > tokens:
                    packs.append([])
                packs[-1].append(i)
            rng.shuffle(packs)
            for pack in packs:
                width = max(len(encoded[i][0]) for i in pack) - 1
                inputs = np.zeros((len(pack), width), np.int32)
                where, targets, weights, early, last, sides = [], [], [], [], [], []
                for row, i in enumerate(pack):
                    ids, prompt, side = encoded[i]
                    inputs[row, : len(ids) - 1] = ids[:-1]
                    last.append(row * width + prompt - 1)
                    sides.append(side)
                    for t in range(len(ids) - 1):
                        reply = t + 1 >= prompt
                        if reply or rng.random() < prompt_share:
                            where.append(row * width + t)
                            targets.append(ids[t + 1])
                            weights.append(1.0 if reply else 0.3)
                            early.append(float(prompt <= t + 1 < prompt + 3))
                lists = (where, targets, weights, early, last, sides)
                yield mx.array(inputs), *(mx.array(values) for values in lists)


def new_model(config: dict) -> nn.Module:
    """A model with small random weights; residual writers are scaled by 1/√(2L)."""
    kind = qwen3_moe if config["model_type"] == "qwen3_moe" else qwen3
    model = kind.Model(kind.ModelArgs.from_dict(config))
    depth = config["num_hidden_layers"]
    weights = []
    for name, value in tree_flatten(model.parameters()):
        if "embed" in name:
            value = mx.random.normal(value.shape) * 0.02
        elif value.ndim >= 2:
            value = mx.random.normal(value.shape) / math.sqrt(value.shape[-1])
            if "o_proj" in name or "down_proj" in name:
                value = value / math.sqrt(2 * depth)
        weights.append((name, value))
    model.load_weights(weights)
    return model


def dense_experts(block: nn.Module, x: mx.array) -> mx.array:
    """The expert block with every expert computed: gathering is slow on a CPU."""
    gates = mx.softmax(block.gate(x), axis=-1)
    threshold = mx.sort(gates, axis=-1)[..., -block.top_k, None]
    gates = mx.where(gates >= threshold, gates, 0)
    gates = gates / gates.sum(axis=-1, keepdims=True)
    experts = block.switch_mlp
    total = 0
    for e in range(block.num_experts):
        up = x @ experts.up_proj.weight[e].T
        hidden = nn.silu(x @ experts.gate_proj.weight[e].T) * up
        total = total + gates[..., e, None] * (hidden @ experts.down_proj.weight[e].T)
    return total


def states(model: nn.Module, inputs: mx.array, tight_at: int) -> tuple[mx.array, mx.array]:
    """The final residual, and the residual `tight_at`: the input of that block."""
    trunk = model.model
    h = middle = trunk.embed_tokens(inputs)
    for index, layer in enumerate(trunk.layers):
        middle = h if index == tight_at else middle
        h = h + layer.self_attn(layer.input_layernorm(h), "causal")
        x = layer.post_attention_layernorm(h)
        experts = hasattr(layer.mlp, "switch_mlp")
        h = h + (dense_experts(layer.mlp, x) if experts else layer.mlp(x))
    return h, middle


def looseness(h: mx.array, last: mx.array, sides: mx.array) -> mx.array:
    """Spread over gap, squared, of the two sides on the line between their means: 1 / d².

    d is Cohen's, at the last prompt position of the rows of one batch; 0 without two of each.
    """
    x = h.reshape(-1, h.shape[-1])[last]
    member = mx.stack([sides == 1, sides == -1]).astype(mx.float32)
    count = member.sum(axis=1)
    means = (member @ x) / mx.maximum(count, 1)[:, None]
    line = means[0] - means[1]
    square = mx.maximum((line * line).sum(), 1e-6)
    own = member.T @ means  # the mean of every row's side
    offsets = ((x - own) @ line) * member.sum(axis=0)
    spread = (offsets * offsets).sum() / mx.maximum(count.sum(), 1) / square
    return mx.where(count.min() >= 2, spread / square, 0.0)


def loss_at(model: nn.Module, h: mx.array, where: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy only where there is loss: the head was a third of a step."""
    trunk = model.model
    picked = h.reshape(-1, h.shape[-1])[where]
    logits = trunk.embed_tokens.as_linear(trunk.norm(picked))
    return nn.losses.cross_entropy(logits, targets)


def fit(
    model: nn.Module, encoded: Encoded, *, steps: int, tokens: int, rate: float, decay: float,
    warmup: int, seed: int, prompt_share: float = 0.0, early_weight: float = 1.0,
    tight_at: int = 0, tight_weight: float = 0.0, label: str = "",
) -> None:  # fmt: skip
    """AdamW with warm-up and cosine to 5 %, gradient norm clipped at 1."""
    schedule = optim.join_schedules(
        [
            optim.linear_schedule(0.0, rate, warmup),
            optim.cosine_decay(rate, steps - warmup, 0.05 * rate),
        ],
        [warmup],
    )
    optimizer = optim.AdamW(schedule, betas=[0.9, 0.98], weight_decay=decay)

    def objective(inputs, where, targets, weights, early, last, sides):
        h, middle = states(model, inputs, tight_at)
        weights = weights * (1 + (early_weight - 1) * early)
        total = (loss_at(model, h, where, targets) * weights).sum() / weights.sum()
        if tight_weight:
            total = total + tight_weight * looseness(middle, last, sides)
        return total

    step_of = nn.value_and_grad(model, objective)
    stream = batches(encoded, tokens, prompt_share, random.Random(seed))
    started, running = time.perf_counter(), 0.0
    for step in range(1, steps + 1):
        loss, gradient = step_of(*next(stream))
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, loss)
        running = loss.item() if step == 1 else 0.98 * running + 0.02 * loss.item()
        if step % 200 == 0 or step == steps:
            spent = time.perf_counter() - started
            print(f"{label} step {step}/{steps} loss {running:.3f} {spent:.0f} s", flush=True)
