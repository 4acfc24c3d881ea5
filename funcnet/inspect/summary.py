"""What a model is made of and what a training step of it keeps in memory, by layer, without computing anything."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import jax

from funcnet._internal import expect
from funcnet._internal.errors import describe
from funcnet._internal.tables import bytes_of, readable, tabulated
from funcnet.combinators.freeze import Freeze
from funcnet.combinators.hooks import observe, paths
from funcnet.layer import Layer, a_layer
from funcnet.structure import Transparent, Wrapped, own_call
from funcnet.train.objective import Objective, as_layer

Tree = Any


@dataclass(frozen=True)
class Row:
    """One layer of a model.

    Attributes:
        path: names from the outermost layer inwards; empty for the model itself.
        kind: the layer's own name, and whether it is frozen, or differentiated "by jax.vjp" instead of by hand.
        output: its output's dtype and shape; inside a `repeat`, for one turn.
        parameters: how many numbers it learns; inside a `repeat`, for one turn. What is tied counts in the row of each
            of its uses.
        residual_bytes: bytes of the arrays it keeps for its backward pass, each array once.
    """

    path: tuple[str, ...]
    kind: str
    output: str
    parameters: int
    residual_bytes: int


@dataclass(frozen=True)
class Summary:
    """A table by layer, and totals of the whole model.

    Attributes:
        rows: layers in the order they run, each combinator above its parts.
        input: the input's dtype and shape.
        parameters: how many numbers the model learns.
        parameter_bytes, residual_bytes: what its parameters, and its residuals of one step, take.
        again: groups of paths at which one and the same layer is used, with parameters of its own at each path.
    """

    rows: tuple[Row, ...]
    input: str
    parameters: int
    parameter_bytes: int
    residual_bytes: int
    again: tuple[tuple[tuple[str, ...], ...], ...] = ()

    def __str__(self) -> str:
        head = ("layer", "kind", "output", "parameters", "residual bytes")
        cells = [
            (
                "  " * (len(r.path) - 1) + (r.path or (r.kind,))[-1],
                r.kind,
                r.output,
                f"{r.parameters:,}",
                f"{r.residual_bytes:,}",
            )
            for r in self.rows
        ]
        total = ("total", "", "", f"{self.parameters:,}", f"{self.residual_bytes:,}")
        *table, last = tabulated(head, [*cells, total], right=(3, 4))
        sizes = f"parameters {readable(self.parameter_bytes)}, residuals of a step {readable(self.residual_bytes)}"
        foot = f"input {self.input}; {sizes}"
        if any(row.kind.startswith("repeat") for row in self.rows):
            foot += "; rows inside a repeat are for one turn of it"
        if any(a.residual_bytes < b.residual_bytes for a in self.rows for b in self.rows if _inside(b.path, a.path)):
            foot += "; a row that keeps less than a row inside it computes those residuals again in the backward pass"
        for places in self.again:
            names = " and ".join("/".join(path) for path in places)
            foot += f"; {names} are one layer with parameters of its own at each place, unless fn.tied makes them one"
        return "\n".join([*table, table[1], last, foot])


def summary(layer: Layer | Objective, x: Any) -> Summary:
    """Tabulate a layer, or a model and its loss, for the input `x`: outputs, parameters, residual bytes. `print` it.

    Everything is found by abstract evaluation, so a model of any size costs milliseconds and no memory. An array that
    two layers keep, such as a relu's output that is the next layer's input, counts in both of their rows, but only once
    in the rows of combinators that contain both, and in the total.

    Args:
        layer: any layer, or an objective.
        x: its input: an array, a `jax.ShapeDtypeStruct`, or a pytree of them; for an objective (inputs, targets).
    """
    layer = as_layer(layer) if isinstance(layer, Objective) else a_layer(layer)
    x = expect.shapes(x)
    key = jax.eval_shape(lambda: jax.random.key(0))
    params, state = jax.eval_shape(layer.init, key, x)
    rows: dict[tuple[str, ...], Row] = {}
    frozen: list[tuple[str, ...]] = []
    places: dict[Layer, list[tuple[str, ...]]] = {}

    def see(path, part, params, x, out):
        y, _, residuals = out
        if jax.tree.leaves(params):
            places.setdefault(part, []).append(path)
        rows[path] = Row(path, _kind(part), describe(y), _count(params), bytes_of(residuals))
        if _is_frozen(part):
            frozen.append(path)

    jax.eval_shape(observe(layer, see).fwd, params, state, x, key)
    for path in [path for path in rows if any(_inside(path, other) for other in frozen)]:
        rows[path] = replace(rows[path], parameters=0)
    whole = rows[()]
    ordered = tuple(rows[path] for path in paths(layer) if path in rows and path) or (whole,)
    again = tuple(tuple(found) for found in places.values() if len(found) > 1)
    return Summary(ordered, describe(x), whole.parameters, bytes_of(params), whole.residual_bytes, again)


def _around(layer: Layer) -> Iterator[Layer]:
    """A layer and what it is wrapped around, from the outside inwards."""
    yield layer
    if isinstance(layer.structure, Wrapped):
        yield from _around(layer.structure.inner)


def _is_frozen(layer: Layer) -> bool:
    return any(isinstance(each.structure, Freeze) for each in _around(layer))


def _kind(layer: Layer) -> str:
    """The layer's name without the wrappers that are not shown, then whether it is frozen, or by `jax.vjp`."""
    automatic = any((call := own_call(each)) and call.name == "from_function" for each in _around(layer))
    shown = next(each for each in _around(layer) if not isinstance(each.structure, Transparent))
    return shown.name + ", frozen" * _is_frozen(layer) + " by jax.vjp" * automatic


def _inside(path: tuple[str, ...], other: tuple[str, ...]) -> bool:
    return len(path) > len(other) and path[: len(other)] == other


def _count(tree: Tree) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(tree))
