"""A parameter's gradient as its factors, and the contractions that turn factors into answers.

A layer's `bwd` does not add a gradient up. It names the two things the gradient is made of and hands them to
`contract` together with the parameter:

    {"kernel": contract(Outer(x, dy), kernel), "bias": contract(Shift(dy), bias)}

With b over examples and t over positions (every axis between the first and the parameter's own):

    Outer(x, dy)       dL/dkernel[i, j] = sum_bt x[b, t, i] dy[b, t, j]
    Shift(dy)          dL/dbias[j]      = sum_bt dy[b, t, j]
    Scale(x_hat, dy)   dL/dscale[j]     = sum_bt x_hat[b, t, j] dy[b, t, j]

A contraction is one function of a factor and its parameter, so one backward pass serves them all:

    total          the gradient itself: [*param]
    per_example    one gradient an example: [B, *param]
    squared_norm   one squared norm an example, float32 or wider: [B]
    keep           the factor as it is, to be contracted later, as often as one likes

`layers` counts the axes that `repeat` has stacked in front of the batch axis, one a nesting; every contraction is
mapped over them. Sums run in float32 for half-precision inputs.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet.expect import InputError, describe


def _static(default: int) -> Any:
    return field(default=default, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Outer:
    """x [*layers, B, .., D] and dy [*layers, B, .., F] of a kernel [D, F]."""

    x: Array
    dy: Array
    layers: int = _static(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Shift:
    """dy [*layers, B, .., F] of a bias [F]."""

    dy: Array
    layers: int = _static(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale:
    """x_hat and dy [*layers, B, .., F] of a scale [F]."""

    x_hat: Array
    dy: Array
    layers: int = _static(0)


Factor = Outer | Shift | Scale


def is_factor(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=fn.is_factor)` over gradients that `keep` left as factors."""
    return isinstance(x, Factor)


@dataclass(frozen=True, eq=False)
class Contraction:
    """What to make of a factor, and of the answers that `repeat` has stacked along a new first axis.

    Args:
        name: how errors call it.
        of: (factor, param) -> answer, for a factor without layer axes.
        stacked: answer with a layer axis in front -> the answer for the stacked parameter.
    """

    name: str
    of: Callable[[Any, Array], Any]
    stacked: Callable[[Any], Any] = lambda answer: answer

    def __call__(self, factor: Any, param: Array) -> Any:
        if not hasattr(factor, "layers"):
            raise _unknown(factor, self.name)
        if factor.layers == 0:
            return self.of(factor, param)
        return self.stacked(jax.vmap(self)(replace(factor, layers=factor.layers - 1), param))


def contraction(
    stacked: Callable[[Any], Any] = lambda answer: answer,
) -> Callable[[Callable[[Any, Array], Any]], Contraction]:
    """A decorator that makes a contraction of a function of (factor, param); `stacked` as in `Contraction`."""
    return lambda of: Contraction(getattr(of, "__name__", "contraction"), of, stacked)


def wide(dtype: Any) -> Any:
    """The dtype to accumulate in: float32 for half precision, else the dtype itself."""
    return jnp.dtype(jnp.float32) if jnp.finfo(dtype).bits < 32 else jnp.dtype(dtype)


def flat(x: Array) -> Array:
    """x [.., D] as a matrix [N, D]: XLA then needs no transposes around a contraction over the leading axes."""
    return x.reshape(-1, x.shape[-1])


def product(a: Array, b: Array, axes: tuple[int, int], like: Array) -> Array:
    """Contract axis `axes[0]` of matrix `a` with `axes[1]` of `b`, summed wide, in the sharding of `like`.

    Under a mesh with explicit axes a contraction over a sharded batch must say how its result lies.
    """
    dimensions = (((axes[0],), (axes[1],)), ((), ()))
    sharding = jax.typeof(like).sharding
    return lax.dot_general(a, b, dimensions, preferred_element_type=wide(a.dtype), out_sharding=sharding)


