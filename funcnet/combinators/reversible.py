"""A reversible block, whose input is computed from its output, so that its activations need not be kept.

With x = (x1, x2), two halves or a pair:

    y1 = x1 + f(x2)        x2 = y2 - g(y1)
    y2 = x2 + g(y1)        x1 = y1 - f(x2)

Backward, from the last line to the first, f and g run again at the inputs found on the way:

    dy1 += bwd_g(dy2)      dx2 = dy2 + bwd_f(dy1)      dx1 = dy1

Residuals: y, and what else f and g are called with: their state before the call, and the key, so that they draw the
same random numbers.  Why: a chain of such blocks needs only the output of the last one. `repeat` of a reversible layer,
and a `serial` of reversible layers alone, keep just that, and are reversible themselves: activation memory does not
grow with depth.
Numerics: x is recovered up to rounding errors of the size of y's own. They carry over to all earlier blocks, and grow
with depth where f and g have large derivatives. In half precision x may be lost almost entirely, so init and fwd refuse
it (apply, which keeps nothing, does not). With x in float32, of which one array is kept, f and g can still compute in
half precision: reversible(mixed(f), mixed(g)).
Source: Gomez, Ren, Urtasun and Grosse 2017, arXiv:1707.04585, algorithm 1.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.barrier import after
from funcnet._internal.errors import InputError, at, by, describe
from funcnet._internal.numerics import sum_dtype
from funcnet._internal.sharding import scan
from funcnet.combinators.named import Named
from funcnet.combinators.sides import passing
from funcnet.gradients.contraction import Contraction, total
from funcnet.layer import Layer, a_layer, child, output
from funcnet.structure import Composed, Wrapped, constructor

Tree = Any
Pair = tuple[Any, Any]


class ReversibleResiduals(NamedTuple):
    """Residuals of a reversible layer: its output y, and in `kept` what it was called with besides params and input."""

    kept: Any
    y: Any


# (params, residuals, dy, contract) -> (dparams, x, dx)
Undo = Callable[[Any, ReversibleResiduals, Any, Contraction], tuple[Any, Any, Any]]


class Reversible(Composed):
    """The layer that `reversible` makes from f and g."""


class Called(NamedTuple):
    """What f and g were called with besides params and input."""

    state: Tree
    key: Array | None


@constructor
def reversible(f: Layer, g: Layer) -> Layer[dict, dict, ReversibleResiduals]:
    """y1 = x1 + f(x2), y2 = x2 + g(y1) on the halves of x [.., 2D] or a pair x; params {"f": .., "g": ..}.

    `repeat(reversible(f, g), L)` keeps one output for all L blocks, and f and g run twice. Batch statistics in them are
    updated once. f draws from `fold_in(key, 0)`, g from `fold_in(key, 1)`.

    Args:
        f: maps x2 to an array like x1.
        g: maps y1 to an array like x2.

    Raises:
        InputError: if x is no pair and cannot be halved, or f's or g's output is not like the half it is added to; from
            init and fwd also if x is in half precision.
    """
    parts = {"f": a_layer(f), "g": a_layer(g)}
    f, g = passing(f), passing(g)

    @by("reversible")
    def check(**trees):
        for what, tree in trees.items():
            expect.keys(tree, parts, what)

    @by("reversible")
    def check_output(name: str, y: Any, half: Any) -> None:
        if not expect.same(half, y):
            wanted = f"an output of {name} like the half it is added to, {describe(half)}"
            raise InputError(wanted, describe(y), f"let the last layer of {name} return that shape and dtype")

    def init(key, x):
        halves = jax.eval_shape(_stream, x)
        params, state = {}, {}
        for i, (name, layer) in enumerate({"f": f, "g": g}.items()):
            given, half = halves[1 - i], halves[i]
            with at(name):
                params[name], state[name] = layer.init(child(key, i), given)
                y = output(layer, params[name], state[name], given)
            check_output(name, y, half)
        return params, state

    def apply(params, state, x):
        check(params=params, state=state)
        x1, x2 = _halves(x)
        with at("f"):
            u = f.apply(params["f"], state["f"], x2)
        check_output("f", u, x1)
        y1 = x1 + u
        with at("g"):
            v = g.apply(params["g"], state["g"], y1)
        check_output("g", v, x2)
        return _like(x, y1, x2 + v)

    def fwd(params, state, x, key):
        check(params=params, state=state)
        x1, x2 = _stream(x)
        with at("f"):
            u, state_f, _ = f.fwd(params["f"], state["f"], x2, child(key, 0))
        check_output("f", u, x1)
        y1 = x1 + u
        with at("g"):
            v, state_g, _ = g.fwd(params["g"], state["g"], y1, child(key, 1))
        check_output("g", v, x2)
        y = _like(x, y1, x2 + v)
        return y, {"f": state_f, "g": state_g}, ReversibleResiduals(Called(state, key), y)

    def undo(params, residuals, dy, contract):
        check(params=params)
        (state, key), y = residuals
        (y1, y2), (dy1, dy2) = _halves(after(dy, y)), _cotangents(dy, y)
        with at("g"):
            v, _, saved = g.fwd(params["g"], state["g"], y1, child(key, 1))
            dg, through = g.bwd(params["g"], saved, dy2, contract)
        x2, dx1 = y2 - v, dy1 + through
        with at("f"):
            u, _, saved = f.fwd(params["f"], state["f"], x2, child(key, 0))
            df, through = f.bwd(params["f"], saved, dx1, contract)
        x1, dx2 = y1 - u, dy2 + through
        return {"f": df, "g": dg}, _like(y, x1, x2), _like(y, dx1, dx2)

    made = Reversible(parts, lambda parts: reversible(**parts), undo=undo)
    return Layer("reversible", init, apply, fwd, _without_x(undo), made, passes=True)


def undoing(layer: Layer) -> Undo | None:
    """For a reversible layer, its `bwd` in a form that also returns the recovered input; None for others."""
    made = layer.structure
    return undoing(made.inner) if isinstance(made, Named) else made.undo if made else None


def _without_x(undo: Undo) -> Callable[..., tuple[Any, Any]]:
    """The `bwd` of a reversible layer."""

    def bwd(params, residuals, dy, contract=total):
        dparams, _, dx = undo(params, residuals, dy, contract)
        return dparams, dx

    return bwd


def in_series(whole: Layer, made: Composed) -> Layer:
    """A `serial` of reversible layers, which keeps only the last output: each recovers the output of the one before."""
    parts: dict[str, Any] = {name: undoing(layer) for name, layer in made.parts.items()}

    def fwd(params, state, x, key):
        y, state, residuals = whole.fwd(params, state, x, key)
        return y, state, ReversibleResiduals({name: each.kept for name, each in residuals.items()}, y)

    def undo(params, residuals, dy, contract):
        with by("serial"):
            expect.keys(params, parts, "params")
            expect.keys(residuals.kept, parts, "residuals")
        dparams, x = {}, residuals.y
        for name, undo_part in reversed(parts.items()):
            with at(name):
                dparams[name], x, dy = undo_part(
                    params[name], ReversibleResiduals(residuals.kept[name], x), dy, contract
                )
        return dparams, x, dy

    return replace(whole, fwd=fwd, bwd=_without_x(undo), made=replace(made, undo=undo))


def in_turns(whole: Layer, made: Wrapped, times: int, check: Callable, keys: Callable) -> Layer:
    """A `repeat` of a reversible layer, which keeps only the last output; `check` and `keys` are the repeat's own."""
    layer, undo_turn = made.inner, undoing(made.inner)
    assert undo_turn

    def fwd(params, state, x, key):
        check(params, state, x)

        def body(x, layers):
            params, state, key = layers
            y, state, residuals = layer.fwd(params, state, x, key)
            return y, (state, residuals.kept)

        y, (state, kept) = scan(body, x, (params, state, keys(key)), length=times)
        return y, state, ReversibleResiduals(kept, y)

    def undo(params, residuals, dy, contract):
        check(params)

        def body(carry, layers):
            (y, dy), (params, kept) = carry, layers
            dparams, x, dx = undo_turn(params, ReversibleResiduals(kept, y), dy, contract.of_one_layer)
            return (x, dx), dparams

        carry, layers = (residuals.y, dy), (params, residuals.kept)
        (x, dx), dparams = scan(body, carry, layers, length=times, reverse=True)
        return contract.stack(params, dparams), x, dx

    return replace(whole, fwd=fwd, bwd=_without_x(undo), made=replace(made, undo=undo))


