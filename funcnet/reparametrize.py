"""Combinators that change what a layer's kernels are made of: their directions and lengths, or themselves over sigma.

A kernel [.., F] is read as a matrix W [N, F], a column a feature.

Weight norm, with a vector v and a number g for each feature:

    W = g v / |v|           dg = <v / |v|, dW>          dv = g (dW - (v / |v|) dg) / |v|

Spectral norm, with sigma = right^T W left, which is W's largest singular value where the vectors are its singular ones:

    W' = W / sigma          dW = (dW' - <dW', W'> right left^T) / sigma

The vectors are kept in state, as constants of the step, and each training pass hands on those of one more iteration:
left <- W^T right, then right <- W left, each to length 1. So y, and `apply`, use the vectors as they were handed in,
and dW is the exact gradient. PyTorch iterates before it uses them, and leaves what that changes out of its gradient.

Both gradients are linear in dW, so an example's own gradient is that of its own dW: contractions that ask for examples,
or keep factors, get them as Shift of one gradient an example.

Residuals: the layer's own; of spectral norm beside them the vectors, which `bwd` is not handed otherwise.
Numerics: lengths, sigma and gradients in float32 for half precision. A feature whose v is 0 has the kernel 0 and the
gradient 0; a sigma of 0 divides by 1.
Source: Salimans and Kingma 2016, arXiv:1602.07868, section 2.1; Miyato et al. 2018, arXiv:1802.05957, algorithm 1.
"""

from collections.abc import Callable, Mapping
from dataclasses import replace
from itertools import count
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.arithmetic import flat, wide
from funcnet.expect import InputError, describe
from funcnet.factors import Contraction, Shift, per_example, total
from funcnet.layer import Layer, a_layer, child, unrounded
from funcnet.layers.normalize import unit, unit_pullback

Tree = Any
Pull = Callable[[Array], Any]


class Divided(NamedTuple):
    """Residuals of `spectral_norm`: the layer's, and the vectors by kernel."""

    layer: Tree
    vectors: Tree


def weight_norm(layer: Layer, names: tuple[str, ...] = ("kernel",)) -> Layer[dict, Any, Any]:
    """The same layer, every kernel a direction and a length for each feature: W = scale * direction / |direction|.

    A leaf kernel [.., F] of the layer's params, at any depth, becomes {"direction": [.., F], "scale": [F]}; `init`
    makes them so that W is the layer's own. For a repeated layer write repeat(weight_norm(layer), times).

    Args:
        layer: any layer with such params.
        names: of the leaves that are reparametrised.

    Raises:
        expect.InputError: if the layer has no such params, or is repeated inside.
    """
    names = _checked(layer, names)

    def whole(parts: Mapping[str, Array]) -> Array:
        expect.named(parts, ("direction", "scale"), "params")
        direction, _ = unit(_columns(parts["direction"]))
        kernel = direction.T * parts["scale"].astype(direction.dtype)[None]
        return kernel.reshape(parts["direction"].shape).astype(parts["direction"].dtype)

    def pull(parts: Mapping[str, Array], dkernel: Array) -> dict[str, Array]:
        direction, length = unit(_columns(parts["direction"]))
        d = _columns(dkernel)
        ddirection = unit_pullback(direction, length, d * parts["scale"].astype(d.dtype)[:, None])
        return {"direction": ddirection.T.reshape(dkernel.shape), "scale": jnp.sum(direction * d, axis=1)}

    def made(params: Tree) -> Tree:
        with expect.by("weight_norm"):
            return _at(names, whole, params)

    def init(key, x):
        params, state = layer.init(key, x)

        def split(kernel):
            _, length = unit(_columns(kernel))
            return {"direction": kernel, "scale": length[:, 0].astype(kernel.dtype)}

        with expect.by("weight_norm"):
            return _at(names, split, _with_kernels(names, params)), state

    def apply(params, state, x):
        return layer.apply(made(params), state, x)

    def fwd(params, state, x, key):
        return layer.fwd(made(params), state, x, key)

    def bwd(params, residuals, dy, contract=total):
        return _through(layer, names, made(params), params, residuals, dy, contract, pull)

    return _around(layer, "weight_norm", init, apply, fwd, bwd)


