"""Layers one after the other; and how combinators name their parts.

A combinator is one more `Layer`, a few lines long, because residuals are plain data that nest and stack like any
other. Child i draws its randomness from `fold_in(key, i)`, so a layer appended at the end leaves the random numbers of
the others unchanged.
"""

from collections.abc import Mapping
from typing import Any

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, by
from funcnet.combinators.reversible import in_series, undoing
from funcnet.combinators.sides import known, passing, reading, writing
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer, child, output
from funcnet.structure import Composed, constructor

Tree = Any


class Serial(Composed):
    """Layers one after the other."""


@constructor
def serial(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """The composition f_n(.. f_2(f_1(x))): layers in order, first those without and then those with a name.

        y_i = f_i(w_i, y_{i-1})         dw_i, dy_{i-1} = bwd_i(dy_i)   from the last layer to the first

    Params, state and residuals are dicts by layer. A layer without a name gets its kind, numbered when repeated:
    dense, relu, dense_1. A layer that stands in several places has parameters of its own in each, for it is a record of
    functions that holds none; `tied` makes them one. A `serial` of reversible layers alone is reversible itself: of all
    their outputs it keeps the last.

    Raises:
        InputError: for no layers at all, and, with the layer's path, for whatever one of them refuses.
    """
    parts = by_name(layers, named)
    inside = {name: passing(layer) for name, layer in parts.items()}
    reads, writes = reading(*parts.values()), writing(*parts.values())

    @by("serial")
    def check(**trees):
        for what, tree in trees.items():
            expect.keys(tree, parts, what)

    def init(key, x):
        params, state = {}, {}
        with known(x, reads):
            for i, (name, layer) in enumerate(inside.items()):
                with at(name):
                    params[name], state[name] = layer.init(child(key, i), x)
                    x = output(layer, params[name], state[name], x)
        return params, state

    def apply(params, state, x):
        check(params=params, state=state)
        with known(x, reads):
            for name, layer in inside.items():
                with at(name):
                    x = layer.apply(params[name], state[name], x)
        return x

    def fwd(params, state, x, key):
        check(params=params, state=state)
        new_state, residuals = {}, {}
        with known(x, reads):
            for i, (name, layer) in enumerate(inside.items()):
                with at(name):
                    x, new_state[name], residuals[name] = layer.fwd(params[name], state[name], x, child(key, i))
        return x, new_state, residuals

    def bwd(params, residuals, dy, contract=total):
        check(params=params, residuals=residuals)
        dparams = {}
        for name, layer in reversed(inside.items()):
            with at(name):
                dparams[name], dy = layer.bwd(params[name], residuals[name], dy, contract)
        return dparams, dy

    made = Serial(parts, lambda parts: serial(**parts))
    whole = Layer("serial", init, apply, fwd, bwd, made, reads=reads, writes=writes, passes=True)
    return in_series(whole, made) if all(map(undoing, parts.values())) else whole


def by_name(layers: tuple[Layer, ...], named: Mapping[str, Layer]) -> dict[str, Layer]:
    """Positional layers under their kinds, numbered when repeated, then the named ones."""
    for given in (*layers, *named.values()):
        a_layer(given)
    parts: dict[str, Layer] = {}
    for layer in layers:
        names = (layer.name if n == 0 else f"{layer.name}_{n}" for n in range(len(layers)))
        parts[next(name for name in names if name not in parts)] = layer
    if not layers and not named:
        raise InputError("at least one layer", "none", "use identity() for a model that does nothing")
    if clash := parts.keys() & named.keys():
        raise InputError("names that differ", f"{sorted(clash)} twice", "give the named layer another name")
    return parts | dict(named)
