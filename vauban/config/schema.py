"""The schema of a run: what a configuration may say, what it defaults to, what it expects.

TOML validation, `vauban init`, the command line's flags and the reference page are all read off
these classes. It knows neither files nor models; `load.py` reads files.
"""

from typing import Annotated, Any, Literal

from pydantic import Field

from vauban.config.settings import (
    PROMPTS,
    Finite,
    Negative,
    NonNegative,
    Prompts,
    Section,
    Setting,
    Text,
)


class ModelSection(Section):
    """Which model is measured and cut."""

    path: Annotated[
        Text, Setting("a model folder or a Hub id (org/name)", "--model", place="model")
    ] = Field(description="The model: a folder with MLX safetensors, or an id on the Hub.")


class DataSection(Section):
    """Prompt sets. Where a key is not set, the sets that the model's folder names in its
    vauban.json are used, and otherwise the bundled ones."""

    harmful: Annotated[
        Prompts | None,
        Setting(PROMPTS, "--harmful", metavar="FILE", place="prompts", example='"harmful.jsonl"'),
    ] = Field(
        default=None, description="Prompts that carry the concept (for refusal: harmful requests)."
    )
    harmless: Annotated[
        Prompts | None,
        Setting(PROMPTS, "--harmless", metavar="FILE", place="prompts", example='"harmless.jsonl"'),
    ] = Field(
        default=None, description="Prompts that do not: a mix of how-to requests and plain tasks."
    )
    eval: Annotated[
        Text | None,
        Setting(
            'a JSONL file of {"prompt", "label"} lines, or "default" (the bundled set)',
            "--eval",
            metavar="FILE",
            place="prompts",
            example='"eval.jsonl"',
        ),
    ] = Field(default=None, description="Held-out prompts labelled harmful or harmless.")


class MeasureSection(Section):
    """How the direction is measured (`vauban.measure`)."""

    method: Annotated[Literal["mean_difference"], Setting('"mean_difference"')] = Field(
        default="mean_difference", description="The estimator of the direction."
    )
    layer: Annotated[
        Literal["causal", "auto"] | NonNegative,
        Setting('"causal", "auto" or a block index, 0 for the first', "--layer", metavar="CHOICE"),
    ] = Field(
        default="causal",
        description="Whose output the direction is taken from, among the first 80 % of the "
        "layers. causal: the one whose removal ends refusal best, whose addition brings it about "
        "and which costs little elsewhere, on prompts held out for it; auto: the best separated "
        "one, which is cheaper.",
    )
    positions: Annotated[
        Literal["post_instruction"] | list[Negative] | None,
        Setting(
            '"post_instruction" or a list of negative token positions',
            example='"post_instruction"',
        ),
    ] = Field(
        default=None,
        description="Token positions looked at; not set: every template token after the "
        "instruction for causal, else the last token of the prompt.",
    )
    clip_quantile: Annotated[
        float, Setting("a number from 0 up to, not including, 0.5", "--clip-quantile", metavar="Q")
    ] = Field(
        default=0.0,
        ge=0.0,
        lt=0.5,
        description="Winsorization: this share of extreme values is clamped.",
    )
    batch_size: Annotated[
        Annotated[int, Field(gt=0)] | None,
        Setting("a whole number above 0", "--batch-size", metavar="N", example="16"),
    ] = Field(
        default=None, description="Prompts per forward pass; not set: chosen from the memory."
    )


class CutSection(Section):
    """What is cut from the weights (`vauban.plan_cut`)."""

    alpha: Annotated[Finite, Setting("a finite number", "--alpha", metavar="A")] = Field(
        default=1.0,
        description="Share of the direction that is removed: 1 all, 0.5 half, above 1 reverses.",
    )
    layers: Annotated[
        Literal["all", "above_median", "top_k"] | list[NonNegative],
        Setting(
            '"all", "above_median", "top_k" or a list of block indices',
            "--layers",
            metavar="S",
        ),
    ] = Field(default="all", description="The blocks whose residual writers are cut.")
    components: Annotated[
        list[Literal["attention", "mlp"]],
        Setting('a list of "attention" and "mlp"'),
    ] = Field(
        default=["attention", "mlp"],
        min_length=1,
        description="Which writers are cut; attention with SSM, mlp with every expert.",
    )
    embedding: Annotated[
        Literal["auto", "untie", "tied", False],
        Setting('"auto", "untie", "tied" or false'),
    ] = Field(
        default="auto",
        description="The embedding writes too. auto: cut it, and give the head a matrix of its own "
        "where both share one (an adapter cannot: the shared one is cut, which changes the head "
        "too); false: keep it.",
    )
    norm_preserve: Annotated[
        Literal["column", "row", "frobenius"] | None,
        Setting('"column", "row" or "frobenius"', example='"column"'),
    ] = Field(
        default=None,
        description="Restore these norms of a matrix after the cut; rows leak the direction.",
    )


