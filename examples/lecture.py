"""A first lecture on networks, from the derivative of a number to backpropagation, computed and compared.

    python examples/lecture.py

It prints each result beside its closed form, or beside what jax.grad and jax.jacobian give, with the difference; all of
it in float64 and held to 1e-10. Then it explains a network of three layers and one of thirty, and draws pictures into
the folder. It exits with 1 if any comparison fails. docs/lecture.md tells the lecture.
"""

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from funcnet.train.plots import pyplot

TOLERANCE = 1e-10
X = np.array([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [1.0, 1.0]])
Y = np.array([0, 1, 1, 0])  # the exclusive or of two signs
NAMES = ("f1", "f2", "f3")  # of the chain f1(f2(f3(x))), from the last layer to the first


@dataclass
class Results:
    """A table that is printed as it grows, and what in it failed."""

    failed: list[str] = field(default_factory=list)

    def section(self, title: str, got: str = "computed", wanted: str = "closed form") -> None:
        print(f"\n{title}\n{'':44}{got:33}{wanted:33}difference")

    def compare(self, name: str, got: Any, wanted: Any) -> None:
        """Two arrays, or two trees of them: the largest difference, over the largest entry where that is above 1."""
        pairs = list(zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True))
        error = max(_difference(a, b) for a, b in pairs)
        verdict = "" if error <= TOLERANCE else "  WRONG"
        print(f"  {name:42}{_shown(pairs, 0):33}{_shown(pairs, 1):33}{error:.1e}{verdict}")
        if verdict:
            self.failed.append(name)

    def refuses(self, name: str, call: Callable[[], Any]) -> None:
        """What `call` raises, which must be an error that explains itself."""
        try:
            call()
        except fn.InputError as error:
            print(f"  {name}\n{_indented(str(error))}")
        else:
            print(f"  {name}: accepted  WRONG")
            self.failed.append(name)


def _difference(a: Any, b: Any) -> float:
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape or not np.isfinite(a).all():
        return float("inf")
    return float(np.max(np.abs(a - b)) / max(1.0, np.max(np.abs(b))))


def _shown(pairs: list[tuple[Any, Any]], side: int) -> str:
    leaves = [np.asarray(pair[side], np.float64) for pair in pairs]
    if len(leaves) == 1 and leaves[0].size <= 4:
        return " ".join(f"{value + 0.0:.5g}" for value in leaves[0].reshape(-1))
    norm = np.sqrt(sum(np.sum(leaf**2) for leaf in leaves))
    what = str(list(leaves[0].shape)) if len(leaves) == 1 else f"{len(leaves)} leaves"
    return f"{what}, norm {norm:.5g}"


def _indented(text: str) -> str:
    return "\n".join(f"      {line}" for line in text.splitlines())


# Derivatives of every rank


def derivatives(results: Results) -> None:
    """R -> R, R^n -> R, R^n -> R^m."""
    rng = np.random.default_rng(0)
    A, v, r, t = jnp.asarray(rng.normal(size=(3, 3))), jnp.asarray(rng.normal(size=3)), 2.0, 0.5
    results.section("Derivatives, rank by rank")
    results.compare("x^3 at 2", fn.derivative(lambda x: x**3)(2.0), 3 * 2.0**2)
    results.compare("exp(-x^2 / 2) at 0.5", fn.derivative(lambda x: jnp.exp(-(x**2) / 2))(t), -t * np.exp(-(t**2) / 2))
    results.compare("x^T A x: (A + A^T) x", fn.gradient(lambda x: x @ A @ x)(v), (A + A.T) @ v)
    results.compare("log sum exp x: softmax(x)", fn.gradient(jax.nn.logsumexp)(v), jax.nn.softmax(v))
    polar = lambda p: p[0] * jnp.array([jnp.cos(p[1]), jnp.sin(p[1])])
    rotation = np.array([[np.cos(t), -r * np.sin(t)], [np.sin(t), r * np.cos(t)]])
    results.compare("polar to Cartesian at (2, 0.5)", fn.jacobian(polar)(jnp.array([r, t])), rotation)
    s = jax.nn.softmax(v)
    results.compare("softmax: diag(s) - s s^T", fn.jacobian(jax.nn.softmax)(v), jnp.diag(s) - jnp.outer(s, s))


