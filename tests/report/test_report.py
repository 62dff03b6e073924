"""Tables, samples and the model card as text."""

from pathlib import Path

import mlx.core as mx
import pytest

import vauban
from vauban.prompts import spread
from vauban.report import (
    HEADINGS,
    BehaviourRow,
    Share,
    cells,
    contrast_line,
    decimal,
    interval_lines,
    markdown_table,
    pick_samples,
    plain_table,
    refusal_statement,
    shorten,
    written_cut,
)
from vauban.report.card import _quoted

BEFORE = BehaviourRow("before", Share(0.98, (0.91, 0.997), 64), Share(0.0, (0.0, 0.057), 64))
AFTER = BehaviourRow("cut", Share(0.02, (0.0, 0.08), 64), kl=0.0312, note="a note.")


def test_cells_leave_out_what_was_not_measured():
    assert cells(AFTER)[2] == "–" and cells(AFTER)[5] == "0.031"


def test_cells_hold_the_intervals_of_perplexity_and_kl():
    row = BehaviourRow(
        "cut", perplexity=1.103, perplexity_interval=(1.08, 1.126), kl=0.0152,
        kl_interval=(0.0069, 0.0271),
    )  # fmt: skip
    assert cells(row)[4:] == ("1.10 (1.08–1.13)", "0.015 (0.0069–0.027)")
    assert cells(row, intervals=False)[4:] == ("1.10", "0.015")
    assert interval_lines([BEFORE, row]) == [
        "perplexity: cut 1.10 (1.08–1.13)",
        "KL: cut 0.015 (0.0069–0.027)",
    ]


def test_markdown_has_as_many_columns_in_every_line():
    lines = [line for line in markdown_table([BEFORE, AFTER]).splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1 and len(lines) == 4
    assert "*cut*: a note." in markdown_table([BEFORE, AFTER])


def test_plain_columns_are_aligned():
    """Every figure ends where its heading ends."""
    head, *lines = plain_table([BEFORE, AFTER]).splitlines()
    ends = [head.index(name) + len(name) for name in HEADINGS[1:]]
    for line in lines:
        assert all(line[end - 1 : end + 1].strip() for end in ends if end <= len(line))
        assert all(line[end : end + 2].strip() == "" for end in ends)
    assert max(map(len, lines)) <= 100


def test_contrast_is_said_only_where_it_was_measured():
    assert contrast_line([BEFORE, AFTER]) is None
    row = BehaviourRow("before", contrast_refused=Share(0.25, (0.1, 0.4), 32))
    assert "before 25.0% (10–40) of 32" in (contrast_line([row]) or "")


def test_a_model_below_the_threshold_does_not_refuse():
    assert refusal_statement(BEFORE, 0.2) is None
    assert "2.0%" in (refusal_statement(AFTER, 0.2) or "")


def _pair(prompt: str, before: bool, after: bool) -> dict:
    return {
        "prompt": prompt,
        "original": "no" if before else "yes",
        "modified": "no" if after else "yes",
        "refused_original": before,
        "refused_modified": after,
    }


def test_samples_show_changes_first_and_one_harmless_answer():
    harmful = [_pair(f"h{i}", True, i % 2 == 0) for i in range(6)]
    found = pick_samples({"harmful": harmful, "harmless": [_pair("s", False, False)]})
    assert [sample.label for sample in found] == ["harmful", "harmful", "harmless"]
    assert all(sample.original != sample.modified for sample in found[:2])
    unchanged = pick_samples({"harmful": [_pair("h", True, True)], "harmless": []})
    assert [sample.prompt for sample in unchanged] == ["h"]


@pytest.mark.parametrize("count", [0, 1, 3, 10, 100])
def test_spread_keeps_order_and_never_repeats(count):
    found = spread(range(10), count)
    assert found == sorted(set(found)) and len(found) == min(count, 10)


@pytest.mark.parametrize("width", [5, 10, 40])
def test_shortened_text_is_one_line_within_the_width(width):
    for text in ("one two three four five six seven", "a" * 60, "a\nb\r\n\tc", ""):
        short = shorten(text, width)
        assert len(short) <= width and "\n" not in short
        assert short == " ".join(text.split()) or short.endswith("…")


@pytest.mark.parametrize("value", [1.2, 0.0312, 123.4, 99999.0, 1e-9, 1e9, -3.5])
def test_decimals_keep_three_digits(value):
    assert float(decimal(value)) == pytest.approx(value, rel=5e-3)


def test_an_answer_cannot_write_markdown_into_the_card():
    assert _quoted("<script> [x](y) `z` *w*") == r"\<script\> \[x\](y) \`z\` \*w\*"
    assert _quoted("") == "(empty)"


@pytest.mark.parametrize("alpha", [1.0, 0.5, 1.15])
def test_a_cut_is_said_to_be_as_planned_and_left_only_where_all_was_to_go(
    tmp_path: Path, alpha: float
) -> None:
    source = vauban.organism_path("dense")
    model, _ = vauban.load(source)
    plan = vauban.plan_cut(model, mx.ones(128), alpha=alpha)
    said = written_cut(plan.export(source, tmp_path / "cut").to_dict())
    away = float(said.split("more than ")[1].split("%")[0])
    assert away < 1, said
    assert ("is left" in said) == (alpha == 1.0)
    assert ("turns round" in said) == (alpha != 1.0)
