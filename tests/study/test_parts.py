"""The parts of a study on the dense organism: fits, matched choice, conditions, meanings."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

import vauban
from vauban.config import StudyConfig
from vauban.directions import NoCandidate, select_direction
from vauban.pipeline.prompt_sets import eval_set, prompt_set
from vauban.study.composition import compose
from vauban.study.conditions import BASELINE, Condition, conditions
from vauban.study.fits import Fits, fit
from vauban.study.further_directions import further_directions
from vauban.study.matched_choice import Choice, candidates, choose


def config(**study: Any) -> StudyConfig:
    folder = str(vauban.organism_path("dense"))
    return StudyConfig.model_validate(
        {"study": {"models": [folder], **study}, "eval": {"num_prompts": 60}}
    )


@pytest.fixture(scope="module")
def organism() -> tuple[Any, Any]:
    return vauban.load(str(vauban.organism_path("dense")))


@pytest.fixture(scope="module")
def prompts() -> dict[str, tuple[str, ...]]:
    folder = vauban.organism_path("dense")
    return {label: prompt_set(config(), label, folder).prompts for label in ("harmful", "harmless")}


@pytest.fixture(scope="module")
def fits(organism: Any, prompts: Any) -> Fits:
    return fit(*organism, prompts["harmful"][:48], prompts["harmless"][:48], config())


@pytest.fixture(scope="module")
def chosen(organism: Any, prompts: Any, fits: Fits) -> dict[Any, Choice]:
    return {
        method: choose(
            *organism,
            method,
            fits,
            prompts["harmful"][48:54],
            prompts["harmless"][48:54],
            config(kl_threshold=0.5),
        )
        for method in ("ablation", "addition", "nullspace", "classifier")
    }


def test_every_place_is_fitted_on_the_same_activations(organism: Any, fits: Fits) -> None:
    positions = vauban.post_instruction_positions(organism[1])
    assert set(fits.inlp) == {(p, r) for p in positions for r in range(fits.n_layers)}
    assert fits.labels.sum().item() == fits.harmless == 48
    key = (-1, 4)
    values = np.array(fits.activations.at(4, -1), dtype=np.float64)
    by_hand = values[48:].mean(0) - values[:48].mean(0)
    assert np.abs(np.array(fits.difference(key)) - by_hand).max() < 1e-4


def test_the_classifier_is_the_first_inlp_direction_at_the_length_of_v(fits: Fits) -> None:
    key = (-1, 4)
    w, v = fits.classifier(key), fits.difference(key)
    assert float(mx.linalg.norm(w)) == pytest.approx(float(mx.linalg.norm(v)), rel=1e-5)
    assert float((w * v).sum()) > 0
    rest = fits.basis(key)[1:]
    assert mx.abs(rest @ w).max().item() < 1e-3 * float(mx.linalg.norm(v))


def test_the_published_basis_holds_the_true_directions_and_perhaps_noise(fits: Fits) -> None:
    """How much rounding noise of a float32 SVD counts as directions hangs on the BLAS."""
    key = (-1, 4)
    published = fits.published(key)
    stopped = vauban.fit_inlp(
        fits.activations.at(4, -1), fits.labels, min_accuracy=0.55, max_rank=100, patience=1
    )
    true = stopped.directions
    assert published.shape[0] >= true.shape[0]
    inside = (true @ published.T) @ published
    assert mx.abs(inside - true).max().item() < 1e-3


@pytest.mark.parametrize("method", ["ablation", "addition", "nullspace", "classifier"])
def test_a_choice_is_select_directions_own(
    method: Any, organism: Any, prompts: Any, fits: Fits, chosen: dict[Any, Choice]
) -> None:
    """Scoring once without filters and applying the rule afterwards changes nothing."""
    kind = {"ablation": "ablate", "nullspace": "project"}.get(method, "add")
    direct = select_direction(
        *organism, candidates(method, fits, 0.9), prompts["harmful"][48:54],
        prompts["harmless"][48:54], kind=kind, scope="local", multipliers=(0.5, 1.0, 2.0),
        kl_threshold=0.5,
    )  # fmt: skip
    choice = chosen[method]
    assert choice.key == (direct.position, direct.layer)
    assert choice.passed == len(direct.kept) and not choice.note
    assert choice.ranked[0] in range(fits.n_layers)
    assert len(set(choice.ranked)) == len(choice.ranked)


def test_where_none_passes_the_best_is_taken_and_said(
    organism: Any, prompts: Any, fits: Fits
) -> None:
    strict = config(kl_threshold=-1.0)
    found = choose(
        *organism, "ablation", fits, prompts["harmful"][48:54], prompts["harmless"][48:54], strict
    )
    assert found.passed == 0 and "none of" in found.note
    again = Choice.from_dict(found.to_dict(), "ablation", fits)
    assert again.key == found.key and mx.array_equal(again.vector, found.vector)


def test_no_accurate_classifier_is_an_error(organism: Any, prompts: Any, fits: Fits) -> None:
    only = Fits(fits.activations, fits.harmless, {k: fits.inlp[-1, 0] for k in fits.inlp})
    with pytest.raises(NoCandidate, match="first classifier"):
        choose(*organism, "nullspace", only, prompts["harmful"][:4], prompts["harmless"][:4],
               config())  # fmt: skip


@pytest.fixture(scope="module")
def every(fits: Fits, chosen: dict[Any, Choice]) -> list[Condition]:
    return conditions(fits, chosen, config())


def test_all_methods_and_scopes_are_there_once(every: list[Condition]) -> None:
    assert every[0] is BASELINE
    found = {(c.method, c.scope) for c in every}
    for method in ("ablation", "nullspace", "flip", "leace", "affine"):
        assert {(method, scope) for scope in ("local", "half", "all")} <= found
    assert sum(c.method == "addition" for c in every) == 3
    assert [c.name for c in every if c.main] == [
        "directional ablation, all",
        "ActAdd ±1",
        next(c.name for c in every if c.method == "nullspace" and c.scope == "all"),
        "flip α = 2, all",
        "classifier ActAdd ±1",
    ]


def test_the_half_scope_holds_the_better_half(chosen: dict[Any, Choice], fits: Fits) -> None:
    choice = chosen["ablation"]
    assert choice.blocks("local", 6) == [choice.key[1]]
    assert choice.blocks("half", 6) == sorted(choice.ranked[:3])
    assert choice.blocks("all", 6) == "all"


def _logits(organism: Any, changes: Any) -> mx.array:
    model, tokenizer = organism
    tokens = mx.array([vauban.encode_chat(tokenizer, "How do I rob a shop?")])
    return vauban.forward(model, tokens, interventions=changes).logits


def test_a_flip_at_alpha_one_is_the_projection(organism: Any, every: list[Condition]) -> None:
    flip = next(c for c in every if c.name.startswith("flip at α = 1"))
    projection = next(c for c in every if c.method == "nullspace" and c.main)
    difference = _logits(organism, flip.remove) - _logits(organism, projection.remove)
    assert mx.abs(difference).max().item() < 1e-3
    assert mx.abs(_logits(organism, flip.remove) - _logits(organism, ())).max().item() > 0.1


def test_repeated_flips_are_not_the_single_one(organism: Any, every: list[Condition]) -> None:
    single = next(c for c in every if c.name == "flip α = 2, all")
    repeated = next(c for c in every if c.name == "flip α = 2 repeated, all")
    difference = _logits(organism, single.remove) - _logits(organism, repeated.remove)
    assert mx.abs(difference).max().item() > 0.1


def test_further_directions_are_described(organism: Any, fits: Fits) -> None:
    key = (-1, 4)
    rows = eval_set(config(), vauban.organism_path("dense"))
    found = further_directions(*organism, fits, key, rows)
    assert [d.index for d in found] == list(range(1, fits.inlp[key].rank + 1))
    first = found[0]
    assert first.refusal_auc > 0.95 and first.cosine > 0.3
    assert any(name.startswith("language: en") for name in first.aucs)
    assert any(name.startswith("length") for name in first.aucs)
    assert all(0.0 <= value <= 1.0 for d in found for value in d.aucs.values())
    assert first.strongest in first.aucs and len(first.writes) == 5
    # By hand: the AUC of one label.
    model, tokenizer = organism
    harmful = [row for row in rows.harmful]
    values = vauban.collect_activations(model, tokenizer, [r.prompt for r in harmful]).at(4)
    along = np.array(values @ fits.inlp[key].directions[0])
    english = np.array([row.language == "en" for row in harmful])
    pairs = along[english][:, None] - along[~english][None]
    by_hand = (pairs > 0).mean() + (pairs == 0).mean() / 2
    assert first.aucs["language: en (harmful)"] == pytest.approx(by_hand, abs=1e-6)


def test_nothing_along_the_first_direction_is_left_for_a_second_pass(
    organism: Any, prompts: Any, fits: Fits, chosen: dict[Any, Choice]
) -> None:
    facts, more = compose(
        *organism, fits, chosen["ablation"], prompts["harmful"][:48], prompts["harmless"][:48],
        (prompts["harmful"][60:80], prompts["harmless"][60:80]),
    )  # fmt: skip
    second = facts["second"]
    assert abs(second["cosine"]) < 1e-3 and 0 < second["norm_ratio"] < 1
    assert 0.9 < second["auc_first"] <= 1.0 and 0 <= second["auc_second"] <= 1
    first_measured = next(row for row in facts["layers"] if row["cosine"] is not None)
    assert first_measured["cosine"] == pytest.approx(1.0, abs=1e-5)
    assert len(more) == 3 and all(c.remove for c in more)
