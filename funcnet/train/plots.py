"""Pictures of a run, as PNG files. Needs the extra `plots`."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def pyplot() -> Any:
    """`matplotlib.pyplot`, drawing to files only.

    Raises:
        ImportError: if matplotlib is not installed; it names the extra.
    """
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError("pictures need matplotlib: python -m pip install 'funcnet[plots]'") from error
    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def plot_history(history: Sequence[dict[str, float]], path: str | Path) -> None:
    """Loss and, where there is one, accuracy against the step, training beside validation.

    Args:
        history: records as `fit` returns them.
        path: of the PNG.
    """
    plt = pyplot()
    names = [name for name in ("loss", "accuracy") if name in history[0]]
    figure, axes = plt.subplots(1, len(names), figsize=(5 * len(names), 3.6), squeeze=False, layout="constrained")
    steps = [record["step"] for record in history]
    for axis, name in zip(axes[0], names, strict=True):
        for key, label in ((name, "training, mean since the record before"), (f"val_{name}", "validation")):
            if key in history[0]:
                axis.plot(steps, [record[key] for record in history], marker=".", label=label)
        axis.set(xlabel="step", ylabel=name, title=name)
        axis.grid(alpha=0.3)
        if name == "loss":
            axis.set_yscale("log")
        axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def plot_confusion(targets: np.ndarray, predicted: np.ndarray, path: str | Path) -> None:
    """How often class i (row) was read as class j (column); the diagonal, in grey, is what was right.

    Args:
        targets, predicted: integer classes [N].
        path: of the PNG.
    """
    plt = pyplot()
    classes = int(max(targets.max(), predicted.max())) + 1
    counts = np.zeros((classes, classes), int)
    np.add.at(counts, (targets, predicted), 1)
    wrong = np.where(np.eye(classes, dtype=bool), 0, counts)
    figure, axis = plt.subplots(figsize=(5.2, 5), layout="constrained")
    axis.imshow(wrong, cmap="Reds", vmin=0, vmax=max(wrong.max(), 1) * 1.5)
    for i, j in np.argwhere(counts):
        axis.text(j, i, counts[i, j], ha="center", va="center", color="grey" if i == j else "black")
    axis.set_xticks(np.arange(classes - 1) + 0.5, minor=True)
    axis.set_yticks(np.arange(classes - 1) + 0.5, minor=True)
    axis.grid(which="minor", color="white")
    axis.tick_params(which="minor", length=0)
    axis.set(xticks=range(classes), yticks=range(classes), xlabel="read as", ylabel="is")
    axis.set_title(f"{np.trace(counts)} of {counts.sum()} right")
    figure.savefig(path, dpi=120)
    plt.close(figure)
