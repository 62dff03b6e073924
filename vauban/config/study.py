"""The schema of a study: which models, interventions, scopes and instruments, with their words.

Read by the same generators as a run's schema. It knows neither files nor models.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from vauban.config.schema import DataSection, FolderSection
from vauban.config.settings import Finite, NonNegative, Section, Setting, Text

Method = Literal[
    "ablation", "addition", "nullspace", "flip", "classifier", "leace", "affine", "random"
]
Scope = Literal["local", "half", "all"]
METHODS: tuple[Method, ...] = (
    "ablation", "addition", "nullspace", "flip", "classifier", "leace", "affine", "random",
)  # fmt: skip
SCOPES: tuple[Scope, ...] = ("local", "half", "all")

TEXT_WORDS = ("plain", "chat", "own")
_TEXTS = 'a JSONL or text file, "plain" or "chat" (shipped), "own", or "hf:org/name?column=text"'


class StudySection(Section):
    """What is compared: every intervention in every scope, on every model."""

    models: Annotated[
        list[Text],
        Setting("a list of model folders or Hub ids (org/name)", place="model"),
    ] = Field(min_length=1, description="The models; each gets its own block of results.")
    methods: Annotated[
        list[Method], Setting("a list of " + ", ".join(f'"{m}"' for m in METHODS))
    ] = Field(
        default=list(METHODS),
        min_length=1,
        description="ablation and addition of the mean difference; null-space projection, flips "
        "and first classifier of INLP; LEACE; affine ablation; a random direction as control.",
    )
    scopes: Annotated[list[Scope], Setting('a list of "local", "half", "all"')] = Field(
        default=list(SCOPES),
        min_length=1,
        description="The block that the direction comes from, the better half of the ranked "
        "blocks, or all. Additions act at their own residual only.",
    )
    scales: Annotated[
        list[Annotated[float, Field(gt=0, allow_inf_nan=False)]],
        Setting("a list of positive numbers"),
    ] = Field(
        default=[0.5, 1.0, 2.0], min_length=1, description="Additions are ± this times the vector."
    )
    ranks: Annotated[list[Annotated[int, Field(gt=0)]], Setting("a list of whole numbers")] = Field(
        default=[1, 2, 4],
        description="INLP is also restricted to its first so many directions, in order.",
    )
    validation: Annotated[Annotated[int, Field(gt=0)], Setting("a whole number above 0")] = Field(
        default=32, description="Prompts of each class set aside for selection; the rest is fitted."
    )
    selection_scope: Annotated[Literal["local", "all"], Setting('"local" or "all"')] = Field(
        default="local",
        description="Where a candidate is removed while it is scored: at its own block, or "
        "everywhere.",
    )
    kl_threshold: Annotated[Finite, Setting("a number")] = Field(
        default=0.1, description="Candidates whose removal costs more KL on harmless prompts drop."
    )
    induce_threshold: Annotated[Finite, Setting("a number")] = Field(
        default=0.0, description="Candidates whose addition induces less refusal log-odds drop."
    )
    prune_layers: Annotated[float, Setting("a share from 0 up to, not including, 1")] = Field(
        default=0.2,
        ge=0.0,
        lt=1.0,
        description="The last layers that are no candidates. In a very shallow model 0.2 may "
        "leave out the layer where refusal is complete.",
    )
    first_accuracy: Annotated[float, Setting("a share from 0 to 1")] = Field(
        default=0.9,
        ge=0.0,
        le=1.0,
        description="INLP is a candidate only where its first classifier reaches this held-out "
        "accuracy.",
    )
    published: Annotated[bool, Setting("true or false")] = Field(
        default=True,
        description="Also project with the basis that the published code reads off a float32 SVD "
        "of a d x d matrix, which takes minutes where d is in the thousands.",
    )
    further: Annotated[bool, Setting("true or false")] = Field(
        default=True, description="Ask what the further INLP directions encode."
    )
    composition: Annotated[bool, Setting("true or false")] = Field(
        default=True,
        description="Measure the direction again after each layer's cut, and once more after all.",
    )


class InlpSection(Section):
    """Iterative null-space projection (`vauban.fit_inlp`)."""

    C: Annotated[
        Annotated[float, Field(gt=0, allow_inf_nan=False)], Setting("a positive number")
    ] = Field(default=0.1, description="Inverse strength of the classifiers' penalty.")
    max_rank: Annotated[Annotated[int, Field(gt=0)], Setting("a whole number above 0")] = Field(
        default=32, description="At most so many directions."
    )
    min_accuracy: Annotated[
        Literal["auto"] | Annotated[float, Field(ge=0, le=1)], Setting('"auto" or a share')
    ] = Field(
        default="auto",
        description="A classifier below this is not removed; auto: majority plus two standard "
        "deviations of chance.",
    )


class StudyEvalSection(Section):
    """How behaviour is measured on held-out prompts."""

    max_tokens: Annotated[Annotated[int, Field(gt=0)], Setting("a whole number above 0")] = Field(
        default=100, description="Longest answer, in tokens."
    )
    num_prompts: Annotated[Annotated[int, Field(gt=0)], Setting("a whole number above 0")] = Field(
        default=100, description="At most this many held-out prompts of each kind."
    )
    refusal_phrases: Annotated[
        list[Text] | None, Setting("a list of phrases", example='["I cannot", "I\'m sorry"]')
    ] = Field(default=None, description="What counts as a refusal; not set: the built-in list.")


class TextsSection(Section):
    """Two text sets for perplexity: running text, and requests with answers."""

    plain: Annotated[
        Text | None,
        Setting(
            _TEXTS,
            place="prompts",
            words=TEXT_WORDS,
            example='"hf:monology/pile-uncopyrighted?column=text"',
        ),
    ] = Field(
        default=None,
        description="Pile-like: lines with `text`. plain: short neutral paragraphs, shipped; own: "
        "the held-out harmless prompts, read as running text. Not set: own for a model that "
        "brings its own prompts (the organisms know no other world), else plain.",
    )
    chat: Annotated[
        Text | None,
        Setting(
            _TEXTS,
            place="prompts",
            words=TEXT_WORDS,
            example='"hf:tatsu-lab/alpaca?prompt=instruction&completion=output&empty=input"',
        ),
    ] = Field(
        default=None,
        description="Alpaca-like: lines with `prompt` and `completion`; only the answer is scored. "
        "chat: neutral requests with answers, shipped; own: held-out rows with an `answer`. Not "
        "set: own for a model that brings its own prompts and answers, else chat.",
    )
    limit: Annotated[Annotated[int, Field(gt=0)], Setting("a whole number above 0")] = Field(
        default=256, description="At most this many texts of each set."
    )


class GuardSection(Section):
    """Who judges whether an answer to a harmful prompt is unsafe."""

    model: Annotated[
        Text | None,
        Setting(
            'a folder or Hub id of a guard model, or "stand-in"',
            place="model",
            words=("stand-in",),
            example='"guard"',
        ),
    ] = Field(
        default=None,
        description="LlamaGuard's protocol with the model's own template; stand-in: the answer "
        "opens like the row's compliance `template`. Not set: the stand-in where the held-out "
        "rows have templates, else not applicable.",
    )
    min_words: Annotated[NonNegative, Setting("a whole number, 0 or more")] = Field(
        default=15, description="Shorter answers are not unsafe (not used by the stand-in)."
    )


class BenchSection(Section):
    """Capability benchmarks through lm-eval (extra `bench`)."""

    tasks: Annotated[list[Text], Setting("a list of lm-eval task names")] = Field(
        default=[], description='For example ["mmlu", "arc_challenge"]; empty: not applicable.'
    )
    num_fewshot: Annotated[NonNegative, Setting("a whole number, 0 or more")] = Field(
        default=5, description="Examples before each question."
    )
    limit: Annotated[
        Annotated[int, Field(gt=0)] | None, Setting("a whole number above 0", example="500")
    ] = Field(default=None, description="At most so many questions a task; not set: all.")
    include_path: Annotated[
        Text | None, Setting("a folder of task files", place="folder", example='"tasks"')
    ] = Field(default=None, description="Local lm-eval task files.")


class StudyConfig(Section):
    """Everything a study depends on; what `study.json` records under "configuration"."""

    seed: Annotated[NonNegative, Setting("a whole number, 0 or more", "--seed", metavar="N")] = (
        Field(0, description="Seeds the splits, INLP's held-out part and the random direction.")
    )
    study: StudySection
    data: DataSection = DataSection()
    inlp: InlpSection = InlpSection()
    eval: StudyEvalSection = StudyEvalSection()
    texts: TextsSection = TextsSection()
    guard: GuardSection = GuardSection()
    bench: BenchSection = BenchSection()
    output: FolderSection = FolderSection()

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, keys in the order of the schema."""
        return self.model_dump(mode="json")
