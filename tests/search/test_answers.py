"""Choice by answers: the rule as arithmetic, the halving, and what it does on the organism."""

from typing import Any

import mlx.core as mx
import pytest

import vauban
from vauban.interventions import Ablate
from vauban.search import AnswerTrial, Strength, StrengthKernel, choose_by_answers
from vauban.search.answers import _diverse, rankings
from vauban.search.short_answers import affordable, cost, halving
from vauban.search.strength import _shortlist


def trial(**facts: Any) -> AnswerTrial:
    every = dict.fromkeys(
        ("refused", "over_refused", "degenerate", "kl", "bypass", "separation"), 0.0
    )
    return AnswerTrial(**{"position": -1, "layer": 3, "prompts": 32, **every, **facts})


def test_the_rule_trades_refusal_against_kl_as_it_says() -> None:
    """A KL at the limit weighs as much as a tenth of the answers refused, twice that twice."""
    assert trial().cost(0.1) == 0.0
    assert trial(kl=0.1).cost(0.1) == pytest.approx(trial(refused=0.1).cost(0.1))
    assert trial(kl=0.2).cost(0.1) == pytest.approx(0.2)
    assert trial(refused=0.1, over_refused=0.2, degenerate=0.3).cost(0.1) == pytest.approx(0.6)
    # One more refusal of 32 is worth a third of the limit.
    assert trial(refused=1 / 32).cost(0.1) == pytest.approx(trial(kl=0.03125).cost(0.1))


def test_what_costs_more_than_no_cut_is_not_asked() -> None:
    """A KL of ten times the limit is the price of every refusal; with nothing cheaper all stay."""
    assert affordable({"a": 0.99, "b": 1.01, "c": 2.0}, 0.1) == ["a"]
    assert affordable({"b": 1.01, "c": 2.0}, 0.1) == ["b", "c"]


def test_a_cut_that_works_beats_one_that_hardly_does() -> None:
    """Measured on Qwen2.5-Coder-0.5B-Instruct: 0 % refused at KL .15, 41 % at .0144."""
    assert cost(0.0, 0.0, 0.0, 0.15 / 0.1) < cost(0.41, 0.0, 0.0, 0.0144 / 0.1)


def test_halving_ends_with_all_prompts() -> None:
    assert halving(8, 8, 32) == [(8, 8), (4, 16), (3, 32)]
    assert halving(12, 8, 100) == [(12, 8), (6, 16), (3, 100)]
    assert halving(1, 8, 32) == [(1, 32)]
    assert halving(5, 2, 2) == [(5, 2)]


def test_the_shortlist_takes_turns_and_skips_what_is_parallel() -> None:
    e = mx.eye(6)
    table = {(-1, r): e[r] for r in range(1, 5)}
    table[-2, 1] = e[1] + 0.01 * e[5]
    bypass = {(-1, 1): -5.0, (-2, 1): -4.9, (-1, 2): 0.5, (-1, 3): 1.0, (-1, 4): 2.0}
    separation = {(-1, 1): 0.0, (-2, 1): 0.1, (-1, 2): 1.0, (-1, 3): 2.0, (-1, 4): 3.0}
    kl = {(-1, 1): 0.3, (-2, 1): 0.2, (-1, 2): 0.0, (-1, 3): 0.1, (-1, 4): 0.1}
    orders = rankings(separation, bypass, kl, 0.1)
    # Of two that are parallel the cheaper one comes first: .007 + .2 against .007 + .3.
    assert orders[0][:2] == [(-2, 1), (-1, 1)] and orders[2][:2] == [(-1, 1), (-2, 1)]
    assert _diverse(table, orders, 3) == [(-2, 1), (-1, 4), (-1, 3)]
    # With nothing else the parallel one comes in as well.
    assert set(_diverse(table, orders, 5)) == set(table)


@pytest.fixture(scope="module")
def offered(organism: Any, organism_prompts: Any) -> Any:
    model, tokenizer = organism
    harmful, harmless = organism_prompts["harmful"], organism_prompts["harmless"]
    return vauban.collect_candidates(model, tokenizer, harmful[:32], harmless[:32])


def test_the_chosen_cut_ends_refusal_on_prompts_it_has_not_seen(
    organism: Any, organism_prompts: Any, offered: Any
) -> None:
    model, tokenizer = organism
    sets = [organism_prompts[name][32:48] for name in ("harmful", "harmless")]
    steps: list[tuple[str, int, int]] = []
    choice = choose_by_answers(
        model, tokenizer, offered, *sets, shortlist=4, progress=lambda *s: steps.append(s)
    )
    assert choice.prompts == 16 and choice.shortlist[0].layer == choice.layer
    assert [t.prompts for t in choice.shortlist] == sorted(
        (t.prompts for t in choice.shortlist), reverse=True
    )
    assert {name for name, _, _ in steps} == {"first tokens", "choose by answers"}
    assert all(steps[-1][0] == "choose by answers" and done <= total for _, done, total in steps)
    fresh = organism_prompts["harmful"][48:64]
    after = vauban.measure_behaviour(
        model, tokenizer, fresh, interventions=[Ablate(choice.direction)], max_tokens=24
    )
    before = vauban.measure_behaviour(model, tokenizer, fresh, max_tokens=24)
    assert before.rate is not None and after.rate is not None
    assert before.rate >= 0.9 and after.rate <= 0.13
    again = choose_by_answers(model, tokenizer, offered, *sets, shortlist=4)
    assert again.to_dict() == choice.to_dict()


