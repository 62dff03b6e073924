"""What the directions that INLP finds after the first one encode.

Cosine with the mean difference, the tokens that they write (logit lens), and how well each tells
apart labels that the held-out rows bring along: style, language, kind, length. Knows rows and
residuals; changes nothing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from vauban._arrays import floats, integers
from vauban.activations import collect_activations
from vauban.directions.separation import auc
from vauban.models import unembed
from vauban.pipeline.prompt_sets import EvalSet
from vauban.prompts import LabelledPrompt, encode_chat
from vauban.study.fits import Fits, Key

# A label counts with 2 to 12 values, of which one is asked against the rest with at least 8 rows
# on either side.
_VALUES = range(2, 13)
_ROWS = 8
_TOKENS = 5
# Keys of a row that say what it is, not what it is like.
_NO_LABELS = frozenset({"prompt", "answer", "label"})


@dataclass(frozen=True)
class FurtherDirection:
    """Direction `index` of INLP, counted from 1 in extraction order.

    `aucs` maps "label: value (among)" to the area under the ROC curve on held-out rows; `strongest`
    is the key furthest from chance. `refusal_auc` tells harmful from harmless. `writes` and
    `writes_against` are the tokens that +v and -v favour behind the final norm.
    """

    index: int
    accuracy: float
    cosine: float
    refusal_auc: float
    strongest: str
    aucs: dict[str, float]
    writes: list[str]
    writes_against: list[str]

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def further_directions(
    model: nn.Module, tokenizer: Any, fits: Fits, key: Key, rows: EvalSet
) -> list[FurtherDirection]:
    """One entry per INLP direction at `key`, on the held-out rows."""
    inlp = fits.inlp[key]
    every = [*rows.harmful, *rows.harmless]
    values = collect_activations(
        model, tokenizer, [row.prompt for row in every], positions=(key[0],)
    ).at(key[1], key[0])
    along = np.array(values @ inlp.directions.T, dtype=np.float64)
    labels = list(_labels(tokenizer, every))
    refusal = np.arange(len(every)) < len(rows.harmful)
    difference = fits.difference(key)
    unit = difference / mx.linalg.norm(difference)
    cosines = floats(inlp.directions @ unit)
    found = []
    for index in range(inlp.rank):
        aucs = {
            name: float(auc(along[~inside & scope, index], along[inside & scope, index]))
            for name, inside, scope in labels
        }
        found.append(
            FurtherDirection(
                index=index + 1,
                accuracy=inlp.accuracies[index],
                cosine=cosines[index],
                refusal_auc=float(auc(along[~refusal, index], along[refusal, index])),
                strongest=max(aucs, key=lambda name: abs(aucs[name] - 0.5)) if aucs else "",
                aucs=aucs,
                writes=_favoured(model, tokenizer, inlp.directions[index]),
                writes_against=_favoured(model, tokenizer, -inlp.directions[index]),
            )
        )
    return found


def _labels(
    tokenizer: Any, rows: Sequence[LabelledPrompt]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, rows with the value, rows asked): within each class, so that refusal is no help."""
    classes = {
        name: np.array([row.label == name for row in rows]) for name in ("harmful", "harmless")
    }
    lengths = np.array([len(encode_chat(tokenizer, row.prompt)) for row in rows])
    for name, members in classes.items():
        longer = lengths > np.median(lengths[members])
        if _enough(longer, members):
            yield f"length: above the median ({name})", longer, members
    fields = sorted({field for row in rows for field in row.extra} - _NO_LABELS)
    for field in fields:
        held = [row.get(field) for row in rows]
        for name, members in classes.items():
            values = sorted({str(v) for v, m in zip(held, members, strict=True) if m and v})
            if len(values) not in _VALUES:
                continue
            # Of two values one says all.
            for value in values[:1] if len(values) == 2 else values:
                inside = np.array([str(v) == value for v in held])
                if _enough(inside, members):
                    yield f"{field}: {value} ({name})", inside, members


def _enough(inside: np.ndarray, members: np.ndarray) -> bool:
    return min(int((inside & members).sum()), int((~inside & members).sum())) >= _ROWS


def _favoured(model: nn.Module, tokenizer: Any, direction: mx.array) -> list[str]:
    logits = unembed(model, direction[None])[0]
    return [tokenizer.decode([token]) for token in integers(mx.argsort(-logits)[:_TOKENS])]
