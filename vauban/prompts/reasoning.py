"""Reasoning blocks: where a prompt opens one, where an answer ends one, what the answer is.

Knows the marks that models write; knows no template and no model.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

# Opening and closing marks of reasoning, as in mlx-lm's list; the last is OpenAI's harmony.
_MARKS = (
    ("<think>", "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|think:start|>", "<|think:end|>"),
    ("<|open|>think<|sep|>", "<|close|>think<|sep|>"),
    ("<|channel>thought", "<channel|>"),
    ("<|channel|>analysis<|message|>", "<|channel|>final<|message|>"),
)

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
    >>> split_reasoning("<think>They greet")
    Parts(reasoning='They greet', answer='', finished=False)
    """
    reasoning = ""
    if _block(text) is None:
        for opening, closing in _MARKS:
            before, closed, after = text.partition(closing)
            if closed and opening not in before:
                reasoning, text = before, after.lstrip()
                break
    finished = True
    while (block := _block(text)) is not None:
        inside, closed, text = text.lstrip().removeprefix(block[0]).partition(block[1])
        reasoning, text, finished = reasoning + inside, text.lstrip(), bool(closed)
    return Parts(reasoning, text, finished)


def _block(text: str) -> tuple[str, str] | None:
    """The marks of the block that a text begins with; None where it begins with none."""
    start = text.lstrip()
    return next((marks for marks in _MARKS if start.startswith(marks[0])), None)


def strip_thinking(text: str) -> str:
    """The answer without the reasoning in front of it; "" where the reasoning was cut off.

    >>> strip_thinking("<think>The user greets me.</think> Hello!")
    'Hello!'
    """
    return split_reasoning(text).answer


def open_reasoning(tokenizer: Any, prompt_ids: Sequence[int]) -> str:
    """The opening mark that a prompt ends with; "" where it ends with none.

    Some models' templates (R1 distills, Qwen3 Thinking) open the block themselves: the answer
    begins inside it and holds no opening mark.
    """
    tail = str(tokenizer.decode(list(prompt_ids[-_MARK_TOKENS:]))).rstrip()
    return next((opening for opening, _ in _MARKS if tail.endswith(opening)), "")


def decode_answer(tokenizer: Any, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> str:
    """An answer's text with every mark of its reasoning, so that the text alone can be judged.

    A mark that the prompt opened stands first. Marks made of special tokens (harmony) are kept; all
    other special tokens and outer white space are removed.
    """
    ids = list(answer_ids)
    marked = open_reasoning(tokenizer, prompt_ids) + str(tokenizer.decode(ids))
    answer = split_reasoning(marked).answer
    if answer == marked:  # no reasoning
        return str(tokenizer.decode(ids, skip_special_tokens=True)).strip()
    # The tokens behind the reasoning, so that only theirs are decoded without special tokens.
    start = len(ids)
    while start and len(str(tokenizer.decode(ids[start - 1 :])).lstrip()) <= len(answer):
        start -= 1
    reasoning = marked[: len(marked) - len(answer)]
    return reasoning + str(tokenizer.decode(ids[start:], skip_special_tokens=True)).strip()
