"""The schema of a run: what a configuration may say, what it defaults to, what it expects.

TOML validation, `vauban init`, the command line's flags and the reference page are all read off
these classes. They know neither files nor models; `load` reads files.
"""

from typing import Any, Literal

from pydantic import ConfigDict

from vauban.config.keys import (
    BOOLEAN,
    NON_NEGATIVE,
    POSITIVE,
    PROMPTS,
    Finite,
    LoudMultiple,
    Negative,
    NonNegative,
    Positive,
    Prompts,
    Quantile,
    Section,
    Text,
    key,
)


class ModelSection(Section):
    """Which model is measured and cut."""

    path: Text = key(
        "a model folder or a Hub id (org/name)",
        "The model: a folder with MLX safetensors, or an id on the Hub.",
        flag="--model", place="model",
    )  # fmt: skip
    chat_template_args: dict[str, Any] | None = key(
        "a table of arguments that the model's chat template reads (as a flag: a JSON object)",
        "Passed to the chat template for every prompt, measured and evaluated alike; where not "
        "set, a template that can reason is told not to.",
        None, flag="--chat-template-args", metavar="JSON", example="{ enable_thinking = true }",
    )  # fmt: skip


class DataSection(Section):
    """Prompt sets. Where a key is not set, the sets that the model's folder names in its
    vauban.json are used, and otherwise the bundled ones."""

    harmful: Prompts | None = key(
        PROMPTS, "Prompts that carry the concept (for refusal: harmful requests).", None,
        flag="--harmful", metavar="FILE", place="prompts", example='"harmful.jsonl"',
    )  # fmt: skip
    harmless: Prompts | None = key(
        PROMPTS, "Prompts that do not: a mix of how-to requests and plain tasks.", None,
        flag="--harmless", metavar="FILE", place="prompts", example='"harmless.jsonl"',
    )  # fmt: skip
    eval: Text | None = key(
        'a file (JSONL, CSV ...) of prompts with a "label", or "default" (the bundled set)',
        "Held-out prompts labelled harmful or harmless.", None,
        flag="--eval", metavar="FILE", place="prompts", example='"eval.jsonl"',
    )  # fmt: skip
    column: Text | None = key(
        "a column's name",
        "Which column (key) of the files named above holds the prompts; not set: prompt, else "
        "goal, text, instruction, behavior, question, query or request.",
        None, flag="--column", metavar="NAME", example='"goal"',
    )  # fmt: skip
    system_prompt: Text | None = key(
        "a text",
        "A system message before every prompt that has none of its own, measured and evaluated "
        "alike.",
        None, flag="--system-prompt", metavar="TEXT", example='"You are a careful assistant."',
    )  # fmt: skip


class MeasureSection(Section):
    """How the direction is measured (`vauban.measure`)."""

    method: Literal["mean_difference", "masked_mean_difference", "variance_scaled"] = key(
        '"mean_difference", "masked_mean_difference" or "variance_scaled"',
        "The estimator of the direction. masked_mean_difference leaves out the coordinates that "
        "stand out over harmless prompts; variance_scaled divides each by its variance: for models "
        "with a loud coordinate, as `vauban doctor` names it.",
        "mean_difference", flag="--method", metavar="NAME",
    )  # fmt: skip
    loud_multiple: LoudMultiple | None = key(
        "a number above 1",
        "masked_mean_difference leaves out coordinates above this multiple of the median; not "
        "set: 50.",
        None, example="50.0",
    )  # fmt: skip
    layer: Literal["answers", "causal", "auto"] | NonNegative = key(
        '"answers", "causal", "auto" or a block index, 0 for the first',
        "Whose output the direction is taken from. answers: the one under whose cut short answers "
        "to prompts held out for it refuse least and cost little elsewhere; causal: the same "
        "by the first token alone, among the first 80 % of the layers; auto: the best separated "
        "one there, which is cheaper.",
        "answers", flag="--layer", metavar="CHOICE",
    )  # fmt: skip
    direction: Text | None = key(
        "a file as `vauban measure` saves it",
        "A direction that was measured before: nothing is measured, the run goes on from it.", None,
        flag="--direction", metavar="FILE", place="file", example='"direction.vauban"',
    )  # fmt: skip
    positions: Literal["post_instruction"] | list[Negative] | None = key(
        '"post_instruction" or a list of negative token positions',
        "Token positions looked at; not set: every template token after the instruction for "
        "answers and causal, else the last token of the prompt.",
        None, example='"post_instruction"',
    )  # fmt: skip
    clip_quantile: Literal["auto"] | Quantile = key(
        '"auto" or a number from 0 up to, not including, 0.5',
        "Winsorization: this share of extreme values is clamped at either end. auto: 0 where no "
        "coordinate is loud, and otherwise what clamps the loud ones, in their residuals.",
        0.0, flag="--clip-quantile", metavar="Q",
    )  # fmt: skip
    batch_size: Positive | None = key(
        POSITIVE, "Prompts per forward pass; not set: chosen from the memory.", None,
        flag="--batch-size", metavar="N", example="16",
    )  # fmt: skip


