"""The verb that edits facts: `edit`, and `edit --undo`."""

import argparse
from dataclasses import fields
from pathlib import Path

from vauban.cli.console import Console
from vauban.errors import InputError
from vauban.export import check_output
from vauban.knowledge import Editor, EditSettings, FactReport, KeyStats, Ledger, load_facts
from vauban.pipeline.stages import open_model
from vauban.report import decimal, shorten

_NAMES = {field.name for field in fields(EditSettings)}


def edit(options: argparse.Namespace) -> int:
    """Edit the facts of a file into a model, or take facts out of an edited folder."""
    if options.undo:
        return _undo(options)
    if len(options.names) != 2:
        raise InputError(f"edit takes MODEL and FACTS; {len(options.names)} names are given")
    model_path, path = options.names
    facts = load_facts(path)
    output = Path(options.output or "output")
    check_output(output, force=options.force, source=None)
    given = {n: v for n, v in vars(options).items() if n in _NAMES and v is not None}
    settings = EditSettings(**given)
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_model(model_path, progress=progress)
        editor = Editor(opened.model, opened.tokenizer, settings)
        report = editor.edit(facts, progress)
        editor.export(opened.folder, output, options.precision, force=options.force)
    return _told(console, editor, report, output)


def _undo(options: argparse.Namespace) -> int:
    """Write an edited folder again without some of its facts."""
    *ids, name = options.names
    folder = Path(name)
    if not ids:
        raise InputError("edit --undo takes the facts' ids and the edited folder")
    ledger = Ledger.load(folder)
    if not ledger.source:
        raise InputError(f"{folder}: the ledger does not name the model that it was made from")
    stats = {n: KeyStats.load(folder / f"key_stats_{n}.vauban") for n in ledger.layers}
    output = Path(options.output) if options.output else folder
    force = options.force or output == folder
    check_output(output, force=force, source=None)
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_model(ledger.source, progress=progress)
        editor = Editor(
            opened.model, opened.tokenizer, ledger.settings, stats, contexts=ledger.contexts
        )
        editor.restore(ledger)
        report = editor.undo(ids)
        editor.export(opened.folder, output, options.precision, force=force)
    console.line(f"taken out: {', '.join(ids)}")
    return _told(console, editor, report, output)


def _told(console: Console, editor: Editor, report: FactReport, output: Path) -> int:
    console.grid(
        ["id", "prompt", "target", "p before", "p after", ""],
        [
            [
                fact.id, shorten(fact.prompt, 40), fact.target, decimal(fact.before),
                decimal(fact.after), "failed" if fact.failed else "known" if fact.known else "",
            ]
            for fact in report.facts
        ],
    )  # fmt: skip
    console.line(report.summary())
    for line in (*report.notes, *report.penalties):
        console.line(line)
    console.line(f"{editor.ledger.summary()}; written to {output}", "green")
    console.document({**report.to_dict(), "output": str(output)})
    return 1 if report.facts and len(report.failed) == len(report.facts) else 0
