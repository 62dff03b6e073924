"""Plan a cut of a whole model: one low-rank update per residual writer, applied or exported later.

Planning reads shapes and gains, no weights. Knows models through `vauban.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from vauban.edits.affine import add_constants, harmless_values, projection_values
from vauban.edits.directions import as_basis
from vauban.edits.lowrank import NORM_MODES, NormMode, through_gain
from vauban.edits.modules import float_module, module_weight, repacked_module
from vauban.edits.packed import LIMIT, Packed, Rounding, pack_edited
from vauban.edits.preservation import PreservationKeys, Preserve
from vauban.edits.sparse import keep_rows
from vauban.edits.streamed import edited_rows
from vauban.edits.update import Update
from vauban.errors import InputError
from vauban.interventions import Add, Intervention, ModuleOutputs, ModuleWeights
from vauban.models import Writer, anatomy, batches, forward, residual_writers
from vauban.models.writers import unpacked_shape

PRECISIONS = (None, "same", "8bit", "float", "adapter")
_COMPONENTS = {
    "attention": ("attention", "ssm"),
    "mlp": ("mlp", "expert", "shared_expert", "other"),
}
EmbeddingMode = Literal["auto", "untie", "tied"] | bool


@dataclass(frozen=True, eq=False)
class Leakage:
    """What is left: per writer ‖U W'‖/‖U W‖, and at most |d.h|/‖h‖ in the stream."""

    writers: Mapping[str, float]
    stream: float

    @property
    def worst(self) -> float:
        return max(self.writers.values(), default=0.0)

    def summary(self) -> str:
        return f"direction left: at most {self.worst:.1e} per writer, stream {self.stream:.1e}"

    def to_dict(self) -> dict[str, Any]:
        return {"writers": dict(self.writers), "worst": self.worst, "stream": self.stream}


