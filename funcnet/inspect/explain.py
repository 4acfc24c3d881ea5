"""Backpropagation that can be watched: the lecture's algorithm, layer by layer, with the numbers it meets.

    1. compute the output and the loss
    2. compute dLoss/d(last activation)
    3. for each layer, from the last to the first:
         3.1  d(activation)/d(parameters) and d(activation)/d(input): the two Jacobians
         3.2  multiply them by dLoss/d(activation); the VJP gives the products without forming the Jacobians

`explain` runs all of it and says what happened; `layer_jacobians` (`funcnet.inspect.jacobians`) forms the Jacobians of
step 3.1 for a small layer.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import describe
from funcnet._internal.expect import is_floating
from funcnet._internal.tables import bytes_of, readable, tabulated
from funcnet.combinators.repeat import Repeat
from funcnet.combinators.sides import passing
from funcnet.gradients.contraction import total
from funcnet.gradients.factor import is_factor
from funcnet.inspect.jacobians import jacobian_bytes
from funcnet.layer import Layer
from funcnet.structure import Composed, Wrapped
from funcnet.train.batch import Batch
from funcnet.train.objective import Objective, an_objective, both, entered, start

Tree = Any
FAINT, FIERCE = 1e-3, 1e3  # times the RMS of the model's input, for activations, or of dLoss/d(output), for cotangents


@dataclass(frozen=True)
class Step:
    """One layer of the walk.

    Attributes:
        path: names from the outermost layer inwards; a turn of a `repeat` is a number.
        kind: the layer's own name.
        input, output: dtype and shape of x and y.
        residual_bytes: of what `fwd` saved.
        activation: RMS of all entries of y.
        cotangent: RMS of dLoss/dy.
        gradient: norm of the gradient of its parameters; None without parameters.
        jacobians: the shapes of dy/dw, for each parameter, and of dy/dx.
        jacobian_bytes: what the Jacobians would take if they were formed.
        vjp_bytes: what the VJP took instead: residuals, the incoming cotangent, and its results.
        marks: what is conspicuous about y, and about dLoss/dy: "vanishing", "exploding", "dead" (all zero), "not
            finite", or "" for nothing.
    """

    path: tuple[str, ...]
    kind: str
    input: str
    output: str
    residual_bytes: int
    activation: float
    cotangent: float
    gradient: float | None
    jacobians: dict[str, str]
    jacobian_bytes: int
    vjp_bytes: int
    marks: tuple[str, str]

    @property
    def name(self) -> str:
        return "/".join(self.path) or self.kind


@dataclass(frozen=True)
class Explanation:
    """One backward pass, explained: `print` it, or draw it with `plot`.

    Attributes:
        steps: the layers in the order they run.
        loss: the value that is minimised.
        loss_name: the kind of the loss.
        input: dtype and shape of the model's input.
    """

    steps: tuple[Step, ...]
    loss: float
    loss_name: str
    input: str

    def __str__(self) -> str:
        forward = [
            (s.name, s.output, readable(s.residual_bytes), f"{s.activation:.3g}", s.marks[0]) for s in self.steps
        ]
        back = [
            (
                s.name,
                s.output[s.output.index("[") :] if s.output[0] != "(" else s.output,
                f"{s.cotangent:.3g}",
                "" if s.gradient is None else f"{s.gradient:.3g}",
                "  ".join(f"d{name}: {shape}" for name, shape in s.jacobians.items()),
                readable(s.jacobian_bytes),
                readable(s.vjp_bytes),
                s.marks[1],
            )
            for s in reversed(self.steps)
        ]
        heads = (
            ("layer", "output y", "residuals", "RMS of y", ""),
            ("layer", "shape of dLoss/dy", "its RMS", "|dLoss/dw|", "Jacobians dy/..", "if formed", "VJP took", ""),
        )
        return "\n".join(
            [
                f"1. forward, from the input {self.input}",
                *tabulated(heads[0], forward, right=(2, 3)),
                f"{self.loss_name}: {self.loss:.6g}",
                "",
                "2. and 3. back, from dLoss/d(last activation); w are a layer's parameters, x its input",
                *tabulated(heads[1], back, right=(2, 3, 5, 6)),
                f"vanishing, exploding: below {FAINT:g} or above {FIERCE:g} times the RMS of the input, for y, or of "
                "dLoss/dy at the output",
            ]
        )

    def plot(self, path: str | Path) -> None:
        """Draw the chain as a PNG: values above, cotangents below. Needs the extra `plots`."""
        from funcnet.inspect.plots import plot_explanation

        plot_explanation(self, path)


def explain(objective: Objective, params: Tree, state: Tree, batch: Batch, key: jax.Array | None = None) -> Explanation:
    """Run one forward and one backward pass and tell what every layer did in them.

    The turns of a `repeat` are shown one by one, the layers inside `skip` and `parallel` in the order they run, without
    a row for the sum; a loss with parameters of its own has the last row. An array that two layers keep counts in both
    of their rows. The pass is not compiled, so that every number can be looked at; it takes the time and the memory of
    an uncompiled one. A layer inside `remat` shows the residuals of its second run.

    Args:
        objective: from `fn.objective`.
        params, state: as `objective.init` makes them.
        batch: (inputs, targets), or (inputs, targets, weights), as for `fn.value_and_grad`.
        key: a `jax.random.key`, or None for a model that draws nothing.

    Raises:
        InputError: for params or a batch that do not fit.
    """
    an_objective(objective)
    pair, weights = entered(objective, batch)
    records: dict[tuple[str, ...], dict[str, Any]] = {}
    model, loss = _watched(objective.model, (), records), objective.loss
    both(params, state)
    if jax.tree.leaves(params["loss"]):
        loss = _noting(loss, (loss.name,), records)
    watched = replace(objective, model=model, loss=loss)
    begun = start(watched, params, state, pair, key, weights)
    model.bwd(params["model"], begun.residuals, begun.dprediction)
    ends = _rms(pair[0]), _rms(begun.dprediction)
    steps = tuple(_step(path, record, ends) for path, record in records.items())
    return Explanation(steps, float(begun.sums["loss"]), objective.loss.name, describe(pair[0]))


def _watched(layer: Layer, path: tuple[str, ...], records: dict) -> Layer:
    """The same layer, in which every single layer records what passes through it, in each turn of a `repeat`."""
    match layer.structure:
        case Repeat() as made:
            return _unrolled(layer, made, path, records)
        case Wrapped(direct=True, inner=inner, again=again):
            return again(_watched(inner, path, records))
        case Composed(direct=True, parts=parts, again=again):
            return again({name: _watched(part, (*path, name), records) for name, part in parts.items()})
    return _noting(layer, path, records)


def _noting(layer: Layer, path: tuple[str, ...], records: dict) -> Layer:
    def fwd(params, state, x, key):
        y, new_state, residuals = layer.fwd(params, state, x, key)
        records[path] = {"layer": layer, "x": x, "y": y, "residuals": residuals}
        return y, new_state, residuals

    def bwd(params, residuals, dy, contract=total):
        dparams, dx = layer.bwd(params, residuals, dy, contract)
        gradients = jax.tree.map(lambda p, answer: total(answer, p) if is_factor(answer) else answer, params, dparams)
        records[path] |= {"dy": dy, "dparams": gradients, "dx": dx}
        return dparams, dx

    return replace(layer, fwd=fwd, bwd=bwd)


def _unrolled(layer: Layer, made: Repeat, path: tuple[str, ...], records: dict) -> Layer:
    """A `repeat` turn by turn."""
    turns = [passing(_watched(made.inner, (*path, str(i)), records)) for i in range(made.times)]

    def fwd(params, state, x, key):
        jax.eval_shape(lambda *args: layer.fwd(*args)[0], params, state, x, key)  # refuses what does not fit
        states, residuals = [], []
        for i, turn in enumerate(turns):
            own = None if key is None else jax.random.fold_in(key, i)
            x, new_state, saved = turn.fwd(_entry(params, i), _entry(state, i), x, own)
            states.append(new_state)
            residuals.append(saved)
        return x, _stack(states), residuals

    def bwd(params, residuals, dy, contract=total):
        grads = []
        for i in reversed(range(made.times)):
            dparams, dy = turns[i].bwd(_entry(params, i), residuals[i], dy, contract.of_one_layer)
            grads.append(dparams)
        return contract.stack(params, _stack(grads[::-1])), dy

    return replace(layer, fwd=fwd, bwd=bwd)


def _entry(tree: Tree, i: int) -> Tree:
    return jax.tree.map(lambda leaf: leaf[i], tree)


def _stack(trees: list[Tree]) -> Tree:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _step(path: tuple[str, ...], record: dict[str, Any], ends: tuple[float, float]) -> Step:
    x, y, dy, dparams = (record[name] for name in ("x", "y", "dy", "dparams"))
    named = {"/".join(str(k.key) for k in p): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(dparams)}
    leaves = [leaf for leaf in jax.tree.leaves(x) if is_floating(leaf)]
    inputs = {"x": leaves[0]} if len(leaves) == 1 else {f"x{i}": leaf for i, leaf in enumerate(leaves)}
    activation, cotangent = _rms(y), _rms(dy)
    gradient = float(np.sqrt(sum(np.sum(np.square(_wide(leaf))) for leaf in named.values()))) if named else None
    lost = gradient is not None and not np.isfinite(gradient)
    return Step(
        path=path,
        kind=record["layer"].name,
        input=describe(x),
        output=describe(y),
        residual_bytes=bytes_of(record["residuals"]),
        activation=activation,
        cotangent=cotangent,
        gradient=gradient,
        jacobians={name: _shape(y, leaf) for name, leaf in {**named, **inputs}.items()},
        jacobian_bytes=sum(jacobian_bytes(y, leaf) for leaf in jax.tree.leaves((named, inputs))),
        vjp_bytes=bytes_of((record["residuals"], dy, dparams, record["dx"])),
        marks=(_mark(activation, ends[0]), "not finite" if lost else _mark(cotangent, ends[1])),
    )


def _mark(size: float, usual: float) -> str:
    """What is conspicuous about an RMS, compared with the `usual` one in the model; "" for nothing."""
    if not np.isfinite(size):
        return "not finite"
    if size == 0:
        return "dead"
    if usual and size < FAINT * usual:
        return "vanishing"
    return "exploding" if usual and size > FIERCE * usual else ""


def _wide(leaf: Any) -> np.ndarray:
    return np.asarray(leaf, np.float64)


def _rms(tree: Tree) -> float:
    """The root of the mean square of all entries of the floating leaves."""
    leaves = [_wide(leaf) for leaf in jax.tree.leaves(tree) if is_floating(leaf)]
    count = sum(leaf.size for leaf in leaves)
    return float(np.sqrt(sum(np.sum(np.square(leaf)) for leaf in leaves) / count)) if count else 0.0


def _shape(y: Any, leaf: Any) -> str:
    shapes = [(*out.shape, *leaf.shape) for out in jax.tree.leaves(y)]
    return " ".join(f"[{', '.join(map(str, shape))}]" for shape in shapes)
