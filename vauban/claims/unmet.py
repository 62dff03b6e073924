"""What a configuration says and the built model does not do.

mlx-lm passes over fields that its classes do not name. A rotary base, type or share that was not
taken up is refused here; other fields that change what the model computes are listed. Knows built
models and the text of their classes; runs no prompt.
"""

from __future__ import annotations

import inspect
import re
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from vauban.claims.rope_check import rope_departures
from vauban.claims.translation import class_of, head_size
from vauban.claims.window import missed_window
from vauban.errors import VaubanWarning, shown

_NEUTRAL: tuple[Any, ...] = (None, False, 0, 1)
# Numbers that scale, cap or clip something, by how such fields are named.
_SCALES = re.compile(
    r"(_multiplier|_scaling|_scaling_factor|_softcapping|_softcap|_scale|_scalar|^clip_qkv|"
    r"^qkv_clip|^scale_emb|^scale_depth|^dim_model_base|^swiglu_limit)$"
)
_NO_SCALES = ("rope_scaling", "initializer_scale")
# Other fields that change the result without a tensor of their own, and the values that do not.
_SWITCHES: dict[str, tuple[Any, ...]] = {
    "norm_topk_prob": (None, False),
    "scale_attn_by_inverse_layer_idx": (None, False),
    "use_bidirectional_attention": (None, False),
    "alibi": (None, False),
    "use_qk_norm": (None, False),
    "n_group": (None, 0, 1),
    "position_embedding_type": (None, "absolute", "learned_absolute", "rope", "rotary"),
    "attention_chunk_size": (None, 0),
}
_EPSILONS = (
    *("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_eps", "norm_epsilon"),
    "layernorm_epsilon",
)
_ACTIVATIONS = ("hidden_activation", "hidden_act", "activation_function")
# What the text of a class holds where it computes an activation.
_WRITTEN = {
    "silu": r"silu|swish|swiglu|switchglu",
    "gelu": r"nn\.gelu\b|nn\.GELU\(\)",
    "gelu_tanh": r"gelu_approx|gelu_fast|nn\.GELU\(.*(tanh|precise|fast)",
    "relu2": r"relu2|relu_squared|reglu2",
    "relu": r"\brelu\b",
}
_SAME = {
    **dict.fromkeys(("silu", "swish"), "silu"),
    **dict.fromkeys(("gelu", "gelu_python", "gelu_10"), "gelu"),
    **dict.fromkeys(
        ("gelu_pytorch_tanh", "gelu_new", "gelu_fast", "gelu_python_tanh", "gelu_accurate"),
        "gelu_tanh",
    ),
    **dict.fromkeys(("relu2", "relu_squared"), "relu2"),
    "relu": "relu",
}


@dataclass(frozen=True)
class Claim:
    """A field of config.json that the model class does not take up.

    beyond  it matters only for texts of more tokens than this
    minor   it changes the logits by a thousandth or so: listed, not warned of
    """

    field: str
    value: Any
    text: str
    beyond: int | None = None
    minor: bool = False

    def __str__(self) -> str:
        return f"{self.field} = {shown(self.value)}: {self.text}"


def unmet_claims(config: Mapping[str, Any], model: nn.Module) -> tuple[Claim, ...]:
    """The fields that `config` sets and `model`, which mlx-lm built from it, does not follow.

    Raises InputError where rotary positions are not those of the configuration: the model would
    run, and give other numbers at every token.

    >>> import vauban
    >>> model, _ = vauban.load(vauban.organism_path("dense"))
    >>> unmet_claims({"model_type": "llama", "logit_scale": 0.25}, model)[0].field
    'logit_scale'
    """
    text = config.get("text_config")
    merged = {**config, **text} if isinstance(text, Mapping) else dict(config)
    merged["model_type"] = str(config.get("model_type"))
    source = _source(model, config)
    claims = [Claim(*one) for one in rope_departures(merged, model)]
    window = missed_window(merged, model, _reads(source, "sliding_window"))
    if window is not None:
        claims.append(
            Claim(
                "sliding_window",
                window,
                f"mlx-lm's {merged['model_type']} lets tokens see further back",
                beyond=window,
            )
        )
    claims += _unread(merged, source)
    claims += _activation(merged, source)
    claims += _epsilon(merged, source, model)
    old, new = config.get("torch_dtype"), config.get("dtype")
    if old and new and old != new:
        claims.append(
            Claim(
                "dtype",
                new,
                f"torch_dtype says {old!r}; the weights are read as stored",
                minor=True,
            )
        )
    return tuple(claims)


