"""A loaded model under interventions as lm-eval's model interface (`lm_eval.api.model.LM`).

Importing this file needs lm-eval; `benchmarks` does it when it is asked to.
"""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from lm_eval.api.model import LM
from mlx_lm.models.cache import make_prompt_cache

from vauban._common import Progress
from vauban.errors import CheckError, InputError
from vauban.evaluation.likelihood import sequence_losses
from vauban.evaluation.sequences import Scored
from vauban.generation import eos_ids, generate_tokens
from vauban.interventions import Intervention, shares_prefix, started
from vauban.models import Stream, tapped, verify_forward

# Prompts are read in pieces of this many tokens, and answers are at most so long where a task does
# not say: mlx-lm's own adapter to lm-eval has the same two.
_PIECE = 2048
_MAX_TOKENS = 8192


class InterventionLM(LM):
    """`model` under `interventions`, with contexts and what follows them told apart.

    A context is read as a prompt and its continuations are scored as decoded tokens, so that an
    `Add` at "prompt" positions and a `Conditional` do here what they do in `generate`. No chat
    template: the benchmarks' protocols are plain text, with the tokenizer's special tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        interventions: Iterable[Intervention] = (),
        *,
        progress: Progress | None = None,
    ) -> None:
        super().__init__()
        verify_forward(model)
        self._model = model
        self.tokenizer = tokenizer
        self._interventions = tuple(interventions)
        self._progress = progress

    def loglikelihood(self, requests: Any) -> list[tuple[float, bool]]:
        """(log-probability, whether it is the greedy one) of each request's continuation."""
        by_context: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_context[request.args[0]].append(place)
        scores = [(0.0, False)] * len(requests)
        for done, (context, places) in enumerate(by_context.items(), start=1):
            head = self._encode(context)
            rows = [self._encode(context + requests[p].args[1])[len(head) :] for p in places]
            if not all(rows):
                raise InputError(f"a continuation of {context[-40:]!r} adds no token to it")
            for place, score in zip(places, self._scores(head, rows), strict=True):
                scores[place] = score
            if self._progress:
                self._progress("benchmark", done, len(by_context))
        return scores

    def _encode(self, text: str) -> list[int]:
        """Token ids with special tokens; at least one, for the first token to be scored from."""
        ids = [int(i) for i in self.tokenizer.encode(text)]
        start = self.tokenizer.bos_token_id
        return ids or [self.tokenizer.eos_token_id if start is None else start]

    def _scores(
        self, head: Sequence[int], rows: Sequence[Sequence[int]]
    ) -> list[tuple[float, bool]]:
        """Continuations of one context, which is read once."""
        run = started(self._interventions, [len(head)])
        cache = make_prompt_cache(self._model)
        # A conditional intervention looks at the whole context, so it is read in one piece.
        piece = _PIECE if shares_prefix(self._interventions) else len(head)
        with tapped(self._model, run, stream=Stream(prefill=True)) as stream:
            for start in range(0, len(head), piece):
                logits = self._model(mx.array([head[start : start + piece]]), cache=cache)
                mx.eval(logits, [state.state for state in cache])
            stream.prefill = False
            scores = []
            for row in rows:
                every = logits[:, -1:]
                if len(row) > 1:
                    following = self._model(mx.array([row[:-1]]), cache=copy.deepcopy(cache))
                    every = mx.concatenate([every, following], axis=1)
                scores.append(_score(every[0].astype(mx.float32), row))
        return scores

    def loglikelihood_rolling(self, requests: Any) -> list[float]:
        """Log-likelihood of whole texts, each token from all before it; the first is not scored."""
        sequences = [Scored(self._encode(request.args[0]), 1) for request in requests]
        return [-loss for loss, _ in sequence_losses(self._model, sequences, self._interventions)]

    def generate_until(self, requests: Any) -> list[str]:
        """Greedy answers by vauban's own generation, cut at the first stop text."""
        by_length: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            by_length[request.args[1].get("max_gen_toks", _MAX_TOKENS)].append(place)
        answers = [""] * len(requests)
        for limit, places in by_length.items():
            written = generate_tokens(
                self._model,
                [self._encode(requests[place].args[0]) for place in places],
                eos=eos_ids(self.tokenizer),
                max_tokens=limit,
                interventions=self._interventions,
            )
            for place, ids in zip(places, written, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                for stop in requests[place].args[1].get("until", []):
                    text = text.split(stop)[0]
                answers[place] = text
        return answers


def _score(logits: mx.array, row: Sequence[int]) -> tuple[float, bool]:
    """Summed log-probability of `row` (T,) under logits (T, V), and whether it is greedy."""
    ids = mx.array(list(row))
    chosen = mx.take_along_axis(logits, ids[:, None], axis=1)[:, 0]
    total = float((chosen - mx.logsumexp(logits, axis=-1)).sum())
    if math.isnan(total):
        raise CheckError("the model's logits are NaN: its answers to a benchmark mean nothing")
    return total, bool((mx.argmax(logits, axis=-1) == ids).all())
