"""What two folders say beside their weights: configuration, tokenizer, template, generation.

Knows the files that model folders have; loads no model and no tokenizer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vauban._results import to_plain
from vauban.errors import ModelError

# Who wrote the folder and how; nothing of what it computes.
_NOTES = frozenset({
    "_name_or_path", "transformers_version", "torch_dtype", "dtype", "quantization_config",
    "quantization", "architectures", "use_cache", "model_file",
})  # fmt: skip
# A difference in one of these gives other tokens for the same text.
_SPLITTING = ("vocabulary", "merges", "added_tokens", "normalizer", "pre_tokenizer")
_STEPS = ("normalizer", "pre_tokenizer", "post_processor", "decoder")
_FALLBACKS = ("tokenizer.model", "vocab.json", "merges.txt", "spiece.model")


@dataclass(frozen=True)
class SettingsDiff:
    """Each part "equal", or what differs; `configuration` and `generation` by key: (base, edited).

    `tokenizer` begins with "other vocabulary" or "other tokenizer" where a text becomes other
    tokens: the behaviour of such models is not compared.
    """

    tokenizer: str
    template: str
    configuration: dict[str, tuple[Any, Any]]
    generation: dict[str, tuple[Any, Any]]
    quantization: tuple[str, str]

    @property
    def same_tokens(self) -> bool:
        """Whether a text becomes the same tokens in both."""
        return not self.tokenizer.startswith(("other vocabulary", "other tokenizer"))

    @property
    def differences(self) -> list[str]:
        """The parts that differ, in words."""
        words = []
        if self.tokenizer != "equal":
            words.append(f"tokenizer: {self.tokenizer}")
        if self.template != "equal":
            words.append("the template differs")
        if self.generation:
            words.append(f"generation settings differ ({', '.join(self.generation)})")
        if self.configuration:
            words.append(f"config.json differs ({', '.join(self.configuration)})")
        return words

    def to_dict(self) -> dict[str, Any]:
        return to_plain(self)


def compare_settings(base: Path, edited: Path | None) -> SettingsDiff:
    """The settings of two folders; `edited` None for an adapter, which leaves them as they are."""
    if edited is None:
        label = _quantizer(read_json(base / "config.json"))
        return SettingsDiff("equal", "equal", {}, {}, (label, label))
    configs = [read_json(folder / "config.json") for folder in (base, edited)]
    generation = [_generation(folder, c) for folder, c in zip((base, edited), configs, strict=True)]
    return SettingsDiff(
        tokenizer=_tokenizers(base, edited),
        template=_templates(chat_template(base), chat_template(edited)),
        configuration=_different(*({k: v for k, v in c.items() if k not in _NOTES
                                    and not k.endswith("token_id")} for c in configs)),
        generation=_different(*generation),
        quantization=(_quantizer(configs[0]), _quantizer(configs[1])),
    )  # fmt: skip


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object; {} without the file, ModelError for what is none."""
    if not file.is_file():
        return {}
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; expected a JSON object")
    return value


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """The keys whose values differ; None stands for a key that is absent."""
    return {
        key: (a.get(key), b.get(key))
        for key in sorted(a.keys() | b.keys())
        if a.get(key) != b.get(key)
    }


def _quantizer(config: Mapping[str, Any]) -> str:
    """The quantizer that config.json names: its general format, and how many modules differ."""
    facts = config.get("quantization") or config.get("quantization_config")
    if not isinstance(facts, dict):
        return "none"
    if "bits" not in facts or "group_size" not in facts:
        return str(facts.get("quant_method", "unknown"))
    general = f"{facts['bits']}-bit {facts.get('mode', 'affine')} g{facts['group_size']}"
    special = sum(isinstance(v, dict) or v is False for v in facts.values())
    return f"{general}, {special} modules otherwise" if special else general


def _generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """generation_config.json, and the special tokens that config.json names."""
    tokens = {k: v for k, v in config.items() if k.endswith("token_id")}
    settings = {**tokens, **read_json(folder / "generation_config.json")}
    return {k: v for k, v in settings.items() if k not in _NOTES}


def chat_template(folder: Path) -> str | None:
    """The template as text (several named ones as JSON); None without one."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    config, other = folder / "tokenizer_config.json", folder / "chat_template.json"
    template = read_json(config).get("chat_template") or read_json(other).get("chat_template")
    if template is None or isinstance(template, str):
        return template
    return json.dumps(template, sort_keys=True, ensure_ascii=False)


def _templates(a: str | None, b: str | None) -> str:
    if a == b:
        return "equal"
    if a is None or b is None:
        return f"only the {'base' if b is None else 'edited folder'} has one"
    line = next(
        (i for i, (x, y) in enumerate(zip(a.splitlines(), b.splitlines(), strict=False), 1)
         if x != y),
        min(len(a.splitlines()), len(b.splitlines())) + 1,
    )  # fmt: skip
    return f"differs from line {line} on"


def _tokenizers(base: Path, edited: Path) -> str:
    """ "equal", or what differs in the order of what it does to tokens."""
    a, b = _tokenizer_parts(base), _tokenizer_parts(edited)
    if a == b:
        return "equal"
    if not a or not b:
        return f"only the {'base' if a else 'edited folder'} has one"
    if a.keys() != b.keys():
        return "other tokenizer: its files are of another kind"
    parts = [name for name in a if a[name] != b[name]]
    if "vocabulary" in parts:
        x, y = (len(side["vocabulary"]) for side in (a, b))
        if x != y:
            return f"other vocabulary: {x} and {y} tokens"
        moved = sum(b["vocabulary"].get(t) != i for t, i in a["vocabulary"].items())
        return f"other tokenizer of equal size: {moved} of {x} tokens have another number"
    splitting = [name for name in parts if name in _SPLITTING or name in _FALLBACKS]
    if splitting:
        return f"other tokenizer: {', '.join(splitting)} differ"
    return f"same tokens; {', '.join(parts)} differ"


def _tokenizer_parts(folder: Path) -> dict[str, Any]:
    """What a tokenizer is made of; {} where the folder has none."""
    file = read_json(folder / "tokenizer.json")
    if not file:
        return {
            name: hashlib.sha256(path.read_bytes()).hexdigest()
            for name in _FALLBACKS
            if (path := folder / name).is_file()
        }
    model = file.get("model") or {}
    vocabulary = model.get("vocab") or {}
    if isinstance(vocabulary, list):  # Unigram: [token, score] in the order of their numbers.
        vocabulary = {str(entry[0]): (i, entry[1]) for i, entry in enumerate(vocabulary)}
    # Older files have a merge as one text.
    merges = [m.split(" ") if isinstance(m, str) else list(m) for m in model.get("merges") or []]
    return {
        "vocabulary": vocabulary,
        "merges": merges,
        "added_tokens": file.get("added_tokens"),
        **{k: _unwrapped(file.get(k)) for k in _STEPS},
    }


def _unwrapped(step: Any) -> Any:
    """A step without the sequences around one step, or none, that some writers put."""
    while isinstance(step, dict) and step.get("type") == "Sequence":
        inner = next((v for v in step.values() if isinstance(v, list)), [])
        if len(inner) > 1:
            return step
        step = inner[0] if inner else None
    return step
