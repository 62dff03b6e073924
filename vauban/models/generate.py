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
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import integers
from vauban._common import Progress
from vauban.errors import InputError
from vauban.interventions import BatchIntervention, Intervention, shares_prefix, started
from vauban.models.anatomy import anatomy
from vauban.models.batching import (
    Batch,
    batches,
    prefix_cache,
    repeated,
    shared_prefix,
    token_budget,
)
from vauban.models.caches import keep_rows, merged
from vauban.models.notes import note, notes
from vauban.models.rows import can_share, relative_difference
from vauban.models.taps import Stream, tapped
from vauban.models.verify import verify_forward
from vauban.prompts import encode_chat


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
    shared = len(token_lists) > 1 and can_share(model) and shares_prefix(interventions)
    skip = shared_prefix(token_lists) if shared else 0
    prefix = prefix_cache(model, token_lists[0][:skip], interventions)
    uneven = len({len(t) for t in token_lists}) > 1
    grouped = uneven and not uneven_batches(model).ok
    done = 0
    sample = _sampler(temperature, seed)
    for batch in batches(
        token_lists,
        skip=skip,
        batch_size=batch_size,
        equal_lengths=grouped,
        budget=token_budget(model),
    ):
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
    logits = mx.take_along_axis(model(batch.tokens, cache=cache), last, axis=1)[:, 0]
    if len(set(batch.lengths)) > 1:
        for state in cache:
            state.finalize()
    return logits


# Finished rows are computed on until this share of the batch is idle: dropping rows copies caches.
_IDLE = 0.25


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
    present = list(range(len(batch.rows)))
    finished: set[int] = set()
    interventions = started(interventions, batch.lengths)
    with tapped(model, interventions, stream=Stream(prefill=True)) as stream:
        chosen = sample(_prefill(model, batch, cache), batch.rows, 0)
        mx.async_eval(chosen)
        stream.prefill = False
        for step in range(1, max_tokens + 1):
            following = chosen
            if step < max_tokens:
                # The next token is under way while this one is looked at.
                logits = model(chosen[:, None], cache=cache)[:, -1]
                following = sample(logits, [batch.rows[i] for i in present], step)
                mx.async_eval(following)
            for row, token in zip(present, integers(chosen), strict=True):
                if token in eos:
                    finished.add(row)
                elif row not in finished:
                    answers[row].append(token)
            keep = [k for k, row in enumerate(present) if row not in finished]
            if not keep:
                break
            chosen = following
            if len(keep) <= (1 - _IDLE) * len(present):
                keep_rows(cache, mx.array(keep), len(present))
                for state in interventions:
                    if isinstance(state, BatchIntervention):
                        state.filter(mx.array(keep))
                present, chosen = [present[k] for k in keep], chosen[mx.array(keep)]
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
    known = notes(model).batches
    if known is not None:
        return known
    check = _try_uneven(model)
    note(model, batches=check)
    return check


def _try_uneven(model: nn.Module) -> BatchCheck:
    top = min(anatomy(model).vocabulary, 50_000)
    lists = [[(i * 7919 + 13) % top for i in range(11)], [(i * 104729 + 5) % top for i in range(6)]]
    start = [(i * 31337 + 7) % top for i in range(5)]
    for head in [[], start] if can_share(model) else [[]]:
        try:
            together = _decoded(model, lists, prefix_cache(model, head, ()))
        except (ValueError, TypeError, RuntimeError, AttributeError, IndexError) as error:
            return BatchCheck(False, f"batching fails: {type(error).__name__}: {error}")
        alone = [_decoded(model, [head + tokens], None, row) for row, tokens in enumerate(lists)]
        single = mx.concatenate(alone)
        difference = relative_difference(together, single)
        half = single.dtype in (mx.float16, mx.bfloat16)
        if not difference <= (2e-2 if half else 1e-4):
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
