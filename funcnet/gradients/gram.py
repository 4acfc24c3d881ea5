"""The squared norm of each example's gradient of a kernel, by Gram matrices, and accurate where their terms cancel.

An example's gradient is G = X^T dY with X [T, D] and dY [T, F], and

    |G|^2 = sum_st (X X^T)[s, t] (dY dY^T)[s, t]

which never forms G. The terms have signs: where the contributions of positions cancel, |G|^2 is a small difference of
large terms, and rounding can turn it into any number, even a negative one. With u the unit roundoff, the inner product
of two vectors of n entries has an error of about sqrt(n) u times their lengths, so the error of the sum is at most
about

    2 u sum_st (sqrt(D) |x_s| |x_t| |dY dY^T|[s, t] + sqrt(F) |X X^T|[s, t] |dy_s| |dy_t|)

and with e the smallest normal number, below which a product may vanish, at most

    e sum_st (D |dY dY^T|[s, t] + F |X X^T|[s, t] + 1)

more. Where that is more than 1e-3 of the sum, or the sum overflows, G is formed for that example after all, in float64,
whether JAX has it enabled or not: products of two float32 numbers are exact there, and none of them overflows or
vanishes. The error of |G| is then about 2 sqrt(T) u sum_t |x_t| |dy_t| with the u of float64, 1e-16. So |G|^2 has a
relative error below 1e-3, unless |G| is below some 1e-12 of sum_t |x_t| |dy_t|. Where x or dy is not finite, |G|^2 is
infinite or NaN. For a single position |G| = |x| |dy|.

For a parameter that is used several times the positions are those of all its uses. A table lookup is an outer product
too, of a row of the identity with dy. Derivatives are those of the sum of products above, where it is finite.

Source: Li et al. 2021, arXiv:2110.05679, section 4, and Bu et al. 2022, arXiv:2205.10683 (Gram matrices); Higham and
Mary 2019, doi:10.1137/18M1226312 (errors of inner products).
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations_with_replacement

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal.sharding import placed, sharded_as

ERROR = 1e-3  # the largest relative error that a squared norm may have

Positions = tuple[Array, Array]  # x [B, T, D], or ids [B, T], which stand for rows of the identity; and dy [B, T, F]


def squared_norms(uses: Sequence[Positions], size: int) -> Array:
    """|sum of X^T dY over the uses|^2 for each example, [B]; `size` is D, and an id equal to it stands for no row."""
    if len(uses) == 1 and uses[0][1].shape[1] == 1:
        return _by_lengths(*uses[0])
    square, error = _by_grams(uses, size)
    if square.shape[0] == 0:
        return square
    trusted = jnp.isfinite(square) & (error <= ERROR * square)
    zero = _all_zero(uses, size)
    numbers = jnp.arange(square.shape[0], dtype=jnp.int32)
    constant = lax.stop_gradient([(_together(x), _together(dy)) for x, dy in uses])

    def form_one(squares: Array) -> Array:
        i = jnp.max(jnp.where(squares < 0, numbers, 0))
        return squares.at[i].set(_formed([(x[i], dy[i]) for x, dy in constant], size))

    # A loop that mostly runs zero times, and does so under `vmap` too, where `lax.cond` would run both branches.
    start = _together(lax.stop_gradient(jnp.where(zero, 0.0, jnp.where(trusted, square, -1.0))))
    found = lax.while_loop(lambda squares: jnp.any(squares < 0), form_one, start)
    moving = jnp.where(jnp.isfinite(square), square, 0.0)
    return placed(found, square) + (moving - lax.stop_gradient(moving))


def _by_lengths(x: Array, dy: Array) -> Array:
    """|x|^2 |dy|^2 of one position, [B]: nothing cancels, and squares of numbers scaled to near 1 do not overflow."""
    tiny = float(jnp.finfo(dy.dtype).tiny)
    sizes = [lax.stop_gradient(jnp.max(jnp.abs(a[:, 0]), axis=1)) for a in (x, dy)]
    sizes = [jnp.clip(each, tiny, 1 / tiny) for each in sizes]  # so that the inverse is a normal number
    squares = [jnp.sum(jnp.square(a[:, 0] / by[:, None]), axis=1) for a, by in zip((x, dy), sizes, strict=True)]
    size = sizes[0] * sizes[1]
    return squares[0] * squares[1] * size * size


def _by_grams(uses: Sequence[Positions], size: int) -> tuple[Array, Array]:
    """The squared norms by Gram matrices, and bounds of their errors, both [B]."""
    dtype, features = uses[0][1].dtype, uses[0][1].shape[-1]
    pairs = combinations_with_replacement(range(len(uses)), 2)
    grams = {(i, j): [_gram(a, b, size, dtype) for a, b in zip(uses[i], uses[j], strict=True)] for i, j in pairs}
    lengths = [[jnp.sqrt(jnp.diagonal(gram, axis1=1, axis2=2)) for gram in grams[i, i]] for i in range(len(uses))]
    info, roots = jnp.finfo(dtype), (math.sqrt(size), math.sqrt(features))
    squares, errors = [], []
    for (i, j), both in grams.items():
        bounds = [a[:, :, None] * b[:, None] for a, b in zip(lengths[i], lengths[j], strict=True)]
        sizes = [jnp.abs(each) for each in both]
        doubt = float(info.eps) * (roots[0] * bounds[0] * sizes[1] + roots[1] * sizes[0] * bounds[1])
        vanished = float(info.tiny) * (size * sizes[1] + features * sizes[0] + 1)
        times = 1 if i == j else 2
        squares.append(times * jnp.sum(both[0] * both[1], axis=(1, 2)))
        errors.append(times * jnp.sum(doubt + vanished, axis=(1, 2)))
    return reduce(jnp.add, squares), reduce(jnp.add, errors)


def _all_zero(uses: Sequence[Positions], size: int) -> Array:
    """Whether each example's gradient is 0 because each of its products has a factor 0, [B]."""
    smaller = [jnp.minimum(_largest(x, size, dy.dtype), _largest(dy, size, dy.dtype)) for x, dy in uses]
    return reduce(jnp.maximum, [jnp.max(each, axis=1) for each in smaller]) == 0


