"""Seven optimizers of optax on three losses of two parameters: the paths they take, and how many steps they need.

    python examples/optimizers.py

It draws each path over the contours of a curved valley, of a saddle between two minima, and of the real negative
log-likelihood of a logistic regression, whose gradient is written by hand. It prints the steps each optimizer needs.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from funcnet.train.plots import pyplot

GAP = 1e-3  # a minimum counts as reached when the loss is this close to the least
FEATURES = ("mean radius", "mean texture")

# An optimizer, and its learning rates for valley, saddle and likelihood. One rule for all: of 1, 2 and 5 x 10^k, that
# which reaches a minimum for good in the fewest of 500 steps (or else the lowest loss) and never leaves the picture.
OPTIMIZERS: dict[str, tuple[Callable[..., optax.GradientTransformation], tuple[float | None, ...]]] = {
    # up to about 2 / the largest curvature, where descent turns to bouncing: at the minima it is 102, 9.1 and 0.08
    "gradient descent": (optax.sgd, (0.02, 0.1, 10.0)),
    # no larger, for a step adds up to ten times the rate
    "momentum": (partial(optax.sgd, momentum=0.9), (0.005, 0.1, 0.1)),
    # no smaller than momentum's: looking ahead damps the swings
    "Nesterov": (partial(optax.sgd, momentum=0.9, nesterov=True), (0.005, 0.1, 1.0)),
    # large, for the steps shrink as squared gradients pile up
    "AdaGrad": (optax.adagrad, (0.5, 0.5, 5.0)),
    # about the length of every step, to the last: what is larger circles the minimum
    "RMSProp": (optax.rmsprop, (0.01, 0.02, 0.2)),
    # about the length of the first steps
    "Adam": (optax.adam, (0.2, 0.2, 0.2)),
    # none: a line search finds each step's length, by evaluations that the table does not count
    "L-BFGS": (optax.lbfgs, (None, None, None)),
}


@dataclass(frozen=True)
class Problem:
    """A loss of two parameters w [2], with its gradient, where to start and where it is least."""

    title: str
    value_and_grad: Callable[[Any], tuple[Any, Any]]
    start: tuple[float, float]
    minima: np.ndarray  # [minima, 2]
    window: tuple[float, float, float, float]  # what is drawn: from left to right, from bottom to top
    labels: tuple[str, str]
    saddle: tuple[float, float] | None = None

    @property
    def value(self) -> Callable[[Any], Any]:
        """The loss alone, which JAX differentiates by `value_and_grad`: L-BFGS's line search does."""
        value = jax.custom_vjp(lambda w: self.value_and_grad(w)[0])
        value.defvjp(self.value_and_grad, lambda grad, dvalue: (dvalue * grad,))
        return value

    @property
    def least(self) -> float:
        return float(self.value(jnp.asarray(self.minima[0])))


def valley(w: Any) -> Any:
    """Rosenbrock's: the floor w2 = w1^2 falls gently to (1, 1) between walls that are steep."""
    return (1 - w[0]) ** 2 + 10 * (w[1] - w[0] ** 2) ** 2


def saddle(w: Any) -> Any:
    """Minima at (1/2, -1) and (1/2, 1), a saddle at the origin between them; no gradient leads off the line w2 = 0."""
    return 2 * (w[0] - w[1] ** 2 / 2) ** 2 + (w[1] ** 2 - 1) ** 2 / 4


def likelihood() -> Callable[[Any], tuple[Any, Any]]:
    """w [2] -> the mean of -log P(malignant or not | two standardised features), and its gradient by hand."""
    try:
        from sklearn.datasets import load_breast_cancer
    except ImportError:
        sys.exit("this example needs scikit-learn: python -m pip install 'funcnet[examples]'")
    data: Any = load_breast_cancer()
    x = data.data[:, [list(data.feature_names).index(name) for name in FEATURES]]
    batch = (x - x.mean(0)) / x.std(0), (data.target == 0).astype(np.float64)[:, None]
    by_hand = fn.value_and_grad(fn.objective(fn.dense(1, use_bias=False), fn.binary_cross_entropy()))

    def value_and_grad(w):
        params, state = {"model": {"kernel": w[:, None]}, "loss": {}}, {"model": (), "loss": ()}
        (value, _), grads = by_hand(params, state, batch)
        return value, grads["model"]["kernel"][:, 0]

    return value_and_grad


