"""The verbs and their flags. Flags of settings are read off the schema.

Parses and explains. Values go to the configuration's validation as they are, so that a wrong flag
and a wrong TOML value get the same message.
"""

import argparse
from typing import Any

import vauban
from vauban.cli.diff_flags import add_comparing
from vauban.cli.search_flags import add_searching, finite
from vauban.cli.setting_flags import add_json, add_settings
from vauban.cli.verb_flags import add_report, add_runs, add_steering, add_surface
from vauban.config import EditConfig, RunConfig, StudyConfig
from vauban.config.keys import keys

VERBS = {
    "demo": "the whole pipeline on the bundled model organism, offline",
    "search": "search through cuts of a model, export the best",
    "init": "write an annotated configuration file",
    "measure": "measure a direction and save it",
    "cut": "cut a saved direction from a model's weights",
    "evaluate": "compare two models before and after",
    "probe": "where prompts lie along a saved direction",
    "steer": "answers with a saved direction taken out or added, nothing written",
    "geometry": "how saved directions lie to each other",
    "edit": "edit facts into a model's weights, or take them out again",
    "study": "compare interventions x scopes on one or more models",
    "diff": "what differs between two model folders: weights, settings, answers",
    "surface": "where a model refuses: a map over harm, language, style, turns",
    "compare": "two finished runs side by side: figures, and answers in pairs",
    "report": "a finished run as one HTML file, made again from its folder",
    "doctor": "what this machine and, with a model, what its layers offer",
}

GROUPS = {
    "to begin": ("demo", "init", "doctor"),
    "directions": ("measure", "probe", "steer", "geometry"),
    "weights": ("cut", "search", "edit"),
    "behaviour": ("evaluate", "surface", "study"),
    "what was written": ("report", "compare", "diff"),
}
"""The verbs by task, as `vauban --help` lists them."""

_EXAMPLE = "mlx-community/Llama-3.2-3B-Instruct-4bit"

_SETTINGS = {
    "demo": ["seed", "measure", "cut", "eval", "gates", "surface", "output"],
    "search": [
        "seed",
        "data.harmful",
        "data.harmless",
        "data.eval",
        "data.column",
        "data.system_prompt",
        "model.chat_template_args",
        "measure.batch_size",
        "eval",
        "gates",
        "output",
    ],
    "measure": [
        "model",
        "data.harmful",
        "data.harmless",
        "data.column",
        "data.system_prompt",
        "measure",
    ],
    "cut": [
        "seed",
        "model",
        "data.harmful",
        "data.harmless",
        "data.column",
        "data.system_prompt",
        "cut",
        "output",
    ],
    "surface": [
        "seed",
        "data.harmful",
        "data.harmless",
        "data.column",
        "data.system_prompt",
        "model.chat_template_args",
        "surface.rows",
        "eval.refusal_mode",
    ],
    "evaluate": [
        "model",
        "data.eval",
        "data.column",
        "data.system_prompt",
        "eval.max_tokens",
        "eval.num_prompts",
        "eval.refusal_mode",
        "eval.judge",
        "gates",
    ],
}


def short_help() -> str:
    """What `vauban` alone says: three commands to copy."""
    return f"""\
vauban {vauban.__version__} measures, edits and evaluates concept directions in language models.

  vauban demo
      the whole way on a bundled model that really refuses: offline, under a minute
  vauban {_EXAMPLE} -o output
      the same on a model of yours: a folder or a Hub id
  vauban init
      a configuration file with every setting explained

All commands and flags: vauban --help. What this machine offers: vauban doctor."""


def main_parser() -> argparse.ArgumentParser:
    """The parser of `vauban MODEL`, `vauban CONFIG.toml` and `vauban --validate CONFIG.toml`."""
    width = max(map(len, VERBS))
    verbs = "\n".join(
        f"{group}:\n" + "\n".join(f"  {name:<{width}}  {VERBS[name]}" for name in names)
        for group, names in GROUPS.items()
    )
    parser = argparse.ArgumentParser(
        prog="vauban",
        usage="vauban MODEL [flags]\n"
        "       vauban CONFIG.toml [flags]\n"
        "       vauban --validate CONFIG.toml\n"
        "       vauban COMMAND ...",
        description="Measure a direction in a model, cut it, compare before and after, export.\n\n"
        f"{verbs}\n\n`vauban COMMAND --help` tells more about each; the flags below are those of\n"
        "`vauban MODEL` and `vauban CONFIG.toml`.",
        epilog="exit codes: 0 done, 1 a check failed, 2 bad usage or input, 130 interrupted.",
        formatter_class=_Formatter,
    )
    parser.add_argument("target", nargs="?", metavar="MODEL | CONFIG.toml", help=argparse.SUPPRESS)
    parser.add_argument("--validate", metavar="CONFIG.toml", help="check a configuration and stop")
    add_settings(parser, [key for key in keys(RunConfig) if key.path != ("model", "path")])
    add_json(parser)
    parser.add_argument("--version", action="version", version=f"vauban {vauban.__version__}")
    return parser


