"""Batched greedy or sampled generation under interventions, with the shared prefix read once.

Uneven prompts share a batch only where the model's batched caches are shown to agree with single
prompts; elsewhere prompts of equal length are grouped. Knows tokens and caches; judges no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import integers
from vauban._common import Progress, probe_tokens
from vauban.errors import InputError, ModelError
from vauban.generation.batching import (
    Batch,
    batches,
    can_skip_blocks,
    prefix_cache,
    repeated,
    shared_prefix,
    token_budget,
)
from vauban.generation.prompt_reading import PromptReading
from vauban.interventions import Intervention, as_interventions, shares_prefix, started
from vauban.models.anatomy import anatomy
from vauban.models.caches import keep_rows, merged
from vauban.models.forward import BatchCheck, can_share, check_ids
from vauban.models.notes import note, notes, warn_beyond_window
from vauban.models.parity import relative_difference, tolerance_for, verify_forward
from vauban.models.swap import around, swapped
from vauban.models.taps import Stream, tapped
from vauban.prompts import encode_chat

# (logits (B, V), the prompts' numbers, step) -> token ids (B,)
Sampler = Callable[[mx.array, Sequence[int], int], mx.array]
# Finished rows are computed on until this share of the batch is idle: dropping rows copies caches.
_IDLE = 0.25


def generate(
    model: nn.Module,
    tokenizer: Any,
    prompts: Sequence[Any],
    *,
    max_tokens: int = 100,
    interventions: Iterable[Intervention] = (),
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> list[str]:
    """One answer per prompt, stopped at any end token.

    A prompt is a text or a list of messages, to which the chat template is applied, or a list of
    token ids, which is read as it is. `temperature` 0 is greedy; otherwise each row is sampled from
    its own key, derived from `seed` and its place in `prompts`, so the answers do not depend on the
    batch size.

    Raises InputError for bad options, empty prompts and ids outside the vocabulary; ModelError,
    naming the prompt, when the logits hold NaN or inf.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> len(vauban.generate(model, tokenizer, ["Hello"], max_tokens=3))
    1
    """
    if isinstance(prompts, str):
        raise InputError(f"prompts is one text, {prompts!r:.60}; expected a list of prompts")
    encoded = [encode_chat(tokenizer, prompt) for prompt in prompts]
    ids = generate_tokens(
        model,
        encoded,
        eos=eos_ids(tokenizer),
        max_tokens=max_tokens,
        interventions=interventions,
        batch_size=batch_size,
        temperature=temperature,
        seed=seed,
        progress=progress,
    )
    return [decode(tokenizer, answer) for answer in ids]


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """The text of answer tokens, without special tokens and outer white space."""
    return tokenizer.decode(list(ids), skip_special_tokens=True).strip()


def eos_ids(tokenizer: Any) -> frozenset[int]:
    """Every id that ends an answer."""
    ids = getattr(tokenizer, "eos_token_ids", None)
    if not ids:
        ids = [tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else []
    # mlx-lm's wrapper holds a set; a bare transformers tokenizer answers with its one id.
    return frozenset({ids} if isinstance(ids, int) else {int(i) for i in ids})


def generate_tokens(
    model: nn.Module,
    token_lists: Sequence[Sequence[int]],
    *,
    eos: frozenset[int],
    max_tokens: int = 100,
    interventions: Iterable[Intervention] = (),
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    reading: PromptReading | None = None,
    progress: Progress | None = None,
) -> list[list[int]]:
    """As `generate`, on token ids: the new ids of each row, without the eos that ended it.

    `reading` takes residuals from the pass over the prompts; right where `can_read_prompts`.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
    if not token_lists:
        return []
    if all(token_lists):
        check_ids(min(map(min, token_lists)), max(map(max, token_lists)), anatomy(model))
    verify_forward(model)
    warn_beyond_window(model, max(map(len, token_lists)) + max_tokens)
    interventions = as_interventions(interventions)
    sample = _sampler(temperature, seed)
    shared = len(token_lists) > 1 and can_share(model) and shares_prefix(interventions)
    keep = -min(reading.positions) if reading else 1
    skip = shared_prefix(token_lists, keep=keep) if shared else 0
    prefix = prefix_cache(model, token_lists[0][:skip], interventions)
    uneven = len({len(t) for t in token_lists}) > 1
    grouped = uneven and not uneven_batches(model).ok
    options: dict[str, Any] = {"batch_size": batch_size, "equal_lengths": grouped}
    answers: dict[int, list[int]] = {}
    for batch in batches(token_lists, skip=skip, budget=token_budget(model), **options):
        rows = _Answers(batch.rows, eos)
        running = started(interventions, batch.lengths)

        def tell(before: int = len(answers), rows: _Answers = rows) -> None:
            if progress:
                progress("generate", before + len(rows.finished), len(token_lists))

        cache = _batch_cache(model, prefix, batch)
        _decode(model, batch, cache, running, rows, max_tokens, sample, tell, reading)
        answers |= zip(batch.rows, rows.answers, strict=True)
        if progress:
            progress("generate", len(answers), len(token_lists))
    return [answers[row] for row in range(len(token_lists))]


