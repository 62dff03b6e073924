"""The verb that edits facts: `edit MODEL FACTS`, `edit CONFIG.toml`, and `edit --undo`."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vauban.cli.console import Console
from vauban.cli.setting_flags import settings
from vauban.config import EditConfig, load_edit, make_edit
from vauban.errors import InputError
from vauban.export import check_output, check_place
from vauban.knowledge import Editor, FactReport, KeyStats, Ledger
from vauban.pipeline import edit_facts
from vauban.pipeline.stages import open_model
from vauban.report import decimal, percent, shorten


def edit(options: argparse.Namespace) -> int:
    """Edit the facts of a file into a model, or take facts out of an edited folder."""
    given = settings(options)
    if options.undo:
        return _undo(options, given)
    if len(options.names) == 1 and options.names[0].endswith(".toml"):
        return edit_file(options.names[0], options)
    if len(options.names) != 2:
        raise InputError(
            f"edit takes MODEL and FACTS, or one TOML file; {len(options.names)} names are given"
        )
    model, facts = options.names
    return _edit(make_edit({**given, ("model", "path"): model, ("edit", "facts"): facts}), options)


def edit_file(path: str, options: argparse.Namespace) -> int:
    """Run a configuration with [edit]."""
    return _edit(load_edit(path, settings(options)), options)


def _edit(config: EditConfig, options: argparse.Namespace) -> int:
    console = Console(as_json=options.json)
    with console.progress() as progress:
        result = edit_facts(config, progress=progress)
    if result.resumed:
        console.line(f"{result.resumed} facts were taken over from a run that had stopped")
    code = _told(console, result.editor, result.report, result.output_dir)
    evaluation = result.document.get("evaluation")
    if evaluation is not None:
        console.grid(["", "original", "fact in the context", "written model"], _rates(evaluation))
        before, after = (result.document["perplexity"][m] for m in ("original", "modified"))
        console.line(f"perplexity on plain text {decimal(before)} → {decimal(after)}")
    console.document(result.to_dict())
    return code


def _rates(evaluation: Mapping[str, Any]) -> list[list[str]]:
    names = ("efficacy", "paraphrase", "neighbourhood", "efficacy_strict", "exact")
    models = ("original", "in_context", "modified")
    return [
        [
            name.replace("_", " ").replace("exact", "said freely"),
            *(percent(rate) if (rate := evaluation[m][name]["rate"]) is not None else "–"
              for m in models),
        ]
        for name in names
    ]  # fmt: skip


def _undo(options: argparse.Namespace, given: Mapping[tuple[str, ...], Any]) -> int:
    """Write an edited folder again without some of its facts."""
    *ids, name = options.names
    folder = Path(name)
    if not ids:
        raise InputError("edit --undo takes the facts' ids and the edited folder")
    ledger = Ledger.load(folder)
    if not ledger.source:
        raise InputError(f"{folder}: the ledger does not name the model that it was made from")
    stats = {n: KeyStats.load(folder / f"key_stats_{n}.vauban") for n in ledger.layers}
    output = Path(given.get(("output", "dir"), folder))
    force = bool(given.get(("output", "force"))) or output == folder
    check_output(output, force=force, source=None)
    check_place(output)
    console = Console(as_json=options.json)
    with console.progress() as progress:
        opened = open_model(ledger.source, progress=progress)
        editor = Editor(
            opened.model, opened.tokenizer, ledger.settings, stats, contexts=ledger.contexts
        )
        editor.restore(ledger)
        report = editor.undo(ids)
        editor.export(opened.folder, output, given.get(("output", "precision")), force=force)
    console.line(f"taken out: {', '.join(ids)}")
    code = _told(console, editor, report, output)
    console.document({**report.to_dict(), "output": str(output)})
    return code


def _told(console: Console, editor: Editor, report: FactReport, output: Path) -> int:
    if report.facts:
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
    else:
        console.line("no other fact had to be edited again")
    for line in (*report.notes, *report.penalties):
        console.line(line)
    console.line(f"{editor.ledger.summary()}; written to {output}", "green")
    return 1 if report.facts and len(report.failed) == len(report.facts) else 0
