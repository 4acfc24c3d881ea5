"""The residual connection, around a layer.

It is transparent: it has the params and parts of the layer it is made of, unless it has a shortcut, a layer too.
"""

from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet.combinators.parallel import branch
from funcnet.combinators.sides import has_sides, passing
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer, output
from funcnet.structure import Composed, Wrapped, constructor

Tree = Any


class Skip(Wrapped):
    """A layer whose input is added to its output."""


class Shortcut(Composed):
    """A layer, `main`, and another one from the same input, `shortcut`, whose outputs are added."""


@constructor
def skip(layer: Layer, shortcut: Layer | None = None) -> Layer:
    """The residual connection y = x + f(x), with dx = dy + bwd_f(dy); with a shortcut g, y = g(x) + f(x).

    With a shortcut, params and state are dicts over main (f) and shortcut (g), and dx = bwd_g(dy) + bwd_f(dy).

    Raises:
        InputError: if f's output does not have the shape and dtype of its input, or of the shortcut's output.
    """
    a_layer(layer)
    if shortcut is not None:
        return _around_shortcut(layer, a_layer(shortcut))

    inside = passing(layer)

    def init(key, x):
        params, state = inside.init(key, x)
        jax.eval_shape(_add, x, output(inside, params, state, x))
        return params, state

    def apply(params, state, x):
        return _add(x, inside.apply(params, state, x))

    def fwd(params, state, x, key):
        y, state, residuals = inside.fwd(params, state, x, key)
        return _add(x, y), state, residuals

    def bwd(params, residuals, dy, contract=total):
        dparams, dx = inside.bwd(params, residuals, dy, contract)
        return dparams, pulled(dy, dx)

    whole = replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, made=Skip(layer, skip))
    return replace(whole, name="skip", passes=True)


def pulled(dy: Any, dx: Any) -> Any:
    """dx of x + f(x), from dy and dx of f; of sides, that of f."""
    return {**dx, "x": dy["x"] + dx["x"]} if has_sides(dx) else dy + dx


def _around_shortcut(layer: Layer, shortcut: Layer) -> Layer[dict, dict, dict]:
    both = branch(shortcut=shortcut, main=layer)

    def summed(ys):
        aside, y = ys["x"] if has_sides(ys) else ys
        added = _add(aside, y, "the shortcut's output")
        return {**ys, "x": added} if has_sides(ys) else added

    def init(key, x):
        params, state = both.init(key, x)
        jax.eval_shape(summed, output(both, params, state, x))
        return params, state

    def apply(params, state, x):
        return summed(both.apply(params, state, x))

    def fwd(params, state, x, key):
        ys, state, residuals = both.fwd(params, state, x, key)
        return summed(ys), state, residuals

    def bwd(params, residuals, dy, contract=total):
        twice = {**dy, "x": (dy["x"], dy["x"])} if has_sides(dy) else (dy, dy)
        return both.bwd(params, residuals, twice, contract)

    def again(parts):
        return skip(parts["main"], parts["shortcut"])

    return Layer(
        "skip", init, apply, fwd, bwd, Shortcut(both.parts, again), reads=both.reads, writes=both.writes, passes=True
    )


@by("skip")
def _add(x: Any, y: Any, other: str = "the input") -> Any:
    """x + y; `other` says what x is. Of dicts with sides, whose x is added."""
    if has_sides(x) and has_sides(y):
        return {**y, "x": _add(x["x"], y["x"], other)}
    x = jnp.asarray(x) if expect.is_array(x) else x
    if not expect.is_floating(x) or not expect.same(x, y):
        wanted = f"a floating array, and an output like {other}, {describe(x)}"
        raise InputError(wanted, describe(y), "let the last layer return that shape, or change the shortcut, a layer")
    return x + y
