"""The picture of one leaf: where it is wrong, and how its values compare with the reference."""

from pathlib import Path

import numpy as np

from funcnet.check.judge import Leaf, as_float64
from funcnet.train.plots import pyplot

MOST = 16  # powers of ten, above or below what is allowed, at which the colours end


def draw(leaf: Leaf, got: np.ndarray, wanted: np.ndarray, path: str | Path) -> None:
    """A PNG: every element's error as a heat map, and its value by the rule against that of the reference.

    Red is beyond what is allowed, blue within; the worst element has a ring in both.
    """
    plt = pyplot()
    got, wanted = (np.real(as_float64(v)) for v in (got, wanted))
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.6), layout="constrained")
    figure.suptitle(f"{leaf.leaf}  {leaf.dtype}[{','.join(map(str, leaf.shape))}]  {leaf.diagnosis}", fontsize=10)
    left.set(xlabel="last axis", ylabel="other axes, flattened" if got.ndim > 2 else "first axis")
    left.set_title("error over what is allowed, log10 (above 0: wrong)")
    limits = [np.nanmin(wanted, initial=0.0), np.nanmax(wanted, initial=0.0)]
    right.plot(limits, limits, color="gray", linewidth=1, label="equal")
    right.scatter(wanted.ravel(), got.ravel(), s=12, alpha=0.6, label="an element")
    right.set(title="every element", xlabel="reference", ylabel="by the rule")
    if got.size:
        beyond = _beyond(leaf, got, wanted)
        reach = max(1.0, float(beyond.max()))
        shown = left.imshow(beyond, aspect="auto", cmap="RdBu_r", vmin=-reach, vmax=reach, interpolation="nearest")
        figure.colorbar(shown, ax=left)
        ring = {"s": 120, "facecolors": "none", "edgecolors": "black", "label": f"the worst, {list(leaf.index)}"}
        row, column = np.unravel_index(np.ravel_multi_index(leaf.index, got.shape) if got.ndim else 0, beyond.shape)
        left.scatter([column], [row], **ring)
        right.scatter([wanted[leaf.index]], [got[leaf.index]], **ring)
    right.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _beyond(leaf: Leaf, got: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """log10 of the errors over what is allowed, as a matrix; what is not finite is at the end of the colours."""
    with np.errstate(all="ignore"):
        share = np.abs(_matrix(got) - _matrix(wanted)) / (leaf.allowed * (leaf.scale or 1.0))
        logs = np.log10(np.where(np.isnan(share), np.inf, share))
    return np.clip(logs, -MOST, MOST)


def _matrix(v: np.ndarray) -> np.ndarray:
    return v.reshape(-1, v.shape[-1]) if v.ndim > 1 else v.reshape(1, -1)
