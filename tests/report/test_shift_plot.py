"""The picture of a hidden shift: its file, and what is said without matplotlib."""

import sys

import numpy as np
import pytest

from vauban.errors import InputError
from vauban.evaluation.hidden_shift import shift_of
from vauban.report import plot_shift


@pytest.fixture
def shift():
    rng = np.random.default_rng(0)
    before = rng.standard_normal((60, 5)) * [4, 2, 1, 1, 1]
    return shift_of(before, before + 0.3 * rng.standard_normal((60, 5)), 3)


def test_points_ellipse_and_figures_are_in_the_picture(shift, tmp_path):
    pytest.importorskip("matplotlib")
    text = plot_shift(shift, tmp_path / "shift.svg").read_text()
    # A point is one use of its marker: sixty before, sixty after, two in the legend.
    assert text.count("<use ") >= 120
    assert plot_shift(shift, tmp_path / "shift.png").read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        plot_shift(shift, tmp_path / "shift.gif")


def test_without_matplotlib_the_cure_is_named(shift, tmp_path, monkeypatch):
    for name in ("matplotlib", "matplotlib.figure"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(InputError, match=r"vauban\[plots\]"):
        plot_shift(shift, tmp_path / "shift.png")
