"""The verbs about configuration files: `vauban init`, `vauban --validate`. No model is loaded."""

import argparse
from pathlib import Path

from vauban.cli.console import Console
from vauban.config import HubDataset, load_config, looks_like_hub_id, write_scaffold
from vauban.errors import InputError


def init(options: argparse.Namespace) -> int:
    """Write the annotated configuration."""
    named = {"model": options.model} if options.model else {}
    path = write_scaffold(options.file, force=options.force, **named)
    console = Console()
    console.line(f"wrote {path}: every setting with its default; name your model in [model].")
    console.line("next:")
    console.command(f"vauban --validate {path}")
    console.command(f"vauban {path}")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Check a configuration, the prompt files and the model folder it names."""
    from vauban.pipeline.sources import eval_set, prompt_set

    config = load_config(options.validate)
    model = config.model.path
    local = Path(model).exists() or not looks_like_hub_id(model)
    if local and not (Path(model) / "config.json").is_file():
        raise InputError(
            f"{options.validate}: [model] path is {model!r}: "
            + ("no config.json in it." if Path(model).is_dir() else "no such folder.")
        )
    checked: dict[str, str] = {"model": model if local else f"{model} (on the Hub; not fetched)"}
    for label in ("harmful", "harmless"):
        given = getattr(config.data, label)
        if isinstance(given, HubDataset) or str(given).startswith("hf:"):
            checked[label] = "on the Hub; not fetched"
            continue
        found = prompt_set(config, label, model if local else None)
        checked[label] = f"{len(found.prompts)} prompts ({found.source}, {found.origin})"
    held_out = eval_set(config, model if local else None)
    checked["held out"] = (
        f"{len(held_out.harmful)} harmful, {len(held_out.harmless)} harmless "
        f"({held_out.source}, {held_out.origin})"
    )
    checked["output"] = config.output.dir
    console = Console(as_json=options.json)
    console.pairs(f"{options.validate} is valid", list(checked.items()))
    console.document({"valid": True, "configuration": config.to_dict()})
    return 0
