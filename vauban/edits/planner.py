"""Plan a cut of a whole model: one low-rank update per residual writer, applied or exported later.

Planning reads shapes and gains, no weights. Knows models through `vauban.models`.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.affine_cut import add_constants, harmless_values, projection_values
from vauban.edits.embedding import EmbeddingMode, embedding_mode
from vauban.edits.lowrank import NORM_MODES, NormMode, through_gain
from vauban.edits.options import block_set, finite, layer_factors, whole
from vauban.edits.plan import EditPlan
from vauban.edits.preservation_keys import PreservationKeys, Preserve
from vauban.edits.sparse import keep_rows
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add
from vauban.linalg import as_basis
from vauban.models import Writer, anatomy, check_measured_on, residual_writers

_COMPONENTS = {
    "attention": ("attention", "ssm"),
    "mlp": ("mlp", "expert", "shared_expert", "other"),
    "embedding": ("embedding",),
}


def plan_cut(
    model: nn.Module,
    direction_or_basis: Any,
    *,
    layers: str | int | Iterable[int] = "all",
    alpha: float = 1.0,
    layer_weights: Mapping[int, float] | None = None,
    norm_preserve: NormMode = None,
    components: Iterable[str] | Mapping[str, float | Mapping[int, float]] = ("attention", "mlp"),
    embedding: EmbeddingMode = "auto",
    biases: bool | None = None,
    preserve: Preserve | PreservationKeys | None = None,
    sparse: float | None = None,
    set_to: float | Mapping[int, float] | Literal["harmless"] | None = None,
) -> EditPlan:
    """Plan W <- W - α u (u^T W) for every residual writer of the chosen blocks.

    `direction_or_basis`: (d,), (k, d) or a result that holds one (`DirectionResult`, `Direction`,
    `INLPResult`, `SubspaceResult`); normalised on entry. u is the direction, or normalize(g ∘ d)
    where a post-norm with gain g stands behind the writer.
    `layers` "all", a block or several; `layer_weights` {block: factor on α} names some of them, and
    -1 the embedding. `components` chooses "attention" (with SSM and conv writers), "mlp" (with all
    experts) and "embedding"; a mapping gives each a factor on α, or one per block ({block: factor};
    a block that it does not name, or gives 0, keeps these writers).
    `embedding` "auto" cuts a table of its own where every block is cut at one strength, and at that
    strength; one that the head shares is kept, because untying it makes the file larger: the share
    of the direction that it goes on writing stands in `stream_leak`. True is the whole cut: a
    shared matrix is untied where the model's own code allows it, so that the head keeps its own,
    else cut for both, and a note says so. "untie" and "tied" ask for one of the two, False keeps
    it. What `components` or `layer_weights` name is cut.
    Negative α strengthens the direction.
    `biases` True (and None, but beside `preserve`) cuts the writers' biases as well; False leaves
    them, and a note says how many of them still write the direction at every token.
    `preserve` restricts every change to the null space of the given keys
    (`collect_preservation_keys`); tables and biases are then left alone. `sparse` cuts only that
    share of each matrix's rows, those that carry most of the direction; the embedding and the
    biases are still cut in full. `set_to` makes the cut affine: the projection becomes that value
    at every residual, {residual: value}, or the harmless means of a `DirectionResult`, through the
    embedding's rows and the blocks' biases; where an architecture has no bias for it, that is an
    error which names the run-time form.

    A VaubanWarning says where a `DirectionResult` was measured on other weights than `model` has.
    Raises InputError for a direction of the wrong size or of a model of another shape, an empty
    basis, an unknown option, a block
    or a key of `layer_weights` that is not there, and options that contradict each other;
    ArchitectureError for a block without a writer.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> plan = vauban.plan_cut(model, mx.random.normal((128,)))
    >>> plan.leakage().worst < 1e-5
    True
    """
    parts = anatomy(model)
    check_measured_on(direction_or_basis, model)
    basis = as_basis(direction_or_basis, "plan_cut", parts.d_model)
    chosen = block_set(layers, range(parts.n_layers), "layers")
    named = _component_settings(components, chosen)
    strengths = _Strengths(
        finite(alpha, "alpha"),
        _kinds(named),
        layer_factors(layer_weights, {-1, *chosen}),
        chosen,
        range(parts.n_layers),
    )
    _check_modes(norm_preserve, biases)
    cut_biases = (biases is None or bool(biases)) and preserve is None
    if preserve is not None:
        preserve = _as_preserve(preserve, embedding, norm_preserve, biases)
        embedding = False
    share = None if sparse is None else _row_share(sparse, norm_preserve)
    writers = residual_writers(model)

    def update(writer: Writer) -> Update:
        writer_basis = through_gain(basis, writer.gain)
        rows = None if share is None else max(1, int(share * writer_basis.shape[1]))
        return Update(
            writer.path, writer.layer, writer.kind, writer_basis, strengths.of(writer),
            norm_preserve, writer.bias and cut_biases,
            None if rows is None else keep_rows(writer_basis, rows),
            None if preserve is None else preserve.protection(writer.path),
            bias_left=writer.bias and not cut_biases,
        )  # fmt: skip

    cut_writers = [w for w in writers if w.layer in chosen and strengths.include(w)]
    if not cut_writers:
        raise InputError(
            f"no writer is left to cut: layers {sorted(chosen)}, kinds {sorted(strengths.kinds)}"
        )
    updates = [update(w) for w in cut_writers]
    kept_biases = [u.path for u in updates if u.bias_left]
    # An affine cut has to reach whatever writes, and what is named is meant.
    if embedding == "auto" and (set_to is not None or strengths.name_embedding):
        embedding = True
    how = embedding_mode(model, embedding, wanted=bool(strengths.of_embedding))
    if how == "kept" and strengths.name_embedding:
        raise InputError(
            "components or layer_weights name the embedding, which is kept (embedding=False, or a "
            "strength of 0); drop one of them"
        )
    if how != "kept":
        strength = strengths.of_embedding
        strength = strengths.alpha if strength is None else strength
        tables = [w for w in writers if w.layer < 0]
        updates = [
            Update(w.path, -1, w.kind, basis, strength, norm_preserve, False) for w in tables
        ] + updates
    constants: tuple[Add, ...] = ()
    targets: list[float] | None = None
    if set_to is not None:
        _check_whole(updates, [w for w in writers if w.layer >= 0])
        _check_affine(basis, norm_preserve, preserve, sparse, how, bool(kept_biases))
        _check_whole(updates, writers)
        targets = projection_values(_values(set_to, direction_or_basis), parts.n_layers)
        updates, constants = add_constants(model, updates, writers, basis[0], targets)
    notes = {
        f"{len(kept_biases)} biases are left and write the direction "
        f"({kept_biases[0] if kept_biases else ''}, ...)": kept_biases,
        "behind a post-norm only alpha 1 is exact; other values are approximate": any(
            w.gain is not None and strengths.of(w) != 1.0 for w in cut_writers
        ),
        "the head shares the embedding for good: cutting it changes the head as well": how
        == "tied",
        "the head keeps the old embedding as a matrix of its own, which makes the file larger by "
        f"{parts.vocabulary * parts.d_model / 1e6:.1f} M parameters": how == "untie",
    }
    settings = {
        "layers": sorted(chosen),
        "alpha": strengths.alpha,
        "layer_weights": dict(strengths.factors),
        "norm_preserve": norm_preserve,
        "components": named,
        "biases": cut_biases,
        "preserve": preserve and {**preserve.keys.to_dict(), "mode": preserve.mode},
        "sparse": share,
        "set_to": targets,
    }
    return EditPlan(
        tuple(updates), basis, how, parts.head_path, settings,
        tuple(note for note, holds in notes.items() if holds), model, constants,
    )  # fmt: skip


@dataclass(frozen=True)
class _Strengths:
    """α times the factors of a writer's component (by kind; one number, or one per block)."""

    alpha: float
    kinds: Mapping[str, float | Mapping[int, float]]
    factors: Mapping[int, float]
    chosen: set[int]
    blocks: range

    def of(self, writer: Writer) -> float:
        return self.alpha * self._kind(writer.kind, writer.layer) * self._factor(writer.layer)

    def include(self, writer: Writer) -> bool:
        """Whether a writer of a chosen block is cut; a component's own 0 for the block keeps it."""
        factor = self.kinds.get(writer.kind)
        if isinstance(factor, Mapping):
            return bool(factor.get(writer.layer))
        return factor is not None

    def _kind(self, kind: str, block: int) -> float:
        factor = self.kinds.get(kind, 1.0)
        return factor.get(block, 0.0) if isinstance(factor, Mapping) else factor

    def _factor(self, block: int) -> float:
        return self.factors.get(block, 1.0)

    @property
    def name_embedding(self) -> bool:
        """Whether the caller gave the embedding a factor of its own."""
        return "embedding" in self.kinds or -1 in self.factors

    @property
    def of_embedding(self) -> float | None:
        """The embedding's own strength, or the one that every writer of every block has.

        None where it is not named and the blocks are cut in part, or at several strengths.
        """
        if self.name_embedding:
            return self.alpha * self._kind("embedding", -1) * self._factor(-1)
        every = {*_COMPONENTS["attention"], *_COMPONENTS["mlp"]} <= self.kinds.keys()
        factors = {
            self._kind(kind, block) * self._factor(block)
            for block in self.chosen
            for kind in self.kinds
        }
        whole = every and self.chosen == {*self.blocks} and len(factors) == 1
        return self.alpha * factors.pop() if whole else None


