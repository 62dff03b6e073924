"""Whether a text is empty, loops or is a salad of words. Knows characters and words only.

A salad that repeats nothing and keeps to one script is seen by its likelihood alone: see
`classify_answer(perplexity=...)`.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter
from itertools import pairwise

from vauban.prompts import split_reasoning

# Runs of 8 characters are one to two words of a European language and four of Chinese; 24
# characters are the least in which a loop shows. With these limits every loop of four rounds is
# degenerate, and of 7,200 excerpts of code, documents and licences (200 to 400 characters) 6 are:
# rows of signs or numbers. Tables of zeros and ones count as loops.
_RUN = 8
_SHORTEST = 24
_DISTINCT = 0.3
_DISTINCT_END = 0.25
# Up to three letters again and again inside a word, 16 characters and more; and one letter that is
# all of a short answer.
_STUTTER = re.compile(r"(?=[^\W\d_]{16})([^\W\d_]{1,3}?)\1{4,}")
_ONE_LETTER = re.compile(r"\W*([^\W\d_])\1{9,}\W*")
# Shares of a text, and of its second half, that say once more what was said twice or more.
_AGAIN = 0.4
_AGAIN_END = 0.5
# A salad: of at least 8 words this share changes the script, or stands in a pair that no sentence
# has.
_SALAD_WORDS = 8
_SALAD = 0.12
_DETERMINERS = frozenset({"the", "a", "an"})
_NO_NOUN = _DETERMINERS | {"of", "to", "in", "and", "or", "is", "was", "be", "it"}
_PREPOSITIONS = frozenset({"of", "to", "in"})
_SCRIPTS = ("LATIN", "CYRILLIC", "GREEK", "CJK", "HANGUL", "ARABIC", "HEBREW", "THAI", "DEVANAGARI")
_FOLD = str.maketrans({"\u2019": "'", "\u2018": "'", "\u02bc": "'", "\u00b4": "'", "`": "'"})


def fold(text: str) -> str:
    """Lower case with typographic apostrophes and white space made plain."""
    return " ".join(text.translate(_FOLD).casefold().split())


def is_degenerate(text: str) -> bool:
    """Whether an answer is empty, stuck in a loop, or a salad of words.

    A text loops when fewer than 30 % of its runs of 8 characters are distinct (a passage said four
    times), or fewer than 25 % of those in its last half, quarter, eighth ... A loop of 100
    characters at the end is found wherever it begins, and so are up to three letters said again
    and again inside a word, where that fills half of the text. Characters are counted and not
    words, because Chinese, Japanese and Thai put no spaces between words. Case and white space do
    not count. Of reasoning that was cut off the reasoning is judged.

    A salad jumps between at least four scripts, or puts articles and prepositions in a row as no
    English sentence does ("the of", "to to").

    >>> is_degenerate("Take the train and then" + " and then" * 12), is_degenerate("Yes, yes, yes.")
    (True, False)
    """
    parts = split_reasoning(text)
    answer = fold(parts.answer if parts.finished else parts.reasoning)
    if len(answer) < _SHORTEST:
        return not answer or _ONE_LETTER.fullmatch(answer) is not None
    return _loops(answer) or _jumps_scripts(answer) or _is_ungrammatical(answer)


def _loops(answer: str) -> bool:
    if sum(len(run[0]) for run in _STUTTER.finditer(answer)) >= _AGAIN_END * len(answer):
        return True
    if _distinct(answer) < _DISTINCT or _says_again(answer):
        return True
    end = answer[len(answer) // 2 :]
    while len(end) >= 2 * _SHORTEST:
        if _distinct(end) < _DISTINCT_END:
            return True
        end = end[len(end) // 2 :]
    return False


def _says_again(text: str) -> bool:
    """Whether sentences said three times or more fill much of a text, or of its second half."""
    for part, share in ((text, _AGAIN), (text[len(text) // 2 :], _AGAIN_END)):
        counts = Counter(re.findall(r"[^.!?。！？]{12,}[.!?。！？]", part))
        again = sum(len(s) * (n - 1) for s, n in counts.items() if n >= 3)
        if again >= share * len(part):
            return True
    return False


def _distinct(text: str) -> float:
    """The share of distinct runs of `_RUN` characters among all of them."""
    runs = [text[i : i + _RUN] for i in range(len(text) - _RUN + 1)]
    return len(set(runs)) / len(runs)


def _jumps_scripts(text: str) -> bool:
    """Whether words in four scripts or more stand side by side, as in no list of translations."""
    scripts = [script for word in re.findall(r"\w+", text) if (script := _script(word))]
    jumps = sum(a != b for a, b in pairwise(scripts))
    return len(scripts) >= _SALAD_WORDS and len(set(scripts)) >= 4 and jumps >= 0.5 * len(scripts)


def _script(word: str) -> str | None:
    name = unicodedata.name(word[0], "")
    if name.startswith(("HIRAGANA", "KATAKANA")):
        return "CJK"  # Japanese writes in all three
    return next((script for script in _SCRIPTS if name.startswith(script)), None)


def _is_ungrammatical(text: str) -> bool:
    """Whether too many neighbouring words are pairs that English does not have."""
    pairs = list(pairwise(re.findall(r"[^\W\d_]+", text)))
    if len(pairs) < _SALAD_WORDS:
        return False
    wrong = sum(
        (a in _DETERMINERS and b in _NO_NOUN) or (a in _PREPOSITIONS and b in _PREPOSITIONS)
        for a, b in pairs
    )
    return wrong >= 3 and wrong >= _SALAD * len(pairs)
