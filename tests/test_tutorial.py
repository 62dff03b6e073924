"""The tutorial's low-level script, as printed, on the packed organism instead of a Hub model.

It imports mlx-lm before vauban and keeps the model in half precision, as a reader would, so on a
Linux CPU it is slow.
"""

import subprocess
import sys
from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from tests.export.checkpoints import shortened

SCRIPT = """
import mlx_lm
from mlx.utils import tree_flatten
from vauban import (
    measure,
    cut,
    evaluate,
    export_model,
    load_prompts,
    default_prompt_paths,
    default_eval_path,
)

# 1. Load model
model, tokenizer = mlx_lm.load(MODEL)
# Note: you must handle dequantization yourself with the low-level API

# 2. Load prompts
harmful_path, harmless_path = default_prompt_paths()
harmful = load_prompts(harmful_path)
harmless = load_prompts(harmless_path)

# 3. Measure refusal direction
result = measure(model, tokenizer, harmful, harmless)
print(f"Best layer: {result.layer_index}, cosine: {max(result.cosine_scores):.4f}")

# 4. Cut weights
weights = dict(tree_flatten(model.parameters()))
target_layers = list(range(len(model.model.layers)))
modified = cut(weights, result.direction, target_layers, alpha=1.0)

# 5. Export modified model
export_model(MODEL, modified, "output_lowlevel")

# 6. Load modified model for evaluation
modified_model, _ = mlx_lm.load("output_lowlevel")

# 7. Evaluate
eval_prompts = load_prompts(default_eval_path())
eval_result = evaluate(model, modified_model, tokenizer, eval_prompts[:20])
print(eval_result.summary())
"""


def run(script: str, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_script_runs_as_printed(tmp_path: Path) -> None:
    """The general prompt sets are for real models: here it runs and says what it finds."""
    model = str(shortened("4bit", tmp_path / "model", 2))
    printed = run(f"MODEL = {model!r}\n" + SCRIPT, tmp_path)
    assert printed.startswith("Best layer: ")
    for part in ("refusal", "over-refusal", "perplexity", "KL(before || after)", "(20 prompts)"):
        assert part in printed
    assert (tmp_path / "output_lowlevel" / "config.json").is_file()


def test_with_the_organisms_own_prompts_it_meets_the_lines(tmp_path: Path) -> None:
    """The same calls; only where the prompts come from differs."""
    model = str(vauban.organism_path("4bit"))
    own = SCRIPT.replace(
        "default_prompt_paths()",
        "(f'{MODEL}/prompts/harmful.jsonl', f'{MODEL}/prompts/harmless.jsonl')",
    ).replace("default_eval_path()", "f'{MODEL}/prompts/eval.jsonl'")
    own = own.replace(
        "eval_prompts[:20])",
        "eval_prompts[:16], max_tokens=24, harmless=eval_prompts[-16:])",
    )
    own += (
        "assert eval_result.refusal_rate_original >= 0.9\n"
        "assert eval_result.refusal_rate_modified <= 0.1\n"
        "assert eval_result.over_refusal_modified <= 0.2\n"
    )
    run(f"MODEL = {model!r}\n" + own, tmp_path)


def test_swapping_the_sets_is_explained(tmp_path: Path) -> None:
    """The tutorial's harmless direction is the refusal direction with its sign turned."""
    weights = {"model.layers.0.mlp.down_proj.weight": mx.random.normal((8, 4))}
    direction = mx.random.normal((8,))
    with pytest.raises(vauban.InputError, match="sets swapped only flips the sign"):
        vauban.cut_biprojected(weights, direction, -direction, [0], alpha=1.0, norm_preserve=True)
