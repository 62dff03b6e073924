"""Logits of tiny models saved by transformers: vauban's are the same, or it says why not.

Live, where torch is installed. Settings are such that a field that is passed over shows: bases far
from the defaults, windows shorter than the prompt, caps that bite, biases and multipliers.
"""

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

import vauban
from vauban.errors import VaubanWarning

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

COMMON = {
    **{"vocab_size": 96, "hidden_size": 64, "intermediate_size": 48, "num_hidden_layers": 4},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
    **{"max_position_embeddings": 128, "rms_norm_eps": 1e-5, "tie_word_embeddings": False},
    **{"attention_dropout": 0.0, "pad_token_id": None, "bos_token_id": 1, "eos_token_id": 2},
}


def rope(**settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": 700.0, **settings}}


HALF = rope(partial_rotary_factor=0.5)
YARN = rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16)
LLAMA3 = rope(
    rope_type="llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
LONG = rope(
    rope_type="longrope", factor=4.0, original_max_position_embeddings=64,
    short_factor=[1.0] * 8, long_factor=[1.0 + 0.2 * i for i in range(8)],
)  # fmt: skip
TIED, WINDOW = {"tie_word_embeddings": True}, {"sliding_window": 8}
EVERY_SECOND = {"layer_types": ["sliding_attention", "full_attention"] * 2, **WINDOW}
EVERY_FOURTH = {"layer_types": ["sliding_attention"] * 3 + ["full_attention"], **WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
FEW = {"num_local_experts": 4, "num_experts_per_tok": 2}
MULTIPLIERS = {
    **{"embedding_multiplier": 2.0, "attention_multiplier": 0.3, "residual_multiplier": 0.5},
    "logits_scaling": 3.0,
}
BY_TYPE = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "factor": 3.0, "rope_theta": 5000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    }
}
CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0, "query_pre_attn_scalar": 9}