def _check_modes(norm_preserve: Any, biases: Any) -> None:
    if norm_preserve is not None and norm_preserve not in NORM_MODES:
        raise InputError(
            f"norm_preserve is {norm_preserve!r}; expected None or one of {NORM_MODES}"
        )
    if biases not in (True, False, None):
        raise InputError(f"biases is {biases!r}; expected True or False")


def _check_affine(
    basis: mx.array, norm_preserve: NormMode, preserve: Any, sparse: Any, how: str, bias_left: bool
) -> None:
    """An affine cut replaces one direction's whole share; nothing else may write along it."""
    wrong = {
        f"{basis.shape[0]} directions": basis.shape[0] != 1,
        f"norm_preserve={norm_preserve!r}": norm_preserve is not None,
        "preserve": preserve is not None,
        "sparse": sparse is not None,
        "biases=False": bias_left,
        f"an embedding that is {how}": how not in ("cut", "untie"),
    }
    given = [name for name, is_wrong in wrong.items() if is_wrong]
    if given:
        raise InputError(
            f"set_to goes with a whole cut of one direction whose embedding is cut apart from the "
            f"head, not with {', '.join(given)}"
        )


def _check_whole(updates: Sequence[Update], writers: Sequence[Writer]) -> None:
    """Whatever still writes along the direction would be added to the values."""
    factors = {u.path: u.alpha for u in updates}
    partly = [w.path for w in writers if factors.get(w.path) != 1.0]
    if partly:
        raise InputError(
            f"set_to goes with a cut of every writer at alpha 1; {partly[0]} has "
            f"{factors.get(partly[0], 0.0):g} (layers, components, alpha and layer_weights decide)"
        )


