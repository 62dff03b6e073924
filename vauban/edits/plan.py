"""Plan a cut of a whole model: one low-rank update per residual writer, applied or exported later.

Planning reads shapes and gains, no weights. Knows models through `vauban.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn

from vauban.edits.affine import add_constants, harmless_values, projection_values
from vauban.edits.directions import as_basis
from vauban.edits.edit_plan import EditPlan
from vauban.edits.heads import EmbeddingMode, embedding_mode
from vauban.edits.lowrank import NORM_MODES, NormMode, through_gain
from vauban.edits.preservation import PreservationKeys, Preserve
from vauban.edits.sparse import keep_rows
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add
from vauban.models import Writer, anatomy, residual_writers

_COMPONENTS = {
    "attention": ("attention", "ssm"),
    "mlp": ("mlp", "expert", "shared_expert", "other"),
}


def plan_cut(
    model: nn.Module,
    direction_or_basis: Any,
    *,
    layers: str | int | Iterable[int] = "all",
    alpha: float = 1.0,
    layer_weights: Mapping[int, float] | None = None,
    norm_preserve: NormMode = None,
    components: Iterable[str] | Mapping[str, float] = ("attention", "mlp"),
    embedding: EmbeddingMode = "auto",
    biases: bool | None = None,
    preserve: Preserve | PreservationKeys | None = None,
    sparse: float | None = None,
    set_to: float | Mapping[int, float] | Literal["harmless"] | None = None,
) -> EditPlan:
    """Plan W <- W - α u (u^T W) for every residual writer of the chosen blocks.

    `direction_or_basis`: (d,), (k, d) or a `DirectionResult`; normalised on entry. u is the
    direction, or normalize(g ∘ d) where a post-norm with gain g stands behind the writer.
    `components` chooses "attention" (with SSM and conv writers) and "mlp" (with all experts); a
    mapping gives each a factor on α, as `layer_weights` does for blocks.
    `embedding` "auto": cut it when untied; untie where the mlx-lm class has a switch, so that the
    head keeps its matrix; else cut the shared matrix and say so. False keeps it, "untie" and
    "tied" ask for one of the two, True means "auto". Negative α strengthens the direction.
    `preserve` restricts every change to the null space of the given keys
    (`collect_preservation_keys`); tables and biases are then left alone. `sparse` cuts only that
    share of each matrix's rows, those that carry most of the direction. `set_to` makes the cut
    affine: the projection becomes that value at every residual, {residual: value}, or the harmless
    means of a `DirectionResult`, through the embedding's rows and the blocks' biases; where an
    architecture has no bias for it, that is an error which names the run-time form.

    Raises InputError for a direction of the wrong size, an unknown option or a block out of
    range; ArchitectureError for a block without a writer.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> plan = vauban.plan_cut(model, mx.random.normal((128,)))
    >>> plan.leakage().worst < 1e-5
    True
    """
    parts = anatomy(model)
    basis = as_basis(direction_or_basis, "plan_cut", parts.d_model)
    chosen = _block_set(layers, parts.n_layers)
    kinds = _kinds(components)
    if norm_preserve is not None and norm_preserve not in NORM_MODES:
        raise InputError(
            f"norm_preserve is {norm_preserve!r}; expected None or one of {NORM_MODES}"
        )
    writers = residual_writers(model)
    if preserve is not None:
        embedding, biases = _with_preserve(embedding, biases, norm_preserve)
        preserve = Preserve(preserve) if isinstance(preserve, PreservationKeys) else preserve
    elif biases is False:
        _check_biases(writers)
    mask = None if sparse is None else _row_mask(sparse)
    updates, notes = [], []
    for writer in writers:
        if writer.layer not in chosen or writer.kind not in kinds:
            continue
        updates.append(
            Update(
                writer.path,
                writer.layer,
                writer.kind,
                through_gain(basis, writer.gain),
                alpha * kinds[writer.kind] * (layer_weights or {}).get(writer.layer, 1.0),
                norm_preserve,
                writer.bias and biases is not False,
                None if mask is None else mask(through_gain(basis, writer.gain)),
                None if preserve is None else preserve.protection(writer.path),
            )
        )
    if not updates:
        raise InputError(
            f"no writer is left to cut: layers {sorted(chosen)}, kinds {sorted(kinds)}"
        )
    if alpha != 1.0 and any(w.gain is not None for w in writers):
        notes.append("behind a post-norm only alpha 1 is exact; other values are approximate")
    how = embedding_mode(model, embedding, whole=len(chosen) == parts.n_layers)
    if how != "kept":
        tables = [w for w in writers if w.layer < 0]
        updates = [
            Update(w.path, -1, w.kind, basis, alpha, norm_preserve, False) for w in tables
        ] + updates
    if how == "tied":
        notes.append("the head shares the embedding for good: cutting it changes the head as well")
    constants: tuple[Add, ...] = ()
    targets: list[float] | None = None
    if set_to is not None:
        _check_affine(basis, norm_preserve, preserve, sparse, how)
        _check_whole(updates, writers)
        values = harmless_values(direction_or_basis) if set_to == "harmless" else set_to
        targets = projection_values(values, parts.n_layers)
        updates, constants = add_constants(model, updates, writers, basis[0], targets)
    settings = {
        "layers": sorted(chosen),
        "alpha": alpha,
        "layer_weights": dict(layer_weights or {}),
        "norm_preserve": norm_preserve,
        "components": (dict(components) if isinstance(components, Mapping) else list(components)),
        "biases": biases is not False,
        "preserve": None
        if preserve is None
        else {**preserve.keys.to_dict(), "mode": preserve.mode},
        "sparse": sparse,
        "set_to": targets,
    }
    return EditPlan(
        tuple(updates), basis, how, parts.head_path, settings, tuple(notes), model, constants
    )


def _check_affine(
    basis: mx.array, norm_preserve: NormMode, preserve: Any, sparse: Any, how: str
) -> None:
    """An affine cut replaces one direction's whole share; nothing else may write along it."""
    wrong = {
        f"{basis.shape[0]} directions": basis.shape[0] != 1,
        f"norm_preserve={norm_preserve!r}": norm_preserve is not None,
        "preserve": preserve is not None,
        "sparse": sparse is not None,
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


def _block_set(layers: Any, n_layers: int) -> set[int]:
    if isinstance(layers, str):
        if layers != "all":
            raise InputError(f"layers is {layers!r}; expected 'all', an int or a list of ints")
        return set(range(n_layers))
    chosen = {int(layers)} if isinstance(layers, int) else {int(i) for i in layers}
    outside = sorted(i for i in chosen if not 0 <= i < n_layers)
    if outside or not chosen:
        given = f"block {outside[0]} does not exist" if outside else "layers is empty"
        raise InputError(f"{given}; the model has blocks 0 to {n_layers - 1}")
    return chosen


def _kinds(components: Iterable[str] | Mapping[str, float]) -> dict[str, float]:
    """The factor on α of every kind of writer that is cut."""
    names = [components] if isinstance(components, str) else list(components)
    factors = components if isinstance(components, Mapping) else {}
    unknown = [c for c in names if c not in _COMPONENTS]
    if unknown or not names:
        raise InputError(f"components {unknown or names}; expected some of {tuple(_COMPONENTS)}")
    return {kind: float(factors.get(name, 1.0)) for name in names for kind in _COMPONENTS[name]}


def _with_preserve(
    embedding: EmbeddingMode, biases: bool | None, norm_preserve: NormMode
) -> tuple[EmbeddingMode, bool]:
    """A table has no inputs to protect and a bias none either: both are left as they are."""
    for name, given in (("embedding", embedding), ("biases", biases)):
        if given not in ("auto", None, False):
            raise InputError(f"preserve leaves the {name} alone; drop {name}={given!r}")
    if norm_preserve is not None:
        raise InputError("rescaling norms would undo what preserve guarantees; give one of them")
    return False, False


def _row_mask(share: float) -> Callable[[mx.array], mx.array]:
    if not 0.0 < share <= 1.0:
        raise InputError(f"sparse is {share}; expected 0 < share <= 1")
    return lambda basis: keep_rows(basis, max(1, int(share * basis.shape[1])))


def _check_biases(writers: list[Writer]) -> None:
    with_bias = [w.path for w in writers if w.bias]
    if with_bias:
        raise InputError(
            f"{with_bias[0]} has a bias that writes the direction too; biases=False would leave it"
        )
