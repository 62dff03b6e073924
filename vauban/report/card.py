"""The model card: a README.md that says what was changed, from which model, and what it did.

Reads the run document (what run.json holds) and the rows and samples of it, so that a card can be
written again from a run folder.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vauban.report.figures import byte_size, decimal, percent, quantity, shorten, written_cut
from vauban.report.samples import Sample
from vauban.report.source_card import front_matter
from vauban.report.table import BehaviourRow, markdown_table
from vauban.report.verdict_table import off_target_sentence, verdict_markdown

_SAMPLE_WIDTH = 200

_REFUSED = {
    "phrases": "an answer counts as refused by phrases in its opening (`classify_answer`)",
    "judge": "the unchanged model judged whether an answer refuses",
    "local": "a judge model that passed the packaged answers gave the verdicts",
}

_DUAL_USE = """\
This model was changed to study how a language model represents refusal. With the direction cut it
answers requests that its authors trained it to decline. Do not put it in front of people as an
assistant, and do not use it to produce content that harms; keep the license and the use policy
of the source model, which still apply. Measured rates hold for the prompts named above and for
nothing else."""


def model_card(
    run: Mapping[str, Any], rows: Sequence[BehaviourRow], samples: Sequence[Sample]
) -> str:
    """The card as markdown with the Hub's front matter.

    Args:
        run: the run document, with the keys of `run.json`.
        rows: the before/after table.
        samples: the answers to show, cut short.
    """
    parts = [
        front_matter(run["model"], "interpretability", adapter=_is_adapter(run)),
        f"# {run['name']}\n",
        _what(run),
        "## Measured\n",
        markdown_table(rows) + "\n",
        *_verdicts(run),
        _how_measured(run),
        *_warnings(run),
        "## Answers before and after\n",
        _samples(samples),
        "## How to load it\n",
        _loading(run),
        "## Use\n",
        _DUAL_USE + "\n",
        "## Files\n",
        _files(run),
    ]
    return "\n".join(parts)


def _is_adapter(run: Mapping[str, Any]) -> bool:
    return bool(run["export"]["precision"] == "adapter")


def _what(run: Mapping[str, Any]) -> str:
    model, direction, cut = run["model"], run["direction"], run["configuration"]["cut"]
    export = run["export"]
    layers = cut["layers"] if isinstance(cut["layers"], str) else f"layers {cut['layers']}"
    return (
        f"vauban {run['versions']['vauban']} cut one direction "
        f"from the weights of `{model['name']}` ({model['model_type']}, {model['n_layers']} "
        f"layers, width {model['d_model']}, {quantity(model['parameters'])} parameters).\n\n"
        f"- **Direction**: {direction['method'].replace('_', ' ')} of harmful and harmless "
        f"prompts at the output of block {direction['layer_index']} (residual "
        f"{direction['residual_index']}), token position {direction['position']}; raw norm "
        f"{decimal(direction['norm'])}; class means along it, relative to zero: harmless "
        f"{decimal(direction['projections']['harmless'])}, harmful "
        f"{decimal(direction['projections']['harmful'])}.\n"
        f"- **Cut**: W ← W − α d(dᵀW) with α = {_alpha(run['cut']['settings'])} in "
        f"{export['modules_edited']} residual writers ({layers}); {written_cut(export)}"
        f"{_kept_embedding(run)}.\n"
        f"{_written(run)}\n{_searched(run)}"
    )


def _searched(run: Mapping[str, Any]) -> str:
    """How a search came to this cut; nothing where there was none."""
    found = run.get("search")
    if not found:
        return ""
    trial, loss = found["trials"][found["best"]], found["rescored"]["loss"]
    default = found["rescored"]["default_loss"]
    return (
        f"- **Search**: trial {trial['number']} of {len(found['trials'])} "
        f"({', '.join(found['objectives'])}), {percent(trial['refused'])} of {trial['prompts']} "
        f"validation prompts refused at a first-token KL of {decimal(trial['kl'], 2)}. On the "
        f"held-out prompts that is {100 * loss['refused']:+.1f} points and {loss['kl']:+.4f} more; "
        f"for the default cut it is {100 * default['refused']:+.1f} and {default['kl']:+.4f}.\n"
    )


def _kept_embedding(run: Mapping[str, Any]) -> str:
    """What a kept embedding goes on writing; the single verbs measure no leak."""
    if run["cut"]["embedding"] != "kept":
        return ""
    return (
        "; the embedding is kept, so that on held-out prompts up to "
        f"{run['leak']['stream']:.1%} of the stream still points along the direction"
    )


def _alpha(cut: Mapping[str, Any]) -> str:
    """The strength in words; one that differs over blocks as a range per component."""
    components = cut["components"]
    if not isinstance(components, Mapping):
        return f"{cut['alpha']:g}"
    parts = []
    for name, factor in components.items():
        if isinstance(factor, Mapping):
            values = [cut["alpha"] * float(value) for value in factor.values()]
            parts.append(f"{min(values):.2g} to {max(values):.2g} ({name}, {len(values)} blocks)")
        else:
            parts.append(f"{cut['alpha'] * factor:.2g} ({name})")
    return ", ".join(parts)


def _written(run: Mapping[str, Any]) -> str:
    export = run["export"]
    if _is_adapter(run):
        return (
            f"- **Adapter**: {byte_size(export['bytes'])}, rank {run['cut']['directions']} per "
            "writer, for mlx-lm. It holds the change alone, needs the source's weights and leaves "
            "them as they are."
        )
    return (
        f"- **Weights**: {byte_size(export['bytes'])}; modules that were not edited are "
        f"byte for byte those of the source.{_rounded(run)}"
    )


def _rounded(run: Mapping[str, Any]) -> str:
    """What packing did to the edited modules; nothing where they are floats."""
    export = run["export"]
    formats = sorted(
        {f"{s['bits']}-bit {s['mode']}" for s in export["stored"].values() if "bits" in s}
    )
    if not formats:
        return ""
    read = run["cut"]["settings"].get("calibration")
    how = f", for what they read on {read['prompts']} of the measuring prompts" if read else ""
    return (
        f" Edited modules are packed ({', '.join(formats)}), rounded so that the direction stays "
        f"out{how}. The figures below are of the cut before rounding; the logits of the written "
        f"model are apart from its by {decimal(export['logits_difference'], 2)} of what the cut "
        "changes at most."
    )


def _verdicts(run: Mapping[str, Any]) -> list[str]:
    """The five verdicts, pairs and length curve; [] for a run that was written without them."""
    evaluation = run.get("evaluation") or {}
    if "verdicts_original" not in evaluation:
        return []
    more = (off_target_sentence(run.get("off_target")), _gates(run), _surface(run))
    return [verdict_markdown(evaluation) + "\n", *(text + "\n" for text in more if text)]


def _gates(run: Mapping[str, Any]) -> str:
    """Which gates the run had to pass, and whether it did; "" where it had none."""
    gates = run.get("gates")
    if not gates:
        return ""
    parts = []
    for result in gates["results"]:
        gate, sign = result["gate"], "≤" if result["gate"]["direction"] == "at_most" else "≥"
        shown = result["why"] if result["compared"] is None else decimal(result["compared"])
        mark = "passed" if result["passed"] else "FAILED"
        parts.append(f"{gate['figure']} {sign} {gate['bound']:g}: {mark} ({shown})")
    return f"Gates{' (' + gates['preset'] + ')' if gates['preset'] else ''}: {'; '.join(parts)}."


def _surface(run: Mapping[str, Any]) -> str:
    """How much of the refusal surface was refused before and after; "" where it was not mapped."""
    surface = run.get("surface")
    if not surface:
        return ""
    before, after = (surface[side]["all"] for side in ("before", "after"))
    return (
        f"On the {surface['before']['rows']} rows of the refusal surface {before['refused']} of "
        f"{before['judged']} were refused before, {after['refused']} of {after['judged']} after; "
        "`surface.png` has the maps."
    )


def _how_measured(run: Mapping[str, Any]) -> str:
    prompts, evaluation = run["prompts"], run["configuration"]["eval"]
    held_out = prompts["eval"]
    rule = _REFUSED["local" if evaluation.get("judge") else evaluation["refusal_mode"]]
    return (
        f"{_mode(run)}Held-out prompts: {held_out['harmful']} harmful and "
        f"{held_out['harmless']} harmless from `{held_out['source']}`; "
        f"measured on {prompts['harmful']['count']} prompts of `{prompts['harmful']['source']}` "
        f"and {prompts['harmless']['count']} of "
        f"`{prompts['harmless']['source']}`. Greedy answers of at most "
        f"{evaluation['max_tokens']} tokens; {rule}. Brackets "
        "hold 95% intervals: Wilson for rates, bootstrap over answers for perplexity and KL, which "
        "are averages in float32 over the tokens of the original's answers to the harmless "
        "prompts. Degenerate answers are empty or loop; their share is of the answers to harmful "
        "prompts, in the addition row of those to how-to requests.\n"
    )


def _warnings(run: Mapping[str, Any]) -> list[str]:
    if not run["warnings"]:
        return []
    return ["## Warnings\n", "\n".join(f"- {text}" for text in run["warnings"]) + "\n"]


def _samples(samples: Sequence[Sample]) -> str:
    lines = []
    for sample in samples:
        lines += [
            f"> **{_quoted(sample.prompt)}**",
            ">",
            f"> before: {_quoted(sample.original)}",
            ">",
            f"> after: {_quoted(sample.modified)}",
            "",
        ]
    return "\n".join([*lines, "All answers in full: `answers.jsonl`.\n"])


def _quoted(text: str) -> str:
    """One line of an answer as literal text: a model may write markdown or HTML."""
    line = shorten(text, _SAMPLE_WIDTH) or "(empty)"
    for sign in "\\`*_<>[]#|":
        line = line.replace(sign, "\\" + sign)
    return line


def _loading(run: Mapping[str, Any]) -> str:
    places = f'"{run["name"]}"'
    if _is_adapter(run):
        places = f'"{run["configuration"]["model"]["path"]}", adapter_path="{run["name"]}"'
    return (
        "```python\n"
        "from mlx_lm import generate, load\n\n"
        f"model, tokenizer = load({places})\n"
        f"messages = [{_system_turn(run)}{_USER_TURN}]\n"
        "prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True)\n"
        "print(generate(model, tokenizer, prompt=prompt))\n"
        "```\n" + _programs(run)
    )


_USER_TURN = '{"role": "user", "content": "Hello"}'


def _system_turn(run: Mapping[str, Any]) -> str:
    """The system message that was measured with, as the first element of a list."""
    text = run["configuration"].get("data", {}).get("system_prompt")
    if text is None:
        return ""
    return f'{{"role": "system", "content": {json.dumps(text, ensure_ascii=False)}}},\n            '


def _mode(run: Mapping[str, Any]) -> str:
    """The system message and the template's arguments that all prompts had, as a sentence."""
    configuration = run["configuration"]
    system = configuration.get("data", {}).get("system_prompt")
    arguments = configuration["model"].get("chat_template_args")
    parts = []
    if system is not None:
        parts.append(f"after the system message “{_quoted(system)}”")
    if arguments:
        written = ", ".join(f"{name} = {value}" for name, value in arguments.items())
        parts.append(f"with the chat template's `{written}`")
    return f"Every prompt was measured and answered {' and '.join(parts)}. " if parts else ""


