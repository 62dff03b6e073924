"""An edit of facts from its configuration to a finished folder.

The facts are asked for before, edited batch by batch with the ledger saved beside the output, and
asked for again from the written folder. A run that was ended goes on from its ledger. Prints
nothing.
"""

import json
import time
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import vauban
from vauban.config import EditConfig
from vauban.errors import InputError
from vauban.evaluation import FactEval, FactScores, measure_perplexity, score_facts
from vauban.export import check_output, check_place, check_room, export_bytes
from vauban.export.fact_edits import export_facts
from vauban.knowledge import (
    Editor,
    EditSettings,
    Fact,
    FactReport,
    KeyStats,
    Ledger,
    collect_key_stats,
    load_facts,
    trace_layers,
)
from vauban.pipeline.preflight import open_folder
from vauban.pipeline.provenance import system, versions
from vauban.pipeline.stages import Opened, Progress, model_facts, open_model
from vauban.prompts import load_texts
from vauban.report import fact_card, json_safe

_SETTINGS = tuple(field.name for field in fields(EditSettings) if field.name != "seed")


@dataclass(frozen=True)
class EditResult:
    """A finished edit. `document` is what run.json holds; `resumed` facts were edited before."""

    output_dir: Path
    report: FactReport
    editor: Editor
    document: Mapping[str, Any]
    resumed: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        """The document with the output folder and the wall time, JSON-safe."""
        document: dict[str, Any] = json_safe(self.document)
        return {
            **self.report.to_dict(), **document,
            "output": str(self.output_dir), "seconds": round(self.seconds, 2),
        }  # fmt: skip


def edit_facts(config: EditConfig, *, progress: Progress | None = None) -> EditResult:
    """Edit the facts of a file into a model and write it, with run.json and a model card.

    Raises:
        InputError: the facts, a setting or the output folder is not what it has to be.
        ModelError, ArchitectureError: the model cannot be loaded, or cannot hold facts.
    """
    started = time.monotonic()
    output = Path(config.output.dir)
    check_output(output, force=config.output.force, source=None)
    facts = load_facts(config.edit.facts)
    texts = moment_texts(config.edit.texts)
    source, _ = open_folder(config.model.path)
    check_output(output, force=config.output.force, source=source)
    check_place(output)
    check_room(output, export_bytes(source, config.output.precision))
    opened = open_model(config.model.path, progress=progress)
    settings = EditSettings(
        **{name: getattr(config.edit, name) for name in _SETTINGS}, seed=config.seed
    )
    scores = _before(opened, facts, progress) if config.edit.evaluate else {}
    plain = [text for text in load_texts("plain") if isinstance(text, str)]
    perplexity = {"original": _perplexity(opened.model, opened.tokenizer, plain)}
    saved = ledger_beside(output)
    editor, resumed = _editor(opened, settings, facts, texts, saved, progress)
    done = {fact.id for fact in editor.ledger.facts}
    todo = [fact for fact in facts if fact.id not in done]
    report = editor.edit(todo, progress, save_to=saved) if todo else FactReport((), (), ())
    document: dict[str, Any] = {}

    def finish(folder: Path) -> None:
        """Read the written model back, and say beside it what was done."""
        if config.edit.evaluate:
            model, tokenizer = vauban.load(folder, unpack=True)
            after, answers = score_facts(
                model, tokenizer, facts, progress=_named("read the edits back", progress)
            )
            evaluation = FactEval(
                modified=after, facts=len(facts), answers=tuple(answers), **scores
            )
            document["evaluation"] = evaluation.to_dict()
            perplexity["modified"] = _perplexity(model, tokenizer, plain)
        document.update(_document(config, opened, editor, report, perplexity))
        text = json.dumps(json_safe(document), indent=2, ensure_ascii=False, allow_nan=False)
        (folder / "run.json").write_text(text + "\n", encoding="utf-8")
        (folder / "README.md").write_text(fact_card(document), encoding="utf-8")

    export_facts(
        editor, opened.folder, output, config.output.precision,
        force=config.output.force, finish=finish,
    )  # fmt: skip
    saved.unlink(missing_ok=True)
    return EditResult(output, report, editor, document, resumed, time.monotonic() - started)


def moment_texts(name: str) -> list[str] | None:
    """The raw texts for the second moment; None where the model writes them."""
    if name == "written":
        return None
    # Statements alone would leave the keys of other text unprotected.
    listed = load_texts(name) + (load_texts("plain") if name == "facts" else [])
    texts = [text for text in listed if isinstance(text, str)]
    if not texts:
        raise InputError(f"texts is {name!r}; expected raw texts, and these are chats")
    return texts


def ledger_beside(output: Path) -> Path:
    """Where the ledger lies while the folder is not yet written."""
    return output.with_name(f".{output.name}.edits.vauban")


def _editor(
    opened: Opened, settings: EditSettings, facts: list[Fact], texts: list[str] | None,
    saved: Path, progress: Progress | None,
) -> tuple[Editor, int]:  # fmt: skip
    """An editor, with what an ended run of the same configuration had edited already."""
    earlier = Ledger.load(saved) if saved.is_file() else None
    if earlier is not None:
        known = {fact.id: fact for fact in facts}
        same = earlier.settings == settings and all(known.get(f.id) == f for f in earlier.facts)
        if not same:
            raise InputError(
                f"{saved} is the ledger of an ended run with other facts or settings; finish that "
                "one, or remove the file"
            )
    stats: dict[int, KeyStats] | None = None
    if texts is not None:
        layers = earlier.layers if earlier else settings.layers
        if isinstance(layers, str):
            layers = trace_layers(opened.model, opened.tokenizer, facts)
        stats = collect_key_stats(
            opened.model, opened.tokenizer, texts, layers, progress=progress
        )  # fmt: skip
    editor = Editor(opened.model, opened.tokenizer, settings, stats)
    if stats is not None and not editor.modules:
        editor.prepare(tuple(stats))
    if earlier is None:
        return editor, 0
    editor.restore(earlier)
    return editor, len(earlier.facts)


def _before(opened: Opened, facts: list[Fact], progress: Progress | None) -> dict[str, FactScores]:
    model, tokenizer = opened.model, opened.tokenizer

    def score(stage: str, told: bool) -> FactScores:
        step = _named(stage, progress)
        return score_facts(model, tokenizer, facts, told=told, progress=step)[0]

    return {
        "original": score("ask for the facts", False),
        "in_context": score("with the fact told", True),
    }


def _named(stage: str, progress: Progress | None) -> Progress | None:
    """Progress under another name of the stage."""
    return progress and (lambda _, done, total: progress(stage, done, total))


def _perplexity(model: Any, tokenizer: Any, texts: list[str]) -> float:
    return float(measure_perplexity(model, tokenizer, texts).perplexity)


def _document(
    config: EditConfig, opened: Opened, editor: Editor, report: FactReport,
    perplexity: Mapping[str, float],
) -> dict[str, Any]:  # fmt: skip
    """Everything in run.json but the evaluation. It holds no times."""
    return {
        "format": 1,
        "kind": "edit",
        "name": Path(config.output.dir).resolve().name,
        "configuration": config.to_dict(),
        "versions": versions(),
        "platform": {**system(), "device": opened.device.name, "backend": opened.device.backend},
        "model": model_facts(opened, config.model.path),
        "layers": list(editor.ledger.layers),
        "contexts": list(editor.ledger.contexts),
        "facts": [fact.to_dict() for fact in editor.ledger.facts],
        "report": report.to_dict(),
        "perplexity": dict(perplexity),
    }
