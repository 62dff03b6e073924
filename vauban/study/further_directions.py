"""What the directions of INLP encode, above all those after the first one.

Cosine with the mean difference, the tokens that they write (logit lens), and how well each tells
apart the labels of the held-out rows: style, language, kind, length.
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

# A label counts with 2 to 12 values; each value is compared with the rest where either side has at
# least 8 rows, the least that gives an AUC some meaning.
_VALUES = range(2, 13)
_ROWS = 8
_TOKENS = 5
# Keys that hold the row's text or its class.
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
    """Every INLP direction at `key`, described on the held-out rows."""
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
    described = []
    for index in range(inlp.rank):
        aucs = {
            name: float(auc(along[~inside & scope, index], along[inside & scope, index]))
            for name, inside, scope in labels
        }
        described.append(
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
    return described


def _labels(
    tokenizer: Any, rows: Sequence[LabelledPrompt]
) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
    """(name, rows with the value, compared rows), within one class, so that refusal is no help."""
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
        column = [row.get(field) for row in rows]
        for name, members in classes.items():
            values = sorted({str(v) for v, m in zip(column, members, strict=True) if m and v})
            if len(values) not in _VALUES:
                continue
            # Of two values one is enough: the other is its complement.
            for value in values[:1] if len(values) == 2 else values:
                inside = np.array([str(v) == value for v in column])
                if _enough(inside, members):
                    yield f"{field}: {value} ({name})", inside, members


def _enough(inside: np.ndarray, members: np.ndarray) -> bool:
    return min(int((inside & members).sum()), int((~inside & members).sum())) >= _ROWS


def _favoured(model: nn.Module, tokenizer: Any, direction: mx.array) -> list[str]:
    logits = unembed(model, direction[None])[0]
    return [tokenizer.decode([token]) for token in integers(mx.argsort(-logits)[:_TOKENS])]
