"""Parameters that are not learned: `freeze` moves them into the state."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import jax

from funcnet._internal.casting import cast, names_in
from funcnet._internal.errors import InputError, by, describe
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer
from funcnet.structure import Transparent, constructor

Tree = Any


class Frozen(NamedTuple):
    """State of `freeze`: the params that are not learned, and the layer's own state."""

    params: Tree
    state: Tree


class FreezeResiduals(NamedTuple):
    """Residuals of `freeze`: the params, which `bwd` does not receive otherwise, and the layer's own residuals."""

    params: Tree
    residuals: Tree


class Freeze(Transparent):
    """A layer whose params are part of its state."""


@constructor
def freeze(layer: Layer) -> Layer:
    """The same layer, whose params are not learned: they are part of its state, and its params are {}.

    So nothing can change them, neither weight decay nor momentum; they count in no gradient norm, and an optimizer
    keeps no state for them. dx is as before, and statistics such as a batch norm's are still updated. To use trained
    params, put `fn.Frozen(params, state)` into the state; for a layer inside a model, at that layer's place in it.

    The frozen params are among the residuals. That costs nothing except under `repeat`, which stacks a copy: prefer
    freeze(repeat(..)) to repeat(freeze(..)).

    Raises:
        InputError: if params are not {} or the state is not what init returned.
    """
    a_layer(layer)

    @by("freeze")
    def check(params, state):
        if jax.tree.leaves(params):
            raise InputError("no params, {}", describe(params), "pass the params that this model's init returned")
        if not isinstance(state, Frozen):
            remedy = "put trained params into the state: fn.Frozen(params, state)"
            raise InputError("a state Frozen(params, state)", describe(state), remedy)

    def init(key, x):
        return {}, Frozen(*layer.init(key, x))

    def apply(params, state, x):
        check(params, state)
        return layer.apply(state.params, state.state, x)

    def fwd(params, state, x, key):
        check(params, state)
        y, inner, residuals = layer.fwd(state.params, state.state, x, key)
        return y, Frozen(state.params, inner), FreezeResiduals(state.params, residuals)

    def bwd(params, residuals, dy, contract=total):
        none = {"of": lambda factor, param: None, "stacked": lambda answer: None, "joined": lambda answers, param: None}
        nothing = replace(contract.keeping, **none)
        return {}, layer.bwd(*residuals, dy, nothing)[1]

    return replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, made=Freeze(layer, freeze))


def frozen_as(dtype: Any, state: Tree, kept: tuple[str, ...] = (), at: str = "") -> Tree:
    """`state`, whose path is `at`, with the frozen params in it cast to `dtype`; `kept` as for `cast`."""

    def one(path, frozen):
        here = at + names_in(path)
        state = frozen_as(dtype, frozen.state, kept, here)
        return Frozen(cast(frozen.params, dtype, kept, here), state)

    return _over_frozen(one, state)


def refrozen(old: Tree, new: Tree) -> Tree:
    """The new state with the frozen params of the old one."""
    return _over_frozen(lambda _, a, b: Frozen(a.params, refrozen(a.state, b.state)), old, new)


def _over_frozen(f: Callable[..., Frozen], state: Tree, *others: Tree) -> Tree:
    """A state with f(path, frozen, those in its place in `others`) for each outermost `Frozen`; its other leaves are
    those of the last of these trees."""
    is_frozen = lambda node: isinstance(node, Frozen)
    one = lambda path, *nodes: f(path, *nodes) if is_frozen(nodes[0]) else nodes[-1]
    return jax.tree_util.tree_map_with_path(one, state, *others, is_leaf=is_frozen)
