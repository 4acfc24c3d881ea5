"""Combinators that change how a layer runs, not what it computes.

`remat` saves memory, `mixed` sets dtypes, `freeze` keeps parameters from being learned, `named` gives a name. They are
transparent: name, params and parts are those of the layer they are given, but for what they are there to change.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import permutations
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.arithmetic import wider
from funcnet.expect import InputError, describe, is_floating
from funcnet.factors import total
from funcnet.layer import Layer, a_layer, around, unrounded
from funcnet.order import after

Tree = Any


class Rerun(NamedTuple):
    """Residuals of `remat`: what `fwd` was called with, beside the params."""

    state: Tree
    x: Tree
    key: Array | None


def remat(layer: Layer) -> Layer:
    """The same layer, which saves only its input and runs `fwd` again in `bwd`: less memory for one more forward pass.

    Names, params and results are the layer's own.
    """

    a_layer(layer)

    def fwd(params, state, x, key):
        y, new_state, _ = layer.fwd(params, state, x, key)
        return y, new_state, Rerun(state, x, key)

    def bwd(params, saved, dy, contract=total):
        return layer.bwd(params, rerun(layer, params, saved, dy), dy, contract)

    return around(layer, replace(layer, fwd=fwd, bwd=bwd), remat, "remat")


def rerun(layer: Layer, params: Tree, saved: Rerun, dy: Tree) -> Tree:
    """The residuals that `fwd` gave when `remat` dropped them, computed after dy: in the backward pass, not before."""
    key = jax.tree.map(jax.random.clone, saved.key)  # to draw again what was drawn
    return layer.fwd(params, saved.state, after(dy, saved.x), key)[2]


class Mixed(NamedTuple):
    """Residuals of `mixed`: the layer's own, and for each of its outputs an empty array of the dtype it returned."""

    residuals: Tree
    outputs: Tree


def mixed(
    layer: Layer,
    param: Any = "float32",
    compute: Any = "bfloat16",
    output: Any = "float32",
    *,
    keep: Sequence[str] = (),
) -> Layer:
    """The same layer with a dtype each for its params, its computation and its input and output.

    Floating params and inputs are cast to `compute` on the way in, outputs to `output` on the way out; cotangents go
    the other way, in the dtype that the layer itself returned: that of a loss's values is float32 whatever it is given.
    Gradients are contracted wide and handed out in the params' own dtype, not rounded to `compute` first. Residuals are
    in `compute`. Names and params are the layer's own; frozen params (`freeze`) are treated alike.

    There are two exceptions. Params that a layer says may be wider than its input (`Layer.unrounded`: nu and theta of
    an `lru`, the logarithms of its decay and angle) are given to it in `param`. And the layers named in `keep` compute
    in `param` as a whole, from an input in `compute` to an output in `compute`:

        mixed(serial(embedding(V, D), layer_norm(), blocks, head=dense(V)), keep=("layer_norm", "head"))

    Args:
        layer: any layer.
        param: dtype of the params that `init` makes and `bwd` returns gradients in.
        compute: dtype that the layer works in.
        output: dtype of y, and of x and dx where they are floating.
        keep: paths of layers among the parts, names joined by "/" as among the params, that compute in `param`.

    Raises:
        InputError: if a floating input is not of dtype `output`, one of the three is no floating dtype, or a path in
            `keep` leads to no layer, or into another one that is kept.
    """
    a_layer(layer)
    param, compute, output = map(expect.floating_dtype, (param, compute, output))
    with expect.by("mixed"):
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

    `first` is the layer without that: it is initialised, as a whole in `param`.
    """
    kept = (*keep, *unrounded(layer))

    def computing(params, state):
        return cast(params, compute, kept), frozen_as(compute, state, kept)

    @expect.by("mixed")
    def check(x, what="an input"):
        if any(is_floating(leaf) and expect.dtype(leaf) != output for leaf in jax.tree.leaves(x)):
            raise InputError(f"{what} of dtype {output}", describe(x), "convert it, or give mixed another output dtype")

    def enter(x):
        check(x)
        return cast(jax.tree.map(jnp.asarray, x), compute)

    def init(key, x):
        check(x)
        params, state = first.init(key, jax.eval_shape(lambda x: cast(x, param), x))
        return cast(params, param), frozen_as(param, state)

    def apply(params, state, x):
        return cast(layer.apply(*computing(params, state), enter(x)), output)

    def fwd(params, state, x, key):
        y, new_state, residuals = layer.fwd(*computing(params, state), enter(x), key)
        outputs = jax.tree.map(lambda leaf: jnp.zeros((0,), leaf.dtype), y)
        return cast(y, output), _refrozen(state, new_state), Mixed(residuals, outputs)

    def bwd(params, saved, dy, contract=total):
        in_param_dtype = replace(contract, of=lambda factor, p: contract.of(factor, p.astype(param)))
        fits = jax.tree.structure(dy, lambda leaf: leaf is None) == jax.tree.structure(saved.outputs)
        if fits:  # else the layer inside says what is wrong
            check(dy, "a cotangent")
            dy = jax.tree.map(lambda like, leaf: cast(leaf, like.dtype), saved.outputs, dy)
        dparams, dx = layer.bwd(cast(params, compute, kept), saved.residuals, dy, in_param_dtype)
        return dparams, cast(dx, output)

    def again(layer):
        return _mixed(layer, first if keep else layer, param, compute, output, keep)

    return around(layer, replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd), again, "mixed")


class Frozen(NamedTuple):
    """State of `freeze`: the params that are not learned, and the layer's own state."""

    params: Tree
    state: Tree


