"""The squared norm of each example's gradient of a kernel, by Gram matrices, and right where they cancel.

An example's gradient is G = X^T dY with X [T, D] and dY [T, F], and

    |G|^2 = sum_st (X X^T)[s, t] (dY dY^T)[s, t]

which never forms G. The terms have signs: where the shares of positions cancel, |G|^2 is a small difference of large
terms, of which rounding can make anything, also a negative number. With u the unit roundoff, the inner product of two
vectors of n entries has an error of about sqrt(n) u times their lengths, so that of the sum is at most about

    2 u sum_st (sqrt(D) |x_s| |x_t| |dY dY^T|[s, t] + sqrt(F) |X X^T|[s, t] |dy_s| |dy_t|)

and with e the smallest normal number, below which a product may vanish, at most

    e sum_st (D |dY dY^T|[s, t] + F |X X^T|[s, t] + 1)

more. Where that is more than 1e-3 of the sum, or the sum overflows, G is formed for that example after all, of rows
scaled by powers of two so that nothing vanishes or overflows. Its own error is about 2 sqrt(T) u sum_t |x_t| |dy_t|;
where that is too much of |G| as well, G is summed in twice the digits: the numbers are cut into halves, whose products
are exact, and what each addition loses is added up beside the sum. So |G|^2 has a relative error below 1e-3, unless |G|
is below some 1e-11 (float32) of sum_t |x_t| |dy_t|. Of numbers that are not finite it is infinite or NaN.

A parameter that is used several times has the positions of all its uses. A row that is looked up in a table is an outer
product too, of a row of the identity with dy. Derivatives are those of the sum of products, where that is finite.

Source: Li et al. 2021, arXiv:2110.05679, section 4, and Bu et al. 2022, arXiv:2205.10683 (Gram matrices); Higham and
Mary 2019, doi:10.1137/18M1226312 (errors of inner products); Ogita, Rump and Oishi 2005, doi:10.1137/030601818 (inner
products in twice the digits).
"""

import math
from collections.abc import Sequence
from functools import reduce
from itertools import combinations_with_replacement, product

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet.arithmetic import cut_as, placed

ERROR = 1e-3  # the relative error of a squared norm

Use = tuple[Array, Array]  # x [B, T, D], or ids [B, T], which stand for rows of the identity; and dy [B, T, F]


