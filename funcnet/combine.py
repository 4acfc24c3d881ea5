"""Combinators: layers made of layers, their backward passes the chain rule and nothing else.

Each is one more `Layer`, a few lines long, because residuals are plain data that nest and stack like any other. `skip`
and `repeat` are transparent: they have the params and parts of the layer they are made of. Child i draws its
randomness from `fold_in(key, i)`, so a layer appended at the end leaves the draws of the others alone.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.arithmetic import added, scan
from funcnet.expect import InputError, at, describe
from funcnet.factors import total
from funcnet.layer import Layer, Made, Undone, a_layer, around, child, output, undoing, without_x

Tree = Any


def serial(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """The composition f_n(.. f_2(f_1(x))): layers in order, first those without and then those with a name.

        y_i = f_i(w_i, y_{i-1})         dw_i, dy_{i-1} = bwd_i(dy_i)   from the last layer to the first

    Params, state and residuals are dicts by layer. A layer without a name gets its kind, numbered when repeated:
    dense, relu, dense_1. Of reversible layers alone it is reversible: of all their outputs it keeps the last.

    Raises:
        InputError: for no layers at all, and with the layer's path for whatever one of them complains about.
    """
    parts = _by_name(layers, named)

    @expect.by("serial")
    def check(**trees):
        for what, tree in trees.items():
            expect.named(tree, parts, what)

    def init(key, x):
        params, state = {}, {}
        for i, (name, layer) in enumerate(parts.items()):
            with at(name):
                params[name], state[name] = layer.init(child(key, i), x)
                x = output(layer, params[name], state[name], x)
        return params, state

    def apply(params, state, x):
        check(params=params, state=state)
        for name, layer in parts.items():
            with at(name):
                x = layer.apply(params[name], state[name], x)
        return x

    def fwd(params, state, x, key):
        check(params=params, state=state)
        new_state, residuals = {}, {}
        for i, (name, layer) in enumerate(parts.items()):
            with at(name):
                x, new_state[name], residuals[name] = layer.fwd(params[name], state[name], x, child(key, i))
        return x, new_state, residuals

    def bwd(params, residuals, dy, contract=total):
        check(params=params, residuals=residuals)
        dparams = {}
        for name, layer in reversed(parts.items()):
            with at(name):
                dparams[name], dy = layer.bwd(params[name], residuals[name], dy, contract)
        return dparams, dy

    whole = Layer("serial", init, apply, fwd, bwd, parts, lambda parts: serial(**parts), Made("serial", fwd, bwd))
    return _reversible_serial(whole) if all(map(undoing, parts.values())) else whole


def _reversible_serial(whole: Layer) -> Layer:
    """A `serial` of reversible layers, which keeps the last output alone: each gives the one before it its own."""
    parts: dict[str, Any] = {name: undoing(layer) for name, layer in whole.parts.items()}

    def fwd(params, state, x, key):
        y, state, residuals = whole.fwd(params, state, x, key)
        return y, state, Undone({name: each.kept for name, each in residuals.items()}, y)

    def undo(params, residuals, dy, contract):
        with expect.by("serial"):
            expect.named(params, parts, "params")
            expect.named(residuals.kept, parts, "residuals")
        dparams, x = {}, residuals.y
        for name, undo_part in reversed(parts.items()):
            with at(name):
                dparams[name], x, dy = undo_part(params[name], Undone(residuals.kept[name], x), dy, contract)
        return dparams, x, dy

    bwd = without_x(undo)
    return replace(whole, fwd=fwd, bwd=bwd, made=Made("serial", fwd, bwd, undo=undo))


def parallel(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """One layer for each entry of a tuple: (x_1, .., x_n) -> (f_1(x_1), .., f_n(x_n)); names as in `serial`.

        dx_i = bwd_i(dy_i)

    Raises:
        InputError: if the input is not a tuple with one entry for each layer.
    """
    parts = _by_name(layers, named)

    @expect.by("parallel")
    def check(xs, what="inputs", **trees):
        if not isinstance(xs, tuple) or len(xs) != len(parts):
            wanted = f"a tuple of {len(parts)} {what}, one for each of {list(parts)}"
            raise InputError(wanted, describe(xs), "give one to each layer")
        for name, tree in trees.items():
            expect.named(tree, parts, name)

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

    return Layer("parallel", init, apply, fwd, bwd, parts, lambda parts: parallel(**parts), Made("parallel", fwd, bwd))


def skip(layer: Layer, shortcut: Layer | None = None) -> Layer:
    """The residual connection y = x + f(x), with dx = dy + bwd_f(dy); with a shortcut g, y = g(x) + f(x).

    With a shortcut params and state are dicts over main (f) and shortcut (g), and dx = bwd_g(dy) + bwd_f(dy).

    Raises:
        InputError: if f's output has not the shape and dtype of its input, or of the shortcut's output.
    """
    a_layer(layer)
    if shortcut is not None:
        return _around_shortcut(layer, a_layer(shortcut))

    def init(key, x):
        params, state = layer.init(key, x)
        jax.eval_shape(_add, x, output(layer, params, state, x))
        return params, state

    def apply(params, state, x):
        return _add(x, layer.apply(params, state, x))

    def fwd(params, state, x, key):
        y, state, residuals = layer.fwd(params, state, x, key)
        return _add(x, y), state, residuals

    def bwd(params, residuals, dy, contract=total):
        dparams, dx = layer.bwd(params, residuals, dy, contract)
        return dparams, dy + dx

    return around(layer, replace(layer, name="skip", init=init, apply=apply, fwd=fwd, bwd=bwd), skip, "skip")


def _around_shortcut(layer: Layer, shortcut: Layer) -> Layer[dict, dict, dict]:
    both = branch(shortcut=shortcut, main=layer)

    def summed(ys):
        aside, y = ys
        return _add(aside, y, "the shortcut's output")

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
        return both.bwd(params, residuals, (dy, dy), contract)

    def again(parts):
        return skip(parts["main"], parts["shortcut"])

    return Layer("skip", init, apply, fwd, bwd, both.parts, again, Made("skip_shortcut", fwd, bwd))


@expect.by("skip")
def _add(x: Any, y: Any, other: str = "the input") -> Any:
    """x + y; `other` says what x is."""
    x = jnp.asarray(x) if expect.is_array(x) else x
    if not expect.is_floating(x) or not expect.same(x, y):
        wanted = f"a floating array, and an output like {other}, {describe(x)}"
        raise InputError(wanted, describe(y), "let the last layer return that shape, or change the shortcut, a layer")
    return x + y


def repeat(layer: Layer, times: int) -> Layer:
    """The same layer `times` over, with parameters of its own each time: a scan over stacked params [L, ..].

    Compiles one copy of the layer however deep the model is. Residuals, state and kept factors are stacked likewise;
    L is in front of the batch axis. Gradients are contracted a layer at a time, inside the backward scan. Of a
    reversible layer it keeps the last output alone, and walks back from it.

    Args:
        layer: maps an input to an output of the same shape and dtype.
        times: L, how often.

    Raises:
        InputError: if the layer's output has not the shape and dtype of its input, or times is not positive.
    """
    a_layer(layer)
    times = expect.count(times, "times")
    undo_turn: Any = undoing(layer)

    def keys(key):
        return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(times))

    def init(key, x):
        params, state = jax.vmap(lambda key: layer.init(key, x))(keys(expect.key(key)))
        first_params, first_state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        y = output(layer, first_params, first_state, x)
        check_output(x, y)
        return params, state

    @expect.by("repeat")
    def check_output(x, y):
        if not expect.same(x, y):
            wanted = f"an output like the input, {describe(x)}"
            raise InputError(wanted, describe(y), "repeat a layer that keeps its shape and dtype")

    @expect.by("repeat")
    def check(params, state=(), x=()):
        expect.shapes(x)  # refuses what is no array
        for what, tree in {"params": params, "state": state}.items():
            if any(jnp.shape(leaf)[:1] != (times,) for leaf in jax.tree.leaves(tree)):
                wanted = f"{what} stacked along a first axis of {times} layers"
                raise InputError(wanted, describe(tree), f"pass the {what} that this model's init returned")

    def apply(params, state, x):
        check(params, state, x)

        def body(x, layers):
            params, state = layers
            return layer.apply(params, state, x), None

        return scan(body, x, (params, state), length=times)[0]

    def fwd(params, state, x, key):
        check(params, state, x)

        def body(x, layers):
            params, state, key = layers
            y, state, residuals = layer.fwd(params, state, x, key)
            return y, (state, distinct(residuals))

        y, (state, stacked) = scan(body, x, (params, state, keys(key)), length=times)
        return y, state, stacked.tree()

    def bwd(params, residuals, dy, contract=total):
        check(params)

        def body(dy, layers):
            dparams, dx = layer.bwd(*layers, dy, contract)
            return dx, dparams

        dx, dparams = scan(body, dy, (params, residuals), length=times, reverse=True)
        return jax.tree.map(lambda _, answer: contract.stacked(answer), params, dparams), dx

    def fwd_of_reversible(params, state, x, key):
        check(params, state, x)

        def body(x, layers):
            params, state, key = layers
            y, state, residuals = layer.fwd(params, state, x, key)
            return y, (state, residuals.kept)

        y, (state, kept) = scan(body, x, (params, state, keys(key)), length=times)
        return y, state, Undone(kept, y)

    def undo(params, residuals, dy, contract):
        check(params)

        def body(carry, layers):
            (y, dy), (params, kept) = carry, layers
            dparams, x, dx = undo_turn(params, Undone(kept, y), dy, contract)
            return (x, dx), dparams

        carry, layers = (residuals.y, dy), (params, residuals.kept)
        (x, dx), dparams = scan(body, carry, layers, length=times, reverse=True)
        return jax.tree.map(lambda _, answer: contract.stacked(answer), params, dparams), x, dx

    def again(layer):
        return repeat(layer, times)

    if undo_turn:
        fwd, bwd = fwd_of_reversible, without_x(undo)
    whole = replace(layer, name="repeat", init=init, apply=apply, fwd=fwd, bwd=bwd)
    return around(layer, whole, again, "repeat", undo if undo_turn else None)


def branch(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """The same input to several layers: x -> (f_1(x), .., f_n(x)); names as in `serial`.

        dx = sum_i bwd_i(dy_i)        summed in float32 for half precision

    Followed by `concat()` or `add()` it is one array again.

    Raises:
        InputError: for no layers at all, and for what one of them refuses.
    """
    each = parallel(*layers, **named)

    def copies(x):
        return (x,) * len(each.parts)

    def init(key, x):
        return each.init(key, copies(x))

    def apply(params, state, x):
        return each.apply(params, state, copies(x))

    def fwd(params, state, x, key):
        return each.fwd(params, state, copies(x), key)

    def bwd(params, residuals, dys, contract=total):
        dparams, dxs = each.bwd(params, residuals, dys, contract)
        return dparams, jax.tree.map(added, *dxs)

    parts = each.parts
    return Layer("branch", init, apply, fwd, bwd, parts, lambda parts: branch(**parts), Made("branch", fwd, bwd))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Distinct:
    """The arrays of a tree, each once: one layer's output is often the next one's input. `tree()` is the tree again."""

    arrays: list[Array]
    structure: Any = field(metadata={"static": True})
    index: tuple[int, ...] = field(metadata={"static": True})

    def tree(self) -> Tree:
        return jax.tree.unflatten(self.structure, [self.arrays[i] for i in self.index])


def distinct(tree: Tree) -> Distinct:
    leaves, structure = jax.tree.flatten(tree)
    arrays = {id(leaf): leaf for leaf in leaves}
    position = {key: i for i, key in enumerate(arrays)}
    return Distinct(list(arrays.values()), structure, tuple(position[id(leaf)] for leaf in leaves))


def _by_name(layers: tuple[Layer, ...], named: Mapping[str, Layer]) -> dict[str, Layer]:
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
