"""Shared by all tests: vauban before mlx (OpenBLAS), tiny real mlx-lm models, the organism.

The tiny models are random instances of mlx-lm's own classes with randomised norms and biases, so
that a forgotten gain or bias shows.
"""

import os

# Tests that run side by side share the cores: threads of theirs would only wait for each other.
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# isort: off
import vauban  # before mlx.core
# isort: on

import importlib
import sys
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from hypothesis import settings
from mlx.utils import tree_map

# The same examples in every run: what fails once fails again. HYPOTHESIS_PROFILE=default searches.
settings.register_profile("seeded", derandomize=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "seeded"))

# Begun first, the longest before: the processes that share the files then end together.
_LONG = (
    *("docs/test_course.py", "docs/test_pages.py", "study/test_study.py", "test_tutorial.py"),
    *("pipeline/test_run.py", "edits/test_packed_organism.py", "search/test_search.py"),
    *("cli/test_demo.py", "edits/test_exact.py", "docs/test_notebook.py", "cli/test_search.py"),
    *("cli/test_adapter.py", "export/test_stacks.py", "study/test_benchmarks.py"),
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"tests/{name}": place for place, name in enumerate(_LONG)}
    items.sort(key=lambda item: places.get(item.nodeid.split("::")[0], len(_LONG)))


_BASE = {
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-5,
    "vocab_size": 160,
    "max_position_embeddings": 512,
    "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}
TINY: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama_bias": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True}),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 32,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "norm_topk_prob": True,
        },
    ),
    "gemma": ("gemma", {"tie_word_embeddings": True}),
    "gemma2": (
        "gemma2",
        {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "query_pre_attn_scalar": 16,
        },
    ),
    "olmo2": ("olmo2", {}),
    "glm4": (
        "glm4",
        {"attention_bias": False, "partial_rotary_factor": 0.5},
    ),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.25,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
    "gemma3_text": (
        "gemma3_text",
        {"sliding_window": 8, "sliding_window_pattern": 2, "query_pre_attn_scalar": 16},
    ),
}


def build(name: str, seed: int = 0, **changes: Any) -> nn.Module:
    """A tiny random float32 model of an mlx-lm class, norms and biases randomised."""
    module, extra = TINY[name]
    code = importlib.import_module(f"mlx_lm.models.{module}")
    config = {**_BASE, **extra, **changes, "model_type": module}
    mx.random.seed(seed)
    model = code.Model(code.ModelArgs.from_dict(config))

    def shake(p: mx.array) -> mx.array:
        if not mx.issubdtype(p.dtype, mx.floating):
            return p
        noise = 0.3 * mx.random.normal(p.shape) if p.ndim == 1 else 0.0
        return (p + noise).astype(mx.float32)

    model.update(tree_map(shake, model.parameters()))
    model.eval()
    mx.eval(model.parameters())
    return model


def random_tokens(rows: int, width: int, seed: int = 1, top: int = 160) -> mx.array:
    return mx.random.randint(0, top, (rows, width), key=mx.random.key(seed))


@pytest.fixture
def tiny() -> Any:
    """A fresh tiny model by name, because tests edit them in place."""
    return build


@pytest.fixture(scope="session")
def organism() -> tuple[nn.Module, Any]:
    """The dense organism; read only."""
    return vauban.load(vauban.organism_path("dense"))


@pytest.fixture(scope="session")
def organism_prompts() -> dict[str, list[str]]:
    """The organism's own prompts: measuring sets, and held-out ones by kind."""
    folder = Path(vauban.organism_path("dense")) / "prompts"
    found = {
        name: vauban.load_prompts(folder / f"{name}.jsonl") for name in ("harmful", "harmless")
    }
    for row in vauban.load_labelled_prompts(folder / "eval.jsonl"):
        found.setdefault(f"eval-{row.extra['kind']}", []).append(row.prompt)
    return found


@pytest.fixture(scope="session")
def measured(
    organism: tuple[nn.Module, Any], organism_prompts: dict[str, list[str]]
) -> "vauban.DirectionResult":
    """The direction that the pipeline chooses on the dense organism."""
    model, tokenizer = organism
    return vauban.measure(
        model, tokenizer, organism_prompts["harmful"], organism_prompts["harmless"]
    )


@pytest.fixture(scope="session")
def environment(tmp_path_factory) -> dict[str, str]:
    """The environment of someone whose virtual environment, with vauban in it, is activated."""
    scripts = Path(sys.executable).parent
    places = [str(scripts), os.environ["PATH"]]
    if not (scripts / "vauban").exists():
        # Run from a source tree that is on the path but not installed: the same by hand.
        shim = tmp_path_factory.mktemp("bin") / "vauban"
        shim.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m vauban "$@"\n')
        shim.chmod(0o755)
        places.insert(0, str(shim.parent))
    return {**os.environ, "PATH": os.pathsep.join(places)}
