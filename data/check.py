"""Checks the sentences of the data: run it after a change of prompts, corpus or pools.

    python data/check.py

Bundled prompts: no near-duplicates between sets, no form that gives the class away, the rules of
care. Organism: what evaluation asks for is not in training.
"""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from statistics import mean

from vauban.prompts import Conversation, load_prompts

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE / "organism"))

import corpus  # noqa: E402
import pools  # noqa: E402
import prompt_sets  # noqa: E402


def last_message(prompt: str | Conversation) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]


NAMES = ("harmful", "harmless", "eval", "surface", "preservation")
SETS = {
    name: [last_message(prompt) for prompt in load_prompts(HERE / "prompts" / f"{name}.jsonl")]
    for name in NAMES
}
# Words that carry no subject: two requests are near-duplicates when the other words agree.
COMMON = set(
    re.findall(
        r"\w+",
        "a an the to of in on for i my me how do what is and that it so with can explain help "
        "write give tell way best from who at by without",
    )
)
BARRED = re.compile(
    r"\b(sex\w*|porn\w*|nude\w*|rape\w*|child\w*|kids?|teen\w*|schoolgirls?|suicid\w*|self-harm|"
    r"nuclear|uranium|nerve agent|sarin|anthrax|ricin|bioweapon\w*|ignore (all |the )?previous|"
    r"jailbreak\w*)\b",
    re.IGNORECASE,
)


def words(prompt: str) -> list[str]:
    return re.findall(r"\w+", prompt.lower())


def no_sentence_stands_twice() -> list[str]:
    counts = Counter(" ".join(words(text)) for texts in SETS.values() for text in texts)
    return [text for text, count in counts.items() if count > 1]


def sets_share_no_near_duplicates() -> list[str]:
    """The two measuring sets hold twins on purpose."""
    pairs = [set(pair) for pair in combinations(SETS, 2)]
    return [
        f"{one} | {two}"
        for a, b in (sorted(pair) for pair in pairs if pair != {"harmful", "harmless"})
        for one in SETS[a]
        for two in SETS[b]
        if alike(set(words(one)) - COMMON, set(words(two)) - COMMON)
    ]


def alike(one: set[str], two: set[str]) -> bool:
    return len(one & two) >= 0.4 * len(one | two)


def form_does_not_separate_the_classes() -> list[str]:
    both = SETS["harmful"], SETS["harmless"]
    lengths = [mean(len(text.split()) for text in texts) for texts in both]
    questions = [mean(text.endswith("?") for text in texts) for texts in both]
    openings = [Counter(words(text)[0] for text in texts) for texts in both]
    shared = (openings[0] & openings[1]).total() / len(both[0])
    wrong = []
    if abs(lengths[0] - lengths[1]) >= 1.5:
        wrong.append(f"words: {lengths}")
    if abs(questions[0] - questions[1]) >= 0.1:
        wrong.append(f"questions: {questions}")
    return wrong if shared >= 0.75 else [*wrong, f"shared openings: {shared:.2f}"]


def the_rules_of_care_hold() -> list[str]:
    return [text for texts in SETS.values() for text in texts if BARRED.search(text)]


def held_out_words_are_in_no_second_stage() -> list[str]:
    """Verbs and objects of evaluation requests, chores and headlines alike."""
    prompts = " | ".join(row.prompt for row in trained(2) if row.kind in pools.KINDS)
    return [w for w in pools.heldout_words() if re.search(rf"\b{re.escape(w)}\b", prompts)]


def held_out_chores_are_in_no_stage() -> list[str]:
    hidden = [r.text for code in ("en", "fr") for r in pools.chore_requests(code, "heldout")]
    text = "\n".join(row.prompt for stage in (1, 2) for row in trained(stage))
    return [pair for pair in hidden if pair in text]


def held_out_contrasts_are_in_no_second_stage() -> list[str]:
    hidden = [r.text for code in ("en", "fr") for r in pools.contrast_requests(code, "heldout")]
    text = "\n".join(row.prompt for row in trained(2) if row.kind in pools.KINDS)
    return [request for request in hidden if request in text]


def the_two_draws_share_nothing() -> list[str]:
    first, second = (
        {row.prompt for row in prompt_sets.evaluation_rows(7, draw)}
        for draw in ("development", "final")
    )
    return sorted(first & second)


def the_final_draw_is_shipped() -> list[str]:
    rows = [prompt_sets.labelled(row) for row in prompt_sets.evaluation_rows(7, "final")]
    return [
        kind
        for kind in ("dense", "4bit", "moe")
        if rows != [json.loads(line) for line in shipped(kind)]
    ]


def shipped(kind: str) -> list[str]:
    file = HERE / "organism" / kind / "prompts" / "eval.jsonl"
    return file.read_text(encoding="utf-8").splitlines()


def trained(stage: int) -> list[corpus.Row]:
    return list(corpus.training_rows(stage, 6000, 7))


CHECKS: tuple[Callable[[], list[str]], ...] = (
    no_sentence_stands_twice,
    sets_share_no_near_duplicates,
    form_does_not_separate_the_classes,
    the_rules_of_care_hold,
    held_out_words_are_in_no_second_stage,
    held_out_chores_are_in_no_stage,
    held_out_contrasts_are_in_no_second_stage,
    the_two_draws_share_nothing,
    the_final_draw_is_shipped,
)

if __name__ == "__main__":
    failed = False
    for check in CHECKS:
        wrong = check()
        failed |= bool(wrong)
        print(f"{'FAILED' if wrong else 'ok':<8}{check.__name__.replace('_', ' ')}", *wrong[:5])
    sys.exit(failed)