EQUAL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {**rope(), "attention_bias": True, "mlp_bias": True}),
    "llama linear": ("Llama", rope(rope_type="linear", factor=3.0)),
    "llama dynamic": ("Llama", rope(rope_type="dynamic", factor=2.0)),
    "llama3": ("Llama", {**LLAMA3, **TIED}),
    "llama yarn": (
        "Llama",
        rope(
            rope_type="yarn", factor=4.0, original_max_position_embeddings=16,
            attention_factor=1.7, beta_fast=16.0, beta_slow=2.0,
        ),
    ),
    "mistral": ("Mistral", {**rope(), "sliding_window": None}),
    "mixtral": ("Mixtral", {**rope(), **FEW, "sliding_window": None}),
    "qwen2": ("Qwen2", YARN),
    "qwen2_moe": ("Qwen2Moe", {**rope(), **EXPERTS, "shared_expert_intermediate_size": 40}),
    "qwen3": ("Qwen3", YARN),
    "qwen3_moe": ("Qwen3Moe", {**rope(), **EXPERTS}),
    "gemma2": ("Gemma2", {**rope(), **CAPS, **TIED, "sliding_window": 64}),
    "gemma3_text": (
        "Gemma3Text", {**BY_TYPE, **EVERY_SECOND, **TIED, "query_pre_attn_scalar": 9}
    ),
    "phi": ("Phi", HALF),
    "phi3": ("Phi3", {**HALF, "sliding_window": None}),
    "granite": ("Granite", {**YARN, **MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granitemoe": ("GraniteMoe", {**rope(), **MULTIPLIERS, **FEW}),
    "olmo2": ("Olmo2", YARN),
    "olmo3": ("Olmo3", {**rope(), **EVERY_SECOND}),
    "olmoe": ("Olmoe", {**rope(), "num_experts": 4, "num_experts_per_tok": 2}),
    "cohere": ("Cohere", {**rope(), **TIED, "logit_scale": 0.3, "use_qk_norm": True}),
    "cohere2": ("Cohere2", {**rope(), **TIED, **EVERY_SECOND, "logit_scale": 0.3}),
    "stablelm": ("StableLm", {**HALF, "use_qkv_bias": True, "use_parallel_residual": True}),
    "glm4": ("Glm4", HALF),
    "helium": ("Helium", rope()),
    "smollm3": ("SmolLM3", {**rope(), "no_rope_layers": [1, 0, 1, 1]}),
    "exaone4": ("Exaone4", {**LLAMA3, **EVERY_FOURTH}),
    "seed_oss": ("SeedOss", {**rope(), "attention_bias": True}),
    "nemotron": ("Nemotron", HALF),
    "ernie4_5": ("Ernie4_5", {**rope(), "use_bias": True}),
    "hunyuan_v1_dense": ("HunYuanDenseV1", rope()),
}  # fmt: skip
# The class computes the other form of GELU: named by the doctor, a thousandth apart at most.
NEARLY = {
    "gemma": ("Gemma", {**rope(), **TIED}),
    "starcoder2": ("Starcoder2", {**rope(), "sliding_window": None}),
    "gpt_neox": ("GPTNeoX", {**HALF, "intermediate_size": 256}),
}
# What mlx-lm's class cannot do: the word that the warning or the refusal has.
NAMED: dict[str, tuple[str, dict[str, Any], str]] = {
    "activation": ("Llama", {**rope(), "hidden_act": "gelu"}, "hidden_act"),
    "truncate": (
        "Llama",
        rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
        "truncate",
    ),
    "short factors": ("Phi3", {**LONG, "original_max_position_embeddings": 64}, "short_factor"),
    "mistral window": ("Mistral", {**rope(), **WINDOW}, "sliding_window"),
    "mixtral window": ("Mixtral", {**rope(), **FEW, **WINDOW}, "sliding_window"),
    "mixtral yarn": ("Mixtral", {**YARN, **FEW, "sliding_window": None}, "yarn"),
    "qwen2 window": (
        "Qwen2",
        {**rope(), "use_sliding_window": True, "max_window_layers": 2, **WINDOW},
        "sliding_window",
    ),
    "qwen3 window": (
        "Qwen3",
        {**rope(), "use_sliding_window": True, "max_window_layers": 2, **WINDOW},
        "sliding_window",
    ),
    "qwen3 bias": ("Qwen3", {**rope(), "attention_bias": True}, "attention_bias"),
    "qwen3_moe yarn": ("Qwen3Moe", {**YARN, **EXPERTS}, "yarn"),
    "qwen2_moe shares": (
        "Qwen2Moe",
        {**rope(), **EXPERTS, "shared_expert_intermediate_size": 40, "norm_topk_prob": True},
        "norm_topk_prob",
    ),
    "gemma2 window": ("Gemma2", {**rope(), **CAPS, **TIED, **WINDOW}, "sliding_window"),
    "gemma3 cap": (
        "Gemma3Text",
        {**EVERY_SECOND, **TIED, "final_logit_softcapping": 2.0},
        "final_logit_softcapping",
    ),
    "gemma3 order": (
        "Gemma3Text",
        {**TIED, **WINDOW, "layer_types": EVERY_FOURTH["layer_types"][::-1]},
        "layer_types",
    ),
    "phi3 window": ("Phi3", {**rope(), **WINDOW}, "sliding_window"),
    "starcoder2 window": ("Starcoder2", {**rope(), **WINDOW}, "sliding_window"),
    "starcoder2 bias": (
        "Starcoder2", {**rope(), "use_bias": False, "sliding_window": None}, "use_bias"
    ),
    "olmoe clip": (
        "Olmoe",
        {**rope(), "num_experts": 4, "num_experts_per_tok": 2, "clip_qkv": 0.5},
        "clip_qkv",
    ),
    "glm": ("Glm", HALF, "partial_rotary_factor"),
    "cohere head": ("Cohere", {**rope(), "logit_scale": 0.3}, "lm_head"),
}  # fmt: skip


def saved(folder: Path, family: str, settings: dict[str, Any]) -> tuple[mx.array, np.ndarray]:
    """A random model in a folder as transformers writes it; tokens and transformers' logits."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{family}Config")(
        **{**COMMON, **json.loads(json.dumps(settings))}
    )
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    model = model.float().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += (0.3 if parameter.ndim == 1 else 0.15) * torch.randn_like(parameter)
    model.save_pretrained(folder)
    for file in vauban.organism_path("dense").glob("tokenizer*"):
        shutil.copy(file, folder)
    tokens = (torch.arange(40)[None] * 37 + 5) % 90 + 3
    return mx.array(tokens.numpy().astype(np.int32)), transformers_logits(model, tokens)


def transformers_logits(model: Any, tokens: Any) -> np.ndarray:
    with torch.no_grad():
        return model(tokens).logits[0].numpy()


def apart(logits: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.array(logits[0]) - expected).max() / np.abs(expected).max())


@pytest.mark.parametrize("name", EQUAL)
def test_the_logits_are_those_of_transformers(tmp_path: Path, name: str) -> None:
    family, settings = EQUAL[name]
    tokens, expected = saved(tmp_path, family, settings)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VaubanWarning)
        model, _ = vauban.load(tmp_path)
        logits = vauban.forward(model, tokens, positions=None).logits
    assert apart(logits, expected) <= 1e-4


@pytest.mark.parametrize("name", NEARLY)
def test_another_form_of_gelu_is_a_thousandth(tmp_path: Path, name: str) -> None:
    family, settings = NEARLY[name]
    tokens, expected = saved(tmp_path, family, settings)
    model, _ = vauban.load(tmp_path)
    (claim,) = vauban.claims.unmet_claims(json.loads((tmp_path / "config.json").read_text()), model)
    assert claim.field == "hidden_act" and claim.minor
    assert apart(vauban.forward(model, tokens, positions=None).logits, expected) <= 1e-3


@pytest.mark.parametrize("name", NAMED)
def test_what_mlx_lm_cannot_do_is_named(tmp_path: Path, name: str) -> None:
    family, settings, word = NAMED[name]
    tokens, expected = saved(tmp_path, family, settings)
    said: list[str] = []
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", VaubanWarning)
        try:
            model, _ = vauban.load(tmp_path)
            assert apart(vauban.forward(model, tokens, positions=None).logits, expected) > 1e-3
        except vauban.InputError as error:
            said.append(str(error))
    said += [str(w.message) for w in seen if w.category is VaubanWarning]
    assert any(word in text for text in said)


@pytest.mark.parametrize(
    "name", ["llama yarn", "gemma3_text", "cohere2", "exaone4", "stablelm", "qwen3_moe", "granite"]
)
def test_a_written_folder_opens_alike_in_transformers_and_in_mlx_lm(
    tmp_path: Path, name: str
) -> None:
    """An edit of nothing: the fields written beside the source's change no number in either."""
    family, settings = EQUAL[name]
    tokens, expected = saved(tmp_path / "source", family, settings)
    model, _ = vauban.load(tmp_path / "source")
    weights = vauban._arrays.flat_parameters(model)
    vauban.export_model(tmp_path / "source", weights, tmp_path / "written")
    alone, _ = mlx_lm.load(str(tmp_path / "written"))
    assert apart(alone(tokens), expected) <= 1e-4
    if name == "qwen3_moe":
        # Experts are written as mlx-lm stacks them, which transformers does not read.
        return
    reader = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "written", attn_implementation="eager"
    )
    again = transformers_logits(reader.eval(), torch.tensor(np.array(tokens)).long())
    assert np.abs(again - expected).max() <= 1e-4 * np.abs(expected).max()
