"""Less memory for one more forward pass: `remat` saves a layer's input, and makes its residuals again."""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
from jax import Array

from funcnet._internal.barrier import after
from funcnet.combinators.sides import unchecked
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer
from funcnet.structure import Transparent, constructor

Tree = Any


class RematResiduals(NamedTuple):
    """Residuals of `remat`: what `fwd` was called with, besides the params."""

    state: Tree
    x: Tree
    key: Array | None


class Remat(Transparent):
    """A layer whose residuals are computed in the backward pass."""


@constructor
def remat(layer: Layer) -> Layer:
    """The same layer, which saves only its input and runs `fwd` again in `bwd`: less memory for one more forward pass.

    Names, params and results are the layer's own.
    """

    a_layer(layer)

    def fwd(params, state, x, key):
        y, new_state, _ = layer.fwd(params, state, x, key)
        return y, new_state, RematResiduals(state, x, key)

    def bwd(params, saved, dy, contract=total):
        return layer.bwd(params, rerun(layer, params, saved, dy), dy, contract)

    return replace(layer, fwd=fwd, bwd=bwd, made=Remat(layer, remat))


def rerun(layer: Layer, params: Tree, saved: RematResiduals, dy: Tree) -> Tree:
    """The residuals that `remat` dropped, recomputed after dy is known: in the backward pass, not before."""
    key = jax.tree.map(jax.random.clone, saved.key)  # to draw the same random numbers again
    with unchecked():
        return layer.fwd(params, saved.state, after(dy, saved.x), key)[2]
