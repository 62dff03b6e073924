"""The verbs for configuration files: `vauban init`, `vauban --validate`. No model is loaded."""

import argparse
from pathlib import Path

from vauban.cli.console import Console
from vauban.config import (
    EditConfig,
    HubDataset,
    RunConfig,
    StudyConfig,
    is_edit,
    is_study,
    load_config,
    load_edit,
    load_study,
    looks_like_hub_id,
    write_scaffold,
)
from vauban.config.keys import Section
from vauban.errors import InputError


def init(options: argparse.Namespace) -> int:
    """Write the annotated configuration."""
    named = {"model": options.model} if options.model else {}
    schema: type[Section] = RunConfig
    if options.study or options.edit:
        schema = StudyConfig if options.study else EditConfig
    path = write_scaffold(options.file, schema=schema, force=options.force, **named)
    place = "models in [study]" if options.study else "model in [model]"
    console = Console()
    console.line(f"wrote {path}: every setting with its default; name your {place}.")
    console.line("next:")
    console.command(f"vauban --validate {path}")
    console.command(f"vauban study {path}" if options.study else f"vauban {path}")
    return 0


def validate(options: argparse.Namespace) -> int:
    """Check a configuration, the prompt files and the model folder it names."""
    if is_edit(options.validate):
        return _validate_edit(options)
    if is_study(options.validate):
        return _validate_study(options)
    config = load_config(options.validate)
    checked = _checked(options.validate, "[model] path", config.model.path, config)
    checked["output"] = config.output.dir
    return _say_valid(options, checked, config)


def _validate_edit(options: argparse.Namespace) -> int:
    """The model and the facts of an edit."""
    from vauban.knowledge import load_facts

    config = load_edit(options.validate)
    checked = {
        "model": _model(options.validate, "[model] path", config.model.path),
        "facts": f"{len(load_facts(config.edit.facts))} facts ({config.edit.facts})",
        "output": config.output.dir,
    }
    return _say_valid(options, checked, config)


def _validate_study(options: argparse.Namespace) -> int:
    """Every model of a study, with the prompts that it will be measured on."""
    config = load_study(options.validate)
    checked: dict[str, str] = {}
    for number, model in enumerate(config.study.models, start=1):
        lines = _checked(options.validate, f"[study] models, element {number}", model, config)
        many = len(config.study.models) > 1
        checked.update({f"{k} ({number})" if many else k: v for k, v in lines.items()})
    guard = config.guard.model
    if guard is not None and guard != "stand-in":
        checked["guard"] = _model(options.validate, "[guard] model", guard)
    checked["output"] = config.output.dir
    return _say_valid(options, checked, config)


def _say_valid(
    options: argparse.Namespace,
    checked: dict[str, str],
    config: RunConfig | StudyConfig | EditConfig,
) -> int:
    console = Console(as_json=options.json)
    console.pairs(f"{options.validate} is valid", list(checked.items()))
    console.document({"valid": True, "configuration": config.to_dict()})
    return 0


def _model(file: str, where: str, model: str) -> str:
    """The model in words; InputError when a local folder holds none."""
    if not Path(model).exists() and looks_like_hub_id(model):
        return f"{model} (on the Hub; not fetched)"
    if not (Path(model) / "config.json").is_file():
        raise InputError(
            f"{file}: {where} is {model!r}: "
            + ("no config.json in it." if Path(model).is_dir() else "no such folder.")
        )
    return model


def _checked(file: str, where: str, model: str, config: RunConfig | StudyConfig) -> dict[str, str]:
    """The model and its prompt sets, read as a run would read them."""
    from vauban.pipeline.prompt_sets import eval_set, prompt_set

    checked = {"model": _model(file, where, model)}
    folder = model if Path(model).exists() else None
    for label in ("harmful", "harmless"):
        given = getattr(config.data, label)
        if isinstance(given, HubDataset) or str(given).startswith("hf:"):
            checked[label] = "on the Hub; not fetched"
            continue
        prompts = prompt_set(config, label, folder)
        checked[label] = f"{len(prompts.prompts)} prompts ({prompts.source}, {prompts.origin})"
    held_out = eval_set(config, folder)
    checked["held out"] = (
        f"{len(held_out.harmful)} harmful, {len(held_out.harmless)} harmless "
        f"({held_out.source}, {held_out.origin})"
    )
    if isinstance(config, RunConfig) and config.surface.scan:
        from vauban.pipeline.surface_stage import surface_rows

        rows = surface_rows(config, Path(folder) if folder else None)
        checked["surface"] = f"{len(rows)} rows"
    return checked