def _largest(a: Array, size: int, dtype: np.dtype) -> Array:
    """The largest magnitude in each row, [B, T]."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return (a < size).astype(dtype)
    return lax.stop_gradient(jnp.max(jnp.abs(a), axis=-1))


def _gram(a: Array, b: Array, size: int, dtype: np.dtype) -> Array:
    """The inner products of all rows of a with all of b, [B, S, T]."""
    match jnp.issubdtype(a.dtype, jnp.integer), jnp.issubdtype(b.dtype, jnp.integer):
        case True, True:
            return ((a[:, :, None] == b[:, None]) & (a[:, :, None] < size)).astype(dtype)
        case True, False:
            return jax.vmap(lambda a, b: b.T.at[a].get(mode="fill", fill_value=0))(a, b)
        case False, True:
            return jnp.swapaxes(_gram(b, a, size, dtype), 1, 2)
    return jnp.einsum("bsi,bti->bst", a, b, precision="highest")


def _formed(uses: Sequence[Positions], size: int) -> Array:
    """|sum of X^T dY|^2 of one example, formed in float64."""
    dtype = uses[0][1].dtype
    with jax.enable_x64(True):
        parts = zip(*((_rows(x, size), dy.astype("float64")) for x, dy in uses), strict=True)
        x, dy = (jnp.concatenate(each) for each in parts)
        # Not `jnp.dot`: it names its dtype, which `vmap` refuses where float64 is not enabled.
        gradient = lax.dot_general(x, dy, (((0,), (0,)), ((), ())), precision="highest")
        return jnp.sum(jnp.square(gradient)).astype(dtype)


def _rows(x: Array, size: int) -> Array:
    """x [T, D] in float64, or the rows of the identity that ids [T] stand for."""
    return jax.nn.one_hot(x, size, dtype="float64") if jnp.issubdtype(x.dtype, jnp.integer) else x.astype("float64")


def _together(a: Array) -> Array:
    """`a` with all of its axes unsharded, where one is sharded over explicit axes of a mesh."""
    return jax.sharding.reshard(a, sharded_as(a, 0)) if any(jax.typeof(a).sharding.spec) else a
