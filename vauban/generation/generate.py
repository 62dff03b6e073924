"""Batched greedy or sampled generation under interventions, with the shared prefix read once.

Uneven prompts share a batch, and take the places of answers that have ended, only where the
model's batched caches are shown to agree with single prompts; elsewhere prompts of equal length are
grouped. Knows tokens and caches; judges no text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from vauban._common import Progress
from vauban.errors import InputError
from vauban.generation.batching import (
    Batch,
    Batches,
    answer_rows,
    prefix_cache,
    shared_prefix,
    token_budget,
)
from vauban.generation.decoding import IDLE, Answers, Decoding, batch_cache, sampler
from vauban.generation.prompt_reading import PromptReading
from vauban.generation.uneven import rows_can_join, uneven_batches
from vauban.interventions import (
    ByRow,
    Intervention,
    ModuleChange,
    ModuleWeights,
    as_interventions,
    check_width,
    shares_prefix,
    started,
)
from vauban.models.anatomy import anatomy
from vauban.models.forward import can_share, check_ids
from vauban.models.notes import warn_beyond_window
from vauban.models.parity import verify_forward
from vauban.prompts import encode_chat


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
    return generate_groups(
        model, [(interventions, token_lists)], eos=eos, max_tokens=max_tokens,
        batch_size=batch_size, temperature=temperature, seed=seed, reading=reading,
        progress=progress,
    )[0]  # fmt: skip


def generate_groups(
    model: nn.Module,
    groups: Sequence[tuple[Iterable[Intervention], Sequence[Sequence[int]]]],
    *,
    eos: frozenset[int],
    max_tokens: int = 100,
    batch_size: int | None = None,
    temperature: float = 0.0,
    seed: int = 0,
    close_loops: bool = False,
    reading: PromptReading | None = None,
    progress: Progress | None = None,
) -> list[list[list[int]]]:
    """As `generate_tokens`, for several (interventions, token lists) whose rows share batches.

    A step of decoding reads all weights however few rows it serves: ten changes on eight prompts
    each take the steps of one. Where rows cannot be mixed the groups are answered one by one.
    `close_loops`: a greedy answer that says one passage four times over, in 32 tokens or more, is
    not computed any further but taken to say it until `max_tokens`.
    """
    if max_tokens < 1:
        raise InputError(f"max_tokens is {max_tokens}; expected at least 1")
    changes = [as_interventions(given) for given, _ in groups]
    flat = [tokens for _, lists in groups for tokens in lists]
    owners = [number for number, (_, lists) in enumerate(groups) for _ in lists]
    if not flat:
        return [[] for _ in groups]
    if all(flat):
        check_ids(min(map(min, flat)), max(map(max, flat)), anatomy(model))
    for change in changes:
        check_width(change, anatomy(model).d_model)
    verify_forward(model)
    warn_beyond_window(model, max(map(len, flat)) + max_tokens)
    uneven = len({len(tokens) for tokens in flat}) > 1
    if len(groups) > 1 and not _can_mix(model, changes):
        return _one_by_one(
            model, groups, progress, eos=eos, max_tokens=max_tokens, batch_size=batch_size,
            temperature=temperature, seed=seed, close_loops=close_loops, reading=reading,
        )  # fmt: skip
    sample = sampler(temperature, seed)
    shared = len(flat) > 1 and can_share(model) and all(map(shares_prefix, changes))
    keep = -min(reading.positions) if reading else 1
    skip = shared_prefix(flat, keep=keep) if shared else 0
    queue = Batches(
        flat, skip=skip, budget=token_budget(model), batch_size=batch_size,
        most=answer_rows(model, max(map(len, flat)) + max_tokens),
        equal_lengths=uneven and not uneven_batches(model).ok,
    )  # fmt: skip
    prefixes = [prefix_cache(model, flat[0][:skip], change) for change in changes]
    numbers = [number for _, lists in groups for number in range(len(lists))]
    rows = Answers(numbers, eos, max_tokens, close_loops=close_loops and temperature == 0)

    def tell() -> None:
        if progress:
            progress("generate", rows.done(), len(flat))

    # What depends on whole prompts was started for one batch: nobody joins it later.
    joining = 1 < queue.size() < len(flat) and all(map(shares_prefix, changes))
    joining = joining and rows_can_join(model).ok
    decoding = Decoding(model, rows, sample, tell)
    while queue.waiting:
        running: list[Intervention] = []
        while room := _room(queue, len(rows.present), joining):
            batch = _by_owner(queue.take(room), owners)
            present = [owners[row] for row in batch.rows]
            running = _started(changes, present, batch.lengths)
            cache = batch_cache(model, prefixes, batch, present, joinable=joining)
            decoding.read(batch, cache, running, reading)
        if joining:
            decoding.order(owners)
            present = [owners[row] for row in rows.present]
            running = _started(changes, present, [0] * len(present))
        decoding.run(running, waiting=joining and queue.waiting > 0)
    each = iter(rows.answers)
    return [[next(each) for _ in lists] for _, lists in groups]


def _room(queue: Batches, present: int, joining: bool) -> int:
    """How many prompts may be read now, beside so many rows; 0 while that is not worth a pass."""
    if not queue.waiting or (present and not joining):
        return 0
    free = queue.size() - present
    return free if free >= IDLE * queue.size() else 0


def _can_mix(model: nn.Module, changes: Sequence[Sequence[Intervention]]) -> bool:
    """Whether rows under different changes may share a batch on this model.

    A change of weights holds for all rows, and routed experts see tokens without their rows.
    """
    every = [intervention for change in changes for intervention in change]
    paths = {path for i in every if isinstance(i, ModuleChange) for path in i.paths}
    routed = any(
        path in paths and isinstance(module, SwitchLinear | QuantizedSwitchLinear)
        for path, module in (model.named_modules() if paths else ())
    )
    weights = any(isinstance(i, ModuleWeights) for i in every)
    return not weights and not routed and uneven_batches(model).ok


def _one_by_one(
    model: nn.Module, groups: Sequence[tuple[Iterable[Intervention], Sequence[Sequence[int]]]],
    progress: Progress | None, **options: Any,
) -> list[list[list[int]]]:  # fmt: skip
    total = sum(len(lists) for _, lists in groups)
    found: list[list[list[int]]] = []
    for change, lists in groups:
        before = sum(len(answers) for answers in found)

        def tell(label: str, done: int, _: int, before: int = before) -> None:
            if progress:
                progress(label, before + done, total)

        found += generate_groups(model, [(change, lists)], progress=tell, **options)
    return found


def _by_owner(batch: Batch, owners: Sequence[int]) -> Batch:
    """The same rows, those of one group side by side."""
    order = sorted(range(len(batch.rows)), key=lambda place: owners[batch.rows[place]])
    return Batch(
        [batch.rows[place] for place in order],
        batch.tokens[mx.array(order)],
        [batch.lengths[place] for place in order],
    )


def _started(
    changes: Sequence[Sequence[Intervention]], owners: Sequence[int], lengths: Sequence[int]
) -> list[Intervention]:
    """The interventions of a batch whose rows stand by their owners."""
    if len(changes) == 1:
        return started(changes[0], lengths)
    groups, counts = [], []
    for number, change in enumerate(changes):
        own = [n for owner, n in zip(owners, lengths, strict=True) if owner == number]
        groups.append(started(change, own) if own else [])
        counts.append(len(own))
    return [ByRow(groups, counts)]
