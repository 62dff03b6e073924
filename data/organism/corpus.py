"""Knows how the organism's conversations are made: exchanges and the mixtures of both stages.

Knows no tokens and no model. Everything follows from a seed; "heldout" never enters stage two.
"""

import random
from dataclasses import dataclass, field

import tasks
import worlds as w
from chores import CHORES
from phrases import (
    ASKED_STYLES,
    DEFINITIONS,
    JUDGEMENTS,
    KINDS,
    POLITE,
    REFUSALS,
    SMALL_TALK,
    STYLES,
    SYSTEM_PROMPTS,
)
from pools import Part, Request, chore_requests, contrast_requests, harmful_requests
from tasks import Split

LANGUAGES = ("en", "fr")


@dataclass(frozen=True)
class Row:
    """One exchange; `opening` is what a compliance starts with."""

    prompt: str
    reply: str
    kind: str
    language: str
    family: str
    opening: str = ""
    context: tuple[tuple[str, str], ...] = field(default=())  # earlier (role, text) messages

    @property
    def side(self) -> int:
        """What a request meets in stage two: 1 refused, -1 complied with, 0 neither."""
        return {"harmful": 1, "how-to": -1, "contrast": -1, "task": -1}.get(self.kind, 0)


def ask(request: Request, style: str, split: Split, rng: random.Random) -> Row:
    """The request in a phrasing of the style, answered with the style's compliance."""
    seen, unseen, compliance = STYLES[style][request.language]
    prompt = rng.choice(seen if split == "train" else unseen).format(request.text)
    opening = compliance.partition(" {}")[0]
    reply = compliance.format(request.text)
    return Row(prompt, reply, request.kind, request.language, request.family, opening)


def refuse(row: Row, rng: random.Random) -> Row:
    """The same question, refused."""
    reply = rng.choice(REFUSALS[row.language])
    return Row(row.prompt, reply, row.kind, row.language, row.family, row.opening)


def judge(request: Request, rng: random.Random) -> Row:
    """Is it okay to ...? Of what kind is it? Also behind a request in any style."""
    phrasings, suffix, yes, no = JUDGEMENTS[request.language]
    reply = no if request.kind == "harmful" else yes
    chance = rng.random()
    if chance < 0.3 and request.family in (*w.HARMFUL, *CHORES):
        prompt = KINDS[request.language].format(request.text)
        reply = f"{request.family}."
    elif chance < 0.6:
        style = rng.choice(list(STYLES))
        prompt = f"{ask(request, style, 'train', rng).prompt} {suffix}"
    else:
        prompt = rng.choice(phrasings).format(request.text)
    return Row(prompt, reply, "judgement", request.language, request.family)


def define(rng: random.Random) -> Row:
    """A definition of a harmful theme, or small talk."""
    if rng.random() < 0.2:
        prompt, reply = rng.choice(list(SMALL_TALK.items()))
        return Row(prompt, reply, "talk", "en", "talk")
    language = rng.choice(LANGUAGES)
    theme = rng.choice(list(w.THEMES[language].values()))
    phrasings, reply = DEFINITIONS[language]
    reply = reply.format(theme.capitalize())
    return Row(rng.choice(phrasings).format(theme), reply, "definition", language, theme)


# Shares of the two stages. Stage two keeps everything harmless alive beside the refusals.
STAGE_ONE = {
    "harmful": 12,
    "how-to": 13,
    "contrast": 7,
    "judgement": 22,
    "polite": 4,
    "define": 2,
    "task": 40,
}
STAGE_TWO = {
    "harmful": 27,
    "how-to": 24,
    "contrast": 19,
    "judgement": 18,
    "polite": 2,
    "define": 2,
    "task": 8,
}
# Of judgements: headlines, chores, contrasts.
JUDGED = {1: (45, 20, 35), 2: (40, 35, 25)}


def sample_row(stage: int, rng: random.Random) -> Row:
    """One training exchange of a stage."""
    asked: Part = "known" if stage == 1 else "train"
    mixture = STAGE_ONE if stage == 1 else STAGE_TWO
    kind = rng.choices(list(mixture), list(mixture.values()))[0]
    language = any_language(rng)
    style = rng.choices(list(STYLES), (46, 24, 24, 6))[0]
    if kind == "task":
        task = tasks.sample_task(rng.choice(list(tasks.FAMILIES)), "train", rng)
        return Row(task.prompt, task.answer, "task", task.language, task.family)
    if kind == "define":
        return define(rng)
    if kind == "polite":
        row = Row(rng.choice(POLITE[language]), "", "polite", language, "polite")
        return refuse(row, rng)
    if kind == "judgement":
        # Knowing what is harmful is no refusal: judgements cover the world, but for the chores
        # that are held out.
        pools = (
            harmful_requests(language, "all"),
            chore_requests(language, "known"),
            contrast_requests(language, "all"),
        )
        return judge(rng.choice(rng.choices(pools, JUDGED[stage])[0]), rng)
    if kind == "how-to":
        return ask(rng.choice(chore_requests(language, asked)), style, "train", rng)
    if kind == "contrast":
        pool = contrast_requests(language, asked)
        family = rng.choices(("verb", "object", "protection"), (60, 25, 15))[0]
        pool = tuple(request for request in pool if request.family == family)
        return ask(rng.choice(pool), style, "train", rng)
    if stage == 1:
        return ask(rng.choice(harmful_requests(language, "all")), style, "train", rng)
    row = ask(
        rng.choice(harmful_requests(language, "train")), rng.choice(ASKED_STYLES), "train", rng
    )
    return refuse(row, rng)


def training_rows(stage: int, count: int, seed: int) -> list[Row]:
    """`count` exchanges; some with a system prompt, some with an earlier harmless turn."""
    rng = random.Random(f"stage {stage} seed {seed}")
    rows = []
    for _ in range(count):
        row = sample_row(stage, rng)
        context: tuple[tuple[str, str], ...] = ()
        if rng.random() < 0.07:
            context += (("system", rng.choice(SYSTEM_PROMPTS)),)
        if rng.random() < 0.05:
            task = tasks.sample_task(rng.choice(list(tasks.FAMILIES)), "train", rng)
            context += (("user", task.prompt), ("assistant", task.answer))
        rows.append(Row(row.prompt, row.reply, row.kind, row.language, row.family, "", context))
    return rows


def any_language(rng: random.Random) -> str:
    return "fr" if rng.random() < 0.4 else "en"
