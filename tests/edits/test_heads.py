"""A tied head after a cut: in memory, at run time and on disk it is the same model."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx_lm.utils import load_model, save_config, save_model

import vauban
from tests.architectures.build import build, with_tie
from tests.conftest import build as tiny
from tests.conftest import random_tokens
from vauban._arrays import flat_parameters
from vauban.edits.embedding import has_untie_switch, is_tied, read_head

# Families whose tied head is no plain `as_linear`, or whose switch is not in the arguments alone.
TIED = {
    "falcon_h1": "tied",
    "minicpm3": "tied",
    "llama4_text": "tied",
    "helium": "untie",
    "seed_oss": "untie",
    "gemma4_text": "untie",
    "muse_glimmer": "untie",
    "kimi_linear": "untie",
    "bailing_moe_v3": "untie",
    "qwen3": "untie",
}


def logits(model: nn.Module, **options: object) -> mx.array:
    out = vauban.forward(model, random_tokens(1, 17), positions=None, **options).logits
    return mx.where(out == -mx.inf, 0, out)


def apart(a: mx.array, b: mx.array) -> float:
    return float(mx.abs(a - b).max() / mx.abs(b).max())


def direction(model: nn.Module) -> mx.array:
    return mx.random.normal((vauban.models.anatomy(model).d_model,), key=mx.random.key(5))


@pytest.mark.parametrize("name", sorted(TIED))
def test_a_tied_head_is_the_same_in_memory_at_run_time_and_on_disk(
    tmp_path: Path, name: str
) -> None:
    source = tmp_path / "source"
    config = with_tie(name, True)
    source.mkdir()
    save_model(source, build(name, config=config))
    save_config(config, source / "config.json")
    model = load_model(source)[0]
    plan = vauban.plan_cut(model, direction(model), embedding=True)
    assert plan.embedding == TIED[name]
    before = logits(model)
    virtual = logits(model, interventions=plan.virtual())
    assert apart(before, virtual) > 0.02
    assert apart(logits(model), before) == 0.0
    assert plan.export(source, tmp_path / "out").ok
    assert apart(logits(load_model(tmp_path / "out")[0]), virtual) < 3e-4
    assert apart(logits(plan.apply(model)), virtual) < 3e-4


@pytest.mark.parametrize("name", ["falcon_h1", "minicpm3"])
def test_a_head_of_its_own_at_another_scale_is_refused(name: str) -> None:
    """Falcon H1 scales the logits of a tied head, MiniCPM 3 what an untied one reads."""
    model = build(name, config=with_tie(name, True))
    assert is_tied(model) and not has_untie_switch(model)
    with pytest.raises(vauban.InputError, match="leaves the logits as they are"):
        vauban.plan_cut(model, direction(model), embedding="untie")


def test_what_a_head_alone_costs_where_it_reads_the_matrix_itself() -> None:
    model = build("llama4_text", config=with_tie("llama4_text", True))
    assert read_head(model).reader == "matrix"
    plan = vauban.plan_cut(model, direction(model), embedding=True)
    alone = logits(model, interventions=plan.head_alone())
    table = model.model.embed_tokens.weight
    state = vauban.forward(model, random_tokens(1, 17), positions="all", logits=False).residual
    u = plan.basis
    expected = model.model.norm(state[:, -1]) @ (table - (table @ u.T) @ u).T
    assert alone.shape == expected.shape == (1, 17, 160)
    assert apart(alone, expected) < 1e-5
    plan = vauban.plan_cut(model, direction(model), norm_preserve="column", embedding=True)
    with pytest.raises(vauban.InputError, match="no run-time form"):
        plan.virtual()


def test_looking_at_a_head_reads_no_weight_and_changes_nothing() -> None:
    model = tiny("qwen3")
    before = flat_parameters(model)
    classes = [type(module) for _, module in model.named_modules()]
    assert has_untie_switch(model) and read_head(model).reader == "embedding"
    after = flat_parameters(model)
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert [type(module) for _, module in model.named_modules()] == classes
    assert model.args.tie_word_embeddings is True
    assert read_head(tiny("llama")).reader == "head"


@pytest.mark.parametrize("bits", [0, 4])
def test_applied_again_the_head_keeps_the_matrix_it_was_given(bits: int) -> None:
    """Once more with the same plan, and with one made before the first was applied."""
    model = tiny("qwen3")
    if bits:
        nn.quantize(model, group_size=32, bits=bits)
    plan = vauban.plan_cut(model, direction(model), embedding=True)
    other = vauban.plan_cut(model, mx.arange(64) - 20.0)
    table = model.model.embed_tokens
    kept = {name: mx.array(table[name]) for name in ("weight", "scales") if name in table}
    for step in (plan, plan, other):
        step.apply(model)
        assert all(bool(mx.array_equal(model.lm_head[n], v)) for n, v in kept.items())
    assert not mx.array_equal(model.model.embed_tokens.weight, kept["weight"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "foo"}, "precision is 'foo'"),
        ({"precision": "adapter"}, "adapter_path"),
    ],
)
def test_options_that_do_not_exist_are_refused_before_anything_is_changed(
    options: dict[str, str], message: str
) -> None:
    model = tiny("qwen3")
    nn.quantize(model, group_size=32, bits=4)
    before = flat_parameters(model)
    plan = vauban.plan_cut(model, direction(model), embedding=True)
    with pytest.raises(vauban.InputError, match=message):
        plan.apply(model, **options)
    after = flat_parameters(model)
    assert after.keys() == before.keys() and all(after[n] is before[n] for n in before)
    assert model.args.tie_word_embeddings is True


@pytest.mark.parametrize("name", ["llama", "gemma3_text"])
def test_a_plan_of_another_model_is_named(name: str) -> None:
    """Another layout, and the same layout with other widths."""
    plan = vauban.plan_cut(tiny("qwen3_moe"), mx.ones(64))
    other = tiny(name)
    before = flat_parameters(other)
    for use in (plan.apply, plan.leakage):
        with pytest.raises(vauban.InputError, match=r"no writer model\.layers\.0.*another model"):
            use(other)
    after = flat_parameters(other)
    assert all(after[n] is before[n] for n in before)
    wide = vauban.load(vauban.organism_path("dense"))[0]
    narrow = vauban.plan_cut(tiny("llama"), mx.ones(64))
    with pytest.raises(vauban.InputError, match="rows have 64 coordinates"):
        narrow.leakage(wide)
