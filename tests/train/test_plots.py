"""Pictures are drawn; without matplotlib the error names the extra."""

import sys

import numpy as np
import pytest

from funcnet.train.plots import plot_confusion, plot_history, pyplot


def test_history_with_and_without_validation(tmp_path):
    plain = [{"step": i, "loss": 1.0 / i} for i in (1, 2, 3)]
    plot_history(plain, tmp_path / "plain.png")
    plot_history([row | {"accuracy": 0.5, "val_loss": 2.0, "val_accuracy": 0.4} for row in plain], tmp_path / "all.png")
    widths = [_width(tmp_path / name) for name in ("plain.png", "all.png")]
    assert widths[1] > 1.5 * widths[0]  # one panel, two panels


def test_confusion_counts_every_example(tmp_path):
    plot_confusion(np.array([0, 1, 2, 2]), np.array([0, 1, 1, 2]), tmp_path / "confusion.png")
    assert _width(tmp_path / "confusion.png") > 100


def test_without_matplotlib_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"funcnet\[plots\]"):
        pyplot()


def _width(path):
    return int.from_bytes(path.read_bytes()[16:20])
