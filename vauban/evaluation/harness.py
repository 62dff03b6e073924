"""mlx-lm's adapter to lm-eval, for a model that is already loaded and runs under interventions.

Knows the adapter's two ways to call the model: reading a prompt, and scoring what follows it from
the prompt's cache. Importing this file needs lm-eval; `capability` does it when asked to.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn
from lm_eval.api.model import LM
from mlx_lm.evaluate import DEFAULT_MAX_TOKENS, MLXLM

from vauban.interventions import Intervention, shares_prefix, started
from vauban.models import Stream, can_pad, eos_ids, generate_tokens, tapped, verify_forward

# mlx-lm's adapter reads prompts in pieces of this many tokens.
_STEP = 2048


class InterventionLM(MLXLM):
    """`MLXLM` around `model` with `interventions` in force, prompts and continuations told apart.

    A context is read as a prompt and its choices are scored as decoded tokens, so that an `Add` at
    "prompt" positions and a `Conditional` do here what they do in `generate`. No chat template:
    the benchmarks' protocols are plain text, with the tokenizer's special tokens.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        interventions: Iterable[Intervention] = (),
        *,
        max_tokens: int | None = None,
        batch_size: int = 8,
    ) -> None:
        # MLXLM's own constructor loads a model from a path; ours is loaded.
        LM.__init__(self)
        verify_forward(model)
        self._model = model
        self.tokenizer = tokenizer
        self._max_tokens = max_tokens
        self._batch_size = batch_size if can_pad(model) else 1
        self.use_chat_template = False
        self._sampler = None
        self._interventions = tuple(interventions)
        self._run: Sequence[Intervention] = ()

    @contextmanager
    def _reading(self, lengths: Sequence[int]) -> Iterator[None]:
        """Prompts of these lengths are read; a `Conditional` decides for what follows as well."""
        self._run = started(self._interventions, lengths)
        with tapped(self._model, self._run, stream=Stream(prefill=True)):
            yield

    def _step(self, wanted: int, length: int) -> int:
        # A conditional intervention looks at the whole prompt, so it is read in one piece.
        return wanted if shares_prefix(self._interventions) else max(wanted, length)

    def _process_prompt(self, prompt: Any, step_size: int = _STEP) -> Any:
        with self._reading([len(prompt)]):
            return super()._process_prompt(prompt, self._step(step_size, len(prompt)))

    def _score_fn(self, inputs: Any, cache: Any = None, step_size: int = _STEP) -> Any:
        if cache is not None:
            with tapped(self._model, self._run, stream=Stream(prefill=False)):
                return super()._score_fn(inputs, cache, step_size)
        # The last token of each row is only predicted, not read.
        lengths = [max(1, len(row) - 1) for row in inputs]
        with self._reading(lengths):
            return super()._score_fn(inputs, None, self._step(step_size, max(lengths)))

    def generate_until(self, requests: Any) -> list[str]:
        """Greedy answers by vauban's own generation, cut at the first stop text."""
        groups: dict[int, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            options = request.args[1]
            limit = self._max_tokens or options.get("max_gen_toks", DEFAULT_MAX_TOKENS)
            groups[limit].append(place)
        answers = [""] * len(requests)
        for limit, places in groups.items():
            found = generate_tokens(
                self._model,
                [self.tokenizer.encode(requests[place].args[0]) for place in places],
                eos=eos_ids(self.tokenizer),
                max_tokens=limit,
                interventions=self._interventions,
            )
            for place, ids in zip(places, found, strict=True):
                text = self.tokenizer.decode(ids, skip_special_tokens=True)
                for stop in requests[place].args[1].get("until", []):
                    text = text.split(stop)[0]
                answers[place] = text
        return answers
