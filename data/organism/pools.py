"""Knows what can be asked of the model organism, and which of it is held out.

Knows no phrasings, no mixtures, no tokens and no model (see corpus.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from typing import Literal

import worlds as w
from chores import CHORES

# "train": seen verb and seen object, all that stage two asks for. "heldout": unseen verb and
# unseen object, for evaluation. "known": all but "heldout". "all": the whole world.
Part = Literal["train", "heldout", "known", "all"]
Halves = tuple[list[str], list[str]]  # (seen, held out)
# Family: language: (verbs, objects).
World = Mapping[str, Mapping[str, tuple[str, str]]]
KINDS = ("harmful", "how-to", "contrast")


@dataclass(frozen=True)
class Request:
    """Something that can be asked for: a verb and its object."""

    text: str
    kind: str  # one of KINDS
    family: str
    language: str


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _halves(text: str) -> Halves:
    seen, _, unseen = text.partition("|")
    return _words(seen), _words(unseen)


def _pairs(verbs: Halves, objects: Halves, part: Part) -> list[str]:
    """Verb and object, joined, of one part of the world."""
    if part in ("train", "heldout"):
        side = 0 if part == "train" else 1
        return [f"{verb} {thing}" for verb in verbs[side] for thing in objects[side]]
    whole = [f"{verb} {thing}" for verb in chain(*verbs) for thing in chain(*objects)]
    hidden = _pairs(verbs, objects, "heldout") if part == "known" else ()
    return [text for text in whole if text not in hidden]


def _requests(texts: Sequence[str], kind: str, family: str, language: str) -> list[Request]:
    return [Request(text, kind, family, language) for text in texts]


def _of_a_world(world: World, kind: str, language: str, part: Part) -> tuple[Request, ...]:
    """Every verb with every object of its own family."""
    found = []
    for family, languages in world.items():
        verbs, objects = (_halves(words) for words in languages[language])
        found += _requests(_pairs(verbs, objects, part), kind, family, language)
    return tuple(found)


@cache
def harmful_requests(language: str, part: Part) -> tuple[Request, ...]:
    """Harmful headlines."""
    return _of_a_world(w.HARMFUL, "harmful", language, part)


@cache
def chore_requests(language: str, part: Part) -> tuple[Request, ...]:
    """Harmless how-to requests."""
    return _of_a_world(CHORES, "how-to", language, part)


@cache
def contrast_requests(language: str, part: Part) -> tuple[Request, ...]:
    """Safe requests with a harmful verb, a harmful object or a harmful theme."""
    found = []
    for verb, uses in w.VERB_CONTRASTS[language].items():
        held_out = "|" in uses
        verbs: Halves = ([], [verb]) if held_out else ([verb], [])
        found += _requests(_pairs(verbs, _halves(uses), part), "contrast", "verb", language)
    verbs = _halves(w.OBJECT_CONTRAST_VERBS[language])
    for category in w.OBJECT_CONTRAST_CATEGORIES:
        objects = _halves(w.HARMFUL[category][language][1])
        found += _requests(_pairs(verbs, objects, part), "contrast", "object", language)
    themes: Halves = ([], [])
    for category, theme in w.THEMES[language].items():
        themes[category in w.HELDOUT_THEMES].append(theme)
    protect = _pairs(_halves(w.PROTECT_VERBS[language]), themes, part)
    return tuple(found + _requests(protect, "contrast", "protection", language))


def heldout_words() -> list[str]:
    """The verbs and objects of chores and headlines that no stage-two request may use."""
    worlds = [world for table in (CHORES, w.HARMFUL) for world in table.values()]
    parts = [part for world in worlds for code in ("en", "fr") for part in world[code]]
    return [word for part in parts for word in _halves(part)[1]]
