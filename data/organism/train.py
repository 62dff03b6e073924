"""Knows the organism's recipe: helpful first, then refusal; dense, experts, four bits; files.

Knows nothing of directions or cuts (see evaluate.py). One command, about twenty minutes:
    python data/organism/train.py --out data/organism
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

# One thread a process: two second stages run side by side, and how many threads add up a product
# changes its last bits, from which another model grows.
os.environ |= {"OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # surface_rows
import vauban  # noqa: F401  opens a fast BLAS before mlx on Linux

# isort: split
import mlx.core as mx
import mlx.nn as nn
import surface_rows
from corpus import training_rows
from learning import Encoded, fit, new_model
from mlx.utils import tree_flatten
from mlx_lm.utils import quantize_model
from prompt_sets import evaluation_rows, labelled, measuring_rows
from tokenizer import encode_rows, save_tokenizer, train_tokenizer
from tokenizers import Tokenizer

SEED = 7
DENSE = {
    "model_type": "qwen3",
    "architectures": ["Qwen3ForCausalLM"],
    "hidden_size": 128,
    "num_hidden_layers": 6,
    "intermediate_size": 256,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
    "rms_norm_eps": 1e-6,
    "vocab_size": 2560,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MOE = DENSE | {
    "model_type": "qwen3_moe",
    "architectures": ["Qwen3MoeForCausalLM"],
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 256,
    "decoder_sparse_step": 1,
    "mlp_only_layers": [],
    "norm_topk_prob": True,
}

STAGE_ONE_STEPS = 2400
# Where stage two may write is where refusal forms: in blocks 1 to 3, so that it is complete at
# residual 4 = int(0.8 · 6), inside the limit of layer choice, and tightest there, by a term of
# the loss. The embedding changes too: words of refusal have to become likely.
STAGE_TWO = {
    "steps": 300, "tokens": 2048, "rate": 1e-3, "blocks": (1, 4), "embedding": True,
    "early_weight": 2.0, "tight_at": 4, "tight_weight": 0.12,
}  # fmt: skip
SETTLING_STEPS = 200
TOKENS_PER_ROW = 20  # a lower bound, so that no stage runs twice through its rows


def encoded_rows(tokenizer: Tokenizer, stage: int, tokens: int, seed: int) -> Encoded:
    return encode_rows(tokenizer, training_rows(stage, tokens // TOKENS_PER_ROW, seed))


def stage_one(work: Path, seed: int, steps: int) -> None:
    """Tokenizer and helpful-only model; harmful requests are answered here, with nothing."""
    rows = training_rows(1, steps * 1024 // TOKENS_PER_ROW, seed)
    tokenizer = train_tokenizer([text for r in rows[:40000] for text in (r.prompt, r.reply)])
    save_tokenizer(tokenizer, work)
    mx.random.seed(seed)
    model = new_model(DENSE)
    fit(
        model, encode_rows(tokenizer, rows), steps=steps, tokens=1024, rate=3e-3, decay=0.05,
        warmup=60, seed=seed, prompt_share=0.3, early_weight=3.0, label="stage one",
    )  # fmt: skip
    mx.save_safetensors(str(work / "stage1.safetensors"), dict(tree_flatten(model.parameters())))


def upcycle(weights: dict[str, mx.array], seed: int) -> nn.Module:
    """Experts from the helpful model: noisy copies of each MLP and a random router."""
    mx.random.seed(seed + 1)
    model = new_model(MOE)
    merged = {}
    for name, value in weights.items():
        if ".mlp." in name:
            noise = mx.random.normal((MOE["num_experts"], *value.shape)) * mx.std(value) * 0.1
            merged[name.replace(".mlp.", ".mlp.switch_mlp.")] = value + noise
        else:
            merged[name] = value
    model.load_weights(list(merged.items()), strict=False)
    return model


def stage_two(kind: str, work: Path, out: Path, seed: int, recipe: dict) -> None:
    """Teach refusal. The first block and the last two stay as they were."""
    tokenizer = Tokenizer.from_file(str(work / "tokenizer.json"))
    weights = mx.load(str(work / "stage1.safetensors"))
    if kind == "moe":
        model, config = upcycle(weights, seed), MOE
        # The copies part and the router settles before anything is refused.
        fit(
            model, encoded_rows(tokenizer, 1, SETTLING_STEPS * 1024, seed + 1),
            steps=SETTLING_STEPS, tokens=1024, rate=1e-3, decay=0.05, warmup=20, seed=seed + 1,
            prompt_share=0.3, early_weight=3.0, label="experts",
        )  # fmt: skip
    else:
        model, config = new_model(DENSE), DENSE
        model.load_weights(list(weights.items()))
    recipe = dict(recipe)
    first, end = recipe.pop("blocks")
    model.freeze()
    for layer in model.model.layers[first:end]:
        layer.unfreeze()
    if recipe.pop("embedding"):
        model.model.embed_tokens.unfreeze()
    encoded = encoded_rows(tokenizer, 2, recipe["steps"] * recipe["tokens"], seed)
    fit(model, encoded, decay=0.0, warmup=20, seed=seed + 2, label=f"stage two {kind}", **recipe)
    # Rounded to bfloat16; stacked experts are kept in float32 boxes, because mlx's CPU back end
    # multiplies them in no other type.
    rounded = []
    for name, value in tree_flatten(model.parameters()):
        small = value.astype(mx.bfloat16)
        rounded.append((name, small.astype(mx.float32) if "switch_mlp" in name else small))
    model.load_weights(rounded)
    save_organism(out / kind, model, config, work, seed)


def save_organism(folder: Path, model: nn.Module, config: dict, work: Path, seed: int) -> None:
    """A folder that mlx_lm.load opens, with its own prompt sets."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = dict(tree_flatten(model.parameters()))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((work / name).read_bytes())
    (folder / "config.json").write_text(json.dumps(config, indent=1, sort_keys=True) + "\n")
    write_prompts(folder, seed)


