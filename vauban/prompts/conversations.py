"""Prompts of several messages: what a prompt file may hold under `messages`, checked and frozen.

Knows the form of messages; knows no tokenizer. A conversation goes wherever a prompt does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from typing import Any

from vauban.errors import InputError, shown

ROLES = ("system", "user", "assistant", "tool")

_FORM = 'expected a list like [{"role": "user", "content": "Hi"}] whose last message is the user\'s'


class Turn(dict[str, str]):
    """One message, {"role": ..., "content": ...}, that compares and hashes by what it says.

    >>> len({Turn(role="user", content="Hi"), Turn(role="user", content="Hi")})
    1
    """

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))


Conversation = tuple[Turn, ...]
"""Messages in order, at most one system message, which comes first, and the user's last."""


def checked_messages(value: Any, where: str) -> Conversation:
    """The messages of a row as a conversation.

    Raises InputError, naming `where` and the message, for anything that is none.

    >>> checked_messages([{"role": "user", "content": "Hi"}], "line 1")
    ({'role': 'user', 'content': 'Hi'},)
    """
    if not isinstance(value, list | tuple) or not value:
        raise InputError(f"{where}: 'messages' is {shown(value)}; {_FORM}.")
    turns = []
    for number, message in enumerate(value, start=1):
        place = f"{where}: message {number}"
        if not isinstance(message, Mapping) or not {"role", "content"} <= message.keys():
            raise InputError(f"{place} is {shown(message)}; expected a role and a content.")
        role, content = message["role"], message["content"]
        if not isinstance(role, Hashable) or role not in ROLES:
            raise InputError(f"{place}: role {shown(role)}; expected one of {', '.join(ROLES)}.")
        if not isinstance(content, str) or not content.strip():
            raise InputError(f"{place}: content {shown(content)}; expected a text, not empty.")
        if role == "system" and number > 1:
            raise InputError(f"{place}: a system message has to be the first one.")
        turns.append(Turn(role=role, content=content))
    if turns[-1]["role"] != "user":
        raise InputError(
            f"{where}: the last message is the {turns[-1]['role']}'s; {_FORM}, for the model to "
            "answer."
        )
    return tuple(turns)