def warn_of_claims(claims: Sequence[Claim]) -> None:
    """One warning of the fields that matter for any text."""
    listed = [str(claim) for claim in claims if not claim.minor and claim.beyond is None]
    if listed:
        warnings.warn(
            "config.json sets what mlx-lm's class does not take up, so that transformers would "
            f"give other numbers: {'; '.join(listed)}",
            VaubanWarning,
            stacklevel=3,
        )


def unread_biases(config: Mapping[str, Any], error: BaseException) -> str:
    """What to add where biases do not fit the class: the flags that it does not read."""
    read = class_of(config) if "bias" in str(error) else None
    if read is None:
        return ""
    source = re.sub(r"#.*", "", inspect.getsource(sys.modules[read.__module__]))
    flags = [
        f"{field} = {value}"
        for field, value in sorted(config.items())
        if isinstance(value, bool) and field.endswith("bias") and not _reads(source, field)
    ]
    return (
        f" (config.json sets {', '.join(flags)}, which mlx-lm's {config['model_type']} does not "
        "read)"
        if flags
        else ""
    )


def _source(model: nn.Module, config: Mapping[str, Any]) -> str:
    """The text of the files that the model's classes come from, without comments."""
    files = {type(module).__module__ for module in model.modules()}
    read = class_of(config)
    if read is not None:
        files.add(read.__module__)
    texts = [
        inspect.getsource(sys.modules[name])
        for name in sorted(files)
        if not name.startswith(("mlx.nn", "mlx_lm.tuner", "vauban."))
    ]
    return re.sub(r"#.*", "", "\n".join(texts))


def _reads(source: str, field: str) -> bool:
    """Whether the classes use a field, as an attribute or a key; a dataclass alone uses none."""
    return re.search(rf"\.{field}\b|[\"']{field}[\"']", source) is not None


def _unread(config: Mapping[str, Any], source: str) -> Iterator[Claim]:
    for field, value in sorted(config.items()):
        neutral = _SWITCHES.get(field)
        if neutral is None:
            if not _SCALES.search(field) or field in _NO_SCALES:
                continue
            neutral = (*_NEUTRAL, *_own_scale(field, config))
        if isinstance(value, dict | list) or _among(value, neutral) or _reads(source, field):
            continue
        yield Claim(field, value, f"mlx-lm's {config['model_type']} does not read it")


def _own_scale(field: str, config: Mapping[str, Any]) -> tuple[float, ...]:
    """The values of an attention's scale that say what a class does without it."""
    size = head_size(config)
    if not size:
        return ()
    return {
        "query_pre_attn_scalar": (float(size),),
        "attention_multiplier": (size**-0.5,),
    }.get(field, ())


def _among(value: Any, neutral: tuple[Any, ...]) -> bool:
    if isinstance(value, int | float) and not isinstance(value, bool):
        numbers = [n for n in neutral if isinstance(n, int | float) and not isinstance(n, bool)]
        return any(abs(value - n) <= 1e-6 * max(1.0, abs(n)) for n in numbers)
    return any(value is n or value == n for n in neutral)


def _activation(config: Mapping[str, Any], source: str) -> Iterator[Claim]:
    field = next((f for f in _ACTIVATIONS if isinstance(config.get(f), str)), None)
    if field is None or any(_reads(source, f) for f in _ACTIVATIONS):
        return
    value = config[field]
    kind = _SAME.get(value)
    if kind is None:
        if value.lower() not in source.lower():
            yield Claim(field, value, "mlx-lm's class computes another activation")
        return
    if re.search(_WRITTEN[kind], source, re.IGNORECASE if kind == "silu" else 0):
        return
    other = {"gelu": "gelu_tanh", "gelu_tanh": "gelu"}.get(kind)
    if other and re.search(_WRITTEN[other], source):
        form = "the exact form" if kind == "gelu_tanh" else "the approximation by tanh"
        yield Claim(field, value, f"mlx-lm's class computes {form}", minor=True)
        return
    yield Claim(field, value, "mlx-lm's class computes another activation")


def _epsilon(config: Mapping[str, Any], source: str, model: nn.Module) -> Iterator[Claim]:
    built = {
        float(module.eps)
        for module in model.modules()
        if isinstance(getattr(module, "eps", None), int | float)
    }
    for field in _EPSILONS:
        value = config.get(field)
        if not isinstance(value, float) or not built or _reads(source, field):
            continue
        if not any(abs(value - one) <= 1e-3 * value for one in built):
            yield Claim(field, value, f"the built norms have {min(built):g}", minor=value < 1e-4)
