"""Knows the checkable tasks: families, their phrasings, their items and which are held out.

Knows no chores, no refusals, no tokens and no model.
"""

import random
from dataclasses import dataclass
from typing import Literal

import facts as f

Split = Literal["train", "heldout"]


@dataclass(frozen=True)
class Task:
    family: str
    language: str
    prompt: str
    answer: str


# A phrasing is a frame around a family's noun phrase. Every family holds two frames out, a
# different two from family to family, so each frame is known, but not with this family.
FRAMES = {
    "en": ["What is {}?", "Give {}.", "Tell me {}.", "Name {}.", "{}?", "I need {}.",
           "Write {}.", "Can you tell me {}?", "Say {}.", "Find {}."],
    "fr": ["Donne {}.", "Dis-moi {}.", "{} ?", "Je cherche {}.", "Trouve {}.",
           "Peux-tu donner {} ?", "Il me faut {}.", "Écris {}."],
}  # fmt: skip

# family: (language, noun phrase, further phrasings seen in training). Facts are to be memorised,
# so their items are shared and the phrasing is new; combinations (first, last, larger) hold
# out items as well.
FAMILIES: dict[str, tuple[str, str, list[str]]] = {
    "opposite": ("en", "the opposite of {}", ["Which word is the opposite of {}?"]),
    "opposite_fr": ("fr", "le contraire de {}", ["Quel est le contraire de {} ?"]),
    "plural": ("en", "the plural of {}", ["Put {} in the plural."]),
    "plural_fr": ("fr", "le pluriel de {}", ["Mets {} au pluriel."]),
    "past": ("en", "the past tense of {}", ["Put {} in the past tense."]),
    "to_french": ("en", "the French word for {}", ["How do you say {} in French?"]),
    "to_english": ("fr", "le mot anglais pour {}", ["Comment dit-on {} en anglais ?"]),
    "capital": ("en", "the capital of {}", ["Which city is the capital of {}?"]),
    "capital_fr": ("fr", "la capitale {}", ["Quelle ville est la capitale {} ?"]),
    "colour": ("en", "the colour of {}", ["Which colour is {}?"]),
    "colour_fr": ("fr", "la couleur {}", ["Quelle est la couleur {} ?"]),
    "category": ("en", "the category of {}", ["Which group does {} belong to?"]),
    "young": ("en", "the name of a baby {}", ["What do you call a young {}?"]),
    "next_day": ("en", "the day after {}", ["Today is {}. What day is tomorrow?"]),
    "previous_day": ("en", "the day before {}", ["Today is {}. What day was yesterday?"]),
    "next_month": ("en", "the month after {}", ["It is {}. What is the next month?"]),
    "next_day_fr": ("fr", "le jour après {}", ["Quel jour vient après {} ?"]),
    "next_month_fr": ("fr", "le mois après {}", ["Quel mois vient après {} ?"]),
    "next_number": ("en", "the number after {}", ["Count on from {}."]),
    "sum": ("en", "the sum of {}", ["Add {}."]),
    "copy": ("en", "this word again: {}", ["Repeat the word {}."]),
    "first": ("en", "the first word of {}", ["Which word comes first in {}?"]),
    "last": ("en", "the last word of {}", ["Which word comes last in {}?"]),
    "larger": ("en", "the larger of {}", ["Which is larger, {}?"]),
}


def phrasings(family: str, split: Split) -> list[str]:
    """The phrasings of a family on one side of the split, each with one slot."""
    language, noun, further = FAMILIES[family]
    frames = FRAMES[language]
    number = list(FAMILIES).index(family)
    out = {(number + 1) % len(frames), (number + 1 + len(frames) // 2) % len(frames)}
    if split == "heldout":
        return [frames[i].format(noun) for i in sorted(out)]
    return [frame.format(noun) for i, frame in enumerate(frames) if i not in out] + further


def _article(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


def _items(family: str) -> dict[str, str]:
    """All items of a family whose items are few: {text that fills the phrasing: answer}."""
    following = {
        "next_day": f.DAYS,
        "next_month": f.MONTHS,
        "next_day_fr": f.DAYS_FR,
        "next_month_fr": f.MONTHS_FR,
    }
    tables = {
        "opposite": f.OPPOSITES, "opposite_fr": f.OPPOSITES_FR, "plural": f.PLURALS,
        "plural_fr": f.PLURALS_FR, "past": f.PAST, "to_french": f.TRANSLATIONS,
        "capital": f.CAPITALS, "capital_fr": f.CAPITALS_FR, "colour_fr": f.COLOURS_FR,
        "young": f.YOUNG,
    }  # fmt: skip
    if family in tables:
        return tables[family]
    if family in following:
        ring = following[family]
        return {word: ring[(i + 1) % len(ring)] for i, word in enumerate(ring)}
    if family == "previous_day":
        return {day: f.DAYS[i - 1] for i, day in enumerate(f.DAYS)}
    if family == "to_english":
        return {french: english for english, french in f.TRANSLATIONS.items()}
    if family == "colour":
        return {_article(thing): colour for thing, colour in f.COLOURS.items()}
    if family == "category":
        bare = ("colour", "number")
        return {
            word if kind in bare else _article(word): kind
            for kind, words in f.CATEGORIES.items()
            for word in words
        }
    if family == "next_number":
        return {str(n): str(n + 1) for n in range(1, 50)}
    if family == "sum":
        return {f"{a} and {b}": str(a + b) for a in range(1, 7) for b in range(1, 7)}
    if family == "larger":
        rows = {}
        for i, small in enumerate(f.SIZES):
            for large in f.SIZES[i + 2 :]:
                rows[f"{_article(small)} and {_article(large)}"] = large
                rows[f"{_article(large)} and {_article(small)}"] = large
        return rows
    if family == "copy":
        return {word: word for word in f.WORDS}
    raise KeyError(family)


def _listing(family: str, split: Split, rng: random.Random) -> tuple[str, str]:
    """Three words; a list is held out when the ring distance of its first two words says so."""
    while True:
        words = rng.sample(f.WORDS, 3)
        gap = (f.WORDS.index(words[0]) - f.WORDS.index(words[1])) % len(f.WORDS)
        if (gap % 5 == 0) == (split == "heldout"):
            return ", ".join(words), words[0 if family == "first" else 2]


def sample_task(family: str, split: Split, rng: random.Random) -> Task:
    """One task of a family; "heldout" takes unseen phrasings, and unseen items where split."""
    language = FAMILIES[family][0]
    phrasing = rng.choice(phrasings(family, split))
    if family in ("first", "last"):
        text, answer = _listing(family, split, rng)
    else:
        rows = list(_items(family).items())
        if family == "larger":
            rows = [r for i, r in enumerate(rows) if (i // 2 % 6 == 5) == (split == "heldout")]
        text, answer = rng.choice(rows)
    prompt = phrasing.format(text)
    return Task(family, language, prompt[0].upper() + prompt[1:], f"{answer}.")
