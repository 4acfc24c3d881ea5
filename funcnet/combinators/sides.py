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

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_floating, same
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
        keep_apart(layer, inputs)
        if not has_sides(inputs):
            return inputs
        with known(inputs, layer.reads):
            read = {name: side for name, side in inputs.items() if name in layer.reads}
        return {**read, "x": inputs["x"]} if read else inputs["x"]

    def passed(inputs: Any, y: Any) -> Any:
        if not has_sides(inputs):
            return y
        written = _own(y, [name for name in layer.writes if name in inputs], layer.name)
        for name in written.keys() - {"x"}:
            if not same(written[name], inputs[name]):
                wanted, remedy = f"{name} like the input's, {describe(inputs[name])}", "return that shape and dtype"
                raise InputError(wanted, describe(written[name]), remedy)
        return {**inputs, **written}

    def init(key, inputs):
        return layer.init(key, given(inputs))

    def apply(params, state, inputs):
        return passed(inputs, layer.apply(params, state, given(inputs)))

    def fwd(params, state, inputs, key):
        y, state, residuals = layer.fwd(params, state, given(inputs), key)
        return passed(inputs, y), state, residuals

    def bwd(params, residuals, dy, contract=total):
        given = {name: dy[name] for name in ("x", *layer.writes) if name in dy} if has_sides(dy) else dy
        lone = has_sides(given) and len(given) == 1
        dparams, dx = layer.bwd(params, residuals, given["x"] if lone else given, contract)
        return dparams, _pulled_sides(layer, dy, dx)

    return replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, passes=True)


def _own(returned: Any, names: list[str], whose: str) -> dict[str, Any]:
    """What a layer returned as a dict of x and the sides of these names, which are x alone where there are none."""
    if not names and not has_sides(returned):
        return {"x": returned}
    if not names:
        remedy = "return x alone, or say in Layer.writes what is returned beside it"
        raise InputError(f"{whose} to return x alone", describe(returned), remedy)
    if not has_sides(returned) or set(returned) != {"x", *names}:
        remedy = 'return {"x": .., name: ..} of all sides that it writes; of bwd, all that it reads, None for integers'
        raise InputError(f"{whose} to return a dict of x and {', '.join(names)}", describe(returned), remedy)
    return dict(returned)


def _pulled_sides(layer: Layer, dy: Any, dx: Any) -> Any:
    """The cotangent of the whole input of a layer, from those of the whole output and of what the layer was given."""
    own = {"x", *layer.reads}.intersection(dx) if has_sides(dx) else set()
    if own and not (has_sides(dy) and own <= dy.keys()):
        remedy = "give bwd a dict like fwd's output, None for integers, or end the model with fn.select()"
        raise InputError(f"a dict with the cotangents of x and of the sides, {sorted(own)}", describe(dy), remedy)
    if not has_sides(dy):
        return dx
    sides = [name for name in layer.reads if name in dy]
    dx = _own(dx, sides, f"bwd of {layer.name}")
    for name in sides:
        if any(jnp.issubdtype(leaf.dtype, jnp.integer) for leaf in jax.tree.leaves(dy[name])):
            raise InputError(f"None as the cotangent of {name}, integers", describe(dy[name]), "give bwd None for it")
        if describe(dx[name]) != describe(dy[name]):
            wanted = f"bwd of {layer.name} to return a cotangent of {name} like dy's, {describe(dy[name])}"
            remedy = "return an array of that shape and dtype, zeros where nothing depends on it, None for integers"
            raise InputError(wanted, describe(dx[name]), remedy)
    return with_sides(dy, dx, layer.writes)


def given_all(layer: Layer) -> Layer:
    """The same layer, which is given the whole input; if it mixes positions, it is refused where segments are lost."""

    def seen(inputs: Any) -> Any:
        if not (has_sides(inputs) and "segments" in inputs):
            keep_apart(layer, inputs)
        return inputs

    return replace(
        layer,
        passes=True,
        init=lambda key, inputs: layer.init(key, seen(inputs)),
        apply=lambda params, state, inputs: layer.apply(params, state, seen(inputs)),
        fwd=lambda params, state, inputs, key: layer.fwd(params, state, seen(inputs), key),
    )


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

    return replace(stateless("select", no_params, fwd, bwd, positionwise=True), passes=True)


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


def with_sides(dy: Mapping[str, Any], dx: Mapping[str, Any], writes: tuple[str, ...]) -> dict[str, Any]:
    """The cotangents of a layer's input: its own of x and of what it writes, of another side the sum with dy's."""
    kept = ("x", *writes)
    return {**dy, **{name: d if name in kept else jax.tree.map(added, dy[name], d) for name, d in dx.items()}}


def reading(*layers: Layer) -> tuple[str, ...]:
    """The sides that any of these layers reads."""
    return tuple(sorted({name for layer in layers for name in layer.reads}))


def writing(*layers: Layer) -> tuple[str, ...]:
    """The sides that any of these layers writes."""
    return tuple(sorted({name for layer in layers for name in layer.writes}))


_ALONE: ContextVar[str | None] = ContextVar("whose layers are to keep what is in a row apart", default=None)


@contextmanager
def alone(whose: str) -> Iterator[None]:
    """Inside, layers that mix what is in a row are refused, also where an input has no segments, or no more."""
    token = _ALONE.set(whose)
    try:
        yield
    finally:
        _ALONE.reset(token)


def keep_apart(layer: Layer, inputs: Any) -> None:
    """Refuse a layer that would mix the sequences of a row, or the slots of an expert."""
    told, whose = has_sides(inputs) and "segments" in inputs, _ALONE.get()
    if not (told or whose) or layer.positionwise:
        return
    if not told and "segments" in layer.reads and whose == "packed":
        remedy = "move fn.select() behind the last layer that reads the segments"
        raise InputError(f"segments beside x, which {layer.name} keeps apart", describe(inputs), remedy)
    if not told or "segments" not in layer.reads:
        wanted = "layers that look at each position alone"
        remedy = "of a layer of your own, say positionwise=True"
        if whose == "moe":
            raise InputError(f"an expert of {wanted}", layer.name, f"put the others around the mixture; {remedy}")
        wanted += ", or keep the segments of a row apart, as attention does"
        raise InputError(wanted, layer.name, f"leave segments out of the input; {remedy}")


_READ: ContextVar[frozenset[str] | None] = ContextVar("sides that are read", default=frozenset())  # None: unchecked


@contextmanager
def known(inputs: Any, reads: tuple[str, ...]) -> Iterator[None]:
    """Refuse a side of nearly a name that a layer reads, of those here and in the combinators around."""
    outer = _READ.get()
    names = None if outer is None else outer | set(reads)
    for name in inputs if names and has_sides(inputs) else ():
        near = difflib.get_close_matches(name, names or (), 1, 0.8)
        if name != "x" and name not in (names or ()) and near:
            remedy = "correct it; a side that no layer reads needs a name that is not nearly one that is read"
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
