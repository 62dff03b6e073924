"""A griffe extension for the API pages: examples (`>>>`) become code blocks, columns lists."""

from __future__ import annotations

import re

import griffe

# A paragraph that begins with the prompt, up to the next empty line that no prompt follows.
_EXAMPLE = re.compile(r"(?:^[ ]*>>> .*\n?(?:^[ ]*\S.*\n?)*(?:^[ ]*\n(?=[ ]*>>>))?)+", re.M)


def fenced(text: str) -> str:
    """The text with its examples between fences.

    >>> fenced("Adds.\\n\\n>>> 1 + 1\\n2")
    'Adds.\\n\\n```pycon\\n>>> 1 + 1\\n2\\n```\\n'
    """
    return _EXAMPLE.sub(lambda match: f"```pycon\n{match[0].rstrip()}\n```\n", text)


# A field and what it is, apart by two spaces or more; what goes on below is indented.
_FIELD = re.compile(r"(?P<name>\S(?:.*?\S)?) {2,}(?P<text>\S.*)")


def listed(text: str) -> str:
    """The text with its columns of fields, "name  what it is", as lists; markdown would join them.

    >>> print(listed("Two.\\n\\nlow    (d,) the one\\nhigh   the other,\\n       which is far"))
    Two.
    <BLANKLINE>
    - `low`: (d,) the one
    - `high`: the other, which is far
    """
    return "\n\n".join(map(_as_list, text.split("\n\n")))


def _as_list(paragraph: str) -> str:
    items: list[str] = []
    for line in paragraph.splitlines():
        match = _FIELD.fullmatch(line)
        if match and not line.startswith((">>>", "...")):
            names = ", ".join(f"`{name}`" for name in re.split(r",\s*", match["name"]))
            items.append(f"- {names}: {match['text']}")
        elif items and line.startswith("    "):
            items[-1] += f" {line.strip()}"
        else:
            return paragraph
    return "\n".join(items) if len(items) > 1 else paragraph


class DoctestBlocks(griffe.Extension):
    """Rewrites every docstring that is collected."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(listed(obj.docstring.value))
