"""The schema of an edit of facts: which facts, how they are edited, where the model goes.

Read by the same generators as a run's schema; its [edit] keys are the fields of
`vauban.EditSettings`. It knows neither files nor models.
"""

from typing import Literal

from vauban.config.keys import (
    BOOLEAN,
    NON_NEGATIVE,
    POSITIVE,
    NonNegative,
    NonNegativeFloat,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Text,
    key,
)
from vauban.config.run_schema import FolderSection, ModelSection

_METHODS = "memit_seq, memit, alphaedit, encore, betaedit, ridge, rome or emmet"
_AUTO = '"auto" or a number above 0'
_NUMBER = "a number above 0"


class EditSection(Section):
    """Which facts are edited, and how (`vauban.EditSettings`)."""

    facts: Text = key(
        "a JSON or JSONL file of facts", "The facts, as `vauban.load_facts` reads them.",
        place="file", example='"facts.jsonl"',
    )  # fmt: skip
    texts: Text = key(
        'a JSONL or text file, "facts" or "plain" (shipped), or "written"',
        "Texts for the second moment of the keys: what the model is to keep. facts: statements "
        "about people, places and products; written: the model writes them.",
        "facts", flag="--texts", metavar="FILE", place="prompts",
        words=("facts", "plain", "written"),
    )  # fmt: skip
    method: Literal[
        "memit_seq", "memit", "alphaedit", "encore", "betaedit", "ridge", "rome", "emmet"
    ] = key(_METHODS, "The rule of the update.", "memit_seq", flag="--method", metavar="NAME")
    layers: Literal["auto"] | list[NonNegative] = key(
        '"auto" or a list of ascending block indices',
        "The blocks that are edited, the last one is where values are trained; auto traces.",
        "auto", flag="--layers", metavar="S",
    )  # fmt: skip
    steps: Positive = key(
        POSITIVE, "Steps that train a value, at most.", 25, flag="--steps", metavar="N"
    )
    lr: PositiveFloat = key(_NUMBER, "The step's size.", 0.5, flag="--lr", metavar="X")
    weight_decay: NonNegativeFloat = key(
        "a number, 0 or more", "What the size of a value's change costs.", 0.5
    )
    kl_factor: NonNegativeFloat = key(
        "a number, 0 or more", "What a change of what the subject is costs.", 0.0625
    )
    keep: NonNegative = key(
        NON_NEGATIVE,
        "Ways in which the model goes on after the subject that are to stay as likely, so that "
        "what else it knows of the subject stays; each costs what kl_factor says.",
        8, flag="--keep", metavar="N",
    )  # fmt: skip
    clamp: PositiveFloat = key(
        _NUMBER, "The longest change of a value, as a multiple of the stream's norm.", 0.75,
        flag="--clamp", metavar="X",
    )  # fmt: skip
    lam: Literal["auto"] | PositiveFloat = key(
        _AUTO, "Strength of the penalty on what plain text reads; auto follows the keys' width.",
        "auto", flag="--lam", metavar="X",
    )  # fmt: skip
    lam_n: PositiveFloat = key(_NUMBER, "Strength of encore's plain ridge.", 20.0)
    tau: PositiveFloat = key(
        _NUMBER, "Directions with at least this second moment are protected (alphaedit, betaedit, "
        "filter project).", 0.02, flag="--tau", metavar="X",
    )  # fmt: skip
    rank: Positive | None = key(
        POSITIVE, "So many directions are protected, instead of tau.", None, example="64"
    )
    energy: Share | None = key(
        "a number from 0 to 1", "The directions with this share of the second moment are "
        "protected, instead of tau.", None, example="0.9",
    )  # fmt: skip
    l2: Literal["auto"] | PositiveFloat = key(
        _AUTO, "Strength of alphaedit's, betaedit's and ridge's plain ridge.", "auto",
        flag="--l2", metavar="X",
    )  # fmt: skip
    stop: Literal["loss", "argmax"] = key(
        '"loss" or "argmax"',
        "A value is learnt at a loss of 0.05, or when its target is the likeliest answer.", "loss",
    )  # fmt: skip
    norm_anchor: bool = key(BOOLEAN, "Scale what the MLP is to write to its mean size.", False)
    batch_size: Positive = key(
        POSITIVE, "Facts that are solved together.", 10, flag="--batch-size", metavar="N"
    )
    filter: Literal["rect", "prune", "sphere", "project"] | None = key(
        '"rect", "prune", "sphere" or "project"', "What an update goes through before it is added.",
        None, flag="--filter", metavar="NAME", example='"sphere"',
    )  # fmt: skip
    evaluate: bool = key(
        BOOLEAN, "Ask for the facts before, and from the written folder after.", True,
        flag="--evaluate",
    )  # fmt: skip


class FactsOutput(FolderSection):
    """Where the edited model goes, and in which format."""

    precision: Literal["same", "8bit", "float"] = key(
        '"same", "8bit" or "float"',
        "How edited matrices are stored: packed as the source's, where the edits survive that; "
        "with 8 bits; in float.",
        "same", flag="--precision", metavar="P",
    )  # fmt: skip


class EditConfig(Section):
    """Everything an edit of facts depends on."""

    seed: NonNegative = key(
        NON_NEGATIVE, "Seeds contexts and the texts that the model writes.", 0,
        flag="--seed", metavar="N",
    )  # fmt: skip
    model: ModelSection
    edit: EditSection
    output: FactsOutput = FactsOutput()

    def conflict(self) -> tuple[tuple[str, ...], str] | None:
        """Two bounds on what is protected."""
        if self.edit.rank is not None and self.edit.energy is not None:
            return ("edit", "energy"), "and rank is given too; expected one of them"
        return None
