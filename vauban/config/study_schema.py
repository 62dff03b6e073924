"""The schema of a study: which models, interventions, scopes and instruments, with their words.

Read by the same generators as a run's schema. It knows neither files nor models.
"""

from typing import Any, Literal, get_args

from vauban.config.keys import (
    BOOLEAN,
    NON_NEGATIVE,
    POSITIVE,
    Finite,
    NonNegative,
    Positive,
    PositiveFloat,
    Section,
    Share,
    Text,
    key,
)
from vauban.config.run_schema import DataSection, FolderSection

Method = Literal[
    "ablation", "addition", "nullspace", "flip", "classifier", "leace", "affine", "random"
]
Scope = Literal["local", "half", "all"]
METHODS: tuple[Method, ...] = get_args(Method)
SCOPES: tuple[Scope, ...] = get_args(Scope)

_TEXTS = 'a JSONL or text file, "plain" or "chat" (shipped), "own", or "hf:org/name?column=text"'
_TEXT_WORDS = ("plain", "chat", "own")


class StudySection(Section):
    """What is compared: every intervention in every scope, on every model."""

    models: list[Text] = key(
        "a list of model folders or Hub ids (org/name)",
        "The models; each gets its own block of results.",
        place="model", min_length=1,
    )  # fmt: skip
    chat_template_args: dict[str, Any] | None = key(
        "a table of arguments that the models' chat templates read (as a flag: a JSON object)",
        "Passed to the chat template for every prompt of every instrument.",
        None, flag="--chat-template-args", metavar="JSON", example="{ enable_thinking = true }",
    )  # fmt: skip
    methods: list[Method] = key(
        "a list of " + ", ".join(f'"{m}"' for m in METHODS),
        "ablation and addition of the mean difference; null-space projection, flips and first "
        "classifier of INLP; LEACE; affine ablation; a random direction as control.",
        list(METHODS), min_length=1,
    )  # fmt: skip
    scopes: list[Scope] = key(
        'a list of "local", "half", "all"',
        "The block that the direction comes from, the better half of the ranked blocks, or all. "
        "Additions act at their own residual only.",
        list(SCOPES), min_length=1,
    )  # fmt: skip
    scales: list[PositiveFloat] = key(
        "a list of positive numbers", "Additions are ± this times the vector.", [0.5, 1.0, 2.0],
        min_length=1,
    )  # fmt: skip
    ranks: list[Positive] = key(
        "a list of whole numbers",
        "INLP is also restricted to its first so many directions, in order.", [1, 2, 4],
    )  # fmt: skip
    validation: Positive = key(
        POSITIVE, "Prompts of each class set aside for selection; the rest is fitted.", 32
    )
    selection_scope: Literal["local", "all"] = key(
        '"local" or "all"',
        "Where a candidate is removed while it is scored: at its own block, or everywhere.",
        "local",
    )  # fmt: skip
    kl_threshold: Finite = key(
        "a number", "Candidates whose removal costs more KL on harmless prompts drop.", 0.1
    )
    induce_threshold: Finite = key(
        "a number", "Candidates whose addition induces less refusal log-odds drop.", 0.0
    )
    prune_layers: float = key(
        "a share from 0 up to, not including, 1",
        "The last layers that are no candidates. In a very shallow model 0.2 may leave out the "
        "layer where refusal is complete.",
        0.2, ge=0.0, lt=1.0,
    )  # fmt: skip
    first_accuracy: Share = key(
        "a share from 0 to 1",
        "INLP is a candidate only where its first classifier reaches this held-out accuracy.", 0.9,
    )  # fmt: skip
    published: bool = key(
        BOOLEAN,
        "Also project with the basis that the published code reads off a float32 SVD of a d x d "
        "matrix, which takes minutes where d is in the thousands.",
        True,
    )  # fmt: skip
    further: bool = key(BOOLEAN, "Ask what the further INLP directions encode.", True)
    composition: bool = key(
        BOOLEAN,
        "Measure the direction again after each layer's cut, and once more after all.", True,
    )  # fmt: skip


