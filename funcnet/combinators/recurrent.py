"""Combinators of recurrent layers: both directions at once, and one layer on top of the other.

    bidirectional   y = [f(x), b(x)] on the last axis       dx = bwd_f(dy_f) + bwd_b(dy_b)
    stacked         y = f_n(.. f_1(x)), same lengths        dx = bwd_1(.. bwd_n(dy))

Inputs are those of the layers: x [B, T, D], or a dict of it with lengths and initial states (`fn.lstm`).
Residuals: those of the layers, by name.
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, by, describe
from funcnet._internal.numerics import added
from funcnet.combinators.parallel import parallel
from funcnet.combinators.serial import serial
from funcnet.combinators.sides import selecting
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, child, output
from funcnet.structure import Composed, constructor

Tree = Any


class Bidirectional(Composed):
    """Two recurrent layers over the same sequences."""


@constructor
def bidirectional(forward: Layer, backward: Layer) -> Layer[dict, dict, dict]:
    """Both layers over the same sequences, y = [y_forward, y_backward] on the last axis: [B, T, D] -> [B, T, 2H].

    bidirectional(lstm(64), lstm(64, reverse=True)); further layers on top with `serial` or `stacked`. Params, state and
    residuals are dicts with `forward` and `backward`. The input is as for one of the layers; an initial state is the
    pair of both layers' states, and so is the final one where both layers return theirs.

        dx = dx_forward + dx_backward

    Raises:
        InputError: if the state is no pair, or the outputs do not have the same shape.
    """
    pair = parallel(forward=selecting(forward), backward=selecting(backward))

    @by("bidirectional")
    def both(inputs):
        if not isinstance(inputs, Mapping) or "state" not in inputs:
            return inputs, inputs
        states = inputs["state"]
        if not isinstance(states, tuple) or len(states) != 2:
            raise InputError("a pair of initial states", describe(states), "give one to each layer: (state, state)")
        return tuple({**inputs, "state": state} for state in states)

    @by("bidirectional")
    def join(ys):
        if not expect.same(*ys):
            remedy = "make both layers of one size, and let both return their state or neither"
            raise InputError("two outputs of the same shape", describe(ys), remedy)
        if expect.is_array(ys[0]):
            return jnp.concatenate(ys, axis=-1)
        (y_forward, state_forward), (y_backward, state_backward) = ys
        return jnp.concatenate([y_forward, y_backward], axis=-1), (state_forward, state_backward)

    @by("bidirectional")
    def split(dy):
        dy, dstates = _cotangents(dy, 2)
        if not expect.is_array(dy) or not dy.ndim:
            raise InputError(
                "a cotangent like the output", describe(dy), "give bwd a dy of the shape that fwd returned"
            )
        dy = jnp.asarray(dy)
        halves = tuple(jnp.split(dy, [dy.shape[-1] // 2], axis=-1))  # the layers refuse halves of an odd size
        return halves if dstates is None else tuple(zip(halves, dstates, strict=True))

    def init(key, inputs):
        params, state = pair.init(key, both(inputs))
        jax.eval_shape(apply, params, state, inputs)  # refuses outputs that cannot be joined
        return params, state

    def apply(params, state, inputs):
        return join(pair.apply(params, state, both(inputs)))

    def fwd(params, state, inputs, key):
        ys, state, residuals = pair.fwd(params, state, both(inputs), key)
        return join(ys), state, residuals

    def bwd(params, residuals, dy, contract=total):
        dparams, (dx, dx_backward) = pair.bwd(params, residuals, split(dy), contract)
        if not isinstance(dx, Mapping):
            return dparams, jax.tree.map(added, dx, dx_backward)
        dstates = {"state": (dx["state"], dx_backward["state"])} if "state" in dx else {}
        return dparams, {**dx, "x": added(dx["x"], dx_backward["x"]), **dstates}

    return Layer(
        "bidirectional",
        init,
        apply,
        fwd,
        bwd,
        Bidirectional({"forward": forward, "backward": backward}, lambda parts: bidirectional(**parts)),
        reads=("lengths", "state"),
    )


class StackedLayers(Composed):
    """Recurrent layers one on top of the other."""


@constructor
def stacked(*layers: Layer, **named: Layer) -> Layer[dict, dict, dict]:
    """Recurrent layers one on top of the other, [B, T, D] -> [B, T, H], all with the same lengths.

    stacked(lstm(64), lstm(64)). Params, state and residuals are dicts by layer, names as in `serial`. An initial state
    is a tuple of the layers' states, and so is the final one where all layers return theirs.

    Raises:
        InputError: if there are not as many initial states as layers, or some layers return their final state
            and others do not.
    """
    parts = serial(*layers, **named).parts

    @by("stacked")
    def check(inputs: Tree) -> None:
        given = inputs if isinstance(inputs, Mapping) else {"x": inputs}
        if "x" not in given:
            wanted = "an array [B, T, D], or a dict of it as x with, where wanted, lengths and state"
            raise InputError(wanted, describe(inputs), 'write {"x": x, "lengths": lengths, "state": states}')
        states = given.get("state")
        if "state" in given and (not isinstance(states, tuple) or len(states) != len(parts)):
            wanted = f"a tuple of {len(parts)} initial states, one for each of {list(parts)}"
            raise InputError(wanted, describe(states), "give one to each layer")

    @by("stacked")
    def check_trees(**trees: Tree) -> None:
        for what, tree in trees.items():
            expect.keys(tree, parts, what)

    def walk(inputs: Tree, visit: Callable[[int, str, Layer, Tree], Tree]) -> Tree:
        """y, or y and the final states; visit(i, name, layer, its input) gives the output of layer i."""
        ys = inputs["x"] if isinstance(inputs, Mapping) else inputs
        finals = []
        for i, (name, layer) in enumerate(parts.items()):
            own = {"state": inputs["state"][i]} if isinstance(inputs, Mapping) and "state" in inputs else {}
            with at(name):
                ys = visit(i, name, selecting(layer), {**inputs, "x": ys, **own} if isinstance(inputs, Mapping) else ys)
            if isinstance(ys, tuple):
                ys, final = ys
                finals.append(final)
        if len(finals) not in (0, len(parts)):
            received = f"{len(finals)} of {len(parts)}"
            with by("stacked"):
                raise InputError("final states of all layers, or of none", received, "set return_state alike in all")
        return (ys, tuple(finals)) if finals else ys

    def init(key, inputs):
        check(inputs)
        params, state = {}, {}

        def visit(i, name, layer, given):
            params[name], state[name] = layer.init(child(key, i), given)
            return output(layer, params[name], state[name], given)

        walk(inputs, visit)
        return params, state

    def apply(params, state, inputs):
        check(inputs)
        check_trees(params=params, state=state)
        return walk(inputs, lambda i, name, layer, given: layer.apply(params[name], state[name], given))

    def fwd(params, state, inputs, key):
        check(inputs)
        check_trees(params=params, state=state)
        new_state, residuals = {}, {}

        def visit(i, name, layer, given):
            y, new_state[name], residuals[name] = layer.fwd(params[name], state[name], given, child(key, i))
            return y

        return walk(inputs, visit), new_state, residuals

    def bwd(params, residuals, dy, contract=total):
        check_trees(params=params, residuals=residuals)
        with by("stacked"):
            dx, dfinals = _cotangents(dy, len(parts))
        dparams, dstates, dinputs = {}, [], None
        for i, (name, layer) in reversed(list(enumerate(parts.items()))):
            with at(name):
                own = dx if dfinals is None else (dx, dfinals[i])
                dparams[name], dinputs = selecting(layer).bwd(params[name], residuals[name], own, contract)
            if isinstance(dinputs, Mapping):
                dx = dinputs["x"]
                dstates.append(dinputs.get("state"))
            else:
                dx = dinputs
        if not isinstance(dinputs, Mapping):
            return dparams, dx
        return dparams, {**dinputs, **({"state": tuple(dstates[::-1])} if "state" in dinputs else {})}

    made = StackedLayers(parts, lambda parts: stacked(**parts))
    return Layer("stacked", init, apply, fwd, bwd, made, reads=("lengths", "state"))


def _cotangents(dy: Tree, layers: int) -> tuple[Any, tuple | None]:
    """(dy, the cotangents of the layers' final states), None where the output has no states."""
    if not isinstance(dy, tuple):
        return dy, None
    if len(dy) != 2 or not isinstance(dy[1], tuple) or len(dy[1]) != layers:
        wanted = f"a cotangent like the output, of y alone or (y, a tuple of {layers} final states)"
        raise InputError(wanted, describe(dy), "give bwd a dy of the structure that fwd returned")
    return dy
