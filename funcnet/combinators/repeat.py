"""The same layer several times over, as a scan over stacked parameters.

It is transparent: it has the params and parts of the layer it is made of, stacked.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.sharding import scan
from funcnet.combinators.reversible import in_turns, undoing
from funcnet.combinators.sides import apart, passing
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer, output
from funcnet.structure import Wrapped, constructor

Tree = Any


@dataclass(frozen=True, eq=False, kw_only=True)
class Repeat(Wrapped):
    """The same layer `times` over, its parameters stacked."""

    times: int


@constructor
def repeat(layer: Layer, times: int) -> Layer:
    """The same layer `times` over, with parameters of its own each time: a scan over stacked params [L, ..].

    Compiles one copy of the layer however deep the model is. Residuals, state and kept factors are stacked likewise;
    L is in front of the batch axis. Gradients are contracted a layer at a time, inside the backward scan, if the
    contraction can combine the layers' answers (`Contraction.stacked`); else the factors of all layers are contracted
    after the scan. Of a reversible layer it keeps only the last output, from which `bwd` recomputes the others.

    Args:
        layer: maps an input to an output of the same shape and dtype.
        times: L, how often.

    Raises:
        InputError: if the layer's output does not have the shape and dtype of its input, or times is not positive.
    """
    a_layer(layer)
    times, inside = expect.count(times, "times"), passing(layer)

    def keys(key):
        return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(times))

    def init(key, x):
        params, state = jax.vmap(lambda key: inside.init(key, x))(keys(expect.key(key)))
        first_params, first_state = jax.tree.map(lambda leaf: leaf[0], (params, state))
        y = output(inside, first_params, first_state, x)
        check_output(x, y)
        return params, state

    @by("repeat")
    def check_output(x, y):
        if not expect.same(x, y):
            wanted = f"an output like the input, {describe(x)}"
            raise InputError(wanted, describe(y), "repeat a layer that keeps its shape and dtype")

    @by("repeat")
    def check(params, state=(), x=()):
        expect.shapes(x)  # refuses leaves that are not arrays
        expect.stacked(params, times, "params")
        expect.stacked(state, times, "state")

    def apply(params, state, x):
        check(params, state, x)
        x, whole = apart(x, layer.writes)

        def body(x, layers):
            params, state = layers
            return apart(inside.apply(params, state, whole(x)), layer.writes)[0], None

        return whole(scan(body, x, (params, state), length=times)[0])

    def fwd(params, state, x, key):
        check(params, state, x)
        x, whole = apart(x, layer.writes)

        def body(x, layers):
            params, state, key = layers
            y, state, residuals = inside.fwd(params, state, whole(x), key)
            return apart(y, layer.writes)[0], (state, distinct(residuals))

        y, (state, stacked) = scan(body, x, (params, state, keys(key)), length=times)
        return whole(y), state, stacked.tree()

    def bwd(params, residuals, dy, contract=total):
        check(params)

        def body(dy, layers):
            dparams, dx = inside.bwd(*layers, dy, contract.of_one_layer)
            return dx, dparams

        dx, dparams = scan(body, dy, (params, residuals), length=times, reverse=True)
        return contract.stack(params, dparams), dx

    made = Repeat(layer, lambda layer: repeat(layer, times), direct=False, times=times)
    whole = replace(layer, name="repeat", init=init, apply=apply, fwd=fwd, bwd=bwd, made=made, passes=True)
    return in_turns(whole, made, times, check, keys) if undoing(layer) else whole


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
