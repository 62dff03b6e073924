"""Write the fixtures of `test_transformers.py`: hidden states of tiny models in transformers.

Needs torch and transformers, which the project does not depend on:

    pip install torch transformers safetensors
    python -m tests.architectures.make_hf_fixtures

For each family one safetensors file holds the random float32 weights under transformers' own
names, the tokens, every hidden state and the logits; its metadata holds the configuration. Knows
nothing of vauban and nothing of MLX, so that the comparison has two independent sides.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).with_name("fixtures")
WIDTH = 21

_COMMON = {
    "vocab_size": 96,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "attention_dropout": 0.0,
}

# (class of the model, class of its configuration, what differs from the common sizes)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", "LlamaConfig", {}),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", {}),
    "gemma3_text": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {
            # mlx-lm rounds the embedding's scale, sqrt(hidden_size), to bfloat16: 8 is exact.
            "hidden_size": 64,
            # Shorter than the prompt, so that a window that is missed shows.
            "sliding_window": 8,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window_pattern": 3,
            "query_pre_attn_scalar": 8,
            "tie_word_embeddings": True,
        },
    ),
    "mixtral": (
        "MixtralForCausalLM",
        "MixtralConfig",
        {"num_local_experts": 4, "num_experts_per_tok": 2},
    ),
}


def transformers_model(name: str, seed: int = 0) -> Any:
    """A random float32 model of transformers, with randomised norms and biases."""
    import torch
    import transformers

    model_class, config_class, more = FAMILIES[name]
    torch.manual_seed(seed)
    config = getattr(transformers, config_class)(**{**_COMMON, **more})
    config._attn_implementation = "eager"
    model = getattr(transformers, model_class)(config).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            scale = 0.3 if parameter.ndim == 1 else 0.15
            parameter += scale * torch.randn_like(parameter)
    return model


def hidden_states(model: Any, tokens: Any) -> tuple[Any, Any]:
    """(L + 1, T, d) inputs of all blocks and output of the last, before the norm; logits (T, V)."""
    import torch

    seen: list[Any] = []
    hooks = [
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]),
            with_kwargs=True,
        )
        for layer in model.model.layers
    ]
    # What transformers returns as the last hidden state is normed already.
    hooks.append(model.model.norm.register_forward_pre_hook(lambda _, args: seen.append(args[0])))
    with torch.no_grad():
        logits = model(tokens).logits[0]
    for hook in hooks:
        hook.remove()
    return torch.stack([h[0] for h in seen]), logits


def stored_weights(model: Any) -> dict[str, Any]:
    """The weights under the names of a published checkpoint, as `save_pretrained` writes them."""
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return load_file(Path(folder) / "model.safetensors")


def main() -> None:
    """Write every fixture and say how large it is."""
    import torch
    import transformers
    from safetensors.torch import save_file

    FOLDER.mkdir(exist_ok=True)
    for name in FAMILIES:
        model = transformers_model(name)
        tokens = (torch.arange(WIDTH)[None] * 37 + 5) % _COMMON["vocab_size"]
        hidden, logits = hidden_states(model, tokens)
        arrays = {f"weights.{key}": value for key, value in stored_weights(model).items()}
        arrays |= {"tokens": tokens.int(), "hidden": hidden, "logits": logits}
        config = model.config.to_dict()
        config["model_type"] = name
        facts = {"config": json.dumps(config), "transformers": transformers.__version__}
        path = FOLDER / f"{name}.safetensors"
        save_file({k: v.clone() for k, v in arrays.items()}, path, facts)
        print(f"{path.name}: {path.stat().st_size / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
