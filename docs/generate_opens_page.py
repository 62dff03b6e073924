"""Write `opens-where.md`, the page "Where it opens", from the load matrix of the tests.

    python docs/generate_opens_page.py

Exports every kind of folder from tiny models and prints which programs open it; the tests open it.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = Path(__file__).with_name("opens-where.md")

_TEXT = """\
# Where it opens

Every folder that vauban writes opens in mlx-lm. Whether another program opens it depends on how
the source stores its weights, and on two flags: `--precision` and `--layout`. This page is written
by `docs/generate_opens_page.py`; the tests open each kind of folder with each program that is
installed, compare logits (float32, at most 1e-4 apart), and see the program refuse what the table
says it refuses.

| what is written | {programs} |
| --- | {dashes} |
{rows}

The tests read a folder as follows. **mlx-lm**: its own loader. **MLX Swift apps**: a reader that
takes every `.safetensors` file under the folder, at any depth, and refuses a tensor that is no
parameter. **transformers** and **PEFT**: the packages, where torch is installed. **llama.cpp's
converter**: its table of names, in the `gguf` package. **mlx-vlm**: its own loader, on a
tiny Qwen 3 VL that transformers has saved, where both packages are installed.

## Names and shapes

`--layout same`, the default, keeps the source's tensor names, shapes and files. A tensor that the
edit does not touch is copied byte for byte, whatever mlx-lm makes of it on loading; experts that
are stored one by one come back one by one. Tensors that mlx-lm does not load (vision towers, heads
that predict several tokens) are copied too, and a file such as `mtp.safetensors` stays in the
index. Where the source's layout cannot hold an edit, mlx-lm's is taken, and the report says why.

`--layout mlx` takes the names and shapes of mlx-lm's modules, `--layout hf` those of transformers
for floats of these families: {families}.

Licence, notice, use policy and small files go along; the source's own card becomes
`SOURCE_README.md`. Weights in other formats stay behind and are named by the report. `vauban doctor
MODEL` lists the files that look like weights and that nothing loads.

## llama.cpp without a new model

`vauban measure --gguf FILE` saves the direction as a control vector as well (`pip install
'vauban[gguf]'`). llama.cpp adds `direction.N` to the output of block N, counted from 0; block 0 has
none. The vectors are raw differences of the class means, so `--control-vector-scaled FILE:-1` with
`--control-vector-layer-range N N` takes one difference away at block N.

## When something fails

Before a model is loaded, a run checks that its output folder can be written, that the disk has room
for it, that every weight file is complete, and that tokenizer and prompts can be read. A measured
direction lies beside the output, as `OUTPUT.direction.vauban`, until the folder is complete. If a
later step fails, `vauban MODEL --direction OUTPUT.direction.vauban -o OUTPUT` goes on from it.
"""


def page(place: Path) -> str:
    """The page; tiny models are exported below `place`."""
    sys.path.insert(0, str(ROOT))
    from tests.export.load_matrix import KINDS, matrix
    from vauban.export.programs import PROGRAMS
    from vauban.export.transformers_names import AS_TRANSFORMERS

    place.mkdir(exist_ok=True)
    for kind in KINDS:
        (place / kind.name).mkdir()
    opened = matrix(place)
    rows = [
        f"| {kind.words} | "
        + " | ".join("yes" if name in opened[kind.name] else "no" for name in PROGRAMS)
        + " |"
        for kind in KINDS
    ]
    families = ", ".join(f"`{name}`" for name in sorted(AS_TRANSFORMERS))
    return _TEXT.format(
        programs=" | ".join(PROGRAMS),
        dashes=" | ".join("---" for _ in PROGRAMS),
        rows="\n".join(rows),
        families=families,
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as folder:
        PAGE.write_text(page(Path(folder)), encoding="utf-8")
