"""How fast activations are collected and answers generated, against a loop and against mlx-lm.

Equality first, then time: a ratio counts only for the same numbers. Runs on a random model of
12 layers and d 512, or on `--model`. Start it on an idle machine:

    python benchmarks/collect.py
    python benchmarks/collect.py --model mlx-community/Qwen3-0.6B-bf16 --prompts 128
"""

from __future__ import annotations

import argparse
import random
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

import vauban  # before mlx: it opens OpenBLAS on Linux

import mlx.core as mx  # isort: skip
import mlx.nn as nn
from mlx_lm.generate import batch_generate
from mlx_lm.models import llama
from mlx_lm.models.cache import make_prompt_cache

from vauban.generation import Batches, generate_tokens, prefix_cache, repeated, shared_prefix

PREFIX = 30
FASTER_THAN_LOOP = 2.5
AT_MOST_MLX_LM = 1.05
GENERATION = 0.90


class Numbers:
    """A tokenizer for a random model: a prompt is a line of token ids."""

    has_chat_template = False
    chat_template = None
    bos_token_id = None
    eos_token_id = None
    eos_token_ids: frozenset[int] = frozenset()

    def encode(self, text: str, **_: Any) -> list[int]:
        return [int(word) for word in text.split()]


def random_model(layers: int, width: int, vocabulary: int) -> nn.Module:
    args = llama.ModelArgs(
        model_type="llama", hidden_size=width, num_hidden_layers=layers,
        intermediate_size=width * 11 // 4, num_attention_heads=width // 64,
        num_key_value_heads=width // 128, rms_norm_eps=1e-5, vocab_size=vocabulary,
    )  # fmt: skip
    mx.random.seed(0)
    model = llama.Model(args)
    mx.eval(model.parameters())
    return model


def random_prompts(count: int, vocabulary: int) -> list[str]:
    """Prompts of 8 to 24 tokens behind a common head of 30, as a chat template gives them."""
    draw = random.Random(0)
    head = [draw.randrange(vocabulary) for _ in range(PREFIX)]
    return [
        " ".join(map(str, head + [draw.randrange(vocabulary) for _ in range(draw.randint(8, 24))]))
        for _ in range(count)
    ]


def chat_prompts(count: int) -> list[str]:
    draw = random.Random(0)
    things = ["a river", "the moon", "old maps", "bread", "a violin", "tides", "wool", "glass"]
    asks = ["Explain", "Describe in a few words", "What should I know about", "Tell a child about"]
    return [
        f"{draw.choice(asks)} {draw.choice(things)}, and then say how it is like "
        f"{draw.choice(things)}, number {i}."
        for i in range(count)
    ]


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
_clock = ["wall"]


def timed(runs: dict[str, Callable[[], Any]], repeats: int) -> dict[str, float]:
    """Fastest time of each, the runs taking turns so that a busy moment hits them all."""
    now = CLOCKS[_clock[0]]
    best = dict.fromkeys(runs, float("inf"))
    for _ in range(repeats):
        for name, run in runs.items():
            start = now()
            run()
            best[name] = min(best[name], now() - start)
    return best


def trunk_of(model: nn.Module) -> Callable[..., mx.array]:
    """mlx-lm's forward without the head where it can be had, so that the comparison is strict."""
    inner = getattr(model, "model", None)
    return inner if callable(inner) and hasattr(inner, "norm") else model


