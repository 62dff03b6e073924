"""The study's table, chart and page, from figures made by hand."""

import builtins
from typing import Any

import pytest

from vauban.errors import InputError
from vauban.study.chart import _whisker, best_families, family_chart, require_charts
from vauban.study.figures import Metric
from vauban.study.tables import cell, study_table, title


def figure(name: str, value: float, low: float, high: float, better: str, base: float) -> Any:
    baseline = Metric(name, base, 10, (base, base), better)
    metric = Metric(name, value, 10, (low, high), better)
    return {**metric.to_dict(), "delta": metric.delta(baseline).to_dict()}


def block(refused: list[float]) -> dict[str, Any]:
    methods = [
        ("ablation", "difference in means"),
        ("nullspace", "INLP"),
        ("classifier", "classifier weights"),
    ]
    conditions = [
        {
            "name": method, "method": method, "family": family, "scope": "all", "main": True,
            "metrics": [
                figure("refusal_harmless", r, max(r - 0.1, 0.0), r + 0.1, "lower", 0.5),
                figure("perplexity: plain", 2.0, 1.5, 2.5, "lower", 2.0),
                {
                    **Metric.not_applicable("mmlu", "no data").to_dict(),
                    "delta": {"change": None, "gain": None, "clipped": None},
                },
            ],
        }
        for (method, family), r in zip(methods, refused, strict=True)
    ]  # fmt: skip
    return {"model": "tiny", "conditions": conditions}


def test_titles_and_cells() -> None:
    assert title("unsafe_harmful (stand-in: a template)") == "judged unsafe"
    assert title("cross_entropy: chat") == "log-perplexity, chat"
    share = figure("refusal_harmless", 0.25, 0.1, 0.4, "lower", 0.5)
    assert cell(share) == "25.0 % [10.0, 40.0] (-25.0)"
    assert cell(share, change=False) == "25.0 % [10.0, 40.0]"


def test_the_table_says_what_does_not_apply() -> None:
    text = study_table(block([0.1, 0.2, 0.3]), markdown=True)
    assert "*lower*" in text and "MMLU: not applicable (no data)." in text
    assert "| ablation | 10.0 % [0.0, 20.0] |" in text


def test_whiskers_are_gains() -> None:
    """Lower is better: an interval of 0.1 to 0.3 against 0.5 is a gain of 0.2 to 0.4."""
    low, high = _whisker(figure("refusal_harmless", 0.2, 0.1, 0.3, "lower", 0.5))
    assert (low, high) == pytest.approx((0.2, 0.4))


def test_every_family_with_the_largest_gain_is_starred() -> None:
    bars = [("red", 0.4), ("blue", 0.4), ("green", 0.1), ("blue", None)]
    assert best_families(bars) == {"red", "blue"}
    assert best_families([("red", None)]) == set()
    assert "<svg" in family_chart([block([0.1, 0.1, 0.3])])


def test_without_matplotlib_the_cure_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(InputError, match=r"vauban\[plots\]"):
        require_charts()