def verb_parser(name: str) -> argparse.ArgumentParser:
    """The parser of one verb."""
    parser = argparse.ArgumentParser(
        prog=f"vauban {name}",
        description=VERBS[name][0].upper() + VERBS[name][1:] + ".",
        formatter_class=_Formatter,
    )
    if name == "init":
        parser.add_argument("file", nargs="?", default="vauban.toml", help="default: vauban.toml")
        parser.add_argument("--model", help="the model to name in it: a folder or a Hub id")
        parser.add_argument(
            "--study", action="store_true", help="write the configuration of a study instead"
        )
        parser.add_argument(
            "--edit", action="store_true", help="write the configuration of an edit of facts"
        )
        parser.add_argument("--force", action="store_true", help="replace the file if it exists")
        return parser
    if name == "doctor":
        parser.add_argument("model", nargs="?", metavar="MODEL", help="a folder or a Hub id")
        parser.add_argument(
            "--probe", action="store_true", help="find the writers by running the model, compare"
        )
    elif name == "study":
        parser.add_argument("config", metavar="CONFIG.toml", help="as `vauban init --study` writes")
        add_settings(parser, keys(StudyConfig))
    elif name == "edit":
        _add_editing(parser)
    elif name == "search":
        add_searching(parser)
        _add_stage(parser, name)
    elif name == "diff":
        add_comparing(parser)
        return parser
    elif name == "compare":
        add_runs(parser)
    elif name == "report":
        add_report(parser)
    elif name == "surface":
        add_surface(parser)
        _add_stage(parser, name)
    elif name == "geometry":
        parser.add_argument(
            "files", nargs="+", metavar="FILE", help="as `vauban measure` saves them, two or more"
        )
        parser.add_argument(
            "--threshold", type=finite, default=0.1,
            help="pairs with a smaller |cosine| are called independent (default: 0.1)",
        )  # fmt: skip
    elif name in ("probe", "steer"):
        parser.add_argument("--model", required=True, help="a folder or a Hub id")
        _add_direction(parser)
        parser.add_argument("--prompt", "-p", action="append", help="a prompt; may be repeated")
        parser.add_argument("--prompts", metavar="FILE", help="a JSONL, CSV or text file")
        parser.add_argument("--column", metavar="NAME", help="which of its columns holds them")
        modes = {("data", "system_prompt"), ("model", "chat_template_args")}
        add_settings(parser, (key for key in keys(RunConfig) if key.path in modes))
        if name == "probe":
            parser.add_argument(
                "--tokens", action="store_true", help="every token, at the direction's residual"
            )
        else:
            add_steering(parser)
    else:
        _add_stage(parser, name)
    add_json(parser)
    return parser


def _add_direction(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--direction", required=True, metavar="FILE", help="as `vauban measure` saves it"
    )


def _add_editing(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "names", nargs="+", metavar="MODEL FACTS",
        help="a folder or a Hub id, and a JSON or JSONL file of facts; or a TOML file with "
        "[edit]; with --undo the facts' ids and the edited folder",
    )  # fmt: skip
    parser.add_argument("--undo", action="store_true", help="take facts out of an edited folder")
    add_settings(parser, (key for key in keys(EditConfig) if key.path != ("model", "path")))


def _add_stage(parser: argparse.ArgumentParser, name: str) -> None:
    """The flags of a verb that does one stage of a run, or all of them (demo)."""
    if name == "cut":
        _add_direction(parser)
    if name == "evaluate":
        parser.add_argument(
            "--modified", required=True, metavar="MODEL",
            help="the changed model, same tokenizer; or an adapter of the model",
        )  # fmt: skip
    wanted = set(_SETTINGS[name])
    shown = [
        key
        for key in keys(RunConfig)
        if {key.section or key.name, ".".join(key.path)} & wanted
        # What measures a direction does not take one.
        and (name, key.name) != ("measure", "direction")
    ]
    add_settings(parser, shown)
    if name == "measure":
        parser.add_argument(
            "-o", "--output", default="direction.safetensors", metavar="FILE",
            help="where the direction is saved (default: direction.safetensors)",
        )  # fmt: skip
        parser.add_argument(
            "--gguf", metavar="FILE", help="also save it as a control vector for llama.cpp"
        )
        parser.add_argument("--force", action="store_true", help="replace the file if it exists")


class _Formatter(argparse.RawDescriptionHelpFormatter):
    """argparse's formatter with room for our longest flag."""

    def __init__(self, prog: str, **options: Any) -> None:
        super().__init__(prog, max_help_position=30, **options)