def problems() -> tuple[Problem, ...]:
    """The three losses, in the order of the learning rates."""
    with_gradient = lambda f: lambda w: (f(w), fn.gradient(f)(w))
    regression, w = likelihood(), jnp.zeros(2)
    gradient = lambda w: regression(w)[1]
    for _ in range(20):  # Newton's method, to the minimum that has no closed form
        w = w - jnp.linalg.solve(fn.jacobian(gradient)(w), gradient(w))
    weights = f"$w_1$, of the {FEATURES[0]}", f"$w_2$, of the {FEATURES[1]}"
    names = "$w_1$", "$w_2$"
    first = "Valley: $(1 - w_1)^2 + 10 (w_2 - w_1^2)^2$"
    second = "Saddle: $2 (w_1 - w_2^2 / 2)^2 + (w_2^2 - 1)^2 / 4$"
    third = r"Likelihood: the mean of $-\log P(y|x)$"
    two = np.array([[0.5, 1.0], [0.5, -1.0]])
    return (
        Problem(first, with_gradient(valley), (-1.2, 1.0), np.ones((1, 2)), (-1.5, 1.5, -0.5, 1.7), names),
        Problem(second, with_gradient(saddle), (-1.5, 0.001), two, (-1.8, 1.3, -1.4, 1.4), names, (0.0, 0.0)),
        Problem(third, regression, (-1.0, 3.0), np.asarray(w)[None], (-1.5, 7.0, -0.6, 3.4), weights),
    )


def descend(problem: Problem, optimizer: optax.GradientTransformation, steps: int) -> tuple[np.ndarray, np.ndarray]:
    """The path [steps + 1, 2] from the start on, and the loss at each of its points."""
    update = optax.with_extra_args_support(optimizer).update  # L-BFGS searches along a line, for which it needs more

    def step(carry, _):
        w, state = carry
        value, grad = problem.value_and_grad(w)
        change, state = update(grad, state, w, value=value, grad=grad, value_fn=problem.value)
        return (optax.apply_updates(w, change), state), (w, value)

    @jax.jit
    def run(w):
        return jax.lax.scan(step, (w, optimizer.init(w)), length=steps + 1)[1]

    path, losses = run(jnp.array(problem.start))
    return np.asarray(path), np.asarray(losses)


def steps_to(losses: np.ndarray, loss: float) -> int | None:
    """The steps after which the loss is `loss` or less and stays so; None if it is not in the end."""
    steps = int(np.max(np.flatnonzero(~(losses <= loss)), initial=-1)) + 1
    return steps if steps < len(losses) else None


def draw(columns: tuple[Problem, ...], paths: dict[str, list[np.ndarray]], picture: Path) -> None:
    """The paths over the contours, one panel for each loss; `paths` by the optimizers' names, one for each loss."""
    plt = pyplot()
    figure, axes = plt.subplots(1, 3, figsize=(15, 5.6), layout="constrained")
    for column, (axis, problem) in enumerate(zip(axes, columns, strict=True)):
        left, right, bottom, top = problem.window
        x, y = np.meshgrid(np.linspace(left, right, 200), np.linspace(bottom, top, 200))
        points = jnp.asarray(np.stack([x, y], axis=-1).reshape(-1, 2))
        height = np.log10(np.asarray(jax.vmap(problem.value)(points)).reshape(x.shape) - problem.least + 1e-3)
        axis.contourf(x, y, height, 20, cmap="Greys_r", alpha=0.35)
        axis.contour(x, y, height, 20, colors="0.65", linewidths=0.5, linestyles="solid")
        for i, name in enumerate(paths):
            width = 3.6 - i / 3  # the later the thinner, to show which lie beneath
            style = {"color": f"C{i}", "linewidth": width, "markersize": width + 3, "alpha": 0.8}
            axis.plot(*paths[name][column].T, ".-", **style, label=name)
        axis.plot(*problem.start, "o", color="black", markersize=9, label="start")
        axis.plot(*problem.minima.T, "*", color="gold", markeredgecolor="black", markersize=17, label="minimum")
        if problem.saddle:
            axis.plot(*problem.saddle, "X", color="white", markeredgecolor="black", markersize=10, label="saddle")
        axis.set(title=problem.title, xlabel=problem.labels[0], ylabel=problem.labels[1])
    handles, labels = axes[1].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False)
    figure.savefig(picture, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/optimizers"), help="folder (default runs/optimizers)")
    parser.add_argument("--steps", type=int, default=500, help="steps of each optimizer (default 500)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be positive, not {args.steps}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is a file; --out names a folder")
    args.out.mkdir(parents=True, exist_ok=True)

    columns = problems()
    paths: dict[str, list[np.ndarray]] = {name: [] for name in OPTIMIZERS}
    print(f"Steps until the loss is within {GAP:g} of the least and stays there, and the learning rate")
    print(f'"-": not in {args.steps} steps, and the loss reached instead\n')
    print(f"{'':18}" + "".join(f"{problem.title.split(':')[0]:26}" for problem in columns).rstrip())
    print(f"{'loss to reach':18}" + "".join(f"{problem.least + GAP:<26.4f}" for problem in columns).rstrip())
    for name, (make, rates) in OPTIMIZERS.items():
        cells = []
        for problem, rate in zip(columns, rates, strict=True):
            path, losses = descend(problem, make(rate), args.steps)
            paths[name].append(path)
            steps = steps_to(losses, problem.least + GAP)
            cells.append(f"{f'-  {losses[-1]:.4f}' if steps is None else steps:<12}{rate or 'line search':<14}")
        print(f"{name:18}{''.join(cells)}".rstrip())

    draw(columns, paths, args.out / "optimizers.png")
    print(f"\npicture: {args.out / 'optimizers.png'}")


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