def _values(set_to: Any, direction: Any) -> float | dict[int, float]:
    """What `set_to` asks for: one value, or one per residual."""
    if isinstance(set_to, str):
        if set_to != "harmless":
            raise InputError(
                f"set_to is {set_to!r}; expected a number, {{residual: number}} or 'harmless'"
            )
        return harmless_values(direction)
    if isinstance(set_to, Mapping):
        return {
            whole(residual, "a residual of set_to"): finite(value, f"set_to[{residual!r}]")
            for residual, value in set_to.items()
        }
    return finite(set_to, "set_to")


def _kinds(
    chosen: dict[str, float | dict[int, float]] | list[str],
) -> dict[str, float | dict[int, float]]:
    """The factor on α, or the one per block, of every kind of writer that is cut."""
    unknown = [c for c in chosen if c not in _COMPONENTS]
    if unknown or not chosen:
        raise InputError(f"components {unknown or chosen}; expected some of {tuple(_COMPONENTS)}")
    factors = chosen if isinstance(chosen, dict) else dict.fromkeys(chosen, 1.0)
    return {kind: factor for name, factor in factors.items() for kind in _COMPONENTS[name]}


def _component_settings(
    components: Any, blocks: Collection[int]
) -> dict[str, float | dict[int, float]] | list[str]:
    """The chosen components as they are written down: names, or {name: factor or factors}."""
    if isinstance(components, Mapping):
        return {
            str(c): layer_factors(f, {-1} if c == "embedding" else blocks, f"components[{c!r}]")
            if isinstance(f, Mapping)
            else finite(f, f"components[{c!r}]")
            for c, f in components.items()
        }
    if not isinstance(components, Iterable):
        raise InputError(f"components is {components!r}; expected some of {tuple(_COMPONENTS)}")
    return [components] if isinstance(components, str) else [str(c) for c in components]


def _as_preserve(
    preserve: Any, embedding: EmbeddingMode, norm_preserve: NormMode, biases: bool | None
) -> Preserve:
    """A table has no inputs to protect and a bias none either: both stay as they are."""
    if biases:
        raise InputError("preserve leaves the biases alone; drop biases=True")
    if isinstance(preserve, PreservationKeys):
        preserve = Preserve(preserve)
    if not isinstance(preserve, Preserve):
        raise InputError(
            f"preserve is a {type(preserve).__name__}; expected the PreservationKeys that "
            "collect_preservation_keys returns, or Preserve(keys, ...)"
        )
    if embedding not in ("auto", None, False):
        raise InputError(f"preserve leaves the embedding alone; drop embedding={embedding!r}")
    if norm_preserve is not None:
        raise InputError("rescaling norms would undo what preserve guarantees; give one of them")
    return preserve


def _row_share(sparse: Any, norm_preserve: NormMode) -> float:
    share = finite(sparse, "sparse")
    if not 0.0 < share <= 1.0:
        raise InputError(f"sparse is {share}; expected 0 < share <= 1")
    if norm_preserve is not None:
        raise InputError(
            f"sparse leaves most rows as they are, norm_preserve={norm_preserve!r} would rescale "
            "all of them; give one of them"
        )
    return share
