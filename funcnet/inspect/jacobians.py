"""The full Jacobians of a layer, for small ones: what a VJP multiplies by without forming it."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_floating
from funcnet._internal.tables import readable
from funcnet.layer import Layer, a_layer

Tree = Any
LARGEST = 2**28  # bytes that are formed, at most


class LayerJacobians(NamedTuple):
    """d(output)/d(params): a tree like params, each leaf [*y.shape, *leaf.shape]; d(output)/d(x): [*y.shape, *x.shape].

    Where the input is a pytree, so is `x`, with None for leaves that are not floating. Where the output is a pytree, it
    is the outer tree of both.
    """

    params: Tree
    x: Tree


def layer_jacobians(layer: Layer, params: Tree, state: Tree, x: Any, key: jax.Array | None = None) -> LayerJacobians:
    """The two full Jacobians of a layer's `fwd` at a point, by automatic differentiation: step 3.1 as it is written.

    A cotangent dy contracted with them over the axes of y gives what `bwd` gives. An integer input or output has None.

    Raises:
        InputError: if they would take more than 256 MiB: a Jacobian's size is that of the output times the input's.
    """
    a_layer(layer)
    leaves, structure = jax.tree.flatten(jax.tree.map(jnp.asarray, x))
    floating = {i: leaf for i, leaf in enumerate(leaves) if is_floating(leaf)}

    def output(params, floating):
        whole = jax.tree.unflatten(structure, [floating.get(i, leaf) for i, leaf in enumerate(leaves)])
        y = layer.fwd(params, state, whole, key)[0]
        return jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, y)

    y = jax.eval_shape(output, params, floating)
    if not jax.tree.leaves((params, floating)):
        return LayerJacobians(params, None)
    size = sum(jacobian_bytes(y, leaf) for leaf in jax.tree.leaves((params, floating)))
    if size > LARGEST:
        wanted = f"a layer whose Jacobians take at most {readable(LARGEST)}"
        raise InputError(wanted, f"{readable(size)} for an output {describe(y)}", "give a smaller batch or layer")
    found = jax.jacrev(lambda both: output(*both))((params, floating))

    def like_x(of_floating):
        return jax.tree.unflatten(structure, [of_floating.get(i) for i in range(len(leaves))])

    of_params = jax.tree.map(lambda _, both: both[0], y, found)
    of_x = jax.tree.map(lambda _, both: like_x(both[1]), y, found)
    return LayerJacobians(of_params, of_x)


def jacobian_bytes(y: Any, leaf: Any) -> int:
    """Bytes of d y / d leaf: one number of y's dtype for each pair of an entry of y and an entry of the leaf."""
    return sum(out.size * leaf.size * out.dtype.itemsize for out in jax.tree.leaves(y))