class Unlearned(NamedTuple):
    """Residuals of `freeze`: the params, which `bwd` has from nowhere else, and the layer's own residuals."""

    params: Tree
    residuals: Tree


def freeze(layer: Layer) -> Layer:
    """The same layer, whose params are not learned: they are part of its state, and its params are {}.

    So nothing can move them: neither weight decay nor momentum, they count in no norm of a gradient, and an optimizer
    keeps nothing for them. dx is as before, and statistics such as a batch norm's are still updated. Trained params go
    into the state by `fn.Frozen(params, state)`, for a layer in a model in that layer's place.

    The frozen params are among the residuals. That costs nothing but under `repeat`, which stacks a copy: prefer
    freeze(repeat(..)) to repeat(freeze(..)).

    Raises:
        InputError: if params are not {} or the state is not what init returned.
    """
    a_layer(layer)

    @expect.by("freeze")
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
        return y, Frozen(state.params, inner), Unlearned(state.params, residuals)

    def bwd(params, residuals, dy, contract=total):
        nothing = replace(contract, of=lambda factor, param: None, stacked=lambda answer: None, joined=None)
        return {}, layer.bwd(*residuals, dy, nothing)[1]

    return around(layer, replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd), freeze, "freeze")


def frozen_as(dtype: Any, state: Tree, kept: tuple[str, ...] = (), at: str = "") -> Tree:
    """`state`, which lies at the path `at`, with the frozen params in it in `dtype`; `kept` as for `cast`."""

    def one(path, frozen):
        here = at + _named(path)
        state = frozen_as(dtype, frozen.state, kept, here)
        return Frozen(cast(frozen.params, dtype, kept, here), state)

    return _over_frozen(one, state)


def _refrozen(old: Tree, new: Tree) -> Tree:
    """The new state with the frozen params of the old one."""
    return _over_frozen(lambda _, a, b: Frozen(a.params, _refrozen(a.state, b.state)), old, new)


def _over_frozen(f: Callable[..., Frozen], state: Tree, *others: Tree) -> Tree:
    """f of the path of each outermost `Frozen` in a state, of it, and of those in its place in others; else the last
    one's leaves."""
    is_frozen = lambda node: isinstance(node, Frozen)
    one = lambda path, *nodes: f(path, *nodes) if is_frozen(nodes[0]) else nodes[-1]
    return jax.tree_util.tree_map_with_path(one, state, *others, is_leaf=is_frozen)


def named(name: str, layer: Layer) -> Layer:
    """The same layer under another name, which it has among the params of `serial`, in tables and in errors.

    serial(dense(8), named("middle", relu()), dense(3)) names one layer where it stands; serial's own keywords name the
    last ones.

    Raises:
        InputError: for a name that is no text, is empty or has a "/", which parts the names of a path.
    """
    a_layer(layer)
    if not isinstance(name, str) or not name or "/" in name:
        raise InputError('a name without "/"', repr(name), 'write named("encoder", layer)')
    return around(layer, replace(layer, name=name), lambda other: named(name, other), "named")


def cast(tree: Tree, dtype: Any, kept: tuple[str, ...] = (), at: str = "") -> Tree:
    """`tree` with its floating arrays in `dtype`; integers, booleans and keys as they are.

    Those at or below the paths `kept`, of which the tree itself lies at `at`, stay as they are where they are wider.
    """

    def one(path, leaf):
        if not is_floating(leaf):
            return leaf
        below = any(f"{at}{_named(path)}".startswith(f"{each}/") for each in kept)
        return leaf if below and wider(leaf.dtype, dtype) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def _named(path: tuple[Any, ...]) -> str:
    """The names in a path of JAX's, each with a "/" behind it."""
    return "".join(f"{entry.key}/" for entry in path if isinstance(entry, jax.tree_util.DictKey))