class CutSection(Section):
    """What is cut from the weights (`vauban.plan_cut`)."""

    alpha: Literal["auto"] | Finite = key(
        '"auto" or a finite number',
        "Share of the direction that is removed: 1 all, 0.5 half, above 1 reverses. auto: chosen "
        "per block and component by short answers, as the direction is; 1 where layers, "
        "components or norm_preserve say what is cut, and for the verb cut.",
        "auto", flag="--alpha", metavar="A",
    )  # fmt: skip
    layers: Literal["all", "above_median", "top_k"] | list[NonNegative] = key(
        '"all", "above_median", "top_k" or a list of block indices',
        "The blocks whose residual writers are cut; above_median and top_k rank them by Cohen's d.",
        "all", flag="--layers", metavar="S",
    )  # fmt: skip
    components: list[Literal["attention", "mlp"]] = key(
        'a list of "attention" and "mlp"',
        "Which writers are cut; attention with SSM, mlp with every expert.",
        ["attention", "mlp"], min_length=1,
    )  # fmt: skip
    embedding: Literal["auto", "untie", "tied"] | bool = key(
        '"auto", "untie", "tied", true or false',
        "The embedding writes too. auto: cut a table of its own, keep one that the head shares "
        "(unless short answers change with it); true: cut it, and give the head a matrix of its "
        "own where both share one, which makes the file larger (an adapter cannot: the shared one "
        "is cut, which changes the head too); false: keep it.",
        "auto",
    )  # fmt: skip
    norm_preserve: Literal["column", "row", "frobenius"] | None = key(
        '"column", "row" or "frobenius"',
        "Restore these norms of a matrix after the cut; rows leak the direction.",
        None, example='"column"',
    )  # fmt: skip


class EvalSection(Section):
    """How before and after are compared (`vauban.evaluate`)."""

    max_tokens: int = key(
        POSITIVE, "Longest answer, in tokens.", 100,
        flag="--max-tokens", short="-m", metavar="N", gt=0,
    )  # fmt: skip
    num_prompts: Positive = key(
        POSITIVE, "At most this many harmful and this many harmless held-out prompts.", 64,
        flag="--num-prompts", metavar="N",
    )  # fmt: skip
    refusal_phrases: list[Text] | None = key(
        "a list of phrases", "What counts as a refusal; not set: the built-in list.", None,
        example='["I cannot", "I\'m sorry"]',
    )  # fmt: skip
    refusal_mode: Literal["phrases", "judge"] = key(
        '"phrases" or "judge"',
        "How a refusal is told: by phrases, or by asking the unchanged model.",
        "phrases", flag="--refusal-mode", metavar="M",
    )  # fmt: skip
    judge: str | None = key(
        "a folder or a Hub id",
        "An instruct model that judges the answers, once it passes the packaged labelled ones.",
        None, flag="--judge", metavar="MODEL", example='"path/to/judge"',
    )  # fmt: skip
    off_target: bool = key(
        BOOLEAN, "Also ask for JSON and for what earlier turns said, before and after.", False,
        flag="--off-target",
    )  # fmt: skip
    controls: bool = key(
        BOOLEAN, "Also cut a random direction, and add the direction to harmless prompts.", True,
        flag="--controls",
    )  # fmt: skip


