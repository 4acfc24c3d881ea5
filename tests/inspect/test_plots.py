"""The picture of a pass: what stands in its boxes, how they are laid out, and what it needs."""

import sys

import jax
import numpy as np
import pytest

import funcnet as fn
from funcnet.inspect.explain import Explanation, Step
from funcnet.inspect.plots import COLUMNS, LETTERS, _formula, _place, _shortened, plot_explanation

pytest.importorskip("matplotlib")


@pytest.mark.parametrize("layers", [1, 3, 30])
def test_the_picture_is_written(layers, tmp_path):
    model = fn.serial(*[fn.dense(3)] * layers)
    objective = fn.objective(model, fn.mse())
    x = np.ones((2, 3), np.float32)
    params, state = objective.init(jax.random.key(0), (x, x))
    fn.explain(objective, params, state, (x, x)).plot(tmp_path / "chain.png")
    header = (tmp_path / "chain.png").read_bytes()[:24]
    assert header.startswith(b"\x89PNG")
    assert int.from_bytes(header[16:20], "big") < 2000


def test_names_may_hold_dollars(tmp_path):
    model = fn.serial(**{"cost$_per_$": fn.dense(3)})
    objective = fn.objective(model, fn.mse())
    x = np.ones((2, 3), np.float32)
    fn.explain(objective, *objective.init(jax.random.key(0), (x, x)), (x, x)).plot(tmp_path / "chain.png")


def a_step(name, gradient=None, marks=("", "")):
    return Step((name,), "kind", "float32[2, 3]", "float32[2, 4]", 0, 1.25, 0.5, gradient, {}, 0, 0, marks)


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    return drawn


def test_every_box_has_its_layer_with_values_above_and_cotangents_below(figures):
    steps = (a_step("dense", 3.5), a_step("cost$", None, ("dead", "")), a_step("head", 0.0, ("", "vanishing")))
    plot_explanation(Explanation(steps, 0.75, "mse", "float32[2, 3]"), "unused")
    (axis,) = figures[0].axes
    texts = [text.get_text() for text in axis.texts if text.get_text()]
    assert texts == [
        "$f_{3}$\ndense",
        "float32[2, 4]\nRMS 1.25 ",
        "RMS 0.5 \n|dL/dw| 3.5",
        "$f_{2}$\ncost\\$",
        "float32[2, 4]\nRMS 1.25 dead",
        "RMS 0.5 ",
        "$f_{1}$\nhead",
        "float32[2, 4]\nRMS 1.25 ",
        "RMS 0.5 vanishing\n|dL/dw| 0",
        "mse",
        "loss 0.75",
        "dLoss/dLoss 1",
    ]
    assert axis.get_title().startswith("$f_{1}(f_{2}(f_{3}(x, w_{3}), w_{2}), w_{1})$ into the loss\nx: float32[2, 3];")
    from matplotlib.colors import to_rgba

    boxes = [patch.get_facecolor() for patch in axis.patches if hasattr(patch, "get_boxstyle")]
    assert boxes == [to_rgba(colour) for colour in ("aliceblue", "mistyrose", "mistyrose", "honeydew")]


@pytest.mark.parametrize("layers", [1, COLUMNS - 1, COLUMNS, 2 * COLUMNS])
def test_boxes_are_laid_out_row_by_row_and_arrows_join_all_of_a_row(layers, figures):
    plot_explanation(Explanation((a_step("dense"),) * layers, 0.0, "mse", ""), "unused")
    (axis,) = figures[0].axes
    boxes = [patch for patch in axis.patches if hasattr(patch, "get_boxstyle")]
    assert len(boxes) == layers + 1
    turns = sum(text.get_text() == "\N{DOWNWARDS ARROW WITH CORNER LEFTWARDS}" for text in axis.texts)
    assert turns == layers // COLUMNS
    arrows = sum(getattr(text, "arrow_patch", None) is not None for text in axis.texts)
    assert arrows == 2 * (layers - turns)
    (left, right), (bottom, top) = axis.get_xlim(), axis.get_ylim()
    for box in boxes:
        assert left < box.get_x()
        assert box.get_x() + box.get_width() < right
        assert bottom < box.get_y()
        assert box.get_y() + box.get_height() < top


def test_places_run_along_rows_and_rows_downwards():
    assert [_place(i, 3) for i in range(7)] == [(0, 0), (1, 0), (2, 0), (0, -1), (1, -1), (2, -1), (0, -2)]


def test_the_formula_has_dots_where_there_are_many_layers():
    assert _formula(1) == "$f_{1}(x, w_{1})$ into the loss"
    assert _formula(3) == "$f_{1}(f_{2}(f_{3}(x, w_{3}), w_{2}), w_{1})$ into the loss"
    assert _formula(6).count("w") == 6
    assert _formula(7) == r"$f_{1}(f_{2}(\cdots f_{7}(x, w_{7})\cdots , w_{2}), w_{1})$ into the loss"


def test_long_names_keep_their_end():
    fits, long = "a" * LETTERS, "first/" + "b" * LETTERS
    assert _shortened(fits) == fits
    assert _shortened(long) == ".." + "b" * (LETTERS - 2)
    assert _shortened("c" + fits[:-1] + "d") == ".." + fits[: LETTERS - 3] + "d"


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"funcnet\[plots\]"):
        plot_explanation(Explanation((a_step("dense"),), 0.0, "mse", ""), "unused")