def square(w: np.ndarray) -> np.ndarray:
    """All sixteen entries of d(X^2)/dX at [[w11, w12], [w21, w22]], written out: [2, 2, 2, 2]."""
    (w11, w12), (w21, w22) = w
    return np.array([
        [[[2 * w11, w12], [w21, 0]], [[w21, w11 + w22], [0, w21]]],
        [[[w12, 0], [w11 + w22, w12]], [[0, w12], [w21, 2 * w22]]],
    ])  # fmt: skip


def matrices(results: Results) -> None:
    """A matrix by a matrix: a matrix of matrices."""
    w = np.array([[1.0, 2.0], [3.0, 4.0]])
    blocks = fn.matrix_derivative(lambda X: X @ X)(jnp.asarray(w))
    results.section("d(X^2)/dX at [[1, 2], [3, 4]], block by block")
    for i, j in np.ndindex(2, 2):
        results.compare(f"d(X^2)/dw{i + 1}{j + 1}", blocks[i, j], square(w)[i, j])
    results.compare(
        "output_first is jax.jacobian",
        fn.matrix_derivative(lambda X: X @ X, layout="output_first")(jnp.asarray(w)),
        jax.jacobian(lambda X: X @ X)(jnp.asarray(w)),
    )
    rng = np.random.default_rng(1)
    results.section("Matrix functions with a derivative by hand")
    for case in fn.WORKED:
        at = jnp.asarray(rng.normal(size=case.shape))
        results.compare(case.name, fn.matrix_derivative(case.function)(at), case.derivative(at))
        print(f"      {case.formula}   [{case.source}]")


# The chain rule at a point


def chain_rule(results: Results) -> None:
    """Local Jacobians, their product in both orders, and what each order costs."""
    rng = np.random.default_rng(2)
    results.section("The chain rule, evaluated at a point")
    at = fn.chain(jnp.abs, jnp.sin)(-2.0)
    results.compare("sin(|x|) at -2: value", at.values[-1], np.sin(2.0))
    for name, local, wanted in zip(("|x|", "sin"), at.jacobians, (-1.0, np.cos(2.0)), strict=True):
        results.compare(f"sin(|x|) at -2: slope of {name}", local, np.array([[wanted]]))
    results.compare("sin(|x|) at -2: product", at.reverse, np.array([[-np.cos(2.0)]]))

    A, B = jnp.asarray(rng.normal(size=(20, 40)) / 6), jnp.asarray(rng.normal(size=(10, 20)) / 4)
    functions = (lambda x: jnp.tanh(A @ x), lambda x: jnp.tanh(B @ x), lambda x: x @ x)
    point = jnp.asarray(rng.normal(size=40))
    wide = fn.chain(*functions)(point)
    whole = jax.grad(lambda x: functions[2](functions[1](functions[0](x))))(point)[None]
    results.compare("R^40 -> R^20 -> R^10 -> R, reverse order", wide.reverse, whole)
    results.compare("R^40 -> R^20 -> R^10 -> R, forward order", wide.forward, whole)
    print(f"\n{_indented(str(wide))}")


# Backpropagation, step by step


def neurons(features: int, gain: float = 1.0) -> fn.Layer:
    """y = tanh(x w + b), with dz = dy * (1 - y^2), dw = x^T dz, db = sum of dz, dx = dz w^T.

    Weights are drawn with the standard deviation gain / sqrt(inputs).
    """

    def init(key, x):
        w = jax.random.normal(key, (x.shape[-1], features), x.dtype) * gain / x.shape[-1] ** 0.5
        return {"w": w, "b": jnp.zeros(features, x.dtype)}

    def fwd(params, x):
        y = jnp.tanh(x @ params["w"] + params["b"])
        return y, {"x": x, "y": y}

    def bwd(params, residuals, dy, contract):
        dz = dy * (1 - residuals["y"] ** 2)
        dparams = {"w": contract(fn.Outer(residuals["x"], dz), params["w"]), "b": contract(fn.Shift(dz), params["b"])}
        return dparams, dz @ params["w"].T

    return fn.stateless("neurons", init, fwd, bwd)


def network(layers: int, width: int, gain: float = 1.0) -> fn.Objective:
    """f1(f2(.. fn(x))) and the loss -log P(y|x): neurons, and an affine layer at the end."""
    hidden = {f"f{i}": neurons(width, gain) for i in range(layers, 1, -1)}
    return fn.objective(fn.serial(**hidden, f1=fn.dense(2)), fn.cross_entropy())