@dataclass(frozen=True, eq=False)
class EditPlan:
    """A planned edit: nothing is changed until `apply` or `export`.

    `embedding` is what happens to it: "cut" (untied), "untie" (the head keeps the old matrix),
    "tied" (the shared matrix is cut, the head changes with it) or "kept".
    """

    updates: tuple[Update, ...]
    basis: mx.array
    embedding: Literal["cut", "untie", "tied", "kept"]
    head_path: str | None
    settings: Mapping[str, Any]
    notes: tuple[str, ...]
    _model: Any = None
    constants: tuple[Add, ...] = ()
    """What an affine cut puts into the stream instead (`affine`)."""

    @property
    def model(self) -> nn.Module:
        """The model that was planned for."""
        return self._model

    def virtual(self) -> tuple[Intervention, ...]:
        """The same change at run time: give it to `generate`, `forward` or `evaluate`.

        A plain cut is made at the writers' outputs and costs no memory. Norm modes, sparse rows
        and protected inputs act inside the matrix: those writers run with their edited float
        matrix, computed once.
        """
        return (*self._cut_at_run_time(), *self.constants)

    def _cut_at_run_time(self) -> tuple[Intervention, ...]:
        tied = frozenset(
            u.path for u in self.updates if u.is_embedding and self.embedding == "tied"
        )
        outputs = {u.path: (u.basis, u.alpha) for u in self.updates if u.acts_on_outputs}
        inside = [u for u in self.updates if not u.acts_on_outputs]
        heads = {path: outputs[path] for path in tied if path in outputs}
        found: list[Intervention] = [ModuleOutputs(outputs, heads)] if outputs else []
        if inside:
            modules = dict(self._model.named_modules())
            edited = {u.path: u.weight(module_weight(modules[u.path])) for u in inside}
            biases = {
                u.path: u.new_bias(modules[u.path].bias)
                for u in inside
                if u.bias and "bias" in modules[u.path]
            }
            found.append(ModuleWeights(edited, biases, tied))
        return tuple(found)

    @property
    def is_whole(self) -> bool:
        """A cut of every writer and table at α 1, which should leave nothing in the stream."""
        every = all(u.complete and u.alpha == 1.0 for u in self.updates)
        tables = self.embedding != "kept"
        return every and tables and len(self.updates) == len(residual_writers(self._model))

    def head_alone(self) -> tuple[Intervention, ...]:
        """What a hard-tied head changes by itself, the stream left as it is; () without one.

        Give it to `compare_likelihood` to see what the tie alone costs.
        """
        if self.embedding != "tied":
            return ()
        heads = {u.path: (u.basis, u.alpha) for u in self.updates if u.is_embedding}
        return (ModuleOutputs({}, heads),)

    def apply(
        self,
        model: nn.Module,
        precision: str | None = None,
        *,
        rounding: Rounding = "two-sided",
    ) -> nn.Module:
        """Edit `model` in place and return it.

        Packed writers stay packed, direction-exact (`precision` None or "same"); "8bit" packs
        edited modules with 8 bits, "float" unpacks them.
        """
        modules = dict(model.named_modules())
        if self.embedding == "untie":
            _untie(model, modules)
        for update in self.updates:
            module = modules[update.path]
            stored = store_packed(module, update, precision, rounding)
            if stored is not None:
                edited = repacked_module(
                    module, stored.arrays, stored.bits, stored.group_size, stored.mode
                )
            else:
                rows = mx.concatenate(list(edited_rows(module, update)))
                shape = unpacked_shape(module)
                edited = float_module(module)
                edited.weight = rows.reshape(shape)
            if update.bias and "bias" in edited:
                edited.bias = update.new_bias(edited.bias)
            mx.eval(edited.parameters())
            if edited is not module:
                model.update_modules(tree_unflatten([(update.path, edited)]))
        for name in ("_vauban_anatomy", "_vauban_check", "_vauban_batches"):
            if hasattr(model, name):
                object.__setattr__(model, name, None)
        return model

    def leakage(self, model: nn.Module | None = None) -> Leakage:
        """Share of the direction left per writer, and in the stream on a fixed probe text.

        Analytic: each edited matrix is computed in float32, measured and dropped. The stream is
        read under the run-time cut at every residual.
        """
        model = model if model is not None else self._model
        modules = dict(model.named_modules())
        writers = {}
        for update in self.updates:
            before = module_weight(modules[update.path])
            writers[update.path] = update.share_left(update.weight(before), before)
        return Leakage(writers, self.stream_leak(model))

    def stream_leak(
        self, model: nn.Module | None = None, token_lists: Sequence[Sequence[int]] | None = None
    ) -> float:
        """Largest |D h|/‖h‖ over all residuals under the run-time cut.

        Over every token of `token_lists` (held-out prompts, say), or of a fixed probe; without the
        constants of an affine cut.
        """
        model = model if model is not None else self._model
        if token_lists is None:
            top = min(anatomy(model).vocabulary, 50_000)
            token_lists = [[(i * 7919 + 13) % top for i in range(24)]]
        virtual = self._cut_at_run_time()
        worst = 0.0
        for batch in batches(token_lists, equal_lengths=True):
            out = forward(model, batch.tokens, positions="all", interventions=virtual, logits=False)
            assert out.residual is not None
            h = out.residual.astype(mx.float32)
            share = mx.linalg.norm(h @ self.basis.T, axis=-1) / mx.linalg.norm(h, axis=-1)
            worst = max(worst, float(share.max()))
        return worst

    def write(self, model_path: str | Path, folder: Path, precision: str | None = None) -> Any:
        """Write the edited checkpoint of `model_path` into `folder`; an `ExportReport`."""
        from vauban.export import write_plan

        return write_plan(self, model_path, folder, precision)

    def export(
        self,
        model_path: str | Path,
        output_dir: str | Path,
        precision: str | None = None,
        force: bool = False,
    ) -> Any:
        """Write a complete folder that `mlx_lm.load` opens, and read back what is left in it."""
        from vauban.export import export_plan

        return export_plan(self, model_path, output_dir, precision, force)

    def summary(self) -> str:
        kinds: dict[str, int] = {}
        for update in self.updates:
            kinds[update.kind] = kinds.get(update.kind, 0) + 1
        counts = ", ".join(f"{n} {kind}" for kind, n in kinds.items())
        lines = [
            f"cut of {self.basis.shape[0]} direction(s) from {len(self.updates)} writers "
            f"({counts}), alpha {self.settings['alpha']}, embedding {self.embedding}"
        ]
        return "\n".join([*lines, *(f"note: {note}" for note in self.notes)])

    def to_dict(self) -> dict[str, Any]:
        return {
            "settings": dict(self.settings),
            "embedding": self.embedding,
            "directions": int(self.basis.shape[0]),
            "writers": [
                {
                    "path": u.path,
                    "layer": u.layer,
                    "kind": u.kind,
                    "alpha": u.alpha,
                    "complete": u.complete,
                }
                for u in self.updates
            ],
            "notes": list(self.notes),
        }


