"""Layers side by side: each with an input of its own, or all with the same."""

from typing import Any

import jax
import jax.numpy as jnp

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, by, describe
from funcnet._internal.numerics import added
from funcnet.combinators.serial import by_name
from funcnet.combinators.sides import has_sides, known, passing, reading, writing
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, child
from funcnet.structure import Composed, constructor

Tree = Any


class Parallel(Composed):
    """Layers side by side."""


@constructor
def parallel(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """One layer for each entry of a tuple: (x_1, .., x_n) -> (f_1(x_1), .., f_n(x_n)); names as in `serial`.

        dx_i = bwd_i(dy_i)

    Raises:
        InputError: if the input is not a tuple with one entry for each layer.
    """
    parts = by_name(layers, named)

    @by("parallel")
    def check(xs, what="inputs", **trees):
        if not isinstance(xs, tuple) or len(xs) != len(parts):
            wanted = f"a tuple of {len(parts)} {what}, one for each of {list(parts)}"
            raise InputError(wanted, describe(xs), "give one to each layer")
        for name, tree in trees.items():
            expect.keys(tree, parts, name)

    def init(key, xs):
        check(xs)
        params, state = {}, {}
        for i, ((name, layer), x) in enumerate(zip(parts.items(), xs, strict=True)):
            with at(name):
                params[name], state[name] = layer.init(child(key, i), x)
        return params, state

    def apply(params, state, xs):
        check(xs, params=params, state=state)
        ys = []
        for (name, layer), x in zip(parts.items(), xs, strict=True):
            with at(name):
                ys.append(layer.apply(params[name], state[name], x))
        return tuple(ys)

    def fwd(params, state, xs, key):
        check(xs, params=params, state=state)
        ys, new_state, residuals = [], {}, {}
        for i, ((name, layer), x) in enumerate(zip(parts.items(), xs, strict=True)):
            with at(name):
                y, new_state[name], residuals[name] = layer.fwd(params[name], state[name], x, child(key, i))
                ys.append(y)
        return tuple(ys), new_state, residuals

    def bwd(params, residuals, dys, contract=total):
        check(dys, "cotangents", params=params, residuals=residuals)
        dparams, dxs = {}, []
        for (name, layer), dy in zip(parts.items(), dys, strict=True):
            with at(name):
                dparams[name], dx = layer.bwd(params[name], residuals[name], dy, contract)
                dxs.append(dx)
        return dparams, tuple(dxs)

    return Layer("parallel", init, apply, fwd, bwd, Parallel(parts, lambda parts: parallel(**parts)))


class Branch(Composed):
    """The same input to several layers."""


@constructor
def branch(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """The same input to several layers: x -> (f_1(x), .., f_n(x)); names as in `serial`.

        dx = sum_i bwd_i(dy_i)        summed in float32 for half precision

    `concat()` or `add()` after it makes its outputs one array again.

    Raises:
        InputError: for no layers at all, for input that one of them refuses, and for side inputs that two layers
            write.
    """
    parts = by_name(layers, named)
    reads = reading(*parts.values())
    each = parallel(**{name: passing(layer) for name, layer in parts.items()})

    def copies(x):
        return (x,) * len(parts)

    def writer(sides):
        """Which layer writes any of these sides; the first if none does."""
        writers = [i for i, layer in enumerate(parts.values()) if not sides.keys().isdisjoint(layer.writes)]
        if len(writers) > 1:
            wanted, remedy = "at most one layer that writes side inputs", "put them one after the other, with serial"
            raise InputError(wanted, f"{[list(parts)[i] for i in writers]}", remedy)
        return writers[0] if writers else 0

    def beside(x, ys):
        """The outputs, beside the sides, which are those of the input but for what one of the layers writes."""
        return {**ys[writer(x)], "x": tuple(y["x"] for y in ys)} if has_sides(x) else ys

    def init(key, x):
        with known(x, reads):
            return each.init(key, copies(x))

    def apply(params, state, x):
        with known(x, reads):
            return beside(x, each.apply(params, state, copies(x)))

    def fwd(params, state, x, key):
        with known(x, reads):
            ys, state, residuals = each.fwd(params, state, copies(x), key)
        return beside(x, ys), state, residuals

    def bwd(params, residuals, dys, contract=total):
        if not has_sides(dys):
            dparams, dxs = each.bwd(params, residuals, dys, contract)
            return dparams, jax.tree.map(added, *dxs)
        given = {name: side for name, side in dys.items() if name != "x"}
        none = jax.tree.map(jnp.zeros_like, given)
        own = [{**(given if i == writer(given) else none), "x": dy} for i, dy in enumerate(dys["x"])]
        dparams, dxs = each.bwd(params, residuals, tuple(own), contract)
        sides = {name: jax.tree.map(added, *(dx[name] for dx in dxs)) for name in given}
        return dparams, {**sides, "x": jax.tree.map(added, *(dx["x"] for dx in dxs))}

    made = Branch(parts, lambda parts: branch(**parts))
    writes = writing(*parts.values())
    return Layer("branch", init, apply, fwd, bwd, made, reads=reads, writes=writes, passes=True)
