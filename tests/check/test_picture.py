"""The picture of a leaf: what its colours are, and that it is drawn for every kind of leaf."""

import sys

import numpy as np
import pytest

from funcnet.check.judge import Leaf, measure
from funcnet.check.picture import MOST, _beyond, draw


def test_colours_are_powers_of_ten_beyond_what_is_allowed():
    """Allowed is 0.01 of the scale 4; a right element lies at the blue end, one that is lost at the red."""
    leaf = Leaf("w", allowed=0.01, scale=4.0)
    got = np.array([[0.04, 4.4, 0.0], [1.004, np.nan, np.inf]])
    wanted = np.array([[0.0, 4.0, 0.0], [1.0, 1.0, 1.0]])
    np.testing.assert_allclose(_beyond(leaf, got, wanted), [[0, 1, -MOST], [-1, MOST, MOST]], atol=1e-9)
    no_scale = Leaf("w", allowed=0.01, scale=0.0)
    np.testing.assert_allclose(_beyond(no_scale, np.array(0.1), np.array(0.0)), [[1]], atol=1e-9)


@pytest.mark.parametrize(("shape", "rows"), [((), (1, 1)), ((3,), (1, 3)), ((2, 3), (2, 3)), ((2, 3, 4), (6, 4))])
def test_a_leaf_of_any_rank_is_a_matrix(shape, rows):
    assert _beyond(Leaf("w", allowed=1.0), np.ones(shape), np.ones(shape)).shape == rows


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn, instead of files."""
    pytest.importorskip("matplotlib")
    from matplotlib.figure import Figure

    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda self, path, **options: drawn.append(self))
    return drawn


def test_the_worst_element_has_a_ring_in_both_halves(figures):
    wanted = np.random.default_rng(0).normal(size=(2, 3, 4))
    got = wanted.astype(np.float32)
    got[1, 2, 3] += 0.5
    draw(measure("w", got, wanted, 1e-6), got, wanted, "unused")
    left, right = figures[0].axes[:2]
    assert figures[0].get_suptitle().startswith("w  float32[2,3,4]")
    assert left.collections[0].get_offsets().tolist() == [[3, 5]]  # row 1 * 3 + 2 of six, the last column
    ring = right.collections[1]
    np.testing.assert_allclose(ring.get_offsets(), [[wanted[1, 2, 3], got[1, 2, 3]]])
    assert ring.get_label() == "the worst, [1, 2, 3]"
    assert right.collections[0].get_offsets().shape == (24, 2)
    low, high = left.images[0].get_clim()
    assert low == -high
    assert high == pytest.approx(np.log10(0.5 / (1e-6 * np.abs(wanted).max())), rel=1e-6)


@pytest.mark.parametrize("shape", [(), (3,), (0,), (0, 3), (2, 3)])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.complex64])
def test_leaves_of_every_kind_are_drawn(shape, dtype, figures):
    wanted = np.ones(shape)
    got = np.full(shape, 1.5).astype(dtype)
    draw(measure("w", got, wanted, 1e-3), got, wanted, "unused")
    assert len(figures[0].axes[1].collections[0].get_offsets()) == got.size


def test_a_leaf_that_is_lost_is_drawn(tmp_path):
    pytest.importorskip("matplotlib")
    got, wanted = np.full((2, 2), np.nan, np.float32), np.full((2, 2), np.nan)
    got[0, 0] = np.inf
    draw(measure("w", got, wanted, 1e-3), got, wanted, tmp_path / "leaf.png")
    assert (tmp_path / "leaf.png").read_bytes().startswith(b"\x89PNG")


def test_without_matplotlib_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"funcnet\[plots\]"):
        draw(Leaf("w", allowed=1.0), np.ones(2), np.ones(2), tmp_path / "leaf.png")
    assert not list(tmp_path.iterdir())
