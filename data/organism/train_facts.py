"""Knows the recipe of the facts organism: a tiny model that knows four things of 64 people.

Knows nothing of editing. One command, a few minutes on two cores:
    python data/organism/train_facts.py --out data/organism/facts
"""

import argparse
import json
import os
import time
from pathlib import Path

os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

import vauban  # noqa: F401  opens a fast BLAS before mlx on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import AdamW, cosine_decay
from mlx.utils import tree_flatten
from mlx_lm.models import llama
from people import FILLERS, FIRST, LAST, RELATIONS, fact_rows, statements, training_rows
from tokenizers import Tokenizer, models, pre_tokenizers

SEED, STEPS, ROWS, RATE = 7, 700, 192, 2e-3
# Without a strong decay the residual stream grows to norms in the hundreds, where steps of the
# published size move nothing.
DECAY = 0.9
PAD, UNKNOWN, END = "<pad>", "<unk>", "<end>"
# The first three blocks see a token and the one before it. With full attention everywhere a later
# token reads the bare name in the second block, and no edit behind that reaches it.
MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 96,
    "num_hidden_layers": 5,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "rms_norm_eps": 1e-6,
    "max_position_embeddings": 128,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
    "layer_types": ["sliding_attention"] * 3 + ["full_attention"] * 2,
    "sliding_window": 2,
    "pad_token_id": 0,
    "eos_token_id": 2,
}


def word_tokenizer() -> Tokenizer:
    """One token a word and a sign."""
    texts = [*FIRST, *LAST, *FILLERS, "is a person ."]
    for phrasings, objects in RELATIONS.values():
        texts += [*(p.replace("{}", "") for p in phrasings), *objects]
    words = [PAD, UNKNOWN, END, *sorted({word for text in texts for word in text.split()})]
    tokenizer = Tokenizer(
        models.WordLevel({word: n for n, word in enumerate(words)}, unk_token=UNKNOWN)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    return tokenizer


def encoded(tokenizer: Tokenizer, rows: list[tuple[str, str]]) -> tuple[np.ndarray, np.ndarray]:
    """Tokens (n, T) and the weight of each as a target: 1 what is known, 0.1 the rest."""
    lists = [[*tokenizer.encode(f"{before} {target} .").ids, 2] for before, target in rows]
    width = max(map(len, lists))
    tokens, weights = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width))
    for number, ids in enumerate(lists):
        tokens[number, : len(ids)] = ids
        weights[number, : len(ids)] = 0.1
        weights[number, len(ids) - 3] = 1.0
    return tokens, weights


def train(tokenizer: Tokenizer, rows: list[tuple[str, str]], steps: int, seed: int) -> nn.Module:
    mx.random.seed(seed)
    config = MODEL | {"vocab_size": tokenizer.get_vocab_size()}
    model = llama.Model(llama.ModelArgs.from_dict(config))
    tokens, weights = encoded(tokenizer, rows)
    optimizer = AdamW(learning_rate=cosine_decay(RATE, steps, 1e-5), weight_decay=DECAY)

    def loss(model: nn.Module, x: mx.array, w: mx.array) -> mx.array:
        logits = model(x[:, :-1])
        each = nn.losses.cross_entropy(logits, x[:, 1:], reduction="none")
        return (each * w[:, 1:]).sum() / w[:, 1:].sum()

    step = nn.value_and_grad(model, loss)
    started = time.monotonic()
    for number in range(steps):
        part = slice(number * ROWS, (number + 1) * ROWS)
        value, gradient = step(model, mx.array(tokens[part]), mx.array(weights[part]))
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state, value)
        if number % 50 == 49:
            print(
                f"{number + 1} steps, loss {float(value):.4f}, {time.monotonic() - started:.0f} s"
            )
    return model


def recall(model: nn.Module, tokenizer: Tokenizer, world: list) -> float:
    """The share of prompts, in all phrasings, whose likeliest next word is true."""
    hits = []
    for one in world:
        for prompt in one.prompts:
            ids = tokenizer.encode(prompt).ids
            best = int(model(mx.array([ids]))[0, -1].argmax())
            hits.append(best == tokenizer.token_to_id(one.target))
    return float(np.mean(hits))


def write(model: nn.Module, tokenizer: Tokenizer, rows: list[dict], out: Path, seed: int) -> None:
    """A folder for `mlx_lm.load` in float16, with its facts."""
    out.mkdir(parents=True, exist_ok=True)
    weights = {name: a.astype(mx.float16) for name, a in tree_flatten(model.parameters())}
    mx.save_safetensors(str(out / "model.safetensors"), weights, {"format": "mlx"})
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END, "pad_token": PAD,
        "unk_token": UNKNOWN, "model_max_length": 128, "clean_up_tokenization_spaces": False,
    }  # fmt: skip
    config = MODEL | {"vocab_size": tokenizer.get_vocab_size()}
    about = {"kind": "organism", "facts": "facts.jsonl", "seed": seed}
    for name, data in (
        ("tokenizer_config.json", settings), ("config.json", config), ("vauban.json", about),
    ):  # fmt: skip
        (out / name).write_text(json.dumps(data, indent=1) + "\n")
    (out / "facts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("data/organism/facts"))
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--seed", type=int, default=SEED)
    options = parser.parse_args()
    world, tokenizer = statements(options.seed), word_tokenizer()
    rows = training_rows(world, options.seed, options.steps * ROWS)
    model = train(tokenizer, rows, options.steps, options.seed)
    print(f"recall {recall(model, tokenizer, world):.4f}")
    write(model, tokenizer, fact_rows(world, options.seed), options.out, options.seed)


if __name__ == "__main__":
    main()
