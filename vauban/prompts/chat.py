"""Chat templating and tokenisation: the one path from a prompt to token ids.

Knows tokenizers (mlx-lm's wrapper and bare transformers ones) by what they can do and imports
neither; knows no model and no arrays.
"""

from __future__ import annotations

import contextlib
import inspect
import re
import warnings
import weakref
from collections.abc import Mapping, Sequence
from typing import Any

from vauban.errors import InputError, VaubanWarning, shown

Message = Mapping[str, Any]
"""One turn: {"role": "user" | "assistant" | "system" | ..., "content": text}."""

_FIXED_ARGUMENTS = ("tokenize", "return_dict", "return_tensors", "padding", "truncation")

# Kimi and DeepSeek call the switch `thinking`; `message.thinking` is a field and no switch.
_THINKING_VARIABLE = re.compile(r"(?<![.\w])thinking\s+is\s|\b(?:if|and|or|not)\s+thinking\b")

_told_without_template: weakref.WeakSet[Any] = weakref.WeakSet()
_template_args: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
_system_prompts: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


def encode_chat(
    tokenizer: Any,
    prompt_or_messages: str | Sequence[Message],
    *,
    system_prompt: str | bool = True,
    **template_args: Any,
) -> list[int]:
    """Token ids of a conversation, ready for the model to answer.

    The model's chat template is applied once, with the generation prompt (left out when the
    last message is the assistant's), and special tokens appear once even when both template and
    tokenizer write them. A template that knows `enable_thinking` (or `thinking`) gets False
    unless the caller passes a value. Without a chat template the contents are encoded as plain
    text, joined by blank lines, and a `VaubanWarning` says so once per tokenizer.

    Args:
        tokenizer: mlx-lm's `TokenizerWrapper` or a transformers tokenizer.
        prompt_or_messages: one user message as text, or a list of messages. Token ids come back
            as they are.
        system_prompt: what stands before a conversation that has no system message; True: that of
            `use_system_prompt`, where there is one; False: nothing.
        template_args: passed to the template: `enable_thinking`, `add_generation_prompt`,
            `continue_final_message`, `tools`, ... They win over those of `use_template_args`.

    Raises:
        InputError: messages of the wrong form, or a template that rejects them.

    Example, with `tokenizer` from `vauban.load`:

        encode_chat(tokenizer, "How do I sharpen a chisel?")
        encode_chat(tokenizer, [{"role": "system", "content": "Be brief."},
                                {"role": "user", "content": "Name a river."}])

    >>> import vauban
    >>> _, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> tokenizer.decode(encode_chat(tokenizer, "Hello"))
    '<|im_start|>user\\nHello<|im_end|>\\n<|im_start|>assistant\\n'
    """
    if token_ids := _given_ids(prompt_or_messages):
        return token_ids
    messages = _as_messages(prompt_or_messages)
    if system_prompt is True:
        system_prompt = _system_prompts.get(_bare(tokenizer), False)
    if system_prompt and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system_prompt}, *messages]
    for name in _FIXED_ARGUMENTS:
        if name in template_args:
            raise InputError(
                f"encode_chat always returns one list of token ids; leave out {name!r}."
            )
    if has_chat_template(tokenizer) or template_args.get("chat_template"):
        encoded = _apply_template(tokenizer, messages, template_args)
    else:
        _tell_without_template(tokenizer)
        encoded = tokenizer.encode("\n\n".join(_plain_content(turn) for turn in messages))
    token_ids = _single_bos(_flat_ids(encoded), getattr(tokenizer, "bos_token_id", None))
    if not token_ids:
        raise InputError(f"{shown(prompt_or_messages)} gives no tokens; the prompt is empty.")
    return token_ids


def use_template_args(tokenizer: Any, template_args: Mapping[str, Any]) -> None:
    """Pass these arguments to the chat template in every later `encode_chat` of a tokenizer.

    Measuring, generation and evaluation encode through `encode_chat`, so that all of them see the
    same mode, for example `{"enable_thinking": True}`. {} takes the arguments back.

    Raises InputError for an argument that the template does not read, which it would ignore.

    Example: `use_template_args(tokenizer, {"enable_thinking": True})`.
    """
    known = template_variables(tokenizer)
    unknown = [name for name in template_args if known is not None and name not in known]
    fixed = [name for name in template_args if name in _FIXED_ARGUMENTS]
    if unknown or fixed or (template_args and not has_chat_template(tokenizer)):
        reads = ", ".join(sorted(known)) if known else "none"
        raise InputError(
            f"chat_template_args: the chat template of {tokenizer_name(tokenizer)} does not read "
            f"{', '.join(map(repr, unknown or fixed or template_args))}; it reads: {reads}."
        )
    _template_args[_bare(tokenizer)] = dict(template_args)


