"""The value a fact's subject should have: the stream vector behind a block that says the target.

δ is added to the output of block z at the subject's last token and trained by Adam until the model
gives the target in every context (Meng et al. 2023, section 4.2). All facts are trained in one
batch. δ touches neither the blocks up to z nor, behind them, the tokens before it: those are
computed once, and a step runs the later blocks over the later tokens. Knows models and rows.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import make_prompt_cache

from vauban._arrays import as_numpy
from vauban.generation import can_skip_blocks, entering
from vauban.knowledge.reading import StreamAt
from vauban.knowledge.tokens import Row
from vauban.models import anatomy, caches, can_pad, can_share, forward

# Loss at which a fact is learnt (Meng et al.), Adam's constants, and how many steps in a row every
# target has to be the most likely token for `stop="argmax"`.
_LEARNT, _BETAS, _EPSILON, _HITS = 5e-2, (0.9, 0.999), 1e-8, 2
# Rows of a batch may begin so many tokens apart; a batch is formed anew when this share of its
# facts has finished; tokens that one step takes at most, and those of them whose logits are read.
_SPREAD, _COMPACT, _TOKENS, _READ = 4, 0.25, 4096, 128


@dataclass(frozen=True)
class ValueSettings:
    """What the optimisation needs of `EditSettings`."""

    steps: int
    lr: float
    weight_decay: float
    kl_factor: float
    clamp: float
    stop: str = "loss"
    prefix: bool = True


@dataclass(frozen=True)
class ValueTask:
    """A fact as rows: its prompts in all contexts with the target, and what is to stay.

    What a `kept` row says is to stay, by the mean KL of what follows its tokens behind the first
    after the subject, or its end alone: "{subject} is a" (Meng et al.), cut there, and what else
    the model says of the subject (`own_words`). `group` is the same for facts that share one δ
    (those about one subject).
    """

    prompts: tuple[Row, ...]
    target: tuple[int, ...]
    kept: tuple[Row, ...]
    group: int


@dataclass(frozen=True, eq=False)
class Value:
    """`z` (d,) = h0 + δ in float64, and how the training went; `steps` counts updates.

    `loss` is the last, `before` the first; `nll` is -log p of the target in the unchanged model.
    """

    z: np.ndarray
    h0: np.ndarray
    steps: int
    loss: float
    before: float
    nll: float

    @property
    def failed(self) -> bool:
        """Whether training did not bring the loss down."""
        learnt = self.before < _LEARNT or self.loss < self.before
        return not (learnt and np.isfinite(self.z).all())


@dataclass(eq=False)
class _Line:
    """One row: its tokens, where δ enters, where logits are read, and for whom they count."""

    tokens: list[int]
    pivot: int
    columns: list[int]
    targets: list[int]
    task: int
    group: int
    share: float
    plain: bool = False


@dataclass(frozen=True, eq=False)
class _Chunk:
    """Lines that are run together from column `start` on, with all that does not change.

    `before` (n, P, V) is what the lines at `kept` say without δ, `nll` (B,) -log p of the targets.
    """

    lines: list[_Line]
    tokens: mx.array
    stream: mx.array
    cache: list[Any] | None
    at: mx.array
    columns: mx.array
    targets: mx.array
    weights: mx.array
    hits: mx.array
    kept: mx.array
    before: mx.array
    nll: np.ndarray


def optimise_values(
    model: nn.Module, layer: int, tasks: Sequence[ValueTask], settings: ValueSettings
) -> list[Value]:
    """The values of all tasks at the output of block `layer`, trained together.

    The facts do not see one another, but for those of one group. A fact that is learnt leaves the
    batch with the δ that it has.
    """
    sizes = Counter(task.group for task in tasks)
    lines = [
        line
        for number, task in enumerate(tasks)
        for line in _lines(number, task, 1.0 / sizes[task.group])
    ]
    runner = _Runner(model, layer + 1, settings.prefix)
    chunks = runner.chunks(lines)
    h0, plain = runner.unchanged(chunks, len(tasks))
    size = h0.shape[1]
    groups = [task.group for task in tasks]
    lead = {group: groups.index(group) for group in groups}
    norms = {group: float(np.linalg.norm(h0[task])) for group, task in lead.items()}
    adam = {group: _Adam(size) for group in norms}
    records: dict[int, list[float]] = {group: [] for group in norms}
    hits = dict.fromkeys(norms, 0)
    active = set(norms)
    for step in range(settings.steps):
        deltas = mx.array(np.stack([adam[g].delta for g in norms]).astype(np.float32))
        places = {group: i for i, group in enumerate(norms)}
        losses, gradient, missed = runner.losses(chunks, deltas, places, settings.kl_factor)
        for group in sorted(active):
            i, state = places[group], adam[group]
            decay = settings.weight_decay / norms[group] ** 2
            size_now = float(np.sqrt((state.delta**2).sum() + 1e-20))
            loss = float(losses[i]) + decay * size_now
            records[group].append(loss)
            hits[group] = 0 if missed[i] else hits[group] + 1
            learnt = hits[group] >= _HITS if settings.stop == "argmax" else loss < _LEARNT
            if learnt or step == settings.steps - 1 or not np.isfinite(loss):
                active.discard(group)
                continue
            state.step(gradient[i] + decay * state.delta / size_now, settings.lr)
            state.clamp(settings.clamp * norms[group])
        if not active:
            break
        remaining = [line for chunk in chunks for line in chunk.lines if line.group in active]
        if len(remaining) <= (1 - _COMPACT) * sum(len(chunk.lines) for chunk in chunks):
            chunks = runner.chunks(remaining)
    return [
        Value(
            h0[n] + adam[task.group].delta, h0[n], adam[task.group].count,
            records[task.group][-1], records[task.group][0], float(plain[n]),
        )
        for n, task in enumerate(tasks)
    ]  # fmt: skip


class _Adam:
    """One fact's δ in float64, with bias correction."""

    def __init__(self, size: int) -> None:
        self.delta, self.mean, self.square = np.zeros(size), np.zeros(size), np.zeros(size)
        self.count = 0

    def step(self, gradient: np.ndarray, lr: float) -> None:
        self.count += 1
        self.mean = _BETAS[0] * self.mean + (1 - _BETAS[0]) * gradient
        self.square = _BETAS[1] * self.square + (1 - _BETAS[1]) * gradient**2
        mean = self.mean / (1 - _BETAS[0] ** self.count)
        square = self.square / (1 - _BETAS[1] ** self.count)
        self.delta = self.delta - lr * mean / (np.sqrt(square) + _EPSILON)

    def clamp(self, limit: float) -> None:
        size = float(np.linalg.norm(self.delta))
        if size > limit:
            self.delta = self.delta * (limit / size)


