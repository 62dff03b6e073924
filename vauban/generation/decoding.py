"""One batch of prompts, from its caches to its last token.

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
from vauban.models.caches import keep_rows, merged
from vauban.models.swap import around, swapped
from vauban.models.taps import Stream, tapped

# (logits (B, V), the prompts' numbers, step) -> token ids (B,)
Sampler = Callable[[mx.array, Sequence[int], int], mx.array]
# Finished rows are computed on until this share of the batch is idle: dropping rows copies caches.
_IDLE = 0.25
# A greedy answer is a loop where its last tokens say one passage of at most so many tokens so many
# times over, and are so many at least. Looked for every eight tokens.
_PASSAGE, _ROUNDS, _SHORTEST_LOOP, _LOOK = 24, 4, 32, 8


def batch_cache(
    model: nn.Module,
    prefixes: Sequence[list[Any] | None],
    batch: Batch,
    owners: Sequence[int] | None = None,
) -> list[Any]:
    """Caches for one batch: mlx-lm's batched kinds for rows of uneven length, else plain ones.

    Row i starts from `prefixes[owners[i]]`, the cache behind the common start under its changes.
    """
    rows = len(batch.rows)
    owners = owners or [0] * rows
    even = len(set(batch.lengths)) == 1
    if even and (prefixes[0] is None or len(prefixes) == 1):
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
    """The answers of a batch so far; `present` are the rows that are still computed.

    `loops_to`: an answer that has become a loop is no longer computed. It is taken to go on as it
    does, up to so many tokens, so that what judges it sees the loop.
    """

    def __init__(
        self, prompts: Sequence[int], eos: frozenset[int], loops_to: int | None = None
    ) -> None:
        self.prompts = prompts
        self.eos = eos
        self.loops_to = loops_to
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.finished: set[int] = set()
        self.present = list(range(len(prompts)))

    @property
    def numbers(self) -> list[int]:
        """The present rows, as the caller numbers its prompts."""
        return [self.prompts[row] for row in self.present]

    def done(self, longest: int) -> int:
        """Whole answers so far; one that goes on counts by its share of the longest."""
        open_ended = sum(
            len(answer) for row, answer in enumerate(self.answers) if row not in self.finished
        )
        return len(self.finished) + open_ended // longest

    def take(self, tokens: mx.array, sound: mx.array, step: int) -> list[int]:
        """Add one token to each unfinished row; the places of the rows that go on."""
        for row, token, good in zip(self.present, integers(tokens), integers(sound), strict=True):
            if row in self.finished:
                continue
            if not good:
                raise ModelError(
                    f"prompt {self.prompts[row]}: the logits of answer token {step} hold NaN or "
                    "inf; the model or an intervention overflows (float32 or bfloat16 help)"
                )
            if token in self.eos:
                self.finished.add(row)
            else:
                self.answers[row].append(token)
                self._close_loop(row)
        return [place for place, row in enumerate(self.present) if row not in self.finished]

    def _close_loop(self, row: int) -> None:
        answer = self.answers[row]
        if self.loops_to is None or len(answer) % _LOOK or len(answer) >= self.loops_to:
            return
        if passage := loop_of(answer):
            rest = self.loops_to - len(answer)
            answer.extend((passage * (rest // len(passage) + 1))[:rest])
            self.finished.add(row)


def decode_batch(
    model: nn.Module,
    batch: Batch,
    cache: list[Any],
    running: Sequence[Intervention],
    rows: Answers,
    max_tokens: int,
    sample: Sampler,
    tell: Callable[[], None],
    reading: PromptReading | None = None,
) -> None:
    """Answer a batch of prompts: `rows` takes the tokens; `tell` is called at every step."""

    def drawn(logits: mx.array, step: int) -> tuple[mx.array, mx.array]:
        """The next tokens, and whether each row's logits allow a choice; not awaited here."""
        tokens = sample(logits, rows.numbers, step)
        # The arg-max of NaN is some token, so a broken model would seem to answer.
        sound = mx.isfinite(logits.max(axis=-1))
        mx.async_eval(tokens, sound)
        return tokens, sound

    recording = Stream(recording=reading is not None, prefill=True)
    with tapped(model, running, stream=recording) as stream:
        tokens, sound = drawn(prefill(model, batch, cache), 0)
        stream.prefill = stream.recording = False
        if reading is not None:
            reading.take(batch, stream, len(anatomy(model).layers))
        for step in range(1, max_tokens + 1):
            following = tokens, sound
            if step < max_tokens:
                # The next token is computed while this one is looked at.
                following = drawn(model(tokens[:, None], cache=cache)[:, -1], step)
            keep = rows.take(tokens, sound, step)
            tell()
            if not keep:
                break
            tokens, sound = following
            if len(keep) <= (1 - _IDLE) * len(rows.present):
                index = mx.array(keep)
                keep_rows(cache, index, len(rows.present))
                for state in running:
                    if hasattr(state, "filter"):
                        state.filter(index)
                rows.present = [rows.present[k] for k in keep]
                tokens, sound = tokens[index], sound[index]


def sampler(temperature: float, seed: int) -> Sampler:
    if not 0 <= temperature < float("inf"):
        raise InputError(f"temperature is {temperature}; expected 0 or more")
    if temperature == 0:
        return lambda logits, rows, step: mx.argmax(logits, axis=-1)

    def sample(logits: mx.array, rows: Sequence[int], step: int) -> mx.array:
        # Gumbel-max with one key per (seed, row, step).
        keys = [mx.random.key(hash((seed, row, step)) % 2**63) for row in rows]
        noise = mx.stack([mx.random.gumbel((logits.shape[-1],), key=key) for key in keys])
        return mx.argmax(logits.astype(mx.float32) / temperature + noise, axis=-1)

    return sample
