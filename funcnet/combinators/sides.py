"""Side inputs: what an input carries beside x through a whole model, such as the lengths of padded sequences.

An input may be a dict {"x": x, name: side, ..}. Combinators pass the sides on; `parallel`, which has an input for each
layer, and `reversible` refuse them, `bidirectional` and `stacked` read lengths and state and return x alone. A layer is
given the sides that it reads (`Layer.reads`) beside x, or x alone where it reads none of them, and its output takes the
place of x:

    y = layer({"x": x, ..what it reads})        {**inputs, "x": y}

So a side is the same for all layers, and its cotangent is the sum of those from the layers that read it; an integer
side has the cotangent None. `select` ends a model with x alone. Under `repeat` a layer that keeps a side among its
residuals, as attention does, keeps it once for each turn.

A layer that also writes a side (`Layer.writes`) returns {"x": y, name: side}, like its input in shape and dtype, and
the layers behind it are given what it wrote: a sum over all layers, for example, that ends in the loss. Its cotangent
runs back through that layer, as x's does. Where the input does not have that side, the layer returns y alone.
"""

import difflib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcnet._internal.expect import InputError, describe, is_floating
from funcnet._internal.numerics import added
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor

Tree = Any


def has_sides(inputs: Any) -> bool:
    """Whether an input, an output or a cotangent is a dict of x and sides."""
    return isinstance(inputs, Mapping) and "x" in inputs


def passing(layer: Layer) -> Layer:
    """The same layer, which passes the sides of its input on; its structure is not for what walks through models."""
    if layer.passes:
        return layer

    def given(inputs: Any) -> Any:
        if not has_sides(inputs):
            return inputs
        if "segments" in inputs and "segments" not in layer.reads and not layer.positionwise:
            wanted = "layers that keep the segments of a row apart, as attention does, or look at each position alone"
            remedy = "leave segments out of the input; of a layer of your own, say Layer.positionwise=True"
            raise InputError(wanted, layer.name, remedy)
        read = {name: side for name, side in inputs.items() if name in layer.reads}
        return {**read, "x": inputs["x"]} if read else inputs["x"]

    def written(tree: Any) -> dict[str, Any]:
        return {name: tree[name] for name in layer.writes if has_sides(tree) and name in tree}

    def passed(inputs: Any, y: Any) -> Any:
        if not has_sides(inputs):
            return y
        return {**inputs, **y} if written(inputs) else {**inputs, "x": y}

    def init(key, inputs):
        return layer.init(key, given(inputs))

    def apply(params, state, inputs):
        return passed(inputs, layer.apply(params, state, given(inputs)))

    def fwd(params, state, inputs, key):
        y, state, residuals = layer.fwd(params, state, given(inputs), key)
        return passed(inputs, y), state, residuals

    def bwd(params, residuals, dy, contract=total):
        own = {**written(dy), "x": dy["x"]} if written(dy) else dy["x"] if has_sides(dy) else dy
        dparams, dx = layer.bwd(params, residuals, own, contract)
        if has_sides(dx) and not (has_sides(dy) and dx.keys() <= dy.keys()):
            wanted = f"a dict with the cotangents of x and of the sides, {sorted(dx)}"
            remedy = "give bwd a dict like fwd's output, None for integers, or end the model with fn.select()"
            raise InputError(wanted, describe(dy), remedy)
        return dparams, with_sides(dy, dx, layer.writes) if has_sides(dy) else dx

    return replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, passes=True)


@constructor
def select(name: str = "x") -> Layer[dict, tuple[()], Any]:
    """One entry of a dict of x and sides, by default x alone: the last layer of a model whose input has sides.

    Args:
        name: of the entry.

    Raises:
        InputError: for an input that has no such entry.
    """

    def fwd(params, inputs):
        if not isinstance(inputs, Mapping) or name not in inputs:
            raise InputError(f"a dict with {name}", describe(inputs), "give the model a dict of x and sides")
        return inputs[name], {other: side for other, side in inputs.items() if other != name}

    def bwd(params, others, dy, contract):
        return {}, {**unheard(others), name: dy}

    return replace(stateless("select", no_params, fwd, bwd), passes=True)


def unheard(sides: Mapping[str, Any]) -> dict[str, Any]:
    """Cotangents of sides that nothing depends on: 0, None for integers."""
    return jax.tree.map(lambda side: jnp.zeros_like(side) if is_floating(side) else None, dict(sides))


class SelectingResiduals(NamedTuple):
    """Residuals of `selecting`: the layer's, and the sides of its output, None where it is no dict."""

    residuals: Tree
    sides: Tree


def selecting(layer: Layer) -> Layer:
    """The same layer, whose output is x alone: for combinators that have a way of their own with dicts."""
    if not layer.passes:
        return layer

    def apply(params, state, inputs):
        y = layer.apply(params, state, inputs)
        return y["x"] if has_sides(y) else y

    def fwd(params, state, inputs, key):
        y, state, residuals = layer.fwd(params, state, inputs, key)
        if not has_sides(y):
            return y, state, SelectingResiduals(residuals, None)
        return y["x"], state, SelectingResiduals(residuals, {name: side for name, side in y.items() if name != "x"})

    def bwd(params, saved, dy, contract=total):
        dy = dy if saved.sides is None else {**unheard(saved.sides), "x": dy}
        return layer.bwd(params, saved.residuals, dy, contract)

    return replace(layer, apply=apply, fwd=fwd, bwd=bwd, passes=False)


def apart(inputs: Any, writes: tuple[str, ...]) -> tuple[Any, Callable[[Any], Any]]:
    """What a loop over layers carries, x and the sides that they write, and what puts the other sides beside it."""
    if not has_sides(inputs):
        return inputs, lambda carried: carried
    return {name: each for name, each in inputs.items() if name in ("x", *writes)}, lambda carried: {
        **inputs,
        **carried,
    }


def with_sides(dy: Mapping[str, Any], dx: Any, writes: tuple[str, ...]) -> dict[str, Any]:
    """The cotangents of a layer's input: its own of x and of what it writes, of another side the sum with dy's."""
    own = dx if has_sides(dx) else {"x": dx}
    kept = ("x", *writes)
    return {**dy, **{name: d if name in kept else jax.tree.map(added, dy[name], d) for name, d in own.items()}}


def reading(*layers: Layer) -> tuple[str, ...]:
    """The sides that any of these layers reads."""
    return tuple(sorted({name for layer in layers for name in layer.reads}))


def writing(*layers: Layer) -> tuple[str, ...]:
    """The sides that any of these layers writes."""
    return tuple(sorted({name for layer in layers for name in layer.writes}))


_READ: ContextVar[frozenset[str] | None] = ContextVar("sides that are read", default=frozenset())  # None: unchecked


@contextmanager
def known(inputs: Any, reads: tuple[str, ...]) -> Iterator[None]:
    """Refuse a side of nearly a name that a layer reads, of those here and in the combinators around."""
    outer = _READ.get()
    names = None if outer is None else outer | set(reads)
    for name in inputs if names and has_sides(inputs) else ():
        near = difflib.get_close_matches(name, names or (), 1, 0.8)
        if name != "x" and name not in (names or ()) and near:
            remedy = "correct it; what no layer reads passes through a model, but under a name of its own"
            raise InputError(f"a side input named {near[0]}", f"one named {name}", remedy)
    token = _READ.set(names)
    try:
        yield
    finally:
        _READ.reset(token)


@contextmanager
def unchecked() -> Iterator[None]:
    """For a forward pass that is run again inside a backward pass, where the combinators around are not known."""
    token = _READ.set(None)
    try:
        yield
    finally:
        _READ.reset(token)