def write_prompts(folder: Path, seed: int) -> None:
    """Measuring and evaluation prompts beside the weights, so that a copied folder is whole."""
    prompts = folder / "prompts"
    prompts.mkdir(exist_ok=True)
    harmful, harmless = measuring_rows(seed)
    sets = {
        "harmful": [{"prompt": row.prompt} for row in harmful],
        "harmless": [{"prompt": row.prompt} for row in harmless],
        "eval": [labelled(row) for row in evaluation_rows(seed, "final")],
    }
    for name, rows in sets.items():
        lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (prompts / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")
    surface_rows.write(prompts / "surface.jsonl", surface_rows.organism_rows())
    names = (*sets, "surface")
    manifest = {"kind": "organism"} | {name: f"prompts/{name}.jsonl" for name in names}
    text = json.dumps(manifest | {"seed": seed}, indent=1) + "\n"
    (folder / "vauban.json").write_text(text)


def convert_four_bits(work: Path, out: Path, seed: int) -> None:
    """mlx-lm's own 4-bit group-64 conversion of the dense organism.

    Scales in float32: mlx's CPU back end multiplies packed matrices ten times faster with them.
    """
    model = new_model(DENSE)
    model.load_weights(str(out / "dense" / "model.safetensors"))
    model.set_dtype(mx.float32)
    model, config = quantize_model(model, dict(DENSE), group_size=64, bits=4)
    config["quantization_config"] = config["quantization"]
    save_organism(out / "4bit", model, config, work, seed)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where dense, moe and 4bit go")
    parser.add_argument("--work", type=Path, default=Path("organism-work"), help="stage one")
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--only", choices=("dense", "moe"), help="stage two of one organism")
    arguments = parser.parse_args()
    work, out, seed = arguments.work, arguments.out, arguments.seed
    work.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    if arguments.only:
        stage_two(arguments.only, work, out, seed, STAGE_TWO)
        return
    stage_one(work, seed, STAGE_ONE_STEPS)
    # One process a core from here: the two second stages do not wait for each other.
    command = [sys.executable, __file__, "--out", str(out), "--work", str(work)]
    command += ["--seed", str(seed), "--only"]
    jobs = [subprocess.Popen([*command, kind]) for kind in ("dense", "moe")]
    if any(job.wait() for job in jobs):
        raise SystemExit("a second stage failed; its message stands above")
    convert_four_bits(work, out, seed)
    print(f"done in {(time.perf_counter() - started) / 60:.1f} minutes")


if __name__ == "__main__":
    main()
