"""The search: its parts as arithmetic, and what it does on the organism, also when it is killed."""

import json
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from scipy.stats import binomtest

import vauban
from tests.killed import search_the_organism, started
from vauban.directions.class_moments import split_prompts
from vauban.evaluation.pairs import paired_test
from vauban.search import KernelSpace, SearchResult, SearchSpace, Strength, StrengthKernel, Trial
from vauban.search import search as search_function
from vauban.search.direction_table import DirectionTable, read_directions
from vauban.search.front import check_objectives, dominates, front_of
from vauban.search.known_cuts import FAINTER
from vauban.search.plots import front_page, front_picture
from vauban.search.result import plan_of
from vauban.search.scoring import Scorer
from vauban.search.short_answers import ShortAnswers
from vauban.search.space import strength_of
from vauban.search.trial_journal import TrialJournal

TRIALS = 6
# A corner of the space, so that the known cuts are soon chosen.
CORNER = {"residuals": (3, 5), "positions": (-1,)}
FAST: dict[str, Any] = {
    "trials": TRIALS, "max_tokens": 6, "seed": 3, "space": SearchSpace(**CORNER)
}  # fmt: skip


def trial(number: int, failed: float, kl: float, **facts: Any) -> Trial:
    given: dict[str, Any] = {
        "parameters": {}, "refused": failed, "over_refused": 0.0, "degenerate": 0.0,
        "state": "complete", "perplexity": None, "prompts": 8, **facts,
    }  # fmt: skip
    return Trial(number=number, failed=failed, kl=kl, **given)


def held_out(prompts: list[str], seed: int) -> list[str]:
    return [prompts[i] for i in split_prompts(prompts, seed)[1]]


def test_the_front_is_what_no_trial_beats() -> None:
    """Against the definition, on random figures with ties."""
    random = np.random.default_rng(0)
    trials = [trial(n, *(random.integers(0, 6, 2) / 5).tolist()) for n in range(40)]
    trials[5] = trial(5, 0.0, 0.0, state="pruned")
    points = {t.number: (t.failed, t.kl) for t in trials if t.state == "complete"}
    front = front_of(trials, ("refused", "kl"))
    expected = {
        point
        for point in points.values()
        if not any((a[0] <= point[0] and a[1] <= point[1]) and a != point for a in points.values())
    }
    assert {(t.failed, t.kl) for t in front} == expected and len(front) == len(expected)
    assert [t.failed for t in front] == sorted(t.failed for t in front)
    assert not dominates((0.1, 0.2), (0.1, 0.2))


def test_objectives_always_hold_refusal_and_kl() -> None:
    assert check_objectives("perplexity") == ("refused", "kl", "perplexity")
    with pytest.raises(vauban.InputError, match="'speed'"):
        check_objectives(["speed"])


def test_the_best_one_keeps_the_limit_or_the_nearest_is_named() -> None:
    trials = (trial(0, 0.0, 0.3), trial(1, 0.1, 0.1), trial(2, 0.9, 0.01))
    result = SearchResult(trials, ("refused", "kl"), {"refused": 1.0}, None, "trials",
                          SearchSpace(), {})  # fmt: skip
    # A KL at 0.1 weighs a quarter of the answers: .75, .35, .925.
    assert result.best().number == 1
    assert result.best(kl_limit=0.3).number == 0
    assert result.best(kl_limit=0.02).number == 2
    with pytest.raises(vauban.CheckError, match="the nearest is trial 2"):
        result.best(kl_limit=0.001)


def test_paired_test_is_the_exact_binomial_test() -> None:
    random = np.random.default_rng(1)
    before, after = random.random((2, 60)) < ((0.6,), (0.3,))
    result = paired_test(before.tolist(), after.tolist())
    b, c = int((before & ~after).sum()), int((after & ~before).sum())
    assert (result.only_before, result.only_after) == (b, c)
    assert result.p_value == pytest.approx(binomtest(b, b + c, 0.5).pvalue)
    assert result.interval[0] < result.difference < result.interval[1]
    assert paired_test([True], [True]).p_value == 1.0
    with pytest.raises(vauban.InputError, match="2 verdicts before and 1 after"):
        paired_test([True, False], [True])