def spectral_norm(layer: Layer, names: tuple[str, ...] = ("kernel",), iterations: int = 1) -> Layer[Any, dict, Divided]:
    """The same layer with every kernel divided by its largest singular value, as far as power iteration knows it.

    Params are the layer's own; state is {"layer": its state, "vectors": {.., kernel: {"left": [F], "right": [N]}}}, in
    float32 or wider. `fwd` and `apply` divide by right^T W left, and `fwd` returns the vectors after `iterations` more.
    `init` makes 15 iterations, so do the same for params that come from elsewhere: call `fwd` some times, and keep its
    state. For a repeated layer write repeat(spectral_norm(layer), times).

    Args:
        layer: any layer with such params.
        names: of the leaves that are divided.
        iterations: of the power method in each training pass.

    Raises:
        expect.InputError: if the layer has no such params, or is repeated inside.
    """
    names, iterations = _checked(layer, names), expect.count(iterations, "iterations")

    def divided(kernel: Array, vectors: Mapping[str, Array]) -> tuple[Array, Array]:
        """The matrix over sigma, [F, N], and sigma."""
        matrix = _columns(kernel)
        left, right = (vectors[name].astype(matrix.dtype) for name in ("left", "right"))
        sigma = jnp.dot(left, matrix @ right)
        sigma = jnp.where(sigma == 0, jnp.ones_like(sigma), sigma)
        return matrix / sigma, sigma

    def iterated(kernel: Array, vectors: Mapping[str, Array], times: int) -> dict[str, Array]:
        matrix = _columns(jax.lax.stop_gradient(kernel))
        left, right = (vectors[name].astype(matrix.dtype) for name in ("left", "right"))
        for _ in range(times):
            left = _unless_zero(unit(matrix @ right)[0], left)
            right = _unless_zero(unit(left @ matrix)[0], right)
        return {"left": left.astype(vectors["left"].dtype), "right": right.astype(vectors["right"].dtype)}

    def whole(kernel: Array, vectors: Mapping[str, Array]) -> Array:
        return divided(kernel, vectors)[0].T.reshape(kernel.shape).astype(kernel.dtype)

    def made(params: Tree, vectors: Tree) -> Tree:
        with expect.by("spectral_norm"):
            return _at(names, whole, params, vectors)

    def init(key, x):
        params, state = layer.init(child(key, 0), x)
        keys = (child(child(key, 1), i) for i in count())  # two for each kernel

        def first(kernel):
            matrix = _columns(kernel)
            left, right = (unit(jax.random.normal(next(keys), (n,), matrix.dtype))[0] for n in matrix.shape)
            return iterated(kernel, {"left": left, "right": right}, 15)

        with expect.by("spectral_norm"):
            return params, {"layer": state, "vectors": _only(names, first, _with_kernels(names, params))}

    @expect.by("spectral_norm")
    def vectors_of(state: Tree) -> Tree:
        expect.named(state, ("layer", "vectors"), "state")
        return state["vectors"]

    def apply(params, state, x):
        return layer.apply(made(params, vectors_of(state)), state["layer"], x)

    def fwd(params, state, x, key):
        vectors = vectors_of(state)
        y, inner, residuals = layer.fwd(made(params, vectors), state["layer"], x, key)
        moved = _only(names, lambda kernel, v: iterated(kernel, v, iterations), params, vectors)
        return y, {"layer": inner, "vectors": moved}, Divided(residuals, vectors)

    def bwd(params, residuals, dy, contract=total):
        def pull(kernel: Array, dkernel: Array, vectors: Mapping[str, Array]) -> Array:
            matrix, sigma = divided(kernel, vectors)
            d = _columns(dkernel)
            along = jnp.sum(d * matrix) * vectors["left"].astype(d.dtype)[:, None]
            return ((d - along * vectors["right"].astype(d.dtype)[None]) / sigma).T.reshape(dkernel.shape)

        kernels, vectors = made(params, residuals.vectors), residuals.vectors
        return _through(layer, names, kernels, params, residuals.layer, dy, contract, pull, vectors)

    return _around(layer, "spectral_norm", init, apply, fwd, bwd)