def squared_norms(uses: Sequence[Use], size: int) -> Array:
    """|sum of X^T dY over the uses|^2 for each example, [B]; `size` is D, and an id of that size is no row."""
    square, error = _by_grams(uses, size)
    if square.shape[0] == 0:
        return square
    finite, zero = _looked_at(uses, size)
    square = jnp.where(zero, 0.0, square)
    trusted = (jnp.isfinite(square) & (error <= ERROR * square)) | zero | ~finite
    numbers = jnp.arange(square.shape[0], dtype=jnp.int32)
    constant = lax.stop_gradient([(_together(x), _together(dy)) for x, dy in uses])

    def form_one(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        squares, trusted = carry
        i = jnp.max(jnp.where(trusted, 0, numbers))
        pairs = [(_rows(x[i], size, dy.dtype), dy[i]) for x, dy in constant]
        x, dy = (jnp.concatenate(parts) for parts in zip(*pairs, strict=True))
        return jnp.where(numbers == i, _formed(x, dy), squares), trusted | (numbers == i)

    # A loop that mostly has no turn: under `vmap`, where `lax.cond` would take both branches, it has none either.
    start = _together(lax.stop_gradient(square)), _together(trusted)
    found, _ = lax.while_loop(lambda carry: ~jnp.all(carry[1]), form_one, start)
    moving = jnp.where(jnp.isfinite(square), square, 0.0)
    return placed(found, square) + (moving - lax.stop_gradient(moving))


def _by_grams(uses: Sequence[Use], size: int) -> tuple[Array, Array]:
    """The squared norms by Gram matrices, and bounds of their errors, both [B]."""
    lengths = [(_lengths(x, size, dy.dtype), _lengths(dy, size, dy.dtype)) for x, dy in uses]
    squares, errors = [], []
    for i, j in combinations_with_replacement(range(len(uses)), 2):
        (x, dy), (other_x, other_dy) = uses[i], uses[j]
        grams = _gram(x, other_x, size, dy.dtype), _gram(dy, other_dy, size, dy.dtype)
        bounds = [a[:, :, None] * b[:, None] for a, b in zip(lengths[i], lengths[j], strict=True)]
        roots = math.sqrt(size), math.sqrt(dy.shape[-1])
        sizes = [jnp.abs(each) for each in grams]
        doubt = 2 * _roundoff(dy) * (roots[0] * bounds[0] * sizes[1] + roots[1] * sizes[0] * bounds[1])
        vanished = float(jnp.finfo(dy.dtype).tiny) * (size * sizes[1] + dy.shape[-1] * sizes[0] + 1)
        times = 1 if i == j else 2
        squares.append(times * jnp.sum(grams[0] * grams[1], axis=(1, 2)))
        errors.append(times * jnp.sum(doubt + vanished, axis=(1, 2)))
    return reduce(jnp.add, squares), reduce(jnp.add, errors)


def _looked_at(uses: Sequence[Use], size: int) -> tuple[Array, Array]:
    """For each example whether all its numbers are finite, and whether its gradient is 0, as all its products are."""
    largest = [(_largest(x, size, dy.dtype), _largest(dy, size, dy.dtype)) for x, dy in uses]
    finite = [jnp.all(jnp.isfinite(a) & jnp.isfinite(b), axis=1) for a, b in largest]
    zero = [jnp.all((a == 0) | (b == 0), axis=1) for a, b in largest]
    return reduce(jnp.logical_and, finite), reduce(jnp.logical_and, zero)


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


def _lengths(a: Array, size: int, dtype: np.dtype) -> Array:
    """The lengths of all rows, [B, T]."""
    if jnp.issubdtype(a.dtype, jnp.integer):
        return (a < size).astype(dtype)
    return jnp.sqrt(jnp.sum(jnp.square(a), axis=-1))


def _rows(x: Array, size: int, dtype: np.dtype) -> Array:
    """x [T, D], or the rows of the identity that ids [T] stand for."""
    return jax.nn.one_hot(x, size, dtype=dtype) if jnp.issubdtype(x.dtype, jnp.integer) else x


def _formed(x: Array, dy: Array) -> Array:
    """|X^T dY|^2 of one example, X^T dY in twice the digits where rounding would be too much of it."""
    x, dy, power = _near_one(x, dy)
    square = jnp.sum(jnp.square(jnp.dot(x.T, dy, precision="highest")))
    lengths = [jnp.sqrt(jnp.sum(jnp.square(a), axis=-1)) for a in (x, dy)]
    error = 2 * math.sqrt(len(x)) * _roundoff(dy) * jnp.sum(lengths[0] * lengths[1])
    trusted = jnp.isfinite(square) & (2 * error <= ERROR * jnp.sqrt(square))
    square = lax.cond(trusted, lambda: square, lambda: jnp.sum(jnp.square(careful_product(x, dy))))
    return square * power * power


def _near_one(x: Array, dy: Array) -> tuple[Array, Array, Array]:
    """X' and dY' with X^T dY = p X'^T dY', no entry larger than 4 and some products not small; and the power of two p.

    With 2^a_t and 2^b_t the powers of two in the largest entries of x_t and dy_t, row t of x is divided by the one and
    row t of dy by the other, and multiplied by 2^(a_t + b_t) / p, where p is the largest 2^(a_t + b_t) of all rows.
    """
    info = jnp.finfo(dy.dtype)
    one = info.maxexp - 1  # the exponent that 1 is stored with; 2 * one is the largest
    stored = (_stored_exponents(jnp.max(jnp.abs(each), axis=1)) for each in (x, dy))
    a, b = (jnp.minimum(each, 2 * one - 1) for each in stored)  # as the power for the largest has no inverse
    both = jnp.where((a > 0) & (b > 0), a + b, 0)  # 0 has exponent 0
    c = jnp.max(both)
    to_near_one = lambda n: _power_of_two(2 * one - n, dy.dtype)[:, None]
    by = _power_of_two(jnp.maximum(both - c + one, 0), dy.dtype)[:, None]  # 0 for what vanishes beside the largest
    return x * to_near_one(a), dy * to_near_one(b) * by, _power_of_two(jnp.clip(c - one, 1, 2 * one), dy.dtype)


def _stored_exponents(a: Array) -> Array:
    """The exponents of positive numbers, as they are stored: that of 1 is `maxexp - 1`."""
    bits = lax.bitcast_convert_type(a, jnp.dtype(f"int{8 * a.dtype.itemsize}"))
    return bits >> jnp.finfo(a.dtype).nmant


def _power_of_two(exponent: Array, dtype: np.dtype) -> Array:
    """The power of two of a stored exponent, or 0 for 0."""
    return lax.bitcast_convert_type(exponent << jnp.finfo(dtype).nmant, dtype)


def careful_product(x: Array, dy: Array) -> Array:
    """X^T dY of x [T, D] and dy [T, F], as in twice the digits of their dtype, and rounded once."""

    def add(carry: tuple[Array, Array], row: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
        total, lost = carry
        for x, dy in product(*map(_halves, row)):
            term = x[:, None] * dy[None]  # exact, of numbers of half of the digits
            new = total + term
            back = new - total
            total, lost = new, lost + ((total - (new - back)) + (term - back))
        return (total, lost), None

    zero = jnp.zeros((x.shape[1], dy.shape[1]), dy.dtype)
    return reduce(jnp.add, lax.scan(add, (zero, zero), (x, dy))[0])


def _halves(a: Array) -> tuple[Array, Array]:
    """Two arrays of half of the digits each, whose sum is a."""
    kind = jnp.finfo(a.dtype)
    high = lax.reduce_precision(a, kind.nexp, (kind.nmant + 1) // 2 - 1)
    return high, a - high


def _roundoff(a: Array) -> float:
    return float(jnp.finfo(a.dtype).eps) / 2


def _together(a: Array) -> Array:
    """`a` with its first axis whole, where explicit axes of a mesh cut it."""
    return jax.sharding.reshard(a, cut_as(a, 0)) if any(jax.typeof(a).sharding.spec) else a