def _lines(number: int, task: ValueTask, part: float) -> list[_Line]:
    """The rows of a task that counts as `part` of its group."""
    lines = [
        _Line(
            [*prompt.tokens, *task.target[:-1]],
            prompt.pivot,
            [len(prompt.tokens) - 1 + i for i in range(len(task.target))],
            list(task.target),
            number,
            task.group,
            part / (len(task.prompts) * len(task.target)),
            place == 0,
        )
        for place, prompt in enumerate(task.prompts)
    ]
    for row in task.kept:
        size = len(row.tokens)
        read = list(range(min(row.pivot + 1, size - 1), size))
        lines.append(
            _Line(list(row.tokens), row.pivot, read, [], number, task.group, part / len(read))
        )
    return lines


class _Runner:
    """Runs lines from residual `start` on; computes what stands before it once a batch."""

    def __init__(self, model: nn.Module, start: int, prefix: bool) -> None:
        self.model, self.start = model, start
        self.skips = can_skip_blocks(model)
        self.pads = can_pad(model)
        self.prefix = prefix and self.skips and can_share(model)

    def chunks(self, lines: Sequence[_Line]) -> list[_Chunk]:
        """Lines with pivots near one another together, so that few tokens before them are run."""
        order = sorted(lines, key=lambda line: (line.pivot, len(line.tokens)))
        chunks: list[_Chunk] = []
        current: list[_Line] = []
        for line in order:
            together = [*current, line]
            begin = current[0].pivot if current else line.pivot
            width = max(len(one.tokens) for one in together) - begin
            far = self.prefix and line.pivot - begin > _SPREAD
            uneven = not self.pads and len({len(one.tokens) for one in together}) > 1
            read = max(len(one.columns) for one in together)
            large = width * len(together) > _TOKENS or read * len(together) > _READ
            if current and (far or uneven or large):
                chunks.append(self._chunk(current))
                together = [line]
            current = together
        return [*chunks, self._chunk(current)]

    def _chunk(self, lines: list[_Line]) -> _Chunk:
        begin = min(line.pivot for line in lines) if self.prefix else 0
        width = max(len(line.tokens) for line in lines)
        rows = mx.array([line.tokens + [0] * (width - len(line.tokens)) for line in lines])
        cache = None
        if begin:
            cache = make_prompt_cache(self.model)
            forward(self.model, rows[:, :begin], cache=cache, positions=None, logits=False)
            mx.eval(caches.arrays_in(cache))
        tokens = rows[:, begin:]
        at = StreamAt(self.start)
        copied = None if cache is None else caches.copied(cache)
        lengths = [len(line.tokens) - begin for line in lines]
        most = max(len(line.columns) for line in lines)

        def padded(values: list[Any], fill: Any) -> list[Any]:
            return values + [fill] * (most - len(values))

        columns = mx.array([padded([c - begin for c in line.columns], 0) for line in lines])
        targets = mx.array([padded(list(line.targets), 0) for line in lines])
        out = forward(
            self.model, tokens, lengths=lengths, cache=copied, positions=None, logits=columns,
            interventions=[at],
        )  # fmt: skip
        hits = mx.array([padded([1.0] * len(line.targets), 0.0) for line in lines])
        shares = mx.array([padded([line.share] * len(line.columns), 0.0) for line in lines])
        pivots = mx.array([line.pivot - begin for line in lines])
        at_pivot = (mx.arange(width - begin)[None] == pivots[:, None])[..., None]
        kept = mx.array([n for n, line in enumerate(lines) if not line.targets], mx.int32)
        assert out.logits is not None
        scores = _log_softmax(out.logits)
        before, stream = scores[kept], at.stream()
        nll = -(mx.take_along_axis(scores, targets[..., None], -1)[..., 0] * hits).sum(1)
        mx.eval(before, stream, nll)
        return _Chunk(
            lines, tokens, stream, cache, at_pivot, columns, targets, shares, hits, kept, before,
            as_numpy(nll),
        )  # fmt: skip

    def unchanged(self, chunks: Sequence[_Chunk], count: int) -> tuple[np.ndarray, np.ndarray]:
        """h0 (count, d), the stream at the subject's end of each plain prompt, and its -log p."""
        h0, nll = np.zeros((count, anatomy(self.model).d_model)), np.zeros(count)
        for chunk in chunks:
            ends = as_numpy((chunk.stream.astype(mx.float32) * chunk.at).sum(1))
            for n, line in enumerate(chunk.lines):
                if line.plain:
                    h0[line.task], nll[line.task] = ends[n], chunk.nll[n]
        return h0, nll

    def losses(
        self, chunks: Sequence[_Chunk], deltas: mx.array, places: dict[int, int], kl_factor: float
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Losses (g,) without the decay, their gradients (g, d), and whether a target is not the
        likeliest token (g,)."""
        losses, missed = np.zeros(len(places)), np.zeros(len(places), bool)
        gradient = np.zeros(deltas.shape)
        for chunk in chunks:
            rows = mx.array([places[line.group] for line in chunk.lines])

            def loss(d: mx.array, chunk: _Chunk = chunk, rows: mx.array = rows) -> Any:
                scores = _log_softmax(self._logits(chunk, d[rows]))
                chosen = mx.take_along_axis(scores, chunk.targets[..., None], -1)[..., 0]
                each = -(chosen * chunk.weights * chunk.hits).sum(1)
                if kl_factor and chunk.kept.size:
                    now, shares = scores[chunk.kept], chunk.weights[chunk.kept]
                    # KL(p_δ ‖ p_0), the mean over a line's tokens.
                    apart = (mx.exp(now) * (now - chunk.before)).sum(-1)
                    each = each.at[chunk.kept].add(kl_factor * (apart * shares).sum(1))
                wrong = ((scores.argmax(-1) != chunk.targets) * chunk.hits).sum(1)
                return each.sum(), (each, wrong)

            (_, (each, wrong)), slope = mx.value_and_grad(loss)(deltas)
            mx.eval(each, wrong, slope)
            gradient += as_numpy(slope)
            for n, line in enumerate(chunk.lines):
                losses[places[line.group]] += float(each[n])
                missed[places[line.group]] |= float(wrong[n]) > 0
        return losses, gradient, missed

    def _logits(self, chunk: _Chunk, deltas: mx.array) -> mx.array:
        """(B, P, V) float32 with each row's δ (B, d) added at its pivot."""
        moved = (chunk.stream.astype(mx.float32) + chunk.at * deltas[:, None]).astype(
            chunk.stream.dtype
        )
        cache = None if chunk.cache is None else caches.copied(chunk.cache)
        options: dict[str, Any] = {"positions": None, "logits": chunk.columns, "cache": cache}
        if self.skips:
            with entering(self.model, self.start, moved):
                out = forward(self.model, chunk.tokens, **options)
        else:
            at = StreamAt(self.start, lambda h: moved)
            out = forward(self.model, chunk.tokens, interventions=[at], **options)
        assert out.logits is not None
        return out.logits


def _log_softmax(logits: mx.array) -> mx.array:
    """In float32, over the vocabulary."""
    scores = logits.astype(mx.float32)
    return scores - mx.logsumexp(scores, axis=-1, keepdims=True)
