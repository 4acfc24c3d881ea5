"""Between funcnet's layers and plain JAX functions, in both directions.

    differentiable(layer)     (params, x) -> y, whose derivative in `jax.grad` is the layer's own `bwd`
    from_function(f, init)    the layer of f(params, x), whose `bwd` is `jax.vjp` of f

The first is for those who stay with Flax, Equinox or plain JAX: it is the only `jax.custom_vjp` here. The second is for
the one odd layer that nobody has derived a rule for.

Residuals of `from_function`: x alone; `bwd` runs f again.  Why: what `jax.vjp` would keep holds copies of parameters,
and its structure is a closure's, while residuals are arrays that depend on the input. Where forward and backward pass
are compiled into one program, outside of a scan, XLA finds that both runs are the same and makes one of them.
Numerics: in `from_function` all sums are accumulated and rounded as in JAX's own rules, not in float32.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.expect import is_array, is_floating
from funcnet._internal.sharding import varies, varying
from funcnet.combinators.sides import given_all
from funcnet.gradients.factor import Pulled
from funcnet.layer import Layer, a_layer, no_params, stateless
from funcnet.structure import constructor

Tree = Any


def differentiable(layer: Layer) -> Callable[..., Any]:
    """f(params, x, *, state=None, key=None) -> y: `fwd` as a JAX function, of which `jax.grad` is the layer's `bwd`.

    For layers with a state, f needs the state and returns (y, new state); neither state is differentiated, as if by
    `stop_gradient`. `key` is what `fwd` draws from. For evaluation there is `layer.apply`.

    f works under `jit`, `vmap`, `scan`, `jax.checkpoint` and any reverse mode, and under forward mode through it
    (`jax.jvp` of `jax.grad`, for Hessian-vector products). Forward mode of f itself is refused by JAX, as for every
    `custom_vjp`: use `layer.fwd` there, which is plain JAX. Inside `jax.shard_map` a gradient is summed, as in JAX,
    over those axes of the mesh that its parameter does not vary over; `layer.bwd` gives each device its own share.

    Raises:
        InputError: if `state` is left out for a layer that has one, and for what the layer refuses.
    """
    a_layer(layer)

    def plain(params, state, x, key):
        return layer.fwd(params, state, x, key)[:2]

    def forward(params, state, x, key):
        y, new_state, residuals = layer.fwd(params, state, x, key)
        return (y, new_state), (params, residuals)

    def backward(saved, cotangents):
        dy = _without_float0(cotangents[0])
        dparams, dx = varying(layer.bwd(*saved, dy), varies(saved, dy))
        return dparams, None, dx, None

    plain.__name__ = layer.name
    run = jax.custom_vjp(plain)
    run.defvjp(forward, backward)

    def function(params: Tree, x: Any, *, state: Tree = None, key: Array | None = None) -> Any:
        if state is None:
            state = _empty_state(layer, x)
        # JAX's own VJP of this cast sums a gradient over the devices that share the array that it belongs to.
        params, x = varying((params, x), varies(params, state, x, key))
        y, new_state = run(params, state, x, key)
        return (y, jax.tree.map(lax.stop_gradient, new_state)) if jax.tree.leaves(state) else y

    function.__name__ = layer.name
    return function


@by("differentiable")
def _empty_state(layer: Layer, x: Any) -> Tree:
    """The empty state of a layer that has none; it is nested as the layers are."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    state = jax.eval_shape(layer.init, key, expect.shapes(x))[1]
    if jax.tree.leaves(state):
        raise InputError(
            f"a state for {layer.name}", "none", "pass the state that init returned: f(params, x, state=state)"
        )
    return state