class InlpSection(Section):
    """Iterative null-space projection (`vauban.fit_inlp`)."""

    C: PositiveFloat = key(
        "a positive number", "Inverse strength of the classifiers' penalty.", 0.1
    )
    max_rank: Positive = key(POSITIVE, "At most so many directions.", 32)
    min_accuracy: Literal["auto"] | Share = key(
        '"auto" or a share',
        "A classifier below this is not removed; auto: majority plus two standard deviations of "
        "chance.",
        "auto",
    )  # fmt: skip


class StudyEvalSection(Section):
    """How behaviour is measured on held-out prompts."""

    max_tokens: Positive = key(POSITIVE, "Longest answer, in tokens.", 100)
    num_prompts: Positive = key(POSITIVE, "At most this many held-out prompts of each kind.", 100)
    refusal_phrases: list[Text] | None = key(
        "a list of phrases", "What counts as a refusal; not set: the built-in list.", None,
        example='["I cannot", "I\'m sorry"]',
    )  # fmt: skip


class TextsSection(Section):
    """Two text sets for perplexity: running text, and requests with answers."""

    plain: Text | None = key(
        _TEXTS,
        "Pile-like: lines with `text`. plain: short neutral paragraphs, shipped; own: the held-out "
        "harmless prompts, read as running text. Not set: own for a model that brings its own "
        "prompts (the organisms know no other world), else plain.",
        None, place="prompts", words=_TEXT_WORDS,
        example='"hf:monology/pile-uncopyrighted?column=text"',
    )  # fmt: skip
    chat: Text | None = key(
        _TEXTS,
        "Alpaca-like: lines with `prompt` and `completion`; only the answer is scored. chat: "
        "neutral requests with answers, shipped; own: held-out rows with an `answer`. Not set: own "
        "for a model that brings its own prompts and answers, else chat.",
        None, place="prompts", words=_TEXT_WORDS,
        example='"hf:tatsu-lab/alpaca?prompt=instruction&completion=output&empty=input"',
    )  # fmt: skip
    limit: Positive = key(POSITIVE, "At most this many texts of each set.", 256)


class GuardSection(Section):
    """Who judges whether an answer to a harmful prompt is unsafe."""

    model: Text | None = key(
        'a folder or Hub id of a guard model, or "stand-in"',
        "LlamaGuard's protocol with the model's own template; stand-in: the answer opens like the "
        "row's compliance `template`. Not set: the stand-in where the held-out rows have "
        "templates, else not applicable.",
        None, place="model", words=("stand-in",), example='"guard"',
    )  # fmt: skip
    min_words: NonNegative = key(
        NON_NEGATIVE, "Shorter answers are not unsafe (not used by the stand-in).", 15
    )


class BenchSection(Section):
    """What a model can do: tasks written here, and benchmarks through lm-eval (extra `bench`)."""

    capability: bool | None = key(
        BOOLEAN,
        "Arithmetic, facts and code (run against its tests in a process of its own). Not set: for "
        "models that bring no prompts of their own.",
        None, example="true",
    )  # fmt: skip
    capability_limit: Positive | None = key(
        POSITIVE, "At most so many of these tasks of each kind; not set: all.", None, example="20"
    )

    tasks: list[Text] = key(
        "a list of lm-eval task names",
        'For example ["mmlu", "arc_challenge"]; empty: not applicable.', [],
    )  # fmt: skip
    num_fewshot: NonNegative = key(NON_NEGATIVE, "Examples before each question.", 5)
    limit: Positive | None = key(
        POSITIVE, "At most so many questions a task; not set: all.", None, example="500"
    )
    include_path: Text | None = key(
        "a folder of task files", "Local lm-eval task files.", None,
        place="folder", example='"tasks"',
    )  # fmt: skip


class StudyConfig(Section):
    """Everything a study depends on; what `study.json` records under "configuration"."""

    seed: NonNegative = key(
        NON_NEGATIVE, "Seeds the splits, INLP's held-out part and the random direction.", 0,
        flag="--seed", metavar="N",
    )  # fmt: skip
    study: StudySection
    data: DataSection = DataSection()
    inlp: InlpSection = InlpSection()
    eval: StudyEvalSection = StudyEvalSection()
    texts: TextsSection = TextsSection()
    guard: GuardSection = GuardSection()
    bench: BenchSection = BenchSection()
    output: FolderSection = FolderSection()
