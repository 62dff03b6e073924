"""Rows of prompts from their caches to their last tokens, those that are done making room.

Knows tokens, caches and started interventions; makes no batches and knows no tokenizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import integers
from vauban.errors import InputError, ModelError
from vauban.generation.batching import Batch, can_skip_blocks, repeated
from vauban.generation.prompt_reading import PromptReading
from vauban.interventions import Intervention
from vauban.models.anatomy import anatomy
from vauban.models.caches import join_rows, keep_rows, merged
from vauban.models.swap import around, swapped
from vauban.models.taps import Stream, tapped

# (logits (B, V), the prompts' numbers, the tokens that each has said) -> token ids (B,)
Sampler = Callable[[mx.array, Sequence[int], Sequence[int]], mx.array]
# Finished rows are computed on until this share of the batch is idle: dropping and joining rows
# copies caches.
IDLE = 0.25
# A greedy answer is a loop where its last tokens say one passage of at most so many tokens so many
# times over, and are so many at least. Looked for every eight tokens.
_PASSAGE, _ROUNDS, _SHORTEST_LOOP, _LOOK = 24, 4, 32, 8


def batch_cache(
    model: nn.Module,
    prefixes: Sequence[list[Any] | None],
    batch: Batch,
    owners: Sequence[int] | None = None,
    *,
    joinable: bool = False,
) -> list[Any]:
    """Caches for one batch: mlx-lm's batched kinds for rows of uneven length, else plain ones.

    Row i starts from `prefixes[owners[i]]`, the cache behind the common start under its changes.
    `joinable`: the batched kinds in any case, so that other rows can join.
    """
    rows = len(batch.rows)
    owners = owners or [0] * rows
    even = len(set(batch.lengths)) == 1
    if even and not joinable and (prefixes[0] is None or len(prefixes) == 1):
        return repeated(prefixes[0], rows) or make_prompt_cache(model)
    starts = [make_prompt_cache(model) if p is None else p for p in prefixes]
    joined = [merged(states, owners) for states in zip(*starts, strict=True)]
    if not even:
        padding = [max(batch.lengths) - n for n in batch.lengths]
        for state in joined:
            state.prepare(lengths=list(batch.lengths), right_padding=padding)
    return joined


def prefill(model: nn.Module, batch: Batch, cache: list[Any]) -> mx.array:
    """(B, V) logits behind each row's last token; the caches are then ready to decode."""
    last = mx.array([n - 1 for n in batch.lengths])[:, None, None]

    def ends(inner: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = inner(*args, **kwargs)
        if isinstance(out, tuple):
            return (mx.take_along_axis(out[0], last, axis=1), *out[1:])
        return mx.take_along_axis(out, last, axis=1)

    # The norm and the head read the rows' ends alone, where the explicit loop is shown to be right:
    # it ends in the same way.
    short = can_skip_blocks(model)
    with swapped([around(anatomy(model).layers[-1], ends)] if short else []):
        logits = model(batch.tokens, cache=cache)
    logits = (logits if short else mx.take_along_axis(logits, last, axis=1))[:, 0]
    if len(set(batch.lengths)) > 1:
        for state in cache:
            state.finalize()
    return logits


def loop_of(tokens: Sequence[int]) -> list[int]:
    """The passage that the last tokens say four times over, in 32 tokens or more; else empty.

    >>> loop_of([5, 6, 7] + [8, 9] * 16), loop_of([8, 9] * 15)
    ([8, 9], [])
    """
    for size in range(1, _PASSAGE + 1):
        length = max(_ROUNDS * size, _SHORTEST_LOOP)
        if len(tokens) < length:
            break
        if tokens[-length + size :] == tokens[-length:-size]:
            return list(tokens[-size:])
    return []


class Answers:
    """The answers of a run so far; `present` are the rows that are computed, in their places.

    `numbers` are the rows as the caller counts its prompts. An answer ends at an end token and at
    `longest` tokens. With `close_loops` one that has become a loop is no longer computed: it is
    taken to go on as it does, so that what judges it sees the loop.
    """

    def __init__(
        self,
        numbers: Sequence[int],
        eos: frozenset[int],
        longest: int,
        *,
        close_loops: bool = False,
    ) -> None:
        self.numbers, self.eos, self.longest = numbers, eos, longest
        self.close_loops = close_loops
        self.answers: list[list[int]] = [[] for _ in numbers]
        self.finished: set[int] = set()
        self.present: list[int] = []

    @property
    def ending(self) -> bool:
        """Whether one more token ends every answer."""
        going_on = (row for row in self.present if row not in self.finished)
        return all(len(self.answers[row]) == self.longest - 1 for row in going_on)

    def done(self) -> int:
        """Whole answers so far; one that goes on counts by its share of the longest."""
        open_ended = sum(
            len(answer) for row, answer in enumerate(self.answers) if row not in self.finished
        )
        return len(self.finished) + open_ended // self.longest

    def take(self, tokens: mx.array, sound: mx.array) -> list[int]:
        """Add one token to each unfinished row; the places of the rows that go on."""
        for row, token, good in zip(self.present, integers(tokens), integers(sound), strict=True):
            if row in self.finished:
                continue
            answer = self.answers[row]
            if not good:
                raise ModelError(
                    f"prompt {self.numbers[row]}: the logits of answer token {len(answer) + 1} "
                    "hold NaN or inf; the model or an intervention overflows "
                    "(float32 or bfloat16 help)"
                )
            if token not in self.eos:
                answer.append(token)
                self._close_loop(answer)
            if token in self.eos or len(answer) == self.longest:
                self.finished.add(row)
        return [place for place, row in enumerate(self.present) if row not in self.finished]

    def _close_loop(self, answer: list[int]) -> None:
        if not self.close_loops or len(answer) % _LOOK:
            return
        if passage := loop_of(answer):
            rest = self.longest - len(answer)
            answer.extend((passage * (rest // len(passage) + 1))[:rest])


class Decoding:
    """The rows that are decoded together: `read` lets them in, `run` answers them.

    `answers` takes the tokens; `tell` is called at every step.
    """

    def __init__(
        self, model: nn.Module, answers: Answers, sample: Sampler, tell: Callable[[], None]
    ) -> None:
        self._model, self._answers, self._sample, self._tell = model, answers, sample, tell
        self._cache: list[Any] = []
        self._next: tuple[mx.array, mx.array] | None = None

    def read(
        self,
        batch: Batch,
        cache: list[Any],
        running: Sequence[Intervention],
        reading: PromptReading | None = None,
    ) -> None:
        """Read the prompts of a batch; its rows join those that are present.

        Rows can only join where both caches are of batched kinds.
        """
        recording = Stream(recording=reading is not None, prefill=True)
        with tapped(self._model, running, stream=recording) as stream:
            first = self._drawn(prefill(self._model, batch, cache), batch.rows, 0)
            if reading is not None:
                reading.take(batch, stream, len(anatomy(self._model).layers))
        if self._next is None:
            self._cache, self._next = cache, first
        else:
            join_rows(self._cache, cache)
            self._next = _joined(self._next, first)
        self._answers.present += batch.rows

    def order(self, owners: Sequence[int]) -> None:
        """Put the rows side by side that have one owner."""
        present = self._answers.present
        order = sorted(range(len(present)), key=lambda place: owners[present[place]])
        if order != list(range(len(present))):
            self._keep(order)

    def run(self, running: Sequence[Intervention], *, waiting: bool) -> None:
        """Decode until all answers are whole or, while others are `waiting`, places are free."""
        answers = self._answers
        with tapped(self._model, running, stream=Stream(prefill=False)):
            while self._next is not None:
                tokens, sound = self._next
                self._next = None
                if not answers.ending:
                    # The next token is computed while this one is looked at.
                    logits = self._model(tokens[:, None], cache=self._cache)[:, -1]
                    self._next = self._drawn(logits, answers.present, 1)
                keep = answers.take(tokens, sound)
                self._tell()
                if not keep:
                    answers.present, self._next = [], None
                elif len(keep) <= (1 - IDLE) * len(answers.present):
                    self._keep(keep)
                    for state in running:
                        if hasattr(state, "filter"):
                            state.filter(mx.array(keep))
                    if waiting:
                        return

    def _drawn(
        self, logits: mx.array, rows: Sequence[int], ahead: int
    ) -> tuple[mx.array, mx.array]:
        """The rows' next tokens but `ahead`, and whether the logits allow a choice; not awaited."""
        answers = self._answers
        said = [len(answers.answers[row]) + ahead for row in rows]
        tokens = self._sample(logits, [answers.numbers[row] for row in rows], said)
        # The arg-max of NaN is some token, so a broken model would seem to answer.
        sound = mx.isfinite(logits.max(axis=-1))
        mx.async_eval(tokens, sound)
        return tokens, sound

    def _keep(self, places: list[int]) -> None:
        """The rows at these places go on, in this order."""
        answers, index = self._answers, mx.array(places)
        keep_rows(self._cache, index, len(answers.present))
        answers.present = [answers.present[place] for place in places]
        if self._next is not None:
            tokens, sound = self._next
            self._next = tokens[index], sound[index]


def _joined(
    first: tuple[mx.array, mx.array], second: tuple[mx.array, mx.array]
) -> tuple[mx.array, mx.array]:
    return mx.concatenate([first[0], second[0]]), mx.concatenate([first[1], second[1]])


def sampler(temperature: float, seed: int) -> Sampler:
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; expected 0 or more")
    if temperature == 0:
        return lambda logits, rows, said: mx.argmax(logits, axis=-1)

    def sample(logits: mx.array, rows: Sequence[int], said: Sequence[int]) -> mx.array:
        # Gumbel-max with one key per (seed, row, place in the answer).
        keys = [
            mx.random.key(hash((seed, row, place)) % 2**63)
            for row, place in zip(rows, said, strict=True)
        ]
        noise = mx.stack([mx.random.gumbel((logits.shape[-1],), key=key) for key in keys])
        return mx.argmax(logits.astype(mx.float32) / temperature + noise, axis=-1)

    return sample