def _batch_cache(model: nn.Module, prefix: list[Any] | None, batch: Batch) -> list[Any]:
    """Caches for one batch: mlx-lm's batched kinds for rows of uneven length, else plain ones."""
    rows = len(batch.rows)
    plain = prefix if prefix is not None else make_prompt_cache(model)
    if len(set(batch.lengths)) == 1:
        return repeated(prefix, rows) or plain
    padding = [max(batch.lengths) - n for n in batch.lengths]
    joined = [merged(state, rows) for state in plain]
    for state in joined:
        state.prepare(lengths=list(batch.lengths), right_padding=padding)
    return joined


def _prefill(model: nn.Module, batch: Batch, cache: list[Any]) -> mx.array:
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


class _Answers:
    """The answers of a batch so far; `present` are the rows that are still computed."""

    def __init__(self, prompts: Sequence[int], eos: frozenset[int]) -> None:
        self.prompts = prompts
        self.eos = eos
        self.answers: list[list[int]] = [[] for _ in prompts]
        self.finished: set[int] = set()
        self.present = list(range(len(prompts)))

    @property
    def numbers(self) -> list[int]:
        """The present rows, as the caller numbers its prompts."""
        return [self.prompts[row] for row in self.present]

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
        return [place for place, row in enumerate(self.present) if row not in self.finished]


def _decode(
    model: nn.Module,
    batch: Batch,
    cache: list[Any],
    running: Sequence[Intervention],
    rows: _Answers,
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
        tokens, sound = drawn(_prefill(model, batch, cache), 0)
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


def _sampler(temperature: float, seed: int) -> Sampler:
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


def uneven_batches(model: nn.Module) -> BatchCheck:
    """Try two prompts of different length together and alone, prefill and one decoded token.

    mlx-lm's batched caches are right on most families, not on all; this decides it by running
    them. Once per loaded model.
    """
    known = notes(model).batches
    if known is not None:
        return known
    check = _try_uneven(model)
    note(model, batches=check)
    return check


def _try_uneven(model: nn.Module) -> BatchCheck:
    top = anatomy(model).vocabulary
    lists = [probe_tokens(11, top), probe_tokens(6, top, 1)]
    for head in [[], probe_tokens(5, top, 2)] if can_share(model) else [[]]:
        try:
            together = _decoded(model, lists, prefix_cache(model, head, ()))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            return BatchCheck(False, f"batching fails: {type(error).__name__}: {error}")
        alone = [_decoded(model, [head + tokens], None, row) for row, tokens in enumerate(lists)]
        single = mx.concatenate(alone)
        difference = relative_difference(together, single)
        if not difference <= tolerance_for(single.dtype in (mx.float16, mx.bfloat16)):
            return BatchCheck(
                False, f"uneven batches differ from single prompts by {difference:.1e}"
            )
    return BatchCheck(True, "")


def _decoded(
    model: nn.Module, lists: list[list[int]], prefix: list[Any] | None, first: int = 0
) -> mx.array:
    """(B, 3, V) logits behind each row and behind two fixed tokens after it."""
    widths = [len(tokens) for tokens in lists]
    padded = [tokens + [0] * (max(widths) - len(tokens)) for tokens in lists]
    batch = Batch(list(range(len(lists))), mx.array(padded), widths)
    cache = _batch_cache(model, prefix, batch)
    steps = [_prefill(model, batch, cache)]
    for token in (1, 3):
        following = mx.array([[token + first + row] for row in batch.rows])
        steps.append(model(following, cache=cache)[:, -1])
    out = mx.stack(steps, axis=1)
    mx.eval(out)
    return out