def use_system_prompt(tokenizer: Any, text: str | None) -> None:
    """Put a system message before every later prompt of a tokenizer that has none of its own.

    As with `use_template_args`, measuring, generation and evaluation then see the same mode. None
    takes it back.

    Raises InputError for an empty text, and for a chat template that rejects a system message
    (with the template's own words) or leaves it out.

    Example: `use_system_prompt(tokenizer, "You are a careful assistant.")`.
    """
    bare = _bare(tokenizer)
    if text is None:
        _system_prompts.pop(bare, None)
        return
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"system_prompt is {shown(text)}; expected a text that is not empty.")
    # Some templates write a default system message, so that two texts are compared.
    encoded = [encode_chat(tokenizer, "Hello", system_prompt=t) for t in (text, f"{text} Hello")]
    if encoded[0] == encoded[1]:
        raise InputError(
            f"system_prompt: the chat template of {tokenizer_name(tokenizer)} leaves out system "
            "messages; put the text into the prompts."
        )
    _system_prompts[bare] = text


def template_variables(tokenizer: Any) -> set[str] | None:
    """The arguments that a tokenizer's Jinja template reads; None for a renderer in Python."""
    template = getattr(tokenizer, "chat_template", None)
    if template is None:
        return None if has_chat_template(tokenizer) else set()
    from jinja2 import Environment, meta  # transformers' own engine

    texts = template.values() if isinstance(template, Mapping) else [template]
    environment = Environment(extensions=["jinja2.ext.loopcontrols"])
    names: set[str] = set()
    for text in texts:
        # {% generation %} marks are transformers' extension and hold no variables of their own.
        plain = re.sub(r"{%-?\s*(?:end)?generation\s*-?%}", "", str(text))
        names |= meta.find_undeclared_variables(environment.parse(plain))
    return names - {"messages", "raise_exception", "strftime_now", "bos_token", "eos_token"}


def has_chat_template(tokenizer: Any) -> bool:
    """Whether the tokenizer can format a conversation, by a Jinja template or in Python."""
    known = getattr(tokenizer, "has_chat_template", None)  # mlx-lm's wrapper knows
    if known is not None:
        return bool(known)
    return getattr(tokenizer, "chat_template", None) is not None or _has_own_renderer(tokenizer)


def conversation_text(prompt_or_messages: str | Sequence[Message]) -> str:
    """A prompt as a reader sees it: a single user message as it is, turns with their roles.

    >>> conversation_text([{"role": "user", "content": "Hi"}])
    'Hi'
    >>> conversation_text([{"role": "system", "content": "Be brief."},
    ...                    {"role": "user", "content": "Hi"}])
    'System: Be brief.\\n\\nUser: Hi'
    """
    turns = _as_messages(prompt_or_messages)
    if len(turns) == 1 and turns[0]["role"] == "user":
        return str(turns[0]["content"])
    return "\n\n".join(f"{str(t['role']).capitalize()}: {t['content']}" for t in turns)


def _given_ids(prompt: Any) -> list[int]:
    """The token ids that a prompt consists of; [] for text and messages."""
    listed = prompt.tolist() if hasattr(prompt, "tolist") else prompt
    if isinstance(listed, list | tuple) and all(hasattr(i, "__index__") for i in listed):
        return [int(i) for i in listed]
    return []


def _as_messages(given: str | Sequence[Message]) -> list[dict[str, Any]]:
    if isinstance(given, str):
        return [{"role": "user", "content": given}]
    if not isinstance(given, Sequence) or not given:
        raise InputError(
            f"expected a text or a list of messages that is not empty, given {shown(given)}."
        )
    messages = []
    for number, turn in enumerate(given):
        if not isinstance(turn, Mapping) or not {"role", "content"} <= turn.keys():
            raise InputError(
                f"message {number} is {shown(turn)}; "
                'expected a mapping with role and content, like {"role": "user", "content": "Hi"}.'
            )
        messages.append(dict(turn))
    return messages


