"""The verbs that look at saved directions: `probe`, `steer` and `geometry`."""

import argparse
from pathlib import Path
from typing import Any

from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import make_config
from vauban.directions import DirectionResult
from vauban.errors import InputError
from vauban.generation import generate
from vauban.interventions import Add, Project
from vauban.models import check_measured_on
from vauban.pipeline.stages import Opened, open_model
from vauban.prompts import conversation_text, load_prompts
from vauban.quick import analyze_geometry, probe_prompt, scan_tokens
from vauban.report import decimal, shorten


def probe(options: argparse.Namespace) -> int:
    """Where prompts lie along a direction, residual by residual, or token by token."""
    prompts = _prompts(options)
    result = DirectionResult.load(options.direction)
    console = Console(as_json=options.json)
    opened = _open(console, options)
    if options.tokens:
        scans = [scan_tokens(opened.model, opened.tokenizer, prompt, result) for prompt in prompts]
        for one in scans:
            console.grid(
                ["token", f"residual {one.residual_index}"],
                [
                    [repr(token)[1:-1], decimal(value)]
                    for token, value in zip(one.tokens, one.projections, strict=True)
                ],
            )
        console.document({"direction": options.direction, "scans": [s.to_dict() for s in scans]})
        return 0
    probes = [probe_prompt(opened.model, opened.tokenizer, prompt, result) for prompt in prompts]
    for name, value in result.projections.items():
        console.line(
            f"mean of the {name} prompts at residual {result.residual_index}: {value:+.2f}"
        )
    residuals = range(len(probes[0].projections))
    console.grid(
        ["last token of", *(f"{r}{'*' if r == result.residual_index else ''}" for r in residuals)],
        [
            [shorten(conversation_text(p.prompt), 40), *(decimal(v) for v in p.projections)]
            for p in probes
        ],
    )
    console.line("* the residual that the direction was measured at")
    console.document({"direction": options.direction, "probes": [p.to_dict() for p in probes]})
    return 0


def steer(options: argparse.Namespace) -> int:
    """Answers with the direction taken out, reflected, or added, beside the model's own."""
    prompts = _prompts(options)
    result = DirectionResult.load(options.direction)
    if options.add is None:
        change: Any = Project(result.direction, options.alpha)
        what = f"h - {options.alpha:g} d(d.h) at every layer"
    else:
        change = Add.from_result(result, options.add)
        what = f"h {options.add:+g} times the raw difference at residual {result.residual_index}"
    console = Console(as_json=options.json)
    opened = _open(console, options)
    check_measured_on(result, opened.model, opened.tokenizer)
    before, steered = (
        generate(
            opened.model, opened.tokenizer, prompts, max_tokens=options.max_tokens,
            interventions=changes,
        )
        for changes in ((), (change,))
    )  # fmt: skip
    rows = [
        {"prompt": prompt, "before": a, "steered": b}
        for prompt, a, b in zip(prompts, before, steered, strict=True)
    ]
    for row in rows:
        console.pairs(
            conversation_text(row["prompt"]),
            [("before", row["before"]), ("steered", row["steered"])],
        )
    console.line(f"steered: {what}")
    console.document({"direction": options.direction, "intervention": what, "answers": rows})
    return 0


def geometry(options: argparse.Namespace) -> int:
    """Cosines between saved directions."""
    names = [Path(file).stem for file in options.files]
    if len(set(names)) < len(names):
        names = list(options.files)
    if len(set(names)) < len(names):
        raise InputError("a file is named twice; expected different directions to compare")
    result = analyze_geometry(
        {name: DirectionResult.load(file) for name, file in zip(names, options.files, strict=True)},
        options.threshold,
    )
    console = Console(as_json=options.json)
    console.line(f"cosines; the set spans about {result.rank:.2f} dimensions")
    console.grid(
        ["", *result.names],
        [
            [name, *(f"{value:+.3f}" for value in row)]
            for name, row in zip(result.names, result.cosines, strict=True)
        ],
    )
    for a, b in result.independent:
        console.line(f"independent (|cosine| below {result.threshold:g}): {a}, {b}")
    console.document(result.to_dict())
    return 0


def _open(console: Console, options: argparse.Namespace) -> Opened:
    config = make_config({**settings(options), ("model", "path"): options.model})
    with console.progress() as progress:
        return open_model(
            options.model,
            chat_template_args=config.model.chat_template_args,
            system_prompt=config.data.system_prompt,
            progress=progress,
        )


def _prompts(options: argparse.Namespace) -> list[Any]:
    """The prompts of --prompt and --prompts, in this order."""
    prompts = [*(options.prompt or [])]
    if options.prompts:
        prompts += load_prompts(options.prompts, column=options.column)
    if not prompts:
        raise InputError("no prompt is given; use --prompt TEXT or --prompts FILE")
    return prompts
