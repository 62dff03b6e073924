"""What refusals, evasions and openings sound like in ten languages, read from one data file.

Knows the file and compiles its expressions. `verdicts` decides by the place in which one stands.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from functools import cache
from typing import Any

from vauban._paths import data_dir

ROLES = {
    "declines": "the speaker does not do what was requested",
    "impossible": "a refusal only together with an apology or a no in front of it",
    "apologies": "begins a sentence that may refuse",
    "unless": "with one of these an apology introduces no refusal: sympathy, misunderstanding",
    "leads": "begins a sentence without content: thanks, understanding, a greeting",
    "assents": "begins an answer that complies, before its content",
    "pivots": "behind a refusal: compliance begins after all",
    "lectures": "law and morals instead of an answer",
    "requests": "questions to the user, and other subjects",
    "salutations": "the first line of a letter, which speaks for its writer",
}
"""The lists of each language, and what a match means."""


@cache
def patterns() -> dict[str, re.Pattern[str]]:
    """One expression per role, over all languages: an answer need not say which one it is in.

    >>> bool(patterns()["declines"].search("je ne peux pas vous aider avec cela."))
    True
    """
    text = (data_dir() / "verdicts" / "phrases.toml").read_text(encoding="utf-8")
    languages = tomllib.loads(text)
    return {
        role: re.compile("|".join(_alternatives(table, role) for table in languages.values()))
        for role in ROLES
    }


def _alternatives(language: Mapping[str, Any], role: str) -> str:
    """A role's list as one group, with <name> filled from the language's words."""
    joined = "|".join(language[role])
    for name, words in language.get("words", {}).items():
        joined = joined.replace(f"<{name}>", f"(?:{'|'.join(words)})")
    return f"(?:{joined})"