class EvalSection(Section):
    """How before and after are compared (`vauban.evaluate`)."""

    max_tokens: Annotated[
        int, Setting("a whole number above 0", "--max-tokens", "-m", metavar="N")
    ] = Field(default=100, gt=0, description="Longest answer, in tokens.")
    num_prompts: Annotated[
        Annotated[int, Field(gt=0)],
        Setting("a whole number above 0", "--num-prompts", metavar="N"),
    ] = Field(
        default=64, description="At most this many harmful and this many harmless held-out prompts."
    )
    refusal_phrases: Annotated[
        list[Text] | None,
        Setting("a list of phrases", example='["I cannot", "I\'m sorry"]'),
    ] = Field(default=None, description="What counts as a refusal; not set: the built-in list.")
    refusal_mode: Annotated[
        Literal["phrases", "judge"], Setting('"phrases" or "judge"', "--refusal-mode", metavar="M")
    ] = Field(
        default="phrases",
        description="How a refusal is told: by phrases, or by asking the unchanged model.",
    )
    controls: Annotated[bool, Setting("true or false", "--controls")] = Field(
        default=True,
        description="Also cut a random direction, and add the direction to harmless prompts.",
    )


class FolderSection(Section):
    """Where the result goes."""

    dir: Annotated[
        Text, Setting("a folder", "--output-dir", "-o", metavar="DIR", place="folder")
    ] = Field(default="output", description="The folder that is written; it must not exist yet.")
    force: Annotated[bool, Setting("true or false", "--force")] = Field(
        default=False, description="Replace the output folder if it exists."
    )


class OutputSection(FolderSection):
    """Where the result goes, and in which format."""

    precision: Annotated[
        Literal["same", "8bit", "float", "adapter"],
        Setting('"same", "8bit", "float" or "adapter"', "--precision", metavar="P"),
    ] = Field(
        default="same",
        description="How edited modules are stored: in the source's own format, where that is "
        "packed rounded so that the direction stays out; packed with 8 bits; in float; or not at "
        "all: adapter writes a small LoRA folder for mlx-lm's --adapter-path, to be used with the "
        "source.",
    )
    calibrate: Annotated[
        NonNegative, Setting("a whole number, 0 or more", "--calibrate", metavar="N")
    ] = Field(
        default=64,
        description="Packed modules are rounded for what they read on this many harmful and this "
        "many harmless measuring prompts; 0: for any input alike.",
    )


_NO_ADAPTER = 'which [output] precision "adapter" cannot hold:'


class RunConfig(Section):
    """Everything a run depends on; what `run.json` records under "configuration"."""

    seed: Annotated[NonNegative, Setting("a whole number, 0 or more", "--seed", metavar="N")] = (
        Field(0, description="Seeds the held-out split and the random control direction.")
    )
    model: ModelSection
    data: DataSection = DataSection()
    measure: MeasureSection = MeasureSection()
    cut: CutSection = CutSection()
    eval: EvalSection = EvalSection()
    output: OutputSection = OutputSection()

    def conflict(self) -> tuple[tuple[str, ...], str] | None:
        """A cut that the precision cannot hold, whatever the model is."""
        if self.output.precision != "adapter":
            return None
        if self.cut.norm_preserve is not None:
            return ("cut", "norm_preserve"), f"{_NO_ADAPTER} restored norms are no low-rank change"
        if self.cut.embedding == "untie":
            return ("cut", "embedding"), f"{_NO_ADAPTER} it gives no head a matrix of its own"
        return None

    def to_dict(self) -> dict[str, Any]:
        """The configuration as plain JSON values, keys in the order of the schema."""
        return self.model_dump(mode="json")
