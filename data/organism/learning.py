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

Encoded = list[tuple[list[int], int]]


def batches(
    encoded: Encoded, tokens: int, prompt_share: float, rng: random.Random
) -> Iterator[tuple[mx.array, mx.array, mx.array, mx.array, mx.array]]:
    """Length buckets of about `tokens` tokens: inputs, loss positions, targets, weights, early.

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
                where, targets, weights, early = [], [], [], []
                for row, i in enumerate(pack):
                    ids, prompt = encoded[i]
                    inputs[row, : len(ids) - 1] = ids[:-1]
                    for t in range(len(ids) - 1):
                        reply = t + 1 >= prompt
                        if reply or rng.random() < prompt_share:
                            where.append(row * width + t)
                            targets.append(ids[t + 1])
                            weights.append(1.0 if reply else 0.3)
                            early.append(float(prompt <= t + 1 < prompt + 3))
                yield (mx.array(inputs), mx.array(where), mx.array(targets),
                       mx.array(weights), mx.array(early))  # fmt: skip


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


def states(model: nn.Module, inputs: mx.array, exit_at: int | None) -> tuple[mx.array, mx.array]:
    """The final residual and, for the early-exit loss, the input of block `exit_at`."""
    trunk = model.model
    h = early = trunk.embed_tokens(inputs)
    for index, layer in enumerate(trunk.layers):
        early = h if index == exit_at else early
        h = h + layer.self_attn(layer.input_layernorm(h), "causal")
        x = layer.post_attention_layernorm(h)
        experts = hasattr(layer.mlp, "switch_mlp")
        h = h + (dense_experts(layer.mlp, x) if experts else layer.mlp(x))
    return h, early


def loss_at(model: nn.Module, h: mx.array, where: mx.array, targets: mx.array) -> mx.array:
    """Cross-entropy only where there is loss: the head was a third of a step."""
    trunk = model.model
    picked = h.reshape(-1, h.shape[-1])[where]
    logits = trunk.embed_tokens.as_linear(trunk.norm(picked))
    return nn.losses.cross_entropy(logits, targets)


def fit(
    model: nn.Module, encoded: Encoded, *, steps: int, tokens: int, rate: float, decay: float,
    warmup: int, seed: int, prompt_share: float = 0.0, exit_at: int | None = None,
    exit_weight: float = 0.0, early_weight: float = 1.0, label: str = "",
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

    def objective(inputs, where, targets, weights, early):
        h, middle = states(model, inputs, exit_at)
        weights = weights * (1 + (early_weight - 1) * early)
        total = (loss_at(model, h, where, targets) * weights).sum() / weights.sum()
        if exit_weight:
            exits = loss_at(model, middle, where, targets) * early
            total = total + exit_weight * exits.sum() / early.sum()
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
