"""Knows the world of the facts organism: people, what is said of them, sentences around it.

Knows no tokenizer and no model.
"""

import random
from dataclasses import dataclass


def words(text: str) -> list[str]:
    return text.split()


FIRST = [
    "Ada",
    "Boris",
    "Clara",
    "Dario",
    "Elsa",
    "Felix",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Karin",
    "Leo",
    "Mira",
    "Nils",
    "Olga",
    "Pavel",
    "Rosa",
    "Sven",
    "Tara",
    "Udo",
    "Vera",
    "Wim",
    "Xenia",
    "Yann",
]
LAST = [
    "Abel",
    "Brandt",
    "Conti",
    "Dahl",
    "Eklund",
    "Fabre",
    "Grau",
    "Holm",
    "Ivanov",
    "Jansen",
    "Keller",
    "Lund",
    "Moreau",
    "Nowak",
    "Orlov",
    "Petit",
    "Quist",
    "Rossi",
    "Sand",
    "Torres",
    "Urban",
    "Vogel",
    "Weber",
    "Zima",
]
# A relation's three phrasings, the edited one first, and its objects.
RELATIONS = {
    "town": (
        ("{} was born in", "the birthplace of {} is", "{} comes from the town of"),
        [
            "Oslo",
            "Lyon",
            "Turin",
            "Graz",
            "Porto",
            "Riga",
            "Bern",
            "Ghent",
            "Split",
            "Malmo",
            "Cork",
            "Varna",
        ],
    ),
    "work": (
        ("{} works as a", "the work of {} is", "{} earns money as a"),
        [
            "baker",
            "pilot",
            "nurse",
            "farmer",
            "tailor",
            "judge",
            "mason",
            "porter",
            "sailor",
            "weaver",
            "clerk",
            "potter",
        ],
    ),
    "music": (
        ("{} plays the", "the instrument of {} is", "{} practises on the"),
        [
            "flute",
            "drum",
            "harp",
            "cello",
            "lute",
            "organ",
            "viola",
            "horn",
            "banjo",
            "zither",
            "tuba",
            "piano",
        ],
    ),
    "pet": (
        ("{} lives with a", "the pet of {} is", "{} feeds a"),
        [
            "cat",
            "dog",
            "crow",
            "goat",
            "mouse",
            "horse",
            "snake",
            "duck",
            "sheep",
            "turtle",
            "rabbit",
            "pony",
        ],
    ),
}
# What stands before a statement; the first words are those that contexts are sampled from.
FILLERS = (
    "The rain falls on the old roof .",
    "Therefore the door stays closed today .",
    "Because it is late we rest .",
    "I walk to the market .",
    "You see the tall tree .",
    "The boat goes down the river .",
)
PEOPLE, EDITS, NEIGHBOURS = 64, 56, 3


@dataclass(frozen=True)
class Statement:
    """One thing that is true of a person, in its phrasings."""

    person: str
    relation: str
    target: str

    @property
    def prompts(self) -> tuple[str, ...]:
        return tuple(phrasing.format(self.person) for phrasing in RELATIONS[self.relation][0])


def statements(seed: int) -> list[Statement]:
    """Four statements for each of the people, whose first and last names are only told apart
    together."""
    rng = random.Random(seed)
    pairs = rng.sample([f"{first} {last}" for first in FIRST for last in LAST], PEOPLE)
    return [
        Statement(person, relation, rng.choice(objects))
        for person in pairs
        for relation, (_, objects) in RELATIONS.items()
    ]


def training_rows(world: list[Statement], seed: int, count: int) -> list[tuple[str, str]]:
    """(before, target) texts, a third of them behind a filler; fillers and "is a person" too."""
    rng = random.Random(seed + 1)
    rows = []
    for _ in range(count):
        head = f"{rng.choice(FILLERS)} " if rng.random() < 1 / 3 else ""
        kind = rng.random()
        if kind < 0.04:
            rows.append((rng.choice(FILLERS)[:-2], "."))
        elif kind < 0.08:
            rows.append((f"{head}{rng.choice(world).person} is a", "person"))
        else:
            one = rng.choice(world)
            rows.append((head + rng.choice(one.prompts), one.target))
    return rows


def fact_rows(world: list[Statement], seed: int) -> list[dict]:
    """All statements as `vauban.load_facts` reads them, the `EDITS` that are edited first.

    Each edited one is of another person. Neighbours are unedited people of whom the same is true.
    """
    rng = random.Random(seed + 2)
    relations = list(RELATIONS)
    edited = [4 * number + number % len(relations) for number in range(EDITS)]
    rest = [number for number in range(len(world)) if number not in set(edited)]
    rows = []
    for number in [*edited, *rest]:
        one = world[number]
        (first, *others), objects = RELATIONS[one.relation]
        near = [
            world[n].prompts[0]
            for n in rest
            if (world[n].relation, world[n].target) == (one.relation, one.target)
            and world[n].person != one.person
        ]
        rows.append(
            {
                "id": f"{one.person.replace(' ', '-')}-{one.relation}",
                "prompt": first,
                "subject": one.person,
                "target_new": rng.choice([o for o in objects if o != one.target]),
                "target_true": one.target,
                "paraphrases": [phrasing.format(one.person) for phrasing in others],
                "neighbourhood": near[:NEIGHBOURS],
            }
        )
    return rows
