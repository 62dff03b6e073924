"""Causal selection against padded full passes for every candidate and score.

    python benchmarks/causal.py                # 5 positions x 12 layers, d 512
    python benchmarks/causal.py --prompts 32 --system ""

A random Llama of 12 layers with a planted refusal: the head's row of the refusal token points along
u, and candidates hold more or less of u. The plain side runs `forward` on right-padded prompts with
the head on the last token, three times per candidate. Scores and choices are compared first.
"""

from __future__ import annotations

# isort: off
import vauban  # before mlx.core

# isort: on
import argparse
import math
import time
import warnings
from typing import Any

import mlx.core as mx
import numpy as np
from mlx_lm.models import llama

from vauban.directions.refusal_odds import last_token_kl, refusal_log_odds
from vauban.interventions import Ablate, Add

SYSTEM = "You are a helpful assistant. Answer the question of the user, and say so if you cannot."


def planted_model(layers: int, width: int, vocabulary: int, token: int) -> tuple[Any, mx.array]:
    """A random model whose stream, moved along u, makes `token` the likely answer."""
    mx.random.seed(0)
    config = {
        "model_type": "llama", "hidden_size": width, "num_hidden_layers": layers,
        "intermediate_size": 11 * width // 4, "num_attention_heads": width // 64,
        "num_key_value_heads": width // 64, "rms_norm_eps": 1e-5, "vocab_size": vocabulary,
        "rope_theta": 10000.0, "tie_word_embeddings": False,
    }  # fmt: skip
    model = llama.Model(llama.ModelArgs.from_dict(config))
    u = mx.random.normal((width,))
    u = u / mx.linalg.norm(u)
    head = model.lm_head.weight
    model.lm_head.weight = head.at[token].add(1.5 * u)
    mx.eval(model.parameters())
    return model, u


def planted_candidates(
    positions: tuple[int, ...], layers: int, u: mx.array
) -> dict[tuple[int, int], mx.array]:
    """Raw vectors: noise plus a share of u that peaks in the middle layers of some positions."""
    rng = np.random.default_rng(1)
    found = {}
    for position in positions:
        best = float(rng.uniform(0.2, 1.0))
        for layer in range(layers):
            share = best * math.exp(-(((layer / layers - 0.5) / 0.2) ** 2))
            noise = mx.array(rng.normal(size=u.shape[0]).astype(np.float32)) / u.shape[0] ** 0.5
            found[position, layer] = 40.0 * (share * u + 0.5 * noise)
    return found


def padded(token_lists: list[list[int]]) -> tuple[mx.array, list[int]]:
    lengths = [len(t) for t in token_lists]
    return mx.array([t + [0] * (max(lengths) - len(t)) for t in token_lists]), lengths


def plain_scores(
    model: Any, table: dict[tuple[int, int], mx.array], sets: list[list[list[int]]],
    ids: list[int],
) -> list[dict[str, float]]:  # fmt: skip
    """Every score of every candidate by a full pass over all prompts of a set."""
    batches = [padded(lists) for lists in sets]

    def logits(which: int, *changes: Any) -> mx.array:
        tokens, lengths = batches[which]
        out = vauban.forward(
            model, tokens, lengths=lengths, positions=None, interventions=changes, logits="last"
        ).logits[:, 0]
        mx.eval(out)
        return out

    base = logits(1)
    return [
        {
            "position": key[0],
            "layer": key[1],
            "bypass": float(refusal_log_odds(logits(0, Ablate(v)), ids).mean()),
            "kl": float(last_token_kl(base, logits(1, Ablate(v))).mean()),
            "induce": float(refusal_log_odds(logits(1, Add(v, 1.0, key[1])), ids).mean()),
        }
        for key, v in table.items()
    ]


def clocks() -> Any:
    """Wall and CPU seconds; on a machine that others use the latter is the steadier one."""
    return np.array([time.perf_counter(), time.process_time()])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--prompts", type=int, default=8, help="of each class")
    parser.add_argument("--system", default=SYSTEM, help="system message, '' for none")
    args = parser.parse_args()
    folder = vauban.organism_path("dense")
    _, tokenizer = vauban.load(folder)
    vocabulary = int(np.ceil((max(tokenizer.get_vocab().values()) + 1) / 64) * 64)
    ids = list(vauban.refusal_token_ids(tokenizer, ["I"]))
    model, u = planted_model(args.layers, args.width, vocabulary, ids[0])
    positions = vauban.post_instruction_positions(tokenizer)[-5:]
    table = planted_candidates(positions, args.layers, u)
    sets = []
    for name in ("harmful", "harmless"):
        texts = vauban.load_prompts(folder / "prompts" / f"{name}.jsonl")[: args.prompts]
        system = [{"role": "system", "content": args.system}] if args.system else []
        sets.append([[*system, {"role": "user", "content": text}] for text in texts])
    encoded = [[vauban.encode_chat(tokenizer, chat) for chat in chats] for chats in sets]
    lengths = [len(tokens) for lists in encoded for tokens in lists]
    start = min(
        next(i for i, column in enumerate(zip(*lists, strict=False)) if len(set(column)) > 1)
        for lists in encoded
    )
    print(
        f"{len(table)} candidates, {args.layers} layers, d {args.width}; {args.prompts} + "
        f"{args.prompts} prompts of {min(lengths)} to {max(lengths)} tokens, {start} shared"
    )
    options = {"refusal_tokens": ids}
    vauban.verify_forward(model)
    plain_scores(model, dict(list(table.items())[:1]), encoded, ids)

    began = clocks()
    plain = plain_scores(model, table, encoded, ids)
    spent = {"plain": clocks() - began}
    expected = vauban.select_from_scores(plain, args.layers)
    results = {}
    # A random model refuses nothing by itself; only what the candidates do to it is planted.
    warnings.simplefilter("ignore", vauban.VaubanWarning)
    for scores in ("all", "needed"):
        began = clocks()
        results[scores] = vauban.select_direction(
            model, tokenizer, table, *sets, scores=scores, **options
        )
        spent[scores] = clocks() - began

    known = {(r["position"], r["layer"]): r for r in plain}
    for scores, result in results.items():
        worst = max(
            abs(record[name] - known[record["position"], record["layer"]][name])
            for record in result.records
            for name in ("bypass", "induce", "kl")
            if record[name] is not None
        )
        computed = sum(r[n] is not None for r in result.records for n in ("bypass", "induce", "kl"))
        same = (result.position, result.layer) == (expected.position, expected.layer)
        print(
            f'scores="{scores}": {computed} of {3 * len(table)} scores, largest difference '
            f"{worst:.1e}, {len(result.kept)} candidates pass, "
            f"{'same choice' if same else 'ANOTHER CHOICE'} (residual {result.layer}, position "
            f"{result.position})"
        )
        if worst > 1e-4 or not same:
            raise SystemExit("the two sides disagree; the times below would compare nothing")
    print("                    wall s    CPU s   ratio (wall, CPU)")
    for name, (wall, cpu) in spent.items():
        ratio = spent["plain"] / (wall, cpu)
        print(f"{name:<16} {wall:9.1f} {cpu:8.1f}   {ratio[0]:.1f}  {ratio[1]:.1f}")


if __name__ == "__main__":
    main()