def _apply_template(
    tokenizer: Any, messages: list[dict[str, Any]], template_args: dict[str, Any]
) -> Any:
    options = {**_template_args.get(_bare(tokenizer), {}), **template_args}
    if not options.get("continue_final_message"):
        options.setdefault("add_generation_prompt", messages[-1]["role"] != "assistant")
    switch = _thinking_switch(tokenizer, options.get("chat_template"))
    if switch and not options.keys() & {"enable_thinking", "thinking"}:
        options[switch] = False
    try:
        return tokenizer.apply_chat_template(messages, tokenize=True, **options)
    except Exception as error:  # templates raise jinja2's errors and, in Python, any other
        roles = ", ".join(str(turn["role"]) for turn in messages)
        raise InputError(
            f"the chat template of {tokenizer_name(tokenizer)} rejects a conversation with the "
            f"roles {roles}: {error}. Many templates know no system role or want user and "
            "assistant in turn; put instructions into the first user message."
        ) from error


def _thinking_switch(tokenizer: Any, template: Any = None) -> str | None:
    """The argument that turns reasoning off in this tokenizer's template, None if it has none."""
    if callable(getattr(tokenizer, "_chat_template", None)):  # mlx-lm's templates in Python
        return "enable_thinking"
    template = template or getattr(tokenizer, "chat_template", None) or ""
    texts = template.values() if isinstance(template, Mapping) else [template]
    if any("enable_thinking" in str(text) for text in texts):
        return "enable_thinking"
    if any(_THINKING_VARIABLE.search(str(text)) for text in texts):
        return "thinking"
    if _has_own_renderer(tokenizer):
        accepted = inspect.signature(_bare(tokenizer).apply_chat_template).parameters
        for name in ("enable_thinking", "thinking"):
            if name in accepted:
                return name
    return None


def _bare(tokenizer: Any) -> Any:
    """The transformers tokenizer inside mlx-lm's wrapper, or the tokenizer itself."""
    # transformers' fast tokenizers have a `_tokenizer` too (the Rust one), but no `_chat_template`.
    return tokenizer._tokenizer if hasattr(tokenizer, "_chat_template") else tokenizer


def _has_own_renderer(tokenizer: Any) -> bool:
    method = getattr(type(_bare(tokenizer)), "apply_chat_template", None)
    return method is not None and not method.__qualname__.startswith("PreTrainedTokenizerBase.")


def _plain_content(turn: dict[str, Any]) -> str:
    if not isinstance(turn["content"], str):
        raise InputError(
            f"a model without a chat template takes texts only, given {shown(turn['content'])}."
        )
    return turn["content"]


def _tell_without_template(tokenizer: Any) -> None:
    bare = _bare(tokenizer)
    if bare in _told_without_template:
        return
    with contextlib.suppress(TypeError):  # an object that cannot be weakly referenced
        _told_without_template.add(bare)
    warnings.warn(
        f"{tokenizer_name(tokenizer)} has no chat template: prompts are encoded as plain text. "
        "For a chat model, take one whose tokenizer brings its template.",
        VaubanWarning,
        stacklevel=3,
    )


def _flat_ids(encoded: Any) -> list[int]:
    """One list of ints from whatever a tokenizer returns: list, batch of one, BatchEncoding.

    Not avoided with `return_dict=False`: templates in Python reject the word.
    """
    if hasattr(encoded, "keys"):
        encoded = encoded["input_ids"]
    if len(encoded) and hasattr(encoded[0], "__len__"):
        encoded = encoded[0]
    return [int(token) for token in encoded]


def _single_bos(token_ids: list[int], bos: int | None) -> list[int]:
    start = 0
    while bos is not None and token_ids[start : start + 2] == [bos, bos]:
        start += 1
    return token_ids[start:]


def tokenizer_name(tokenizer: Any) -> str:
    """What a message calls a tokenizer: the name or path it was loaded from, else its class."""
    return getattr(tokenizer, "name_or_path", None) or type(_bare(tokenizer)).__name__
