"""The picture of an `Explanation`: the chain of layers into the loss, values above and cotangents below."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from funcnet.train.plots import pyplot

if TYPE_CHECKING:
    from funcnet.inspect.explain import Explanation, Step

COLUMNS, WIDTH, HEIGHT = 6, 2.1, 1.75  # boxes per row, inches per box
LETTERS = 24  # of a name that fit in a box
WRITTEN_OUT = 6  # for at most so many layers the title shows the whole composition


def plot_explanation(explanation: "Explanation", path: str | Path) -> None:
    """Draw the chain row by row, in reading order, and write it as a PNG."""
    plt = pyplot()
    steps = explanation.steps
    boxes = len(steps) + 1  # and the loss
    columns = min(boxes, COLUMNS)
    rows = -(-boxes // columns)
    figure, axis = plt.subplots(figsize=(WIDTH * columns + 0.8, HEIGHT * rows + 0.9), layout="constrained")
    for i, step in enumerate(steps):
        _draw(axis, i, columns, f"$f_{{{len(steps) - i}}}$", step)
    _loss(axis, len(steps), columns, explanation)
    axis.set(xlim=(-0.55, columns - 0.35), ylim=(-rows + 0.45, 0.62))
    axis.axis("off")
    legend = f"x: {explanation.input}; above: the output y and its RMS; below: the RMS of dLoss/dy, and |dLoss/dw|"
    axis.set_title(f"{_formula(len(steps))}\n{legend}", size=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _formula(count: int) -> str:
    """f_1(f_2(x, w_2), w_1) -> loss, for few layers; else with dots."""
    shown = list(range(1, count + 1)) if count <= WRITTEN_OUT else [1, 2, None, count]
    opened = "".join(r"\cdots " if i is None else f"f_{{{i}}}(" for i in shown)
    closed = "".join(r"\cdots " if i is None else f", w_{{{i}}})" for i in reversed(shown))
    return f"${opened}x{closed}$ into the loss"


def _place(i: int, columns: int) -> tuple[int, int]:
    return i % columns, -(i // columns)


def _draw(axis: Any, i: int, columns: int, function: str, step: "Step") -> None:
    x, y = _place(i, columns)
    name = _shortened(step.name).replace("$", r"\$")  # a dollar sign would begin a formula
    _box(axis, x, y, f"{function}\n{name}", "mistyrose" if any(step.marks) else "aliceblue")
    above = f"{step.output}\nRMS {step.activation:.3g} {step.marks[0]}"
    axis.text(x, y + 0.24, above, ha="center", va="bottom", size=8)
    below = f"RMS {step.cotangent:.3g} {step.marks[1]}"
    if step.gradient is not None:
        below += f"\n|dL/dw| {step.gradient:.3g}"
    axis.text(x, y - 0.24, below, ha="center", va="top", size=8, color="firebrick")
    _arrows(axis, i, columns)


def _loss(axis: Any, i: int, columns: int, explanation: "Explanation") -> None:
    x, y = _place(i, columns)
    _box(axis, x, y, explanation.loss_name, "honeydew")
    axis.text(x, y + 0.24, f"loss {explanation.loss:.4g}", ha="center", va="bottom", size=8)
    axis.text(x, y - 0.24, "dLoss/dLoss 1", ha="center", va="top", size=8, color="firebrick")


def _box(axis: Any, x: int, y: int, text: str, colour: str) -> None:
    from matplotlib.patches import FancyBboxPatch

    style = "round,pad=0.02,rounding_size=0.05"
    axis.add_patch(FancyBboxPatch((x - 0.4, y - 0.17), 0.8, 0.34, boxstyle=style, facecolor=colour, edgecolor="grey"))
    axis.text(x, y, text, ha="center", va="center", size=8.5)


def _arrows(axis: Any, i: int, columns: int) -> None:
    """To the next box, in black, and back from it, in red; at the end of a row a sign for the next row instead."""
    x, y = _place(i, columns)
    if (i + 1) % columns:
        axis.annotate("", (x + 0.58, y + 0.06), (x + 0.42, y + 0.06), arrowprops={"arrowstyle": "->"})
        axis.annotate(
            "", (x + 0.42, y - 0.06), (x + 0.58, y - 0.06), arrowprops={"arrowstyle": "->", "color": "firebrick"}
        )
    else:
        axis.text(x + 0.46, y, "↵", size=12, va="center", color="grey")


def _shortened(name: str) -> str:
    """A path, shortened to fit into a box; its end is kept, since it says most."""
    return name if len(name) <= LETTERS else ".." + name[2 - LETTERS :]
