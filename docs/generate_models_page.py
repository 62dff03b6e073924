"""Write `models.md`, the page "Which models work", from what the tests measure.

    python docs/generate_models_page.py

Runs every configuration of `tests/architectures` (about a minute) on the mlx-lm that is installed.
Knows the facts and how they are printed; measures nothing itself.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("models.md")

_INTRODUCTION = """\
# Which models work

vauban walks a model's blocks itself and reads the residual stream between them. Before it returns
a number it compares its own forward pass with the model's, once for every model that is loaded,
on a prompt longer than the model's sliding window (past 2048 tokens the window is filled with
repeated keys and values instead of being read). Where the two differ, or where memory does not
allow a window to be crossed, it records the model's own
forward instead and says so; where neither agrees it refuses the model by name. `vauban doctor
MODEL` shows the same facts for a model of yours.

This page is written by `docs/generate_models_page.py` from what the tests measure: tiny random
models of mlx-lm's own classes in float32, {configurations} configurations of {modules} of its
model files, with random norms and biases and prompts longer than the windows. A model that is not
listed is treated by the same rules and the same checks.

Measured with mlx-lm {version}.

| | configurations |
| --- | --- |
{totals}

## The configuration is checked too

A model's own forward pass cannot show that mlx-lm passed over a field of `config.json`. vauban
compares the two when it loads:

* Rotary positions as transformers 5 writes them (`rope_parameters`, also by layer type) and
  `layer_types` are translated into the fields that mlx-lm's class reads. The rotary modules of the
  built model are then asked for their angles. Where these are not those of the configuration (YaRN
  on Qwen 3 MoE, a share of each head on `glm`), the model is refused by name.
* Scales, caps, clipping, activations, expert normalisation and windows that the class does not
  compute are listed by `vauban doctor MODEL` and warned of once. A window matters only for longer
  texts; the warning comes with the first of them. Differences of a thousandth (the form of GELU)
  are listed alone.
* A written folder keeps the source's fields and has the translated ones beside them, so that plain
  mlx-lm reads it as vauban did. transformers reads the same numbers from either.

The tests save tiny models of 30 families with transformers, where torch is installed, and compare
logits to 1e-4 of their size; what cannot agree is refused or named.

The weights are a claim as well. An export compares rows of every parameter that the plan's model
holds with what the folder stores, and refuses a model with an adapter, or one that was changed in
memory, by the names of the modules; `mlx_lm.fuse` makes a folder of it first. A saved direction
carries its model's fingerprint (shape, tokenizer, a few thousand numbers): other weights are warned
of, another shape or tokenizer is refused. A 4-bit conversion counts as the same model.

## How to read the table

**Path**: `manual` is the explicit loop; its logits are those of the model's own forward pass, and
its residuals those that the model's blocks read. **Writers**: what adds to the stream, and so what
a cut edits; *gain* where a norm stands between a writer and the stream, *bias* where a writer has
one. **After a cut**: the largest share of the direction that any residual keeps when every writer
is cut; a dash is less than 0.001 %. **Embedding**: `cut` where the head has its own matrix,
`untie` where the export gives it one, `tied` where the head shares the matrix for good, or would
read one of its own at another scale, and changes with it. **Batches**: `any` where prompts of
uneven length generate together, `equal` where mlx-lm's batched caches are not exact or missing, so
that only prompts of one length share a batch; answers are those of single prompts in both cases.
Where it is `any`, prompts that wait take the places of answers that have ended.

| model file | path | writers | after a cut | embedding | batches | notes |
| --- | --- | --- | --- | --- | --- | --- |
"""

_END = """
## Not run here

{refused}

## What cannot be cut exactly

{leaks}
"""


def percent(share: float) -> str:
    return "—" if share <= 1e-5 else f"{100 * share:.2g} %"


def _totals(found: list) -> str:
    ran = [f for f in found if not f.refused]
    lines = {
        "explicit loop, logits equal to 1e-5": [
            f.path == "manual" and f.parity <= 1e-5 for f in ran
        ],
        "padded rows equal single prompts": [f.padding <= 1e-4 for f in ran],
        "common prefix read once": [f.prefix is not None and f.prefix <= 1e-4 for f in ran],
        "writers equal the numeric probe": [
            not f.probe.missed and not f.probe.invented for f in ran
        ],
        "nothing left after a full cut": [f.leak <= 1e-5 for f in ran],
        "generation equals single prompts": [f.generated for f in ran],
        "logit lens of the last residual gives the logits": [f.lens <= 1e-5 for f in ran],
    }
    return "\n".join(f"| {name} | {sum(good)} of {len(found)} |" for name, good in lines.items())


def render() -> str:
    """The whole page."""
    sys.path.insert(0, str(ROOT))
    importlib.import_module("vauban")  # before mlx: it opens OpenBLAS on Linux
    import mlx_lm

    from tests.architectures.build import names
    from tests.architectures.expected import LEAKS, NO_SITES, NO_TAP, PREFIX_NOT_SHARED, REFUSED
    from tests.architectures.measure import measure
    from vauban.models.families import NOT_CUTTABLE

    found = [measure(name) for name in names()]
    rows = []
    for f in found:
        if f.refused:
            continue
        marks = [*f.kinds] + ["gain"] * f.gains + ["bias"] * f.biases
        notes = [f.note] if f.note else []
        if f.name in PREFIX_NOT_SHARED:
            notes.append(f"prefix read per prompt: {PREFIX_NOT_SHARED[f.name]}")
        if f.name in NO_TAP:
            notes.append("no change of the stream between blocks while it generates")
        if f.name in NO_SITES and f.sites != "exact" and "arrives" not in f.sites:
            notes.append(f"no change at a block's own terms: {NO_SITES[f.name]}")
        if f.module == "bitnet":
            notes.append("its kernel needs Metal; measured with the same product in plain mlx")
        variant = f.name.partition("@")[2]
        name = f"`{f.module}`" + (f" ({variant.replace('_', ' ')})" if variant else "")
        rows.append(
            f"| {name} | {f.path} | {', '.join(marks[1:])} | {percent(LEAKS.get(f.name, 0.0))} "
            f"| {f.embedding} | {'any' if f.uneven else 'equal'} | {'; '.join(notes)} |"
        )
    refused = [f"* `{name}`: {measure(name).refused}." for name in sorted(REFUSED)]
    leaks = [
        f"* `{name}`: {NOT_CUTTABLE.get(name, '')}; the stream keeps {percent(share)}."
        for name, share in sorted(LEAKS.items())
    ]
    head = _INTRODUCTION.format(
        configurations=len(found),
        modules=len({f.module for f in found}),
        version=mlx_lm.__version__,
        totals=_totals(found),
    )
    end = _END.format(refused="\n".join(refused), leaks="\n".join(leaks))
    return head + "\n".join(rows) + "\n" + end


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
    print(f"{PAGE.name} written")