def placed(a: Array, like: Array) -> Array:
    """`a` in the sharding of `like`; under a mesh without explicit axes, `a` itself."""
    sharding = jax.typeof(like).sharding
    return a if jax.typeof(a).sharding == sharding else jax.sharding.reshard(a, sharding)


def _wide_examples(a: Array, name: str) -> Array:
    """a [B, .., F] as [B, T, F] in the accumulation dtype."""
    if a.ndim < 2:
        remedy = "give the model a batch axis, or use total"
        raise InputError(f"an example axis in front for {name}", describe(a), remedy)
    return a.reshape(a.shape[0], -1, a.shape[-1]).astype(wide(a.dtype))


@contraction()
def total(factor: Factor, param: Array) -> Array:
    """The gradient: summed over examples and positions in float32 or wider, in the parameter's dtype and sharding."""
    match factor:
        case Outer(x, dy):
            answer = product(flat(x), flat(dy), (0, 0), param)
        case Shift(dy):
            answer = placed(jnp.sum(flat(dy), axis=0, dtype=wide(dy.dtype)), param)
        case Scale(x_hat, dy):
            high = wide(dy.dtype)
            answer = placed(jnp.sum(flat(x_hat).astype(high) * flat(dy).astype(high), axis=0), param)
        case _:
            raise _unknown(factor, "total")
    return answer.astype(param.dtype)


@contraction(lambda answer: jnp.moveaxis(answer, 0, 1))
def per_example(factor: Factor, param: Array) -> Array:
    """One gradient an example, [B, *param] ([B, L, *param] under `repeat`), in the parameter's dtype."""
    return _per_example(factor, "per_example").astype(param.dtype)


def _per_example(factor: Factor, name: str) -> Array:
    match factor:
        case Outer(x, dy):
            return jnp.einsum("bti,btj->bij", _wide_examples(x, name), _wide_examples(dy, name))
        case Shift(dy):
            return jnp.sum(_wide_examples(dy, name), axis=1)
        case Scale(x_hat, dy):
            return jnp.sum(_wide_examples(x_hat, name) * _wide_examples(dy, name), axis=1)
        case _:
            raise _unknown(factor, name)


@contraction(lambda answer: jnp.sum(answer, axis=0))
def squared_norm(factor: Factor, param: Array) -> Array:
    """One squared gradient norm an example, [B], in float32 or wider; summed over the layers of `repeat`.

    For a kernel the gradient of an example is G = X^T dY with X [T, D] and dY [T, F], and

        |G|^2 = sum_st (X X^T)[s, t] (dY dY^T)[s, t]

    which never forms G. It is used where its two T x T matrices are smaller than G (2 T^2 <= D F), as in mixed ghost
    clipping. Source: Li et al. 2021, arXiv:2110.05679, section 4; Bu et al. 2022, arXiv:2205.10683.
    """
    if isinstance(factor, Outer):
        x, dy = _wide_examples(factor.x, "squared_norm"), _wide_examples(factor.dy, "squared_norm")
        if 2 * x.shape[1] ** 2 <= x.shape[2] * dy.shape[2]:
            gram = [jnp.einsum("bsi,bti->bst", a, a) for a in (x, dy)]
            return jnp.sum(gram[0] * gram[1], axis=(1, 2))
    gradient = _per_example(factor, "squared_norm")
    return jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim)))


@contraction(lambda factor: replace(factor, layers=factor.layers + 1))
def keep(factor: Factor, param: Array) -> Factor:
    """The factor itself. Contract it later: `total(factor, param)`, `squared_norm(factor, param)`."""
    return factor


def _unknown(factor: Any, name: str) -> InputError:
    known = ", ".join(kind.__name__ for kind in Factor.__args__)
    return InputError(f"a factor that {name} knows ({known})", describe(factor), "return one of them from bwd")