def _around(layer: Layer, name: str, init: Callable, apply: Callable, fwd: Callable, bwd: Callable) -> Layer:
    """A layer, or a loss with all that a training step wants to know of it, without its parts."""
    ours = {"name": name, "init": init, "apply": apply, "fwd": fwd, "bwd": bwd}
    paths = unrounded(layer)
    in_state = [f"layer/{path}" for path in paths]  # of frozen params, in the state of `spectral_norm`
    return replace(layer, **ours, parts={}, rebuild=None, made=None, unrounded=(*paths, *in_state))


def _unless_zero(new: Array, old: Array) -> Array:
    """A zero matrix says nothing of directions, and 0 would stay 0 for ever."""
    return jnp.where(jnp.any(new != 0), new, old)


def _checked(layer: Layer, names: Any) -> tuple[str, ...]:
    """`names` if they are names, and the layer is one that is not repeated inside."""
    if not isinstance(names, (tuple, list)) or not names or not all(isinstance(name, str) for name in names):
        raise InputError("names of params in a tuple", repr(names), 'write names=("kernel",)')
    if _repeats(a_layer(layer)):
        remedy = "write repeat(weight_norm(layer), times), and likewise for spectral_norm"
        raise InputError("a layer without a repeat inside, whose kernels are stacked", layer.name, remedy)
    return tuple(names)


def _repeats(layer: Layer) -> bool:
    inner = layer.made.inner if layer.combinator and layer.made else None
    return layer.combinator == "repeat" or any(map(_repeats, [*layer.parts.values(), *([inner] if inner else [])]))


def _with_kernels(names: tuple[str, ...], params: Tree) -> Tree:
    """`params` if they have such leaves, all of at least two axes."""
    leaves = jax.tree.leaves(_only(names, lambda kernel: kernel, params) if _has(names, params) else {})
    if not leaves or any(leaf.ndim < 2 for leaf in leaves):
        wanted = f"a layer with params {', '.join(names)} of at least two axes, the last that of its features"
        raise InputError(wanted, describe(params), "give a layer that has them, or the names of those it has")
    return params


def _through(
    layer: Layer,
    names: tuple[str, ...],
    kernels: Tree,
    params: Tree,
    residuals: Tree,
    dy: Any,
    contract: Contraction,
    pull: Callable,
    *more: Tree,
) -> tuple[Tree, Any]:
    """(dparams, dx): the layer's `bwd` with its kernels, whose gradients are pulled back to what they are made of.

    A sum can be pulled back itself. Whatever else is asked for gets the gradients of the examples, which the compiler
    makes in the same backward pass as the other leaves' answers.
    """
    summed = not contract.by_example and contract.name != "keep"
    found = total if summed else per_example
    widely = replace(found, of=lambda factor, param: found.of(factor, param.astype(wide(param.dtype))))
    dkernels, _ = layer.bwd(kernels, residuals, dy, widely)
    dparams, dx = layer.bwd(kernels, residuals, dy, contract)

    def answer(_: Any, dkernel: Array, param: Any, *more: Any) -> Any:
        each = dkernel[None] if summed else dkernel
        pulled = jax.vmap(lambda d: pull(param, d, *more))(each)
        return jax.tree.map(lambda part, p: contract(Shift(part), p), pulled, param)

    return _at(names, answer, dparams, dkernels, params, *more), dx


def _columns(kernel: Array) -> Array:
    """A kernel [.., F] as [F, N], a feature a row, in the accumulation dtype."""
    return flat(kernel).T.astype(wide(kernel.dtype))


def _at(names: tuple[str, ...], f: Callable, tree: Tree, *more: Tree) -> Tree:
    """`tree` with f(leaf, *leaves of more) where a key is one of `names`."""
    if not isinstance(tree, Mapping):
        return tree
    return {
        key: f(value, *(m[key] for m in more))
        if key in names
        else _at(names, f, value, *(m.get(key, {}) for m in more))
        for key, value in tree.items()
    }


def _only(names: tuple[str, ...], f: Callable, tree: Tree, *more: Tree) -> Tree:
    """The same with nothing but those leaves, and the dicts that they are in."""
    found = {}
    for key, value in tree.items():
        if key in names:
            found[key] = f(value, *(m[key] for m in more))
        elif isinstance(value, Mapping) and _has(names, value):
            found[key] = _only(names, f, value, *(m[key] for m in more))
    return found


def _has(names: tuple[str, ...], tree: Tree) -> bool:
    return isinstance(tree, Mapping) and any(key in names or _has(names, value) for key, value in tree.items())
