"""A configuration is a claim: what it says is what the built model does, or is named.

The independent sides are a Llama in NumPy float64 that reads `rope_parameters` as transformers
does, and transformers' own configuration classes.
"""

import json
import math
import warnings
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx_lm
import numpy as np
import pytest

import vauban
from tests.architectures import build as architectures
from tests.conftest import build, random_tokens
from tests.export.checkpoints import save_checkpoint, unit
from vauban.claims import translated, unmet_claims
from vauban.claims.translation import class_of
from vauban.errors import InputError, ModelError, VaubanWarning
from vauban.models.notes import notes

YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}
ROPES: dict[str, dict[str, Any]] = {
    "default": {"rope_type": "default", "rope_theta": 500.0},
    "linear": {"rope_type": "linear", "factor": 3.0, "rope_theta": 700.0},
    "llama3": {
        **{"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
        **{"original_max_position_embeddings": 16, "rope_theta": 700.0},
    },
    "yarn": {**YARN, "rope_theta": 700.0, "attention_factor": 1.3},
}


def edit_config(folder: Path, drop: tuple[str, ...] = (), **changes: Any) -> Path:
    file = folder / "config.json"
    config = {k: v for k, v in json.loads(file.read_text()).items() if k not in drop}
    file.write_text(json.dumps({**config, **changes}))
    return folder


def written(tmp_path: Path, name: str, parameters: dict[str, Any], **changes: Any) -> Path:
    """A tiny model as transformers 5 saves it: the rotary numbers in `rope_parameters` alone."""
    folder = save_checkpoint(tmp_path / name, name, dtype=mx.float32)
    dropped = ("rope_theta", "rope_scaling", "partial_rotary_factor", "rope_local_base_freq")
    return edit_config(folder, dropped, rope_parameters=parameters, **changes)


def frequencies(settings: dict[str, Any], dims: int) -> tuple[np.ndarray, float]:
    """Rotary frequencies of the type and the growth of queries and keys, by the papers."""
    base, factor = settings["rope_theta"], settings.get("factor", 1.0)
    plain = np.array([base ** (-2 * i / dims) for i in range(dims // 2)])
    if settings["rope_type"] == "linear":
        return plain / factor, 1.0
    if settings["rope_type"] == "llama3":
        out = []
        for f in plain:
            length = 2 * math.pi / f
            low = settings["original_max_position_embeddings"] / settings["low_freq_factor"]
            high = settings["original_max_position_embeddings"] / settings["high_freq_factor"]
            mix = (16 / length - 1.0) / (4.0 - 1.0)
            between = (1 - mix) * f / factor + mix * f
            out.append(f if length < high else f / factor if length > low else between)
        return np.array(out), 1.0
    if settings["rope_type"] == "yarn":
        turn = [dims * math.log(32 / (n * 2 * math.pi)) / (2 * math.log(base)) for n in (32, 1)]
        low, high = max(math.floor(turn[0]), 0), min(math.ceil(turn[1]), dims - 1)
        keep = 1 - np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)
        return plain * keep + plain / factor * (1 - keep), settings["attention_factor"]
    return plain, 1.0


def llama_logits(model: nn.Module, tokens: list[int], settings: dict[str, Any]) -> np.ndarray:
    """The Llama of `model`'s weights in float64, with rotary positions of its own."""
    rate, growth = frequencies(settings, 16)

    def weight(module: nn.Module) -> np.ndarray:
        return np.array(module.weight.astype(mx.float32), dtype=np.float64)

    def norm(h: np.ndarray, module: nn.Module) -> np.ndarray:
        return h / np.sqrt((h**2).mean(-1, keepdims=True) + 1e-5) * weight(module)

    def turned(x: np.ndarray) -> np.ndarray:
        angle = np.arange(len(tokens))[:, None] * rate
        a, b = x[..., :8], x[..., 8:]
        cos, sin = np.cos(angle), np.sin(angle)
        return growth * np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)

    def heads(x: np.ndarray, count: int) -> np.ndarray:
        return x.reshape(len(tokens), count, 16).transpose(1, 0, 2)

    h = weight(model.model.embed_tokens)[tokens]
    for block in model.model.layers:
        at, mlp = block.self_attn, block.mlp
        x = norm(h, block.input_layernorm)
        q = turned(heads(x @ weight(at.q_proj).T, 4))
        k = turned(heads(x @ weight(at.k_proj).T, 2)).repeat(2, axis=0)
        v = heads(x @ weight(at.v_proj).T, 2).repeat(2, axis=0)
        scores = q @ k.transpose(0, 2, 1) / 4.0
        scores = np.where(np.tri(len(tokens), dtype=bool), scores, -np.inf)
        share = np.exp(scores - scores.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        h = h + (share @ v).transpose(1, 0, 2).reshape(len(tokens), -1) @ weight(at.o_proj).T
        x = norm(h, block.post_attention_layernorm)
        gate = x @ weight(mlp.gate_proj).T
        h = h + (gate / (1 + np.exp(-gate)) * (x @ weight(mlp.up_proj).T)) @ weight(mlp.down_proj).T
    return norm(h, model.model.norm) @ weight(model.lm_head).T


@pytest.mark.parametrize("kind", ROPES)
def test_rope_parameters_are_what_the_model_runs_with(tmp_path: Path, kind: str) -> None:
    """mlx-lm reads none of them on its own, and the exported folder needs vauban no more."""
    folder = written(tmp_path, "llama", ROPES[kind])
    tokens = random_tokens(1, 40)
    model, _ = vauban.load(folder)
    logits = vauban.forward(model, tokens, positions=None).logits
    expected = llama_logits(model, tokens[0].tolist(), ROPES[kind])
    size = np.abs(expected).max()
    assert np.abs(np.array(logits[0]) - expected).max() <= 1e-4 * size
    alone, _ = mlx_lm.load(str(folder))
    assert np.abs(np.array(alone(tokens)[0]) - expected).max() > 0.05 * size

    plan = vauban.plan_cut(model, unit())
    assert plan.export(folder, tmp_path / "cut").ok
    config = json.loads((tmp_path / "cut" / "config.json").read_text())
    assert config["rope_parameters"] == ROPES[kind]
    cut, _ = mlx_lm.load(str(tmp_path / "cut"))
    reference = vauban.forward(model, tokens, positions=None, interventions=plan.virtual()).logits
    assert mx.abs(cut(tokens) - reference).max().item() <= 1e-4 * size


def test_an_adapter_is_written_and_compared_on_the_model_as_it_was_meant(tmp_path: Path) -> None:
    folder = written(tmp_path, "llama", ROPES["default"])
    model, _ = vauban.load(folder)
    plan = vauban.plan_cut(model, unit())
    plan.export(folder, tmp_path / "adapter", precision="adapter")
    assert vauban.export.logits_difference(tmp_path / "adapter", plan, folder) < 1e-2


def test_rotary_bases_by_layer_type(tmp_path: Path) -> None:
    parameters = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 5e5},
        "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    }
    kinds = ["sliding_attention", "full_attention"] * 2
    folder = written(tmp_path, "gemma3_text", parameters, layer_types=kinds)
    edit_config(folder, ("sliding_window_pattern",))
    model, _ = vauban.load(folder)
    assert notes(model).translated == (
        *("rope_local_base_freq", "rope_scaling", "rope_theta", "sliding_window_pattern"),
    )
    local, full = (block.self_attn.rope for block in model.model.layers[:2])
    assert (local.base, local.scale, full.base, full.scale) == (70.0, 1.0, 5e5, 1 / 8)


@pytest.mark.parametrize("name", ["gemma3", "mistral3", "qwen2_vl", "kimi_k25", "gpt_neox"])
def test_rope_parameters_inside_text_config_and_under_other_names(name: str) -> None:
    config = architectures.configuration(name)
    inside = config.get("text_config", config)
    for part in (config, inside):
        for field in ("rope_theta", "rope_scaling", "rotary_emb_base", "rope_local_base_freq"):
            part.pop(field, None)
    share = inside.pop("rotary_pct", None)
    inside["rope_parameters"] = {"rope_type": "default", "rope_theta": 700.0}
    if share:
        inside["rope_parameters"]["partial_rotary_factor"] = share
    told = translated(config)
    assert told and class_of(config) is not None
    config |= told
    model = architectures.build(name, config=config)
    bases = {
        float(module.base)
        for path, module in model.named_modules()
        if path.endswith(("rope", "rotary_emb")) and isinstance(module, nn.RoPE)
    }
    assert 700.0 in bases and bases <= {700.0, 10_000.0 if name == "gemma3" else 700.0}
    assert [c for c in unmet_claims(config, model) if not c.minor] == []


@pytest.mark.parametrize(
    ("name", "parameters", "changes", "words"),
    [
        ("qwen3_moe", {**YARN, "rope_theta": 700.0}, {}, ("base 700, yarn", "qwen3_moe", "factor")),
        (
            "gemma3_text",
            {"rope_type": "default", "rope_theta": 700.0},
            {"layer_types": ["full_attention", *["sliding_attention"] * 2, "full_attention"]},
            ("layer_types", "FSSF"),
        ),
    ],
)
def test_what_cannot_be_translated_is_refused(
    tmp_path: Path, name: str, parameters: dict[str, Any], changes: dict[str, Any],
    words: tuple[str, ...],
) -> None:  # fmt: skip
    folder = written(tmp_path, name, parameters, **changes)
    with pytest.raises(InputError) as error:
        vauban.load(folder)
    assert all(word in str(error.value) for word in words)


def test_an_older_field_that_the_class_passes_over_is_refused_as_well(tmp_path: Path) -> None:
    folder = edit_config(save_checkpoint(tmp_path / "moe", "qwen3_moe"), rope_scaling=YARN)
    with pytest.raises(InputError, match="yarn"):
        vauban.load(folder)
    # The user may say that it is to run as mlx-lm does.
    model, _ = vauban.load(folder, model_config={"rope_scaling": None})
    assert vauban.verify_forward(model).ok


def test_a_share_of_each_head_that_is_not_taken_up_is_refused() -> None:
    config = {
        **{"model_type": "glm", "hidden_size": 64, "num_hidden_layers": 2, "head_dim": 16},
        **{"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2},
        **{"rms_norm_eps": 1e-5, "vocab_size": 90},
        "rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5},
    }
    read = class_of(config)
    assert read is not None
    from mlx_lm.models.glm import Model

    with pytest.raises(InputError, match=r"0\.5 of each head .* turn all 16"):
        unmet_claims(config, Model(read.from_dict(config)))


@pytest.mark.parametrize(
    ("name", "field", "value", "listed", "minor"),
    [
        ("llama", "logit_scale", 0.25, True, False),
        ("llama", "logit_scale", 1.0, False, False),
        ("llama", "final_logit_softcapping", 30.0, True, False),
        ("llama", "final_logit_softcapping", None, False, False),
        ("llama", "embedding_multiplier", 12.0, True, False),
        ("llama", "query_pre_attn_scalar", 16, False, False),
        ("llama", "query_pre_attn_scalar", 9, True, False),
        ("llama", "clip_qkv", 8.0, True, False),
        ("llama", "hidden_act", "gelu", True, False),
        ("llama", "hidden_act", "silu", False, False),
        ("llama", "partial_rotary_factor", 0.5, True, False),
        ("llama", "attention_bias", False, False, False),
        ("llama", "use_bidirectional_attention", True, True, False),
        ("gemma", "hidden_act", "gelu_pytorch_tanh", True, True),
        ("gemma2", "attn_logit_softcapping", 50.0, False, False),
        ("granite", "residual_multiplier", 0.5, False, False),
        ("qwen3", "layer_norm_epsilon", 0.1, True, False),
    ],
)
def test_fields_that_are_not_taken_up_are_named_and_others_are_not(
    tmp_path: Path, name: str, field: str, value: Any, listed: bool, minor: bool
) -> None:
    folder = edit_config(save_checkpoint(tmp_path / name, name), **{field: value})
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", VaubanWarning)
        model, _ = vauban.load(folder)
    claims = [claim for claim in notes(model).claims if claim.field == field]
    assert bool(claims) == listed and all(claim.minor == minor for claim in claims)
    said = [str(w.message) for w in seen if w.category is VaubanWarning]
    assert any(field in text for text in said) == (listed and not minor)


def test_a_window_that_is_not_kept_is_named_with_the_first_longer_text(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "mistral", "llama")
    edit_config(folder, ("layer_types",), model_type="mistral", sliding_window=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error", VaubanWarning)
        model, _ = vauban.load(folder)
        vauban.forward(model, random_tokens(1, 12))
    with pytest.warns(VaubanWarning, match=r"13 tokens .* sliding_window = 12"):
        vauban.forward(model, random_tokens(1, 13))
    with warnings.catch_warnings():
        warnings.simplefilter("error", VaubanWarning)
        vauban.forward(model, random_tokens(1, 14))


def test_windows_on_other_blocks_than_the_configuration_names() -> None:
    kinds = ["full_attention", "sliding_attention", "full_attention", "full_attention"]
    model = build("llama", layer_types=kinds, sliding_window=8)
    config = {"model_type": "llama", "sliding_window": 8, "layer_types": kinds}
    assert unmet_claims(config, model) == ()
    with pytest.raises(InputError, match="block 1 full_attention"):
        unmet_claims({**config, "layer_types": kinds[::-1]}, model)


def test_a_contradiction_of_dtypes_is_listed() -> None:
    config = {"model_type": "llama", "torch_dtype": "float16", "dtype": "bfloat16"}
    (claim,) = unmet_claims(config, build("llama"))
    assert claim.field == "dtype" and claim.minor and "float16" in str(claim)
    assert unmet_claims({**config, "dtype": "float16"}, build("llama")) == ()


def test_weights_that_do_not_fit_name_the_flag(tmp_path: Path) -> None:
    folder = edit_config(save_checkpoint(tmp_path / "q", "qwen3"), attention_bias=True)
    weights = dict(mx.load(str(folder / "model.safetensors")))
    weights["model.layers.0.self_attn.q_proj.bias"] = mx.zeros((64,))
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    with pytest.raises(ModelError, match="attention_bias = True, which mlx-lm's qwen3 does not"):
        vauban.load(folder)


# Configuration classes of transformers whose defaults, made small, are normal models.
NORMAL = (
    *("Llama", "Qwen2", "Qwen3", "Qwen3Moe", "Mistral", "Mixtral", "Gemma", "Gemma2", "Gemma3Text"),
    *("Phi", "Phi3", "Granite", "Olmo2", "Olmo3", "Cohere", "Cohere2", "StableLm", "GPTNeoX"),
    *("Starcoder2", "Glm4", "Helium", "SmolLM3", "SeedOss", "Nemotron", "Exaone4", "Olmoe"),
)
SMALL = {
    **{"hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "vocab_size": 96},
    **{"num_key_value_heads": 4, "head_dim": 16, "pad_token_id": None},
}


@pytest.mark.parametrize("name", NORMAL)
def test_a_normal_configuration_gives_no_warning(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    given = {k: v for k, v in SMALL.items() if name != "Gemma3Text" or k != "num_hidden_layers"}
    config = getattr(transformers, f"{name}Config")(**given, intermediate_size=256).to_dict()
    if name in ("Gemma2", "Gemma3Text"):
        config["query_pre_attn_scalar"] = 16
    config = json.loads(json.dumps(config))
    config |= translated(config)
    read = class_of(config)
    assert read is not None
    import importlib

    model = importlib.import_module(read.__module__).Model(read.from_dict(config))
    claims = [claim for claim in unmet_claims(config, model) if not claim.minor]
    assert [claim for claim in claims if claim.beyond is None] == []
    # A window that mlx-lm's class does not keep is named, and warned of where a text is longer.
    assert {c.field for c in claims} <= {"sliding_window"}
