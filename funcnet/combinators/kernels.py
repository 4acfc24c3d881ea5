"""The kernels among a layer's parameters, reparametrised: what `weight_norm` and `spectral_norm` share.

A kernel [.., F] is read as a matrix W [N, F], one column for each feature. The gradient of a parameter that W is
computed from is linear in dW, so its factor is W's factor followed by that linear map, `Mapped`. Kernels of layers
stacked inside, by `repeat` or a combinator of one's own, are treated one by one; W's factor says along how many axes.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import jax
from jax import Array

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_floating
from funcnet._internal.numerics import flat, sum_dtype
from funcnet.gradients.contraction import Contraction, keep
from funcnet.gradients.factor import Stacked
from funcnet.layer import Layer, a_layer, unrounded

Tree = Any


def reparametrized(layer: Layer, name: str, init: Callable, apply: Callable, fwd: Callable, bwd: Callable) -> Layer:
    """A layer with these functions and without parts; a loss keeps what a training step wants to know about it."""
    ours = {"name": name, "init": init, "apply": apply, "fwd": fwd, "bwd": bwd}
    paths = unrounded(layer)
    in_state = [f"layer/{path}" for path in paths]  # of frozen params, in the state of `spectral_norm`
    return replace(layer, **ours, made=None, unrounded=(*paths, *in_state))


def checked(layer: Layer, names: Any) -> tuple[str, ...]:
    """`names` as a tuple, if they are names and `layer` is a layer."""
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("names of params in a tuple", repr(names), 'write names=("kernel",)')
    a_layer(layer)
    return tuple(names)


def depths_of(layer: Layer, names: tuple[str, ...], params: Tree, state: Tree, x: Any) -> Tree:
    """For each of these kernels, the number of leading axes along which its layers are stacked, from its factor."""
    kernels = jax.tree.leaves(only_kernels(names, lambda kernel: kernel, params) if _has(names, params) else {})
    if not kernels or any(kernel.ndim < 2 for kernel in kernels):
        wanted = f"a layer with params {', '.join(names)} of at least two axes, the last that of its features"
        raise InputError(wanted, describe(params), "give a layer that has them, or the names of those it has")

    def factors(params, state, x, key):
        y, _, residuals = layer.fwd(params, state, x, key)
        dy = jax.tree.map(lambda leaf: leaf if is_floating(leaf) else None, y)
        return layer.bwd(params, residuals, dy, keep)[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    return only_kernels(names, _stacks, jax.eval_shape(factors, params, state, x, key))


def _stacks(factor: Any) -> int:
    return 1 + _stacks(factor.factor) if isinstance(factor, Stacked) else 0


def each_layer(depth: int, f: Callable) -> Callable:
    """f mapped over the layers of its arguments, which are stacked along `depth` leading axes."""
    return f if depth == 0 else jax.vmap(each_layer(depth - 1, f))


def through(
    layer: Layer,
    names: tuple[str, ...],
    kernels: Tree,
    params: Tree,
    residuals: Tree,
    dy: Any,
    contract: Contraction,
    answer: Callable,
    *more: Tree,
) -> tuple[Tree, Any]:
    """(dparams, dx) by the layer's `bwd`, with `answer(param, kernel, factor, *more)` at the places of the kernels."""
    factors, dx = layer.bwd(kernels, residuals, dy, contract.keeping)
    at_kernel = lambda kernel, factor, param, *more: answer(param, kernel, factor, *more)
    elsewhere = lambda param, factor, *_: jax.tree.map(lambda p, f: contract(f, p), param, factor)
    return at_kernels(names, at_kernel, kernels, factors, params, *more, elsewhere=elsewhere), dx


def columns(kernel: Array) -> Array:
    """A kernel [.., F] as [F, N], one row for each feature, in the accumulation dtype."""
    return flat(kernel).T.astype(sum_dtype(kernel.dtype))


def at_kernels(
    names: tuple[str, ...], f: Callable, tree: Tree, *more: Tree, elsewhere: Callable = lambda leaf, *_: leaf
) -> Tree:
    """`tree` with f(leaf, *leaves of more) where a key is one of `names`, and `elsewhere` of the same elsewhere."""
    if not isinstance(tree, Mapping):
        return elsewhere(tree, *more)
    return {
        key: f(value, *(m[key] for m in more))
        if key in names
        else at_kernels(names, f, value, *(m.get(key, {}) for m in more), elsewhere=elsewhere)
        for key, value in tree.items()
    }


def only_kernels(names: tuple[str, ...], f: Callable, tree: Tree, *more: Tree) -> Tree:
    """The same, with only the leaves at `names` and the dicts that contain them."""
    found = {}
    for key, value in tree.items():
        if key in names:
            found[key] = f(value, *(m[key] for m in more))
        elif isinstance(value, Mapping) and _has(names, value):
            found[key] = only_kernels(names, f, value, *(m[key] for m in more))
    return found


def _has(names: tuple[str, ...], tree: Tree) -> bool:
    return isinstance(tree, Mapping) and any(key in names or _has(names, value) for key, value in tree.items())