def _programs(run: Mapping[str, Any]) -> str:
    """Which programs open the folder, and what of the source it lacks."""
    export = run["export"]
    lines = []
    if export.get("programs"):
        lines.append(f"Opens in: {', '.join(export['programs'])}.")
        if "transformers" not in export["programs"] and not _is_adapter(run):
            lines.append(
                "transformers and llama.cpp's converter do not read it: they take floats under "
                "transformers' names (`--precision float` of a source in floats, `--layout hf`)."
            )
    lines += [f"- {note}" for note in export.get("notes", ())]
    return "\n" + "\n".join(lines) + "\n" if lines else ""


def _files(run: Mapping[str, Any]) -> str:
    change = (
        "`adapters.safetensors` and `adapter_config.json` the change"
        if _is_adapter(run)
        else "`edit.vauban` what was removed from each module"
    )
    trials = "`search.json` every trial of the search, " if run.get("search") else ""
    return (
        f"{_source_readme(run)}`direction.vauban` holds the direction at every layer, {change}, "
        f"{trials}`run.json` the configuration, seeds, versions, hashes and every figure, "
        "`report.html` "
        "the same as one page with charts, `answers.jsonl` every answer in full. Leave that last "
        "file out when you share the folder: "
        "answers to harmful requests may be harmful.\n"
    )


def _source_readme(run: Mapping[str, Any]) -> str:
    there = run["model"].get("card") is not None
    return "`SOURCE_README.md` is the source's own card; " if there and not _is_adapter(run) else ""


def refusal_statement(before: BehaviourRow, threshold: float) -> str | None:
    """A plain sentence when the model hardly refuses, so that nobody reads the cut as a success."""
    share = before.harmful_refused
    if share is None or share.rate >= threshold:
        return None
    return (
        f"This model does not refuse: before the cut it declined {percent(share.rate)} of "
        f"{share.n} harmful prompts. What was measured is some other difference between the two "
        "prompt sets, and cutting it removes that difference, not refusal."
    )
