"""Facts as token ids: where the subject ends, how a target goes on, and the contexts before them.

Knows tokenizers; runs a model only to sample contexts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.nn as nn

from vauban.errors import InputError, shown
from vauban.generation import decode, eos_ids, generate_tokens
from vauban.knowledge.facts import Fact

# What contexts start with, and their length in tokens (Meng et al. 2023).
_STARTS = ("The", "Therefore", "Because", "I", "You")
_CONTEXT_TOKENS = 10
# Full sampling from small models is noise, and the published top 5 of a step is close to this.
_TEMPERATURE = 0.7


@dataclass(frozen=True)
class Row:
    """A prompt's ids, and the index of its subject's last token."""

    tokens: tuple[int, ...]
    pivot: int


def encode_fact(tokenizer: Any, fact: Fact, context: str = "{}") -> Row:
    """The fact's prompt in a context, with its subject's last token.

    Raises InputError where a token reaches from the subject into what follows.
    """
    before, _, after = context.partition("{}")
    start, _, end = fact.prompt.partition("{}")
    head = before + start + fact.subject
    text = head + end + after
    tokens = tuple(int(i) for i in tokenizer.encode(text))
    alone = tuple(int(i) for i in tokenizer.encode(head))
    if alone and tokens[: len(alone)] == alone:
        return Row(tokens, len(alone) - 1)
    # The subject's end has merged with what follows: the offsets say which token holds it.
    for index, (first, last) in enumerate(_offsets(tokenizer, text, tokens)):
        if first < len(head) <= last:
            if text[len(head) : last].strip():
                raise InputError(
                    f"subject {shown(fact.subject)} is cut by tokenisation in {shown(text)}: one "
                    f"token holds {text[first:last]!r}; put a space behind {{}}"
                )
            return Row(tokens, index)
    raise InputError(f"subject {shown(fact.subject)} has no token of its own in {shown(text)}")


def _offsets(tokenizer: Any, text: str, tokens: Sequence[int]) -> list[tuple[int, int]]:
    """The span of characters of each token."""
    inner = getattr(tokenizer, "_tokenizer", tokenizer)
    if getattr(inner, "is_fast", False):
        spans = inner(text, return_offsets_mapping=True)["offset_mapping"]
        if len(spans) == len(tokens):
            return [(int(a), int(b)) for a, b in spans]
    # A slow tokenizer: the text that the first tokens decode to.
    ends = [len(tokenizer.decode(list(tokens[: i + 1]))) for i in range(len(tokens))]
    return list(zip([0, *ends], ends, strict=False))


def target_ids(tokenizer: Any, text: str, target: str) -> tuple[int, ...]:
    """The target's ids as they follow `text`, without special tokens.

    Raises InputError for a target that gives no tokens.
    """
    joined = target if target.startswith(" ") or text.endswith((" ", "\n")) else f" {target}"
    before = [int(i) for i in tokenizer.encode(text, add_special_tokens=False)]
    both = [int(i) for i in tokenizer.encode(text + joined, add_special_tokens=False)]
    ids = both[len(before) :]
    if both[: len(before)] != before or not ids:
        ids = [int(i) for i in tokenizer.encode(joined, add_special_tokens=False)]
    if not ids:
        raise InputError(f"target {shown(target)} gives no tokens")
    return tuple(ids)


def check_contexts(contexts: Sequence[str]) -> tuple[str, ...]:
    """InputError unless the first context is "{}" and every one holds one `{}`."""
    listed = tuple(contexts)
    wrong = [c for c in listed if not isinstance(c, str) or c.count("{}") != 1]
    if not listed or wrong or listed[0] != "{}":
        raise InputError(
            f"contexts are {shown(listed)}; expected templates with one {{}} each, the first '{{}}'"
        )
    return listed


def sample_contexts(model: nn.Module, tokenizer: Any, seed: int = 0) -> tuple[str, ...]:
    """ "{}" and five sentences that the model starts by itself, each with ". {}" behind it."""
    starts = [[int(i) for i in tokenizer.encode(start)] for start in _STARTS]
    ends = generate_tokens(
        model,
        starts,
        eos=eos_ids(tokenizer),
        max_tokens=_CONTEXT_TOKENS - 1,
        temperature=_TEMPERATURE,
        seed=seed,
    )
    texts = [decode(tokenizer, [*start, *end]) for start, end in zip(starts, ends, strict=True)]
    cleaned = (text.replace("{", " ").replace("}", " ").strip() for text in texts)
    return ("{}", *(f"{text}. {{}}" for text in dict.fromkeys(cleaned) if text))
