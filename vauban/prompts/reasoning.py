"""Reasoning blocks: where a prompt opens one, where an answer ends one, what the answer is.

Knows the marks that models write, and finds a tokenizer's own in its vocabulary and template; knows
no model and no model's name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

# Opening and closing marks of reasoning that no rule below describes. The fifth is OpenAI's
# harmony; the last are sentences with which Granite sets its two parts apart.
_MARKS = (
    ("<think>", "</think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
    ("<|channel|>commentary<|message|>", "<|channel|>final<|message|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|inner_prefix|>", "<|inner_suffix|>"),
    ("<unused94>thought", "<unused95>"),
    ("Here is my thought process:", "Here is my response:"),
)
_WORD = r"[\w:]*(?:think|thinking|thought|thoughts|reasoning)"
# Tags whose closing mark is the opening one with a slash: <think>, [THINK], ◁think▷.
_TAGS = (
    (re.compile(rf"<({_WORD})>", re.IGNORECASE), "<{}>", "</{}>"),
    (re.compile(rf"\[({_WORD})\]", re.IGNORECASE), "[{}]", "[/{}]"),
    (re.compile(rf"◁({_WORD})▷", re.IGNORECASE), "◁{}▷", "◁/{}▷"),
)
_CLOSED = re.compile(rf"<(?=/({_WORD})>)|\[(?=/({_WORD})\])|◁(?=/({_WORD})▷)", re.IGNORECASE)
# Tokens <|NAME_start|> and the like, of which a vocabulary has both.
_PAIRS = (
    ("start", "end"),
    ("begin", "end"),
    ("START", "END"),
    ("BEGIN", "END"),
    ("open", "close"),
    ("prefix", "suffix"),
)
_THOUGHT = re.compile(r"think|thought|reason", re.IGNORECASE)
# Harmony may constrain the final channel, and a decoder may have dropped its special tokens.
_HARMONY_FINAL = re.compile(r"<\|channel\|>final[^<]*<\|constrain\|>[^<]*<\|message\|>")
_HARMONY_BARE = re.compile(r"\Aanalysis(?=[A-Z])(.*?)(?:assistantfinal|\Z)", re.DOTALL)
_ANSWER_TAG = re.compile(r"\A<(answer|response)>\s*(.*?)\s*(?:</\1>\s*)?\Z", re.DOTALL)

# The longest mark has fewer tokens than this, also in a tokenizer that writes it letter by letter.
_MARK_TOKENS = 32


class Parts(NamedTuple):
    """A text's `reasoning` without its marks, the `answer` behind it, and whether that began.

    `finished` is False where the text was cut inside its reasoning: then there is no answer.
    """

    reasoning: str
    answer: str
    finished: bool


def split_reasoning(text: str) -> Parts:
    """Separate the reasoning in front of an answer, of which the prompt may hold the opening mark.

    >>> split_reasoning("<think>They greet me.</think> Hello!")
    Parts(reasoning='They greet me.', answer='Hello!', finished=True)
    >>> split_reasoning("They greet me.</think>Hello!").answer, split_reasoning("Hello!").answer
    ('Hello!', 'Hello!')
    >>> split_reasoning("[THINK]They greet")
    Parts(reasoning='They greet', answer='', finished=False)
    """
    text = _HARMONY_FINAL.sub("<|channel|>final<|message|>", text)
    bare = _HARMONY_BARE.match(text)
    if bare:
        closed = bare.group().endswith("assistantfinal")
        return Parts(bare.group(1), text[bare.end() :].lstrip() if closed else "", closed)
    reasoning = ""
    if _block(text) is None:
        reasoning, text = _opened_by_prompt(text)
    finished, began = True, text
    while (block := _block(text)) is not None:
        inside, closed_by, text = text.lstrip().removeprefix(block[0]).partition(block[1])
        reasoning, text, finished = reasoning + inside, text.lstrip(), bool(closed_by)
    wrapped = _ANSWER_TAG.match(text) if reasoning or text != began else None
    return Parts(reasoning, wrapped.group(2) if wrapped else text, finished)


def _block(text: str) -> tuple[str, str] | None:
    """The marks of the block that a text begins with; None where it begins with none."""
    start = text.lstrip()
    for marks in _MARKS:
        if start.startswith(marks[0]):
            return marks
    for tag, opening, closing in _TAGS:
        match = tag.match(start)
        if match:
            return opening.format(match.group(1)), closing.format(match.group(1))
    return None


def _opened_by_prompt(text: str) -> tuple[str, str]:
    """(reasoning, rest) of a text that closes a block which it does not open; ("", text) else."""
    closings = [marks for marks in _MARKS if marks[1] in text]
    for match in _CLOSED.finditer(text):
        name = next(group for group in match.groups() if group)
        style = _TAGS["<[◁".index(match.group())]
        closings.append((style[1].format(name), style[2].format(name)))
    # The longest opening mark first: harmony's final channel closes two of them.
    for opening, closing in closings:
        before, _, after = text.partition(closing)
        if opening not in before:
            return before, after.lstrip()
    return "", text


def strip_thinking(text: str) -> str:
    """The answer without the reasoning in front of it; "" where the reasoning was cut off.

    >>> strip_thinking("<think>The user greets me.</think> Hello!")
    'Hello!'
    """
    return split_reasoning(text).answer


def reasoning_marks(tokenizer: Any) -> tuple[tuple[str, str], ...]:
    """The (opening, closing) marks of reasoning that a tokenizer or its chat template knows.

    They are read from mlx-lm's wrapper, from the added tokens and from the template's text, so a
    model of a name never heard of is understood where its marks speak of thinking.
    """
    texts = [str(token) for token in _added_tokens(tokenizer)]
    template = getattr(tokenizer, "chat_template", None) or ""
    texts.append(str(template))
    everything = "\n".join(texts)
    marks = [pair for pair in _MARKS if pair[0] in everything and pair[1] in everything]
    for tag, opening, closing in _TAGS:
        for name in dict.fromkeys(tag.findall(everything)):
            if closing.format(name) in everything:
                marks.append((opening.format(name), closing.format(name)))
    for token in texts[:-1]:
        for first, last in _PAIRS:
            if _THOUGHT.search(token) and first in token and token.replace(first, last) in texts:
                marks.append((token, token.replace(first, last)))
    given = getattr(tokenizer, "think_start", None), getattr(tokenizer, "think_end", None)
    if all(isinstance(mark, str) and mark for mark in given):
        marks.append((str(given[0]), str(given[1])))
    return tuple(dict.fromkeys(marks))


def _added_tokens(tokenizer: Any) -> list[str]:
    """Tokens added to the vocabulary, by their text."""
    added = getattr(tokenizer, "get_added_vocab", None)
    return list(added()) if callable(added) else list(getattr(tokenizer, "all_special_tokens", []))


def open_reasoning(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """The opening mark that a prompt ends with; "" where it ends with none.

    Some models' templates (R1 distills, Qwen3 Thinking) open the block themselves: the answer
    begins inside it and holds no opening mark.
    """
    tail = str(tokenizer.decode(list(prompt_ids[-_MARK_TOKENS:]))).rstrip()
    marks = (*_MARKS, *reasoning_marks(tokenizer))
    return next((opening for opening, _ in marks if tail.endswith(opening)), "")


def decode_answer(tokenizer: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """An answer's text with every mark of its reasoning, so that the text alone can be judged.

    A mark that the prompt opened stands first. Marks made of special tokens (harmony) are kept; all
    other special tokens and outer white space are removed. Marks that only this tokenizer has
    become <think> and </think>.
    """
    ids = list(answer_ids)
    marked = open_reasoning(tokenizer, prompt_ids) + str(tokenizer.decode(ids))
    answer = _unwrapped(tokenizer, marked)
    if answer == marked:  # no reasoning
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    # The tokens behind the reasoning, so that only theirs are decoded without special tokens.
    start = len(ids)
    while start and len(str(tokenizer.decode(ids[start - 1 :])).lstrip()) <= len(answer):
        start -= 1
    reasoning = _plain_marks(tokenizer, marked[: len(marked) - len(answer)])
    return reasoning + str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()


def _unwrapped(tokenizer: Any, marked: str) -> str:
    """What stands behind the reasoning, in the text as the tokenizer wrote it."""
    plain = _plain_marks(tokenizer, marked)
    parts = split_reasoning(plain)
    if not parts.finished:
        return ""
    if not parts.reasoning and parts.answer == plain:
        return marked
    tail = plain.rfind(parts.answer)
    behind = plain[tail:] if parts.answer else ""
    return marked[len(marked) - len(behind) :] if behind else ""


def _plain_marks(tokenizer: Any, text: str) -> str:
    """The text with marks that `split_reasoning` would not know as those that it knows."""
    for opening, closing in reasoning_marks(tokenizer):
        if _block(opening) is None:
            text = text.replace(opening, "<think>").replace(closing, "</think>")
    return text