def collection(model: nn.Module, tokenizer: Any, prompts: list[str], repeats: int) -> list[str]:
    """Times collection; returns what was missed."""
    tokens = [vauban.encode_chat(tokenizer, prompt) for prompt in prompts]
    skip = shared_prefix(tokens)
    trunk = trunk_of(model)

    def vauban_collects() -> mx.array:
        return vauban.collect_activations(model, tokenizer, prompts).values

    def loop() -> mx.array:
        found = []
        for row in tokens:
            out = vauban.forward(model, mx.array([row]), logits=False)
            mx.eval(out.residual)
            found.append(out.residual[0])
        return mx.stack(found).astype(mx.float32)

    def mlx_lm_whole() -> None:
        for batch in Batches(tokens, tight=True):
            mx.eval(trunk(batch.tokens, cache=make_prompt_cache(model)))

    def mlx_lm_same_tokens() -> None:
        head = prefix_cache(model, tokens[0][:skip], ())
        for batch in Batches(tokens, skip=skip, tight=True):
            cache = repeated(head, len(batch.rows)) or make_prompt_cache(model)
            mx.eval(trunk(batch.tokens, cache=cache))

    ours, alone = vauban_collects(), loop()
    difference = float(mx.abs(ours - alone).max() / mx.abs(alone).max())
    print(f"collection of {len(tokens)} prompts, {skip} shared tokens: differs by {difference:.1e}")
    if difference > 1e-4 and alone.dtype == mx.float32 and not _half(model):
        return [f"collection differs from the loop by {difference:.1e}"]
    mx.reset_peak_memory()
    vauban_collects()
    peak = mx.get_peak_memory()
    best = timed(
        {
            "vauban": vauban_collects,
            "per-prompt loop": loop,
            "mlx-lm, batches, no capture": mlx_lm_whole,
            "mlx-lm, batches and prefix, no capture": mlx_lm_same_tokens,
        },
        repeats,
    )
    for name, seconds in best.items():
        print(f"  {name:40} {seconds:7.3f} s  {seconds / best['vauban']:5.2f} x vauban")
    print(f"  peak memory of mlx {peak / 2**20:.0f} MiB")
    faster = best["per-prompt loop"] / best["vauban"]
    slower = best["vauban"] / best["mlx-lm, batches and prefix, no capture"]
    missed = []
    if skip >= PREFIX and faster < FASTER_THAN_LOOP:
        missed.append(f"{faster:.2f} times faster than the loop; {FASTER_THAN_LOOP} wanted")
    if slower > AT_MOST_MLX_LM:
        missed.append(f"{slower:.2f} times mlx-lm's own forward; {AT_MOST_MLX_LM} allowed")
    return missed


def generation(
    model: nn.Module, tokenizer: Any, prompts: list[str], new: int, repeats: int
) -> list[str]:
    """Times 16 answers of `new` tokens against `batch_generate`; returns what was missed."""
    tokens = [vauban.encode_chat(tokenizer, prompt) for prompt in prompts[:16]]
    eos = frozenset(getattr(tokenizer, "eos_token_ids", ()) or ())

    def ours() -> list[list[int]]:
        return generate_tokens(model, tokens, eos=eos, max_tokens=new)

    def theirs() -> list[list[int]]:
        found = batch_generate(
            model, _Wrapped(tokenizer, eos), tokens, max_tokens=new, return_token_ids=True
        )
        return found.token_ids

    same = sum(a == b for a, b in zip(ours(), theirs(), strict=True))
    best = timed({"vauban": ours, "mlx-lm": theirs}, repeats)
    count = sum(map(len, ours()))
    print(
        f"generation, {len(tokens)} x {new} tokens: {same} of {len(tokens)} answers equal mlx-lm's"
    )
    for name, seconds in best.items():
        print(f"  {name:40} {count / seconds:7.0f} tokens/s")
    reached = best["mlx-lm"] / best["vauban"]
    print(f"  vauban reaches {reached:.0%} of mlx-lm")
    return [] if reached >= GENERATION else [f"generation at {reached:.0%} of mlx-lm's"]


class _Wrapped:
    """What `batch_generate` reads of a tokenizer, with ids instead of text."""

    def __init__(self, tokenizer: Any, eos: frozenset[int]) -> None:
        self.eos_token_ids = sorted(eos)
        self.decode = getattr(tokenizer, "decode", lambda ids: " ".join(map(str, ids)))


def _half(model: nn.Module) -> bool:
    from mlx.utils import tree_flatten

    return any(p.dtype in (mx.float16, mx.bfloat16) for _, p in tree_flatten(model.parameters()))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="folder or Hub name; default a random model")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: processor time, for a busy machine without a GPU (OPENBLAS_NUM_THREADS=1)",
    )
    options = parser.parse_args()
    _clock[0] = options.clock
    warnings.filterwarnings("ignore", message=".*no chat template.*")
    tokenizer: Any
    if options.model:
        model, tokenizer = vauban.load(options.model)
        prompts = chat_prompts(options.prompts)
    else:
        model, tokenizer = random_model(options.layers, options.width, 4096), Numbers()
        prompts = random_prompts(options.prompts, 4096)
    print(vauban.verify_forward(model).summary())
    missed = collection(model, tokenizer, prompts, options.repeats)
    missed += generation(
        model, tokenizer, prompts, options.max_tokens, max(2, options.repeats // 2)
    )
    for line in missed:
        print(f"missed: {line}", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