def backpropagation(results: Results, objective: fn.Objective) -> None:
    """The lecture's algorithm; each layer's two Jacobians, times the incoming cotangent, beside its `bwd`."""
    model = objective.model
    w, s = model.init(jax.random.key(0), X)
    results.section("Backpropagation, step by step")

    h, inputs, residuals = X, {}, {}
    for name, layer in model.parts.items():
        inputs[name] = h
        h, _, residuals[name] = layer.fwd(w[name], s[name], h, None)
    losses, _, loss_residuals = objective.loss.fwd({}, (), (h, Y), None)
    results.compare("1. loss: mean of -log P(y|x)", losses.mean(), -jnp.log(jax.nn.softmax(h)[jnp.arange(4), Y]).mean())

    _, (dh, _) = objective.loss.bwd({}, loss_residuals, jnp.full(4, 1 / 4))
    results.compare("2. dL/df1: (softmax - onehot) / 4", dh, (jax.nn.softmax(h) - jax.nn.one_hot(Y, 2)) / 4)

    grads, stepped = {}, {}
    for name in NAMES:
        layer = model.parts[name]
        J = fn.layer_jacobians(layer, w[name], s[name], inputs[name])
        by_jacobians = tuple(jax.tree.map(lambda J, dh=dh: jnp.tensordot(dh, J, dh.ndim), J))
        grads[name], dx = layer.bwd(w[name], residuals[name], dh)
        results.compare(f"3. {name} by parameters: bwd, Jacobian", grads[name], by_jacobians[0])
        results.compare(f"3. {name} by its input: bwd, Jacobian", dx, by_jacobians[1])
        stepped[name], dh = jax.tree.map(lambda w, g: w - 0.1 * g, w[name], grads[name]), dx

    def loss(w):
        h3 = jnp.tanh(X @ w["f3"]["w"] + w["f3"]["b"])
        h2 = jnp.tanh(h3 @ w["f2"]["w"] + w["f2"]["b"])
        return -jax.nn.log_softmax(h2 @ w["f1"]["kernel"] + w["f1"]["bias"])[jnp.arange(4), Y].mean()

    results.section("The whole gradient", "by hand", "jax.grad")
    automatic = jax.grad(loss)(w)
    for name in NAMES:
        results.compare(f"dL/dw{name[1]}", grads[name], automatic[name])
    print(f"\n  one step w - 0.1 dL/dw: L = {loss(w):.6f} -> {loss(stepped):.6f}")


def train(results: Results, objective: fn.Objective, steps: int) -> tuple[list[float], list[float]]:
    """Training by `train_step` and by `layerwise_step`, their parameters compared; the losses of both."""
    optimizer, batch = optax.adam(0.05), (X, Y)
    at_once, by_layer = fn.train_step(objective, optimizer), fn.layerwise_step(objective, optimizer)
    first, second = (fn.init_train_state(objective, optimizer, jax.random.key(0), batch) for _ in range(2))
    losses, layerwise_losses = [], []
    results.section("The optimization step under Adam, layer by layer", "layerwise_step", "train_step")
    for i in range(1, steps + 1):
        first, metrics = at_once(first, batch)
        losses.append(float(metrics["loss"]))
        second, metrics = by_layer(second, batch)
        layerwise_losses.append(float(metrics["loss"]))
        if i in (1, 5, steps):
            results.compare(f"parameters after {i} steps", second.params, first.params)
    P = jax.nn.softmax(objective.model.apply(first.params["model"], first.state["model"], X))[:, 1]
    print(f"\n  L = {losses[0]:.4f} -> {losses[-1]:.4f}, P(y=1|x) = {np.asarray(P).round(3).tolist()}, y = {Y}")
    return losses, layerwise_losses


def refusals(results: Results, objective: fn.Objective) -> None:
    """What has no answer is refused, with the reason."""
    clipped = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(0.05))
    state = fn.init_train_state(objective, clipped, jax.random.key(0), (X, Y))
    print("\nWhat is refused, and why")
    results.refuses("sin(|x|) at 0, where |x| has no derivative", lambda: fn.chain(jnp.abs, jnp.sin)(0.0))
    results.refuses("the gradient of a function R^3 -> R^3", lambda: fn.gradient(jnp.sin)(jnp.ones(3)))
    results.refuses(
        "clipping by the whole gradient's norm, layer by layer",
        lambda: fn.layerwise_step(objective, clipped)(state, (X, Y)),
    )


