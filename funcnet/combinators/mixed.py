"""Separate dtypes for the parameters, the computation and the output of a layer."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcnet._internal import expect
from funcnet._internal.casting import cast
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.expect import is_floating
from funcnet.combinators.freeze import frozen_as, refrozen
from funcnet.combinators.sides import has_sides
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer, unrounded
from funcnet.structure import Transparent, constructor

Tree = Any


class MixedResiduals(NamedTuple):
    """Residuals of `mixed`: the layer's own, and for each of its outputs an empty array of the dtype it returned."""

    residuals: Tree
    outputs: Tree


class Mixed(Transparent):
    """A layer with separate dtypes for its params, its computation and its output."""


@constructor
def mixed(
    layer: Layer,
    param: Any = "float32",
    compute: Any = "bfloat16",
    output: Any = "float32",
    *,
    keep: Sequence[str] = (),
) -> Layer:
    """The same layer with a dtype each for its params, its computation and its input and output.

    Floating params and inputs are cast to `compute` on the way in, outputs to `output` on the way out. Cotangents are
    cast the other way, dy to the dtype that the layer itself returned: for a loss's values that is float32 or
    wider. Gradients are contracted in float32 and returned in the params' own dtype, not rounded to `compute` first.
    Residuals are in `compute`. Names and params are the layer's own; frozen params (`freeze`) are treated likewise.

    There are three exceptions. Params that a layer says may be wider than its input (`Layer.unrounded`: nu and theta of
    an `lru`, the logarithms of its decay and angle) are given to it in `param`. Side inputs that the layer does not
    read, or that it writes, stay as they are. And the layers named in `keep` compute in `param` as a whole, from an
    input in `compute` to an output in `compute`:

        mixed(serial(embedding(V, D), layer_norm(), blocks, head=dense(V)), keep=("layer_norm", "head"))

    Args:
        layer: any layer.
        param: dtype of the params that `init` makes and `bwd` returns gradients in.
        compute: dtype that the layer works in.
        output: dtype of y, and of x and dx where they are floating.
        keep: paths of layers among the parts, names joined by "/" as among the params, that compute in `param`.

    Raises:
        InputError: if a floating input is not of dtype `output`, one of the three is no floating dtype, or a path in
            `keep` leads to no layer, or into another layer that is kept.
    """
    a_layer(layer)
    param, compute, output = map(expect.floating_dtype, (param, compute, output))
    with by("mixed"):
        if isinstance(keep, str):
            raise InputError("keep as a tuple of paths", repr(keep), f'write keep=("{keep}",)')
        keep = tuple(keep) if isinstance(keep, Iterable) else (keep,)
        if not all(isinstance(path, str) for path in keep):
            raise InputError("keep as a tuple of paths", repr(keep), 'write keep=("layer_norm",), or leave it out')
        if inside := [(a, b) for a, b in permutations(keep, 2) if f"{a}/".startswith(f"{b}/")]:
            received = "{!r} and {!r}".format(*inside[0])
            raise InputError("paths of different layers to keep, none inside another", received, "leave out the inner")
        mostly = layer
        for path in keep:
            mostly = _at(mostly, path, path.split("/"), lambda part: mixed(part, param, param, compute))
    return _mixed(mostly, layer, param, compute, output, tuple(keep))


def _at(layer: Layer, path: str, names: list[str], wrap: Callable[[Layer], Layer]) -> Layer:
    """The layer with `wrap` around the part that the names lead to; `path` is all of them, for the error."""
    if not names:
        return wrap(layer)
    name, *rest = names
    if name not in layer.parts or layer.rebuild is None:
        received = f"{path!r}, where {layer.name} has the parts {list(layer.parts)}"
        remedy = "name a layer as `fn.summary` does; a param alone cannot be kept, but the layer it is of can"
        raise InputError("paths of layers to keep", received, remedy)
    return layer.rebuild({**layer.parts, name: _at(layer.parts[name], path, rest, wrap)})


def _mixed(layer: Layer, first: Layer, param: Any, compute: Any, output: Any, keep: tuple[str, ...]) -> Layer:
    """`mixed` of a layer whose parts at the paths in `keep` compute in `param` themselves.

    `first` is the layer before those parts were wrapped, which is the one that is initialised, all of it in `param`.
    """
    kept = (*keep, *unrounded(layer))
    rounded = {"x", *layer.reads} - {*layer.writes}

    def computing(params, state):
        return cast(params, compute, kept), frozen_as(compute, state, kept)

    def cast_x(x, dtype):
        """x and what is read beside it in another dtype; other sides, and totals that are written, are not rounded."""
        if not has_sides(x):
            return cast(x, dtype)
        return {name: cast(side, dtype) if name in rounded else side for name, side in x.items()}

    @by("mixed")
    def check(x, what="an input"):
        own = {name: side for name, side in x.items() if name in rounded} if has_sides(x) else x
        if any(is_floating(leaf) and expect.dtype(leaf) != output for leaf in jax.tree.leaves(own)):
            raise InputError(f"{what} of dtype {output}", describe(x), "convert it, or give mixed another output dtype")

    def enter(x):
        check(x)
        return cast_x(jax.tree.map(jnp.asarray, x), compute)

    def init(key, x):
        check(x)
        params, state = first.init(key, jax.eval_shape(lambda x: cast_x(x, param), x))
        return cast(params, param), frozen_as(param, state)

    def apply(params, state, x):
        return cast_x(layer.apply(*computing(params, state), enter(x)), output)

    def fwd(params, state, x, key):
        y, new_state, residuals = layer.fwd(*computing(params, state), enter(x), key)
        outputs = jax.tree.map(lambda leaf: jnp.zeros((0,), leaf.dtype), y)
        return cast_x(y, output), refrozen(state, new_state), MixedResiduals(residuals, outputs)

    def bwd(params, saved, dy, contract=total):
        in_param_dtype = contract.after(lambda factor, p: (factor, p.astype(param)))
        fits = jax.tree.structure(dy, lambda leaf: leaf is None) == jax.tree.structure(saved.outputs)
        if fits:  # else the layer inside says what is wrong
            check(dy, "a cotangent")
            dy = jax.tree.map(lambda like, leaf: cast(jax.tree.map(jnp.asarray, leaf), like.dtype), saved.outputs, dy)
        dparams, dx = layer.bwd(cast(params, compute, kept), saved.residuals, dy, in_param_dtype)
        return dparams, cast_x(dx, output)

    def again(layer):
        return _mixed(layer, first if keep else layer, param, compute, output, keep)

    return replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, made=Mixed(layer, again))
