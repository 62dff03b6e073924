"""Batched greedy or sampled generation under interventions, with the shared prefix read once.

Uneven prompts share a batch only where the model's batched caches are shown to agree with single
prompts; elsewhere prompts of equal length are grouped. Knows tokens and caches; judges no text.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from vauban._arrays import integers
from vauban.errors import InputError
from vauban.interventions import Intervention
from vauban.models.anatomy import anatomy
from vauban.models.batching import (
    Batch,
    batches,
    can_share,
    prefix_cache,
    repeated,
    shared_prefix,
)
from vauban.models.caches import keep_rows
from vauban.models.taps import Stream, tapped
from vauban.models.verify import verify_forward
from vauban.prompts import encode_chat

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class BatchCheck:
    """Whether prompts of uneven length may share a batch on this model, and why not."""

    ok: bool
    reason: str


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
    """One answer per prompt (a string or a list of messages), chat-templated, stopped at any eos.

    `temperature` 0 is greedy; otherwise each row is sampled from its own key, derived from `seed`
    and its place in `prompts`, so the answers do not depend on the batch size.

    >>> import vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> len(vauban.generate(model, tokenizer, ["Hello"], max_tokens=3))
    1
    """
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
    return frozenset(int(i) for i in ids)


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
    progress: Progress | None = None,
) -> list[list[int]]:
    """As `generate`, on token ids: the new ids of each row, without the eos that ended it."""
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
    if not token_lists:
        return []
    verify_forward(model)
    interventions = tuple(interventions)
    answers: list[list[int]] = [[] for _ in token_lists]
    skip = shared_prefix(token_lists) if can_share(model) and len(token_lists) > 1 else 0
    prefix = prefix_cache(model, token_lists[0][:skip], interventions)
    uneven = len({len(t) for t in token_lists}) > 1
    grouped = uneven and not uneven_batches(model).ok
    done = 0
    sample = _sampler(temperature, seed)
    for batch in batches(token_lists, skip=skip, batch_size=batch_size, equal_lengths=grouped):
        cache = _batch_cache(model, prefix, batch)
        for row, answer in zip(
            batch.rows,
            _decode_batch(model, batch, cache, interventions, eos, max_tokens, sample),
            strict=True,
        ):
            answers[row] = answer
        done += len(batch.rows)
        if progress:
            progress("generate", done, len(token_lists))
    return answers


def _batch_cache(model: nn.Module, prefix: list[Any] | None, batch: Batch) -> list[Any]:
    """Caches for one batch: mlx-lm's batched ones (left padding, row filter) over plain KV."""
    rows = len(batch.rows)
    plain = prefix if prefix is not None else make_prompt_cache(model)
    uneven = len(set(batch.lengths)) > 1
    if all(type(c) is KVCache for c in plain) and uneven:
        width = max(batch.lengths)
        merged = []
        for state in plain:
            joined = KVCache.merge([state] * rows)
            joined.prepare(right_padding=[width - n for n in batch.lengths])
            merged.append(joined)
        return merged
    return repeated(prefix, rows) or make_prompt_cache(model)


def _decode_batch(
    model: nn.Module,
    batch: Batch,
    cache: list[Any],
    interventions: Sequence[Intervention],
    eos: frozenset[int],
    max_tokens: int,
    sample: Callable[[mx.array, Sequence[int], int], mx.array],
) -> list[list[int]]:
    answers: list[list[int]] = [[] for _ in batch.rows]
    alive = list(range(len(batch.rows)))
    with tapped(model, interventions, stream=Stream(prefill=True)) as stream:
        logits = model(batch.tokens, cache=cache)
        last = mx.array([n - 1 for n in batch.lengths])[:, None, None]
        logits = mx.take_along_axis(logits, last, axis=1)[:, 0]
        if len(set(batch.lengths)) > 1:
            for state in cache:
                state.finalize()
        stream.prefill = False
        for step in range(max_tokens):
            chosen = sample(logits, [batch.rows[i] for i in alive], step)
            ids = integers(chosen)
            keep = [k for k, token in enumerate(ids) if token not in eos]
            for k in keep:
                answers[alive[k]].append(ids[k])
            if not keep or step == max_tokens - 1:
                break
            if len(keep) < len(alive):
                of = len(alive)
                alive = [alive[k] for k in keep]
                keep_rows(cache, mx.array(keep), of)
                chosen = chosen[mx.array(keep)]
            logits = model(chosen[:, None], cache=cache)[:, -1]
    return answers


def _sampler(temperature: float, seed: int) -> Callable[[mx.array, Sequence[int], int], mx.array]:
    if temperature < 0:
        raise InputError(f"temperature is {temperature}; expected 0 or more")
    if temperature == 0:
        return lambda logits, rows, step: mx.argmax(logits, axis=-1)

    def sample(logits: mx.array, rows: Sequence[int], step: int) -> mx.array:
        # Gumbel-max with one key per (seed, row, step).
        noise = mx.stack(
            [
                mx.random.gumbel(
                    (logits.shape[-1],), key=mx.random.key(hash((seed, row, step)) % 2**63)
                )
                for row in rows
            ]
        )
        return mx.argmax(logits.astype(mx.float32) / temperature + noise, axis=-1)

    return sample


def uneven_batches(model: nn.Module) -> BatchCheck:
    """Try two prompts of different length together and alone, prefill and one decoded token.

    mlx-lm's batched caches are right on most families, not on all; this decides it by running
    them. Once per loaded model.
    """
    known = getattr(model, "_vauban_batches", None)
    if known is not None:
        return known
    check = _try_uneven(model)
    object.__setattr__(model, "_vauban_batches", check)
    return check


def _try_uneven(model: nn.Module) -> BatchCheck:
    if not all(type(c) is KVCache for c in make_prompt_cache(model)):
        return BatchCheck(False, "its caches are not plain key-value caches")
    top = min(anatomy(model).vocabulary, 50_000)
    lists = [[(i * 7919 + 13) % top for i in range(11)], [(i * 104729 + 5) % top for i in range(6)]]
    batch = Batch([0, 1], mx.array([lists[0], lists[1] + [0] * 5]), [11, 6])
    try:
        cache = _batch_cache(model, None, batch)
        first = mx.take_along_axis(
            model(batch.tokens, cache=cache), mx.array([10, 5])[:, None, None], axis=1
        )
        for state in cache:
            state.finalize()
        second = model(mx.array([[1], [2]]), cache=cache)
        together = mx.concatenate([first, second], axis=1).astype(mx.float32)
        mx.eval(together)
    except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
        return BatchCheck(False, f"batching fails: {type(error).__name__}: {error}")
    alone = []
    for tokens, following in zip(lists, (1, 2), strict=True):
        cache = make_prompt_cache(model)
        first = model(mx.array([tokens]), cache=cache)[:, -1:]
        second = model(mx.array([[following]]), cache=cache)
        alone.append(mx.concatenate([first, second], axis=1))
    single = mx.concatenate(alone).astype(mx.float32)
    scale = float(mx.abs(single).max())
    difference = float(mx.abs(together - single).max())
    half = first.dtype in (mx.float16, mx.bfloat16)
    if difference <= (2e-2 if half else 1e-4) * scale:
        return BatchCheck(True, "")
    return BatchCheck(False, f"uneven batches differ from single prompts by {difference:.1e}")