# Pictures


def draw_square(path: Path) -> None:
    """d(X^2)/dX for a 2 x 2 X: a matrix of matrices, formulas and values."""
    plt = pyplot()
    w = np.array([[1.0, 2.0], [3.0, 4.0]])
    blocks = np.asarray(fn.matrix_derivative(lambda X: X @ X)(jnp.asarray(w)))
    formulas = [
        [["2w_{11}", "w_{12}", "w_{21}", "0"], ["w_{21}", "w_{11}+w_{22}", "0", "w_{21}"]],
        [["w_{12}", "0", "w_{11}+w_{22}", "w_{12}"], ["0", "w_{12}", "w_{21}", "2w_{22}"]],
    ]
    figure, axes = plt.subplots(2, 2, figsize=(6.4, 6.8), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.15)
    for i, j in np.ndindex(2, 2):
        axis = axes[i, j]
        axis.imshow(blocks[i, j], cmap="Blues", vmin=0, vmax=2.4 * blocks.max())
        for n, (p, q) in enumerate(np.ndindex(2, 2)):
            zero = blocks[i, j, p, q] == 0
            axis.text(q, p if zero else p - 0.1, f"${formulas[i][j][n]}$", ha="center", va="center", fontsize=15,
                      color="0.6" if zero else "black")  # fmt: skip
            if not zero:
                axis.text(q, p + 0.25, f"= {blocks[i, j, p, q]:g}", ha="center", va="center", color="0.25")
        axis.set_title(f"$\\partial X^2 / \\partial w_{{{i + 1}{j + 1}}}$", fontsize=14)
        axis.set(xticks=[0.5], yticks=[0.5], xticklabels=[], yticklabels=[])
        axis.tick_params(length=0)
        axis.grid(color="white", linewidth=2)
    figure.suptitle("The derivative of $X^2$ at $X$ = [[1, 2], [3, 4]]: block ($i$, $j$) is by $w_{ij}$")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_training(losses: list[float], layerwise_losses: list[float], path: Path) -> None:
    """The loss before each step, for both ways to update."""
    plt = pyplot()
    steps = np.arange(1, len(losses) + 1)
    figure, axis = plt.subplots(figsize=(6, 3.8), layout="constrained")
    axis.plot(steps, losses, linewidth=5, color="C0", alpha=0.4, label="train_step")
    axis.plot(steps, layerwise_losses, "--", color="C3", label="layerwise_step")
    axis.set(xlabel="step", ylabel="L, the mean of $-\\log P(y|x)$", yscale="log")
    axis.set_title("Three layers learn the exclusive or of two signs")
    axis.grid(alpha=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("runs/lecture"), help="for pictures (default runs/lecture)")
    parser.add_argument("--steps", type=int, default=100, help="training steps (default 100)")
    args = parser.parse_args()
    if args.steps < 1:
        parser.error(f"--steps must be positive, not {args.steps}")
    if args.out.exists() and not args.out.is_dir():
        parser.error(f"{args.out} is a file; --out names a folder")
    args.out.mkdir(parents=True, exist_ok=True)

    results, three, thirty = Results(), network(3, 4), network(30, 8, gain=0.5)
    derivatives(results)
    matrices(results)
    chain_rule(results)
    backpropagation(results, three)
    losses = train(results, three, args.steps)
    refusals(results, three)

    draw_square(args.out / "square.png")
    draw_training(*losses, args.out / "training.png")
    for title, objective, targets, picture in (
        ("Three layers", three, Y, "chain_3.png"),
        ("Thirty layers whose weights are drawn half as large", thirty, np.array([0, 0, 1, 1]), "chain_30.png"),
    ):
        params, state = objective.init(jax.random.key(0), (X, targets))
        explanation = fn.explain(objective, params, state, (X, targets))
        print(f"\n{title}, explained\n\n{explanation}")
        explanation.plot(args.out / picture)

    print(f"\npictures: {args.out}")
    if results.failed:
        sys.exit(f"{len(results.failed)} failed: {', '.join(results.failed)}")
    print(f"every comparison holds to {TOLERANCE:g}")


if __name__ == "__main__":
    with jax.enable_x64(True):
        main()