def test_the_best_is_returned_even_where_nothing_works(
    organism: Any, organism_prompts: Any
) -> None:
    """Random directions: refusal stays, and the notes say so."""
    model, tokenizer = organism
    key = mx.random.key(0)
    table = {(-1, r): mx.random.normal((128,), key=key + r) for r in (1, 3)}
    sets = [organism_prompts[name][:4] for name in ("harmful", "harmless")]
    choice = choose_by_answers(model, tokenizer, table, *sets, max_tokens=8)
    assert choice.refused > 0.5 and any("still refused" in note for note in choice.notes)
    assert "still refused" in choice.summary()


def test_a_rule_of_ones_own_replaces_the_phrases(organism: Any, organism_prompts: Any) -> None:
    model, tokenizer = organism
    sets = [organism_prompts[name][:2] for name in ("harmful", "harmless")]
    choice = choose_by_answers(
        model, tokenizer, {(-1, 4): mx.ones(128)}, *sets, max_tokens=2, refusal=lambda text: True
    )
    assert choice.refused == choice.over_refused == 1.0


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shortlist": 0}, "shortlist is 0"),
        ({"kl_limit": 0.0}, "a KL above 0"),
        ({"harmful": ["one"]}, "1 harmful validation prompts"),
        ({"candidates": {(-1, 0): mx.ones(128)}}, "no candidate lies at a residual from 1 to 5"),
        ({"candidates": {(-1, 2): mx.ones(64)}}, "64 components"),
    ],
)
def test_bad_input(organism: Any, changes: dict[str, Any], message: str) -> None:
    model, tokenizer = organism
    given = {
        "candidates": {(-1, 4): mx.ones(128)}, "harmful": ["a", "b"], "harmless": ["c", "d"],
        **changes,
    }  # fmt: skip
    with pytest.raises(vauban.InputError, match=message):
        choose_by_answers(model, tokenizer, **given)


def test_a_stronger_cut_than_all_has_to_gain_two_answers() -> None:
    from vauban.search.kernel import StrengthKernel
    from vauban.search.strength import WHOLE, Strength, StrengthTrial, _whole_unless_better

    stronger = Strength(StrengthKernel.constant(1.15), StrengthKernel.constant(1.15))
    peak = Strength(StrengthKernel(1.4, 2.0, 3.0, 0.0), StrengthKernel(1.0, 2.0, 3.0, 0.0))

    def trial(strength: Strength, refused: int, prompts: int = 32) -> StrengthTrial:
        return StrengthTrial(strength, prompts, refused / prompts, 0.0, 0.0, 0.01, -5.0)

    def first(best: StrengthTrial, whole: StrengthTrial) -> Strength:
        found = _whole_unless_better([best, trial(peak, 3), whole])
        assert len(found) == 3 and set(found) == {best, trial(peak, 3), whole}
        return found[0].strength

    assert first(trial(stronger, 0), trial(WHOLE, 1)) == WHOLE
    assert first(trial(stronger, 0), trial(WHOLE, 2)) == stronger
    # A cut of a few blocks is no stronger one, and strength 1 on other prompts is no comparison.
    assert first(trial(peak, 0), trial(WHOLE, 1)) == peak
    assert first(trial(stronger, 0), trial(WHOLE, 0, 8)) == stronger


def test_one_dearer_strength_stands_beside_cheaper_ones() -> None:
    """However many strengths above 1 are offered, they take one place of the shortlist."""
    shades = [0.5, 0.6, 0.7, 0.8, 1.0, 1.1, 1.2, 1.3]
    offered = [Strength(*[StrengthKernel.constant(a)] * 2) for a in shades]
    bypass = {s: -a for s, a in zip(offered, shades, strict=True)}
    kl = {s: a * a for s, a in zip(offered, shades, strict=True)}
    chosen = [s.mlp.peak for s in _shortlist(offered, bypass, kl, 4, 0.1)]
    assert chosen[:2] == [1.0, 1.1]
    assert len(chosen) == 4 and max(chosen[2:]) < 1.0


def test_cheaper_strengths_are_those_of_the_rule_and_unlike() -> None:
    """First tokens of a 4-bit model: of its best two, which are alike, one is asked; the third, at
    twice their KL, left 6 % of the refusals where they left 16 %. More room takes the others."""
    scores = {1.0: (-3.17, 0.27), 0.5: (-2.10, 0.078), 0.51: (-2.13, 0.084), 0.9: (-2.66, 0.145),
              0.6: (-1.78, 0.067), 0.7: (-2.36, 0.127), 0.4: (-1.01, 0.027)}  # fmt: skip
    offered = [Strength(*[StrengthKernel.constant(a)] * 2) for a in scores]
    bypass, kl = ({s: scores[s.mlp.peak][i] for s in offered} for i in (0, 1))

    def chosen(count: int) -> list[float]:
        return [s.mlp.peak for s in _shortlist(offered, bypass, kl, count, 0.1)]

    assert chosen(3) == [1.0, 0.5, 0.9]
    assert chosen(4) == [1.0, 0.5, 0.9, 0.4]
    assert chosen(7) == [1.0, 0.5, 0.9, 0.4, 0.51, 0.6, 0.7]
