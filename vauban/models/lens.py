"""The logit lens: what a residual says when the final norm and the head read it at once.

Knows the verified walk over a model's blocks; chooses no residual.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from vauban.errors import ArchitectureError, InputError
from vauban.models.anatomy import anatomy
from vauban.models.families import LOOPS, family_of
from vauban.models.notes import notes
from vauban.models.parity import verify_forward
from vauban.models.walk import finish, read_out, several_streams


def unembed(model: nn.Module, residuals: mx.array) -> mx.array:
    """Logits (..., V) of residuals (..., d), by the model's own final norm and head.

    The logit lens (nostalgebraist 2020): what the model would say if it stopped there. The model's
    forward pass runs over blocks that do nothing, so scales and soft caps are the model's own and
    residual L gives the logits of `forward`. Where a model carries several streams (residuals are
    then what norms read, as `forward` returns them) or needs a loop of its own, the norm and the
    head alone are applied.

    Raises InputError for another width than the model's, ArchitectureError where no final norm is
    known.

    >>> import mlx.core as mx, vauban
    >>> model, tokenizer = vauban.load(vauban.organism_path("dense"))
    >>> out = vauban.forward(model, mx.array([vauban.encode_chat(tokenizer, "Hello")]))
    >>> lens = vauban.unembed(model, out.residual[0, :, 0])  # (L+1, V): every residual
    >>> bool(mx.allclose(lens[-1], out.logits[0, -1], atol=1e-4))
    True
    """
    verify_forward(model)
    parts = anatomy(model)
    if residuals.ndim == 0 or residuals.size == 0 or residuals.shape[-1] != parts.d_model:
        raise InputError(
            f"residuals have shape {residuals.shape}; expected (..., {parts.d_model}), not empty"
        )
    rows = residuals.reshape(-1, 1, parts.d_model)
    if several_streams(model) or family_of(model) in LOOPS:
        if parts.norm is None:
            raise ArchitectureError(f"{family_of(model)} has no final norm that vauban knows")
        logits = read_out(model, parts, parts.norm(rows))
    else:
        tokens = mx.zeros(rows.shape[:2], mx.int32)
        nothing: list[tuple[None, ...]] = [(None,) * count for count in notes(model).extras]
        logits = finish(model, parts.layers, tokens, make_prompt_cache(model), rows, nothing)
    return logits.reshape(*residuals.shape[:-1], -1)
