"""The picture of one leaf: where it is wrong, and how its values lie beside the reference."""

from pathlib import Path

import numpy as np

from funcnet.check.judge import Leaf, wide
from funcnet.train.plots import pyplot


def draw(leaf: Leaf, got: np.ndarray, wanted: np.ndarray, path: str | Path) -> None:
    """A PNG: the errors over the leaf's scale as a heat map, and every element, by the rule against the reference."""
    plt = pyplot()
    got, wanted = (np.real(wide(v)) for v in (got, wanted))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"{leaf.leaf}  {leaf.dtype}[{','.join(map(str, leaf.shape))}]  {leaf.diagnosis}", fontsize=10)
    with np.errstate(all="ignore"):
        error = np.log10(np.maximum(np.abs(_matrix(got) - _matrix(wanted)) / (leaf.scale or 1.0), 1e-17))
    error = np.where(np.isfinite(error), error, 0.0)
    shown = left.imshow(error, aspect="auto", cmap="magma", vmin=-17, vmax=0, interpolation="nearest")
    left.set(title="error over the leaf's scale, log10", xlabel="last axis", ylabel="other axes, flattened")
    figure.colorbar(shown, ax=left)
    right.scatter(wanted.ravel(), got.ravel(), s=12, alpha=0.6)
    limits = [np.nanmin(wanted, initial=0.0), np.nanmax(wanted, initial=0.0)]
    right.plot(limits, limits, color="gray", linewidth=1, label="equal")
    right.set(title="every element", xlabel="reference", ylabel="by the rule")
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _matrix(v: np.ndarray) -> np.ndarray:
    return v.reshape(-1, v.shape[-1]) if v.ndim > 1 else v.reshape(1, -1)