class SurfaceSection(Section):
    """A map of where the model refuses, before and after the cut (`vauban.scan_surface`)."""

    scan: bool = key(
        BOOLEAN, "Answer the rows of the map before and after the cut.", False, flag="--surface",
    )  # fmt: skip
    rows: Text | None = key(
        'a JSONL file of prompts with every axis, or "default" (the bundled rows)',
        "The rows; not set: those that the model's folder names, else the bundled ones.",
        None, flag="--rows", metavar="FILE", place="prompts", example='"surface.jsonl"',
    )  # fmt: skip
    max_tokens: Positive = key(POSITIVE, "Longest answer to a row, in tokens.", 40)


class GatesSection(Section):
    """Bounds that the run's figures have to keep. Where one is broken the command ends with code 1,
    after everything is written. A key is a figure (refusal, kl, evaluation.perplexity_modified),
    its value a bound: "<= 0.05", "<= 0.05 estimate", or { at_most = 0.05, end = "upper" }; without
    an end the one of the interval that speaks against the figure is compared."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True)

    preset: Literal["careful", "publish"] | None = key(
        '"careful" or "publish"',
        "A named set of gates; figures that stand beside it replace the preset's.", None,
        flag="--gates", metavar="PRESET", example='"careful"',
    )  # fmt: skip


class FolderSection(Section):
    """Where the result goes."""

    dir: Text = key(
        "a folder", "The folder that is written; it must not exist yet.", "output",
        flag="--output-dir", short="-o", metavar="DIR", place="folder",
    )  # fmt: skip
    force: bool = key(BOOLEAN, "Replace the output folder if it exists.", False, flag="--force")


class OutputSection(FolderSection):
    """Where the result goes, and in which format."""

    precision: Literal["same", "8bit", "float", "adapter"] = key(
        '"same", "8bit", "float" or "adapter"',
        "How edited modules are stored: in the source's own format, where that is packed rounded "
        "so that the direction stays out; packed with 8 bits; in float; or not at all: adapter "
        "writes a small LoRA folder for mlx-lm's --adapter-path, to be used with the source.",
        "same", flag="--precision", metavar="P",
    )  # fmt: skip
    layout: Literal["same", "mlx", "hf"] = key(
        '"same", "mlx" or "hf"',
        "Whose names and shapes the weights get: same, the source's; mlx, those of mlx-lm's "
        "modules; hf, those that transformers reads.",
        "same", flag="--layout", metavar="L",
    )  # fmt: skip
    calibrate: NonNegative = key(
        NON_NEGATIVE,
        "Packed modules are rounded for what they read on this many harmful and this many harmless "
        "measuring prompts; 0: for any input alike.",
        64, flag="--calibrate", metavar="N",
    )  # fmt: skip


_NO_ADAPTER = 'which [output] precision "adapter" cannot hold:'


class RunConfig(Section):
    """Everything a run depends on; what `run.json` records under "configuration"."""

    seed: NonNegative = key(
        NON_NEGATIVE, "Seeds the held-out split and the random control direction.", 0,
        flag="--seed", metavar="N",
    )  # fmt: skip
    model: ModelSection
    data: DataSection = DataSection()
    measure: MeasureSection = MeasureSection()
    cut: CutSection = CutSection()
    eval: EvalSection = EvalSection()
    surface: SurfaceSection = SurfaceSection()
    gates: GatesSection = GatesSection()
    output: OutputSection = OutputSection()

    def conflict(self) -> tuple[tuple[str, ...], str] | None:
        """A cut that the precision cannot hold, whatever the model is."""
        if self.output.precision != "adapter":
            return None
        if self.cut.norm_preserve is not None:
            return ("cut", "norm_preserve"), f"{_NO_ADAPTER} restored norms are no low-rank change"
        if self.output.layout != "same":
            return ("output", "layout"), f"{_NO_ADAPTER} an adapter holds no weights"
        if self.cut.embedding == "untie":
            return ("cut", "embedding"), f"{_NO_ADAPTER} it gives no head a matrix of its own"
        return None