@by("reversible")
def _halves(x: Any) -> Pair:
    """x as a pair of floating arrays."""
    if isinstance(x, tuple) and len(x) == 2:
        for half in x:
            expect.float_array(half)
        return jnp.asarray(x[0]), jnp.asarray(x[1])
    expect.float_array(x)
    x = jnp.asarray(x)
    if x.shape[-1] % 2:
        remedy = "give an even number of features, or a pair of arrays"
        raise InputError("an array whose last axis can be halved", describe(x), remedy)
    first, second = jnp.split(x, 2, axis=-1)
    return first, second


@by("reversible")
def _stream(x: Any) -> Pair:
    """The halves of an x that `bwd` will have to recover from y, and so not in half precision."""
    halves = _halves(x)
    if any(sum_dtype(half.dtype) != half.dtype for half in halves):
        remedy = "give x in float32; reversible(mixed(f), mixed(g)) computes f and g in half precision"
        raise InputError("an x in float32 or float64, which can be computed from y", describe(x), remedy)
    return halves


@by("reversible")
def _cotangents(dy: Any, y: Any) -> Pair:
    if not isinstance(y, tuple):
        return _halves(expect.cotangent(dy, y.shape, y.dtype))
    if not isinstance(dy, tuple) or len(dy) != 2:
        raise InputError(f"a pair of cotangents like {describe(y)}", describe(dy), "give bwd a dy like fwd's output")
    first, second = (expect.cotangent(d, half.shape, half.dtype) for d, half in zip(dy, y, strict=True))
    return first, second


def _like(x: Any, first: Array, second: Array) -> Any:
    """Both halves in the form of x: a pair, or one array."""
    return (first, second) if isinstance(x, tuple) else jnp.concatenate([first, second], axis=-1)
