"""Batches: which prompts share one, and what does not decide it."""

from dataclasses import replace
from typing import Any

import pytest

import vauban
from vauban.generation import Batches, token_budget
from vauban.generation import batching as module
from vauban.models import device_info


def test_batches_hold_every_prompt_once_longest_first() -> None:
    lists = [[1] * n for n in (3, 9, 1, 30, 9, 2)]
    for options in ({}, {"batch_size": 2}, {"equal_lengths": True}, {"tight": True}, {"budget": 9}):
        found = list(Batches(lists, **options))
        assert sorted(row for batch in found for row in batch.rows) == list(range(6))
        widths = [batch.tokens.shape[1] for batch in found]
        assert widths == sorted(widths, reverse=True)
        for batch in found:
            assert batch.lengths == [len(lists[row]) for row in batch.rows]
            assert batch.tokens.sum().item() == sum(batch.lengths)


def test_other_programs_do_not_decide_what_is_batched(
    organism: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shape of a batch decides the last bits of a product, and so of what is written."""
    model, _ = organism
    device = device_info()
    budgets = set()
    for free in (device.memory_total, device.memory_total // 1000, 0):
        now = replace(device, memory_total=10**8, memory_available=free)
        monkeypatch.setattr(module, "device_info", lambda now=now: now)
        budgets.add(token_budget(model))
    assert len(budgets) == 1 and budgets.pop() < module.TOKEN_BUDGET


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"interventions": vauban.Ablate([1.0])}, "is one Ablate; expected a list"),
        ({"interventions": ["ablate"]}, "'ablate' is no intervention"),
        ({"logits": "first"}, "logits is 'first'"),
        ({"streams": "every"}, "streams 'every'"),
    ],
)
def test_options_that_would_be_read_as_something_else(
    organism: Any, options: dict[str, Any], message: str
) -> None:
    import mlx.core as mx

    with pytest.raises(vauban.InputError, match=message):
        vauban.forward(organism[0], mx.array([[1, 2]]), **options)
    with pytest.raises(vauban.InputError, match="expected integer ids"):
        vauban.forward(organism[0], mx.array([[1.0, 2.0]]))
