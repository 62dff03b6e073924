"""Which token positions belong to the chat template and which to the user; common starts.

Knows tokenizers through `chat`; knows no model and no arrays.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vauban.errors import InputError
from vauban.prompts.chat import encode_chat, has_chat_template, tokenizer_name

# The three ways in which prompts end. Pre-tokenizers merge punctuation with a following newline
# but letters not, so a suffix that all three share stands behind every prompt.
_SENTINELS = ("Name one river in Peru", "Is seven a prime number?", "Write a line about snow.")


def post_instruction_positions(tokenizer: Any, **template_args: Any) -> tuple[int, ...]:
    """Positions of the tokens that the template puts behind every user message.

    They are counted from the end: (-5, -4, -3, -2, -1) for ChatML. Sentinel messages are
    encoded and the longest common suffix of their token ids is taken; ids and not strings,
    because tokens may merge across the end of the message (Arditi et al. 2024,
    arXiv 2406.11717). (-1,) for a model without a chat template.

    Raises:
        InputError: the template writes the same tokens whatever the user says.

    >>> import vauban
    >>> _, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> post_instruction_positions(tokenizer)
    (-5, -4, -3, -2, -1)
    """
    if not has_chat_template(tokenizer) and not template_args.get("chat_template"):
        return (-1,)
    rows = [encode_chat(tokenizer, text, **template_args)[::-1] for text in _SENTINELS]
    if all(row == rows[0] for row in rows):
        raise InputError(
            f"the chat template of {tokenizer_name(tokenizer)} leaves out the user's message; "
            "pass another one with chat_template=..."
        )
    shared = max(_shared_length(rows), 1)
    return tuple(range(-shared, 0))


def instruction_end(tokenizer: Any) -> int:
    """The negative position of the last token of the user's text: -6 for ChatML.

    Harmfulness is read there and refusal behind it, at the template's end (Zhao et al. 2025,
    arXiv 2507.11878). -1 for a model without a chat template, where both are one token.
    """
    return min(post_instruction_positions(tokenizer)) - int(has_chat_template(tokenizer))


def common_prefix(token_lists: Sequence[Sequence[int]]) -> int:
    """Number of leading tokens that all lists share, at most one less than the shortest has.

    The last token of every list is kept out, so that each list yields logits.

    >>> common_prefix([[1, 2, 3], [1, 2, 4, 5]]), common_prefix([[1, 2], [1, 2]])
    (2, 1)
    """
    if not token_lists:
        return 0
    shortest = min(map(len, token_lists))
    return max(min(_shared_length(token_lists), shortest - 1), 0)


def _shared_length(rows: Sequence[Sequence[int]]) -> int:
    shared = 0
    for column in zip(*rows, strict=False):
        if any(token != column[0] for token in column):
            break
        shared += 1
    return shared
