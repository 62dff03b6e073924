"""What can be known before a model is loaded, checked then: folders, room, files, prompts, layers.

Headers and small files are read, no weights: a slip is told within two seconds. Each function
raises an InputError that names the file, what it holds and what was expected.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vauban.config import RunConfig, looks_like_hub_id
from vauban.directions import DirectionResult
from vauban.directions.measure import check_sets
from vauban.errors import InputError, ModelError
from vauban.export import check_output, check_place, check_room, export_bytes
from vauban.models import check_weights, model_folder
from vauban.models.loading import check_folder, has_tokenizer
from vauban.pipeline.prompt_sets import LABELS, EvalSet, PromptSet, eval_set, prompt_set
from vauban.pipeline.surface_stage import surface_rows

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")
_SETTINGS = ("generation_config.json", "chat_template.json", "processor_config.json")


@dataclass(frozen=True)
class Preflight:
    """What a run has to go on once its checks have passed; no weight has been read."""

    folder: Path
    """The model's folder; for a Hub id the one in the Hub's cache."""
    model: dict[str, Any]
    """The model's config.json."""
    harmful: PromptSet
    harmless: PromptSet
    held_out: EvalSet
    direction: DirectionResult | None
    """What `[measure] direction` names; None where it is to be measured."""
    needed: int
    """Bytes that the output takes at least."""
    free: int
    """Bytes that its disk has."""


def preflight(config: RunConfig) -> Preflight:
    """Check everything that a run needs and that shows before its model is loaded.

    Files that the user named come first, then the output folder, then the model's own files: a
    slip in the first costs no download of the last.

    Raises:
        InputError: a prompt file, the direction, a layer, the output folder or the room for it.
        ModelError: a file of the model is missing, cut off or none of its kind.
    """
    output = Path(config.output.dir)
    check_output(output, force=config.output.force, source=None)
    named = {
        label: prompt_set(config, label, None)
        for label in LABELS
        if getattr(config.data, label) is not None
    }
    held_out = eval_set(config, None) if config.data.eval is not None else None
    if config.surface.scan and config.surface.rows is not None:
        surface_rows(config, None)
    if config.eval.judge is not None:
        open_folder(config.eval.judge)
    given = config.measure.direction
    direction = DirectionResult.load(given) if given is not None else None
    if not Path(config.model.path).exists() and looks_like_hub_id(config.model.path):
        # Its download may take long; without one these checks come with the others below.
        check_place(output)
    folder, model = open_folder(config.model.path)
    check_output(output, force=config.output.force, source=folder)
    harmful, harmless = (named.get(label) or prompt_set(config, label, folder) for label in LABELS)
    if direction is None:
        check_sets({"harmless": list(harmless.prompts), "harmful": list(harmful.prompts)})
    layers, size = model_size(model)
    if layers is not None:
        check_layers(config, layers)
    if direction is not None:
        check_fits(direction, layers, size, config.model.path)
    held_out = held_out or eval_set(config, folder)
    needed = export_bytes(
        folder, config.output.precision, unties=config.cut.embedding in (True, "untie")
    ) + 12 * (layers or 0) * (size or 0)
    check_place(output)
    free = check_room(output, needed)
    return Preflight(folder, model, harmful, harmless, held_out, direction, needed, free)


def open_folder(path: str) -> tuple[Path, dict[str, Any]]:
    """The local folder of a model and its config.json, when all of its files can be read.

    The header of every weight file is read and compared with its size and with the index; the
    tokenizer's and the settings' files are parsed.

    Raises ModelError for the first file that is missing, cut off or none of its kind.
    """
    folder = model_folder(path)
    config = check_folder(folder)
    check_weights(folder)
    if not has_tokenizer(folder):
        raise ModelError(
            f"{folder} has no tokenizer (tokenizer.json, *.model, *.tiktoken or vocab.*); copy its "
            "files from the model that the weights come from"
        )
    for name in (*_TOKENIZER_FILES, *_SETTINGS):
        _check_json(folder / name)
    return folder, config


def _check_json(file: Path) -> None:
    """ModelError where a file is there and holds no JSON object."""
    if not file.is_file():
        return
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ModelError(f"{file} is not JSON: {error}; cut off? Fetch it again") from error
    if not isinstance(value, dict):
        raise ModelError(f"{file} holds a {type(value).__name__}; expected an object {{...}}")


def model_size(config: dict[str, Any]) -> tuple[int | None, int | None]:
    """(blocks, width) as a config.json says them; None for what it does not."""
    inner = config.get("text_config")
    places = [config, inner] if isinstance(inner, dict) else [config]

    def first(*names: str) -> int | None:
        values = (place.get(name) for place in places for name in names)
        return next((v for v in values if isinstance(v, int) and v > 0), None)

    layers = first("num_hidden_layers", "n_layers", "n_layer", "num_layers")
    return layers, first("hidden_size", "d_model", "n_embd", "dim", "model_dim")


def check_layers(config: RunConfig, n_layers: int) -> None:
    """Refuse a block the model does not have before anything is measured for it."""
    chosen = config.cut.layers if isinstance(config.cut.layers, list) else []
    for key, blocks in (("layer", [config.measure.layer]), ("layers", chosen)):
        for block in blocks:
            if isinstance(block, int) and block >= n_layers:
                raise InputError(
                    f"{key}: layer {block} does not exist; the model has blocks 0 to {n_layers - 1}"
                )


def check_fits(
    direction: DirectionResult, layers: int | None, size: int | None, model: str
) -> None:
    """InputError where a saved direction has another width or depth than the model."""
    depth = len(direction.cosine_scores)
    if (layers is not None and depth != layers) or (size is not None and direction.d_model != size):
        raise InputError(
            f"the direction was measured on {direction.model_path or 'a model'} with {depth} "
            f"blocks of width {direction.d_model}; {model} has {layers or 'other'} blocks of width "
            f"{size or 'another'}. Measure it on this model"
        )