def test_parameters_and_strengths_say_the_same() -> None:
    """What a known cut becomes in the space gives its strengths back, block by block."""
    space = SearchSpace().resolved(6, (-1, -2))
    for strength in (
        Strength(StrengthKernel.constant(1.0), StrengthKernel.constant(0.7)),
        Strength(StrengthKernel(1.4, 2.5, 3.0, 0.2), StrengthKernel.constant(0.0)),
    ):
        point = space.parameters(6, 4, -2, strength)
        assert point is not None
        for name in ("attention", "mlp"):
            kernels = (getattr(s, name).strengths(6) for s in (strength, strength_of(point)))
            assert np.allclose(*kernels)
    assert space.parameters(6, 4, -3, strength) is None
    # A negative strength is part of the space, and one above 1.
    low, high = space.bounds(6)["mlp.peak"]
    assert low < 0 and high > 1


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"estimators": ("median",)}, "'median'"),
        ({"norm_modes": ("rows",)}, "'rows'"),
        ({"positions": (0,)}, "negative ints"),
        ({"attention": KernelSpace(peak=(0, 0)), "mlp": KernelSpace(peak=(0, 0))}, "no cut"),
    ],
)
def test_a_space_that_is_none(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(vauban.InputError, match=message):
        SearchSpace(**changes)
    with pytest.raises(vauban.InputError, match="width"):
        KernelSpace(width=(0.0, 1.0))
    with pytest.raises(vauban.InputError, match="from 1 to 5"):
        SearchSpace(residuals=(0, 3)).resolved(6, (-1,))


def test_between_two_residuals_lie_both_directions_by_nearness() -> None:
    raw = mx.stack([mx.eye(4)[i] * 10.0**i for i in range(4)])[:, None]
    table = DirectionTable({"mean_difference": raw}, (-1,))
    expected = np.array([0, 0.75, 0.25, 0])
    between = np.array(table.unit("mean_difference", -1, 1.25))
    assert np.allclose(between, expected / np.linalg.norm(expected), atol=1e-6)
    assert set(table.candidates("mean_difference", (1.5, 3.0))) == {(-1, 2), (-1, 3)}


def test_directions_are_the_differences_of_means(organism: Any, organism_prompts: Any) -> None:
    model, tokenizer = organism
    sets = [organism_prompts[name][:6] for name in ("harmful", "harmless")]
    table = read_directions(model, tokenizer, *sets, positions=(-1, -2))
    means = [
        np.array(vauban.collect_activations(model, tokenizer, p, positions=(-1, -2)).values)
        .astype(np.float64)
        .mean(0)
        for p in sets
    ]
    assert np.allclose(table.raw["mean_difference"], means[0] - means[1], atol=1e-4)


def test_a_proposal_depends_on_the_finished_trials_alone(tmp_path: Path) -> None:
    """A journal that is read back proposes what the one in memory does, at every number."""
    bounds, choices = {"x": (0.0, 1.0)}, {"position": (-1, -2)}
    objectives = ("refused", "kl")
    memory = TrialJournal(None, {"a": 1}, bounds, choices, objectives)
    memory.begin([{"x": 0.5, "position": -1}])
    path = tmp_path / "s.journal"
    for number in range(16):
        journal = TrialJournal(path, {"a": 1}, bounds, choices, objectives)
        if number == 0:
            journal.begin([{"x": 0.5, "position": -1}])
        point = memory.propose(7)
        assert journal.propose(7) == point
        state = "pruned" if number % 3 == 2 else "complete"
        kl = math.inf if number == 4 else 1 - point["x"]
        done = trial(number, point["x"] ** 2, kl, parameters=point, state=state)
        journal.add(done)
        memory.add(done)
        journal.close()
        if number == 6:
            # A process that was killed while it wrote.
            with path.open("ab") as stream:
                stream.write(b'{"op_code":4,"worker')
    assert memory.trials == TrialJournal(path, {"a": 1}, bounds, choices, objectives).trials


def test_a_storage_file_of_another_search_is_named_and_left_alone(tmp_path: Path) -> None:
    path = tmp_path / "s.journal"
    given: Any = ({"x": (0.0, 1.0)}, {"position": (-1,)}, ("refused", "kl"))
    journal = TrialJournal(path, {"model": {"layers": 6}, "seed": 0}, *given)
    with pytest.raises(vauban.InputError, match="in use by another search"):
        TrialJournal(path, {"model": {"layers": 6}, "seed": 0}, *given)
    journal.close()
    before = path.read_bytes()
    with pytest.raises(vauban.InputError, match=r"model, layers is 6 in the file and 8 here"):
        TrialJournal(path, {"model": {"layers": 8}, "seed": 0}, *given)
    with pytest.raises(vauban.InputError, match="seed is 0 in the file and 1 here"):
        TrialJournal(path, {"model": {"layers": 6}, "seed": 1}, *given)
    assert path.read_bytes() == before
    (tmp_path / "notes.txt").write_text("no journal")
    with pytest.raises(vauban.InputError, match="no journal of a search"):
        TrialJournal(tmp_path / "notes.txt", {}, *given)


@pytest.fixture(scope="module")
def sets(organism_prompts: Any) -> list[list[str]]:
    """24 + 24 measuring prompts, of which 8 + 8 are held out."""
    return [organism_prompts[name][:24] for name in ("harmful", "harmless")]


@pytest.fixture(scope="module")
def result(organism: Any, sets: Any) -> SearchResult:
    seen: list[int] = []

    def watch(trial: Trial, front: Any) -> None:
        seen.append(trial.number)

    steps: list[tuple[str, int, int]] = []
    found = vauban.search(
        *organism, *sets, **FAST, on_trial=watch, progress=lambda *step: steps.append(step)
    )
    assert seen == list(range(TRIALS))
    search_steps = list(dict.fromkeys(s[1:] for s in steps if s[0] == "search"))
    assert search_steps == [(n, TRIALS) for n in range(TRIALS + 1)]
    assert ("unchanged answers", 16, 16) in steps
    return found


def test_the_search_is_callable_under_both_of_its_names() -> None:
    assert vauban.search.search is search_function
    assert vauban.search.SearchSpace is vauban.SearchSpace


def test_a_search_finds_cuts_that_end_refusal(
    organism: Any, organism_prompts: Any, sets: Any, result: SearchResult
) -> None:
    model, tokenizer = organism
    assert result.stopped == "trials" and len(result.trials) == TRIALS
    assert result.baseline["refused"] >= 0.8
    best = result.best()
    assert best in result.front and best.refused <= 0.13 and best.kl < 0.1
    assert result.trials[0].state == "complete"
    # The default cut comes first, then the same one fainter.
    for name in ("attention.peak", "mlp.peak"):
        peaks = [t.parameters[name] / result.trials[0].parameters[name] for t in result.trials[:5]]
        assert peaks == pytest.approx([1.0, *FAINTER])
    # Harmless prompts are answered where over-refusal is an objective, and on fresh prompts.
    assert all(t.over_refused is None for t in result.front)
    assert result.baseline["over_refused"] is not None
    # Nothing that was stopped would have beaten what stopped it.
    for stopped in (t for t in result.trials if t.state == "pruned"):
        at_best = stopped.failed * stopped.prompts / 8, stopped.kl
        rivals = [(t.failed, t.kl) for t in result.front] + [(1.0, 0.0)]
        assert any(dominates(rival, at_best) for rival in rivals)
    # The figures are those of the plan, measured independently.
    plan = result.plan(best)
    change = plan.virtual()
    base, cut = (
        [
            np.array(
                vauban.forward(
                    model, mx.array([vauban.encode_chat(tokenizer, prompt)]), interventions=c
                ).logits[0, -1],
                dtype=np.float64,
            )
            for prompt in held_out(sets[1], FAST["seed"])
        ]
        for c in ((), change)
    )
    shares = [[np.exp(x) / np.exp(x).sum() for x in part] for part in (base, cut)]
    # As `last_token_kl` defines it, with 1e-6 beside every probability.
    kl = np.mean([
        (p * (np.log(p + 1e-6) - np.log(q + 1e-6))).sum() for p, q in zip(*shares, strict=True)
    ])  # fmt: skip
    assert best.kl == pytest.approx(kl, abs=1e-5)


def test_a_saved_result_comes_back(
    organism: Any, organism_prompts: Any, result: SearchResult, tmp_path: Path
) -> None:
    model, _ = organism
    fresh = organism_prompts["harmful"][60:72], organism_prompts["harmless"][60:72]
    rescored = result.rescore(*fresh)
    assert [s.number for s in rescored.front] == [t.number for t in result.front]
    winner = next(s for s in rescored.front if s.number == result.best().number)
    low, high = winner.refused_interval
    assert (low, high) == vauban.wilson_interval(round(12 * winner.refused), 12)
    assert rescored.loss["kl"] == pytest.approx(winner.kl - result.best().kl)
    assert rescored.unchanged.refused >= 0.8 and not rescored.notes
    again = result.rescore(*(part[:8] for part in (organism_prompts["harmful"], fresh[1])))
    assert "in the search already" in again.notes[0]
    path = result.save(tmp_path / "search.json")
    loaded = SearchResult.load(path)
    assert loaded.to_dict() == result.to_dict() == json.loads(json.dumps(result.to_dict()))
    assert loaded.best() == result.best()
    for number in {0, result.best().number}:
        assert np.allclose(loaded.direction(number), result.direction(number))
    plans = loaded.plan(model=model), result.plan()
    assert plans[0].to_dict() == plans[1].to_dict()
    with pytest.raises(vauban.InputError, match="knows no model"):
        loaded.plan()
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(vauban.InputError, match=r"not a search\.json"):
        SearchResult.load(tmp_path / "other.json")


def test_the_plots_are_whole_files(result: SearchResult, tmp_path: Path) -> None:
    pytest.importorskip("plotly")
    page = front_page(result, tmp_path / "search.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page and "https://cdn" not in page.split("plotly.js v")[0]
    assert f"trial {result.best().number}" in page
    picture = front_picture(result, tmp_path / "search.png").read_bytes()
    assert picture.startswith(b"\x89PNG") and len(picture) > 10_000


def test_a_killed_search_ends_like_an_unbroken_one(
    organism: Any, sets: Any, result: SearchResult, tmp_path: Path
) -> None:
    """Killed twice with SIGKILL, between and within trials, once with a half-written line."""
    path = tmp_path / "search.journal"
    for kills, after in enumerate((1, 2)):
        process, hearing = started(search_the_organism, path)
        for _ in range(after):
            hearing.recv()
        process.kill()
        process.join()
        if kills == 0:
            with path.open("ab") as stream:
                stream.write(b'{"op_code":4,')
    before: list[int] = []
    ended = search_function(
        *organism, *sets, **FAST, storage=path, on_trial=lambda t, front: before.append(t.number)
    )
    assert ended.trials == result.trials and ended.front == result.front
    assert before and before[0] >= 3
    # The file is of this search alone, and more trials go on from it.
    with pytest.raises(vauban.InputError, match="max_tokens is 6 in the file and 5 here"):
        search_function(*organism, *sets, **{**FAST, "max_tokens": 5}, storage=path)
    more = search_function(*organism, *sets, **{**FAST, "trials": TRIALS + 1}, storage=path)
    assert more.trials[:TRIALS] == result.trials and len(more.trials) == TRIALS + 1


def test_over_refusal_and_perplexity_can_be_objectives(organism: Any, sets: Any) -> None:
    found = search_function(
        *organism, *sets, trials=2, max_tokens=4, objectives=("over_refused", "perplexity"),
        space=SearchSpace(residuals=(4, 5), positions=(-1,), norm_modes=(None,)),
    )  # fmt: skip
    assert found.objectives == ("refused", "kl", "over_refused", "perplexity")
    model, tokenizer = organism
    prompts = held_out(sets[1], 0)
    answers = vauban.generate(model, tokenizer, prompts, max_tokens=4)
    chats = [
        [{"role": "user", "content": p}, {"role": "assistant", "content": a}]
        for p, a in zip(prompts, answers, strict=True)
    ]
    change = plan_of(model, found.direction(0), found.trials[0].parameters).virtual()
    expected = vauban.perplexity(model, tokenizer, chats, interventions=change)
    assert found.trials[0].perplexity == pytest.approx(expected, rel=0.02)


def test_a_cut_that_overflows_is_the_worst_of_all(organism: Any, sets: Any) -> None:
    answers = ShortAnswers(*organism, *(part[:8] for part in sets), max_tokens=2)
    scorer = Scorer(answers, ("refused", "kl"))
    assert scorer.unchanged().state == "complete"
    figures = scorer.score((vauban.Add(mx.full((128,), 1e38), 100.0, 2),), ())
    assert (figures.state, figures.refused, figures.failed) == ("pruned", 1.0, 1.0)
    assert figures.kl == math.inf


def test_time_and_interruption_end_the_trials(organism: Any, sets: Any) -> None:
    def interrupt(trial: Trial, front: Any) -> None:
        raise KeyboardInterrupt

    broken = search_function(*organism, *sets, **FAST, on_trial=interrupt)
    assert broken.stopped == "interrupted" and [t.number for t in broken.trials] == [0]
    assert broken.front == broken.trials
    late = search_function(*organism, *sets, **FAST, timeout=0.01)
    assert late.stopped == "timeout" and late.trials == ()
    with pytest.raises(vauban.CheckError, match="no trial beats the unchanged model"):
        late.best()


def test_a_model_that_does_not_refuse_is_not_searched(organism: Any, sets: Any) -> None:
    found = search_function(*organism, *sets, **FAST, refusal=lambda text: False)
    assert found.stopped == "no refusal" and found.trials == ()
    assert "nothing to search" in found.summary()


def test_a_missing_extra_is_named(
    organism: Any, sets: Any, result: SearchResult, tmp_path: Path, monkeypatch: Any
) -> None:
    for module in ("optuna", "plotly.graph_objects", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(vauban.InputError, match=r"needs optuna.*vauban\[search\]"):
        search_function(*organism, *sets, **FAST)
    for draw in (front_page, front_picture):
        with pytest.raises(vauban.InputError, match=r"vauban\[plots\]"):
            draw(result, tmp_path / "front")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trials": 0}, "trials is 0"),
        ({"timeout": 0.0}, "timeout 0.0"),
        ({"kl_limit": -1.0}, "kl_limit is -1.0"),
        ({"objectives": ("speed",)}, "'speed'"),
        ({"harmful": ["a", "b", "c", "d", "e", "f", "g", "h", "i"]}, "3 harmful validation"),
        ({"evaluation": (["a"],)}, "evaluation holds 1 sets"),
    ],
)
def test_bad_input(organism: Any, sets: Any, changes: dict[str, Any], message: str) -> None:
    given = {"harmful": sets[0], "harmless": sets[1], **changes}
    call: Callable[..., Any] = search_function
    with pytest.raises(vauban.InputError, match=message):
        call(*organism, **given)