def store_packed(
    module: nn.Module, update: Update, precision: str | None, rounding: Rounding = "two-sided"
) -> Packed | None:
    """The edited matrix packed, or None where it is to be stored as floats.

    A packed module keeps its format (None, "same") as long as no more than `LIMIT` of the
    direction is left in it; then 8 bits, then the float type are taken, by name in the report.
    """
    if precision not in PRECISIONS:
        raise InputError(f"precision is {precision!r}; expected None or one of {PRECISIONS[1:]}")
    packed = "scales" in module
    widths: list[int | None] = []
    if update.writes_rows and update.offset is not None:
        # Rows that carry a constant are not rounded to carry none.
        return None
    if precision == "8bit":
        widths = [8]
    elif packed and precision != "float":
        widths = [None, 8]
    for bits in widths:
        found = pack_edited(module, update, bits=bits, rounding=rounding)
        if not update.complete or found.left <= abs(1.0 - update.alpha) + LIMIT:
            return found
    return None


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
    how = _embedding_mode(model, embedding, whole=len(chosen) == parts.n_layers)
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
        _check_affine(basis, alpha, norm_preserve, preserve, sparse, how)
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
    basis: mx.array, alpha: float, norm_preserve: NormMode, preserve: Any, sparse: Any, how: str
) -> None:
    """An affine cut replaces one direction's whole share; nothing else may write along it."""
    wrong = {
        f"{basis.shape[0]} directions": basis.shape[0] != 1,
        f"alpha={alpha}": alpha != 1.0,
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


def has_untie_switch(model: nn.Module) -> bool:
    """Whether the class can carry its own head: `args.tie_word_embeddings` and an `lm_head`."""
    import inspect

    args = getattr(model, "args", None)
    return hasattr(args, "tie_word_embeddings") and "self.lm_head" in inspect.getsource(type(model))


def _embedding_mode(
    model: nn.Module, embedding: EmbeddingMode, *, whole: bool
) -> Literal["cut", "untie", "tied", "kept"]:
    if embedding not in ("auto", "untie", "tied", True, False):
        raise InputError(f"embedding is {embedding!r}; expected 'auto', 'untie', 'tied' or False")
    if embedding is False or (embedding == "auto" and not whole):
        return "kept"
    if not anatomy(model).tied:
        return "cut"
    if embedding == "tied":
        return "tied"
    if has_untie_switch(model):
        return "untie"
    if embedding == "untie":
        raise InputError(
            f"{type(model).__module__} has no switch to untie its head; use embedding='tied'"
        )
    return "tied"


def _untie(model: nn.Module, modules: dict[str, nn.Module]) -> None:
    """Give the head its own copy of the embedding matrix, in its own packing."""
    embedding = anatomy(model).embedding
    model.lm_head = head_from_embedding(embedding)
    model.args.tie_word_embeddings = False
    modules["lm_head"] = model.lm_head


def head_from_embedding(embedding: nn.Module) -> nn.Module:
    """A linear head that computes `embedding.as_linear`."""
    if isinstance(embedding, nn.QuantizedEmbedding):
        head = nn.QuantizedLinear(
            embedding.group_size,
            32,
            bias=False,
            group_size=embedding.group_size,
            bits=embedding.bits,
            mode=getattr(embedding, "mode", "affine"),
        )
        for name in ("weight", "scales", "biases"):
            if name in embedding:
                head[name] = embedding[name]
        return head
    plain = nn.Linear(1, 1, bias=False)
    plain.weight = embedding.weight
    return plain