@constructor
def from_function(
    f: Callable[[Any, Any], Any], init: Callable[[Array, Any], Any] | None = None, *, positionwise: bool = False
) -> Layer[Any, tuple[()], Any]:
    """The layer y = f(params, x), by `jax.vjp`, for the one odd layer in a model; `summary` marks it as such.

    All contractions are defined for it. `per_example` and `squared_norm` run one backward pass of f for each example,
    since nothing is known of how its gradients are made. Where f mixes examples, per-example answers for the layers
    before it mean nothing.

    Args:
        f: differentiable by JAX, without state or randomness; inputs and outputs are pytrees of arrays.
        init: (key, x) -> params, floating arrays in a dict; None for no params, in which case f gets {}.
        positionwise: whether f looks at each position of x [B, T, ..] alone, as an expert of `moe` has to.

    Raises:
        InputError: if f or init is no function, init gives other params, or f gives no arrays.
    """
    for given in (f, init or no_params):
        if not callable(given):
            raise InputError(
                "functions f(params, x) and init(key, x)", describe(given), "give the functions themselves"
            )
    name = getattr(f, "__name__", "")
    name = name if name.isidentifier() else "from_function"

    def start(key: Array, x: Any) -> Any:
        params = (init or no_params)(expect.key(key), x)
        if not isinstance(params, dict) or not all(map(is_floating, jax.tree.leaves(params))):
            raise InputError("params as a dict of floating arrays", describe(params), "let init(key, x) return such")
        return params

    def fwd(params: Any, x: Any) -> tuple[Any, Any]:
        y = f(params, x)
        if not jax.tree.leaves(y) or not all(map(is_array, jax.tree.leaves(y))):
            raise InputError("a function with arrays as its value", describe(y), "let f(params, x) return JAX arrays")
        return y, x

    def pull(params: Any, x: Any, dy: Any) -> tuple[list[Array], Any]:
        # Made to vary over the same axes, all get each device's own share: jax.vjp sums the gradient of what is shared.
        params, x = varying((params, x), varies(params, x))
        leaves, structure = jax.tree.flatten(x)

        def moved(params: Any, moving: list[Any]) -> tuple[list[Array], Any]:
            y = f(params, jax.tree.unflatten(structure, map(_either, moving, leaves)))
            return [leaf for leaf in jax.tree.leaves(y) if _moves(leaf)], y

        moving = [leaf if _moves(leaf) else None for leaf in leaves]
        _, pullback, y = jax.vjp(moved, params, moving, has_aux=True)
        dparams, dmoving = pullback(_cotangents(dy, y))
        return jax.tree.leaves(dparams), jax.tree.unflatten(structure, dmoving)

    def bwd(params, x, dy, contract):
        gradients, dx = pull(params, x, dy)
        leaves, structure = jax.tree.flatten(params)

        def factor(i: int) -> Pulled:
            return Pulled(gradients[i], params, x, dy, _gradients, i)

        return jax.tree.unflatten(structure, [contract(factor(i), leaf) for i, leaf in enumerate(leaves)]), dx

    def _gradients(params: Any, x: Any, dy: Any) -> list[Array]:
        return pull(params, x, dy)[0]

    return given_all(stateless(name, start, fwd, bwd, positionwise=positionwise))


def _without_float0(cotangents: Tree) -> Tree:
    """None for the cotangents of integers, as layers have it, where JAX has an array of float0."""
    return jax.tree.map(lambda leaf: None if leaf.dtype == jax.dtypes.float0 else leaf, cotangents)


def _cotangents(dy: Tree, y: Tree) -> list[Array]:
    """The cotangents of the floating leaves of y; refuse what is no cotangent of y."""
    leaves = jax.tree.leaves(y)
    given = jax.tree.leaves(dy, is_leaf=lambda leaf: leaf is None)
    if len(given) != len(leaves):
        raise InputError(f"a cotangent like the output, {describe(y)}", describe(dy), "give bwd a dy like fwd's output")
    pairs = [pair for pair in zip(given, leaves, strict=True) if pair[0] is not None or _moves(pair[1])]
    checked = [expect.cotangent(dy, leaf.shape, leaf.dtype) for dy, leaf in pairs]
    return [dy for dy in checked if _moves(dy)]


def _moves(leaf: Any) -> bool:
    """Whether it has a derivative."""
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _either(leaf: Any, otherwise: Any) -> Any:
    return otherwise if leaf is None else leaf
