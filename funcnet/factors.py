"""A parameter's gradient as its factors, and the contractions that turn factors into answers.

A layer's `bwd` does not add a gradient up. It names the two things the gradient is made of and hands them to
`contract` together with the parameter:

    {"kernel": contract(Outer(x, dy), kernel), "bias": contract(Shift(dy), bias)}

With b over examples and t over positions (every axis between the first and the parameter's own):

    Outer(x, dy)       dL/dkernel[i, j] = sum_bt x[b, t, i] dy[b, t, j]
    Shift(dy)          dL/dbias[j]      = sum_bt dy[b, t, j]
    Scale(x_hat, dy)   dL/dscale[j]     = sum_bt x_hat[b, t, j] dy[b, t, j]
    Gather(ids, dy)    dL/dtable[v, j]  = sum_bt [ids[b, t] = v] dy[b, t, j]
    Window(x, dy)      dL/dkernel[o, i, j] = sum_bt x[b, s t + o, i] dy[b, t, j]        s the stride; also transposed
    Blocks(..)         one of these for each block of the parameter's last axis, formed when it is contracted
    Sum(factors)       the sum of theirs: of a parameter that is used several times
    Pulled(pull)       what `jax.vjp` of a function gives that no factors are known of

A contraction is one function of a factor and its parameter, so one backward pass serves them all:

    total          the gradient itself: [*param]
    per_example    one gradient an example: [B, *param]
    squared_norm   one squared norm an example, float32 or wider: [B]
    rows           the touched rows of a table, `Rows`; for every other factor the gradient itself
    keep           the factor as it is, to be contracted later, as often as one likes

`layers` counts the axes that `repeat` has stacked in front of the batch axis, one a nesting; every contraction is
mapped over them. `mixes` says that the factor is of a layer whose output for one example depends on the others, such as
batch norm: no example has a gradient of its own, and per_example and squared_norm are refused. Sums run in float32 for
half-precision inputs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet.arithmetic import cut_as, flat, placed, product, whole, wide
from funcnet.columns import block, blocks, joined
from funcnet.correlation import correlation, correlation_by_taps
from funcnet.expect import InputError, describe
from funcnet.gram import squared_norms
from funcnet.window import Windows


def _static(default: int | bool) -> Any:
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
    """dy [*layers, B, .., *param] of a bias, mostly [F]."""

    dy: Array
    layers: int = _static(0)
    mixes: bool = _static(False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Scale:
    """x_hat and dy [*layers, B, .., F] of a scale [F]; x_hat can be wider than dy."""

    x_hat: Array
    dy: Array
    layers: int = _static(0)
    mixes: bool = _static(False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Gather:
    """ids [*layers, B, ..] and dy [*layers, B, .., D] of a table [size, D]; an id out of range adds nothing."""

    ids: Array
    dy: Array
    size: int = field(metadata={"static": True})
    layers: int = _static(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Window:
    """x [*layers, B, *spatial, C] and dy [*layers, B, *outputs, F] of a kernel [*window, C / groups, F].

    Of a transposed convolution, `transposed`: its windows lie on dy, one for each entry of x, and its kernel
    [*window, C, F] is that of the convolution from dy's shape to x's, flipped, features and channels exchanged.
    """

    x: Array
    dy: Array
    geometry: Windows = field(metadata={"static": True})
    layers: int = _static(0)
    transposed: bool = _static(False)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks:
    """A factor that is formed block by block, for a parameter whose last axis is too long to form it whole.

    Attributes:
        saved: arrays, their batch axis in front or shared by all examples.
        of: (saved, i, size) -> the factor of `block(param, i, size)`, a plain function; what the block has in common
            with the one before it is zero in it.
        size: of a block.
    """

    saved: Any
    of: Callable[[Any, Array, int], Any] = field(metadata={"static": True})
    size: int = field(metadata={"static": True})
    layers: int = _static(0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Sum:
    """The factors of one parameter, one for each of its uses; their `layers` are counted here."""

    factors: tuple[Any, ...]
    layers: int = _static(0)

    @property
    def mixes(self) -> bool:
        """Whether one of them does."""
        return any(getattr(each, "mixes", False) for each in self.factors)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pulled:
    """gradient [*layers, *param], and `pull(params, x, dy)[leaf]`, which gives it for other cotangents too."""

    gradient: Array
    params: Any
    x: Any
    dy: Any
    pull: Callable[[Any, Any, Any], list[Array]] = field(metadata={"static": True})
    leaf: int = field(metadata={"static": True})
    layers: int = _static(0)


Factor = Outer | Shift | Scale | Gather | Window | Blocks | Sum | Pulled


def is_factor(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=fn.is_factor)` over gradients that `keep` left as factors."""
    return isinstance(x, Factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The gradient of a table as its touched rows: `jnp.zeros_like(table).at[ids].add(rows)`, and zero elsewhere.

    Attributes:
        ids: [N], ascending, each row of the table once, and then as often as needed the table's size, which is no row:
            JAX leaves it out of `table.at[ids].add(..)`. N is the number of ids looked up. Stacked [L, N] by `repeat`.
        rows: [N, D], the sum of dy over the positions of that id; zero where there is no row.
    """

    ids: Array
    rows: Array


@dataclass(frozen=True, eq=False)
class Contraction:
    """What to make of a factor, and of the answers that `repeat` has stacked along a new first axis.

    Args:
        name: how errors call it.
        of: (factor, param) -> answer, for a factor without layer axes.
        stacked: answer with a layer axis in front -> the answer for the stacked parameter.
        by_example: whether it answers for each example by itself.
        joined: (answers, param) -> the answer for a parameter, from those for the blocks of its last axis, stacked in
            front; None for a contraction that makes nothing of the numbers themselves, and takes `Blocks` as they are.
    """

    name: str
    of: Callable[[Any, Array], Any]
    stacked: Callable[[Any], Any] = lambda answer: answer
    by_example: bool = False
    joined: Callable[[Any, Array], Any] | None = None

    def __call__(self, factor: Any, param: Array) -> Any:
        if not hasattr(factor, "layers"):
            raise _unknown(factor, self.name)
        if getattr(factor, "mixes", False):
            mixing(self)
        if factor.layers == 0:
            if self.joined is None or not isinstance(factor, Blocks):
                return self.of(factor, param)
            return self.joined(lax.map(lambda i: self._of_block(factor, param, i), blocks(param, factor.size)), param)
        return self.stacked(jax.vmap(self)(replace(factor, layers=factor.layers - 1), param))

    def _of_block(self, factor: Blocks, param: Array, i: Array) -> Any:
        return self(factor.of(factor.saved, i, factor.size), block(param, i, factor.size))


def contraction(
    stacked: Callable[[Any], Any] = lambda answer: answer,
    by_example: bool = False,
    joined: Callable[[Any, Array], Any] | None = None,
) -> Callable[[Callable[[Any, Array], Any]], Contraction]:
    """A decorator that makes a contraction of a function of (factor, param); the options are those of `Contraction`."""
    return lambda of: Contraction(getattr(of, "__name__", "contraction"), of, stacked, by_example, joined)


def mixing(contract: Contraction) -> None:
    """Refuse a contraction that answers for each example by itself: the `bwd` of a layer that mixes them calls this."""
    if contract.by_example:
        wanted = "a contraction over the whole batch: each example's output depends on all others here, so none has a"
        remedy = "use total or keep, or a layer that looks at one example at a time, such as group_norm"
        raise InputError(f"{wanted} gradient of its own", contract.name, remedy)


def _wide_examples(a: Array, name: str, rank: int = 1) -> Array:
    """a [B, .., *param] as [B, T, *param] in the accumulation dtype, `rank` the number of the parameter's axes."""
    if a.ndim < 1 + rank:
        remedy = "give the model a batch axis, or use total"
        raise InputError(f"an example axis in front for {name}", describe(a), remedy)
    steps = math.prod(a.shape[1 : a.ndim - rank])  # not -1, which no examples would leave open
    return a.reshape(a.shape[0], steps, *a.shape[a.ndim - rank :]).astype(wide(a.dtype))


def _in_table(factor: Gather) -> tuple[Array, Array]:
    """ids and dy; for an id out of range the table's size, which is no row, and zero."""
    ids = whole(factor.ids)
    inside = (ids >= 0) & (ids < factor.size)
    return jnp.where(inside, ids, factor.size), jnp.where(inside[..., None], factor.dy, jnp.zeros_like(factor.dy))


def _table(ids: Array, dy: Array, size: int) -> Array:
    """The table [size, D] of the sums of dy [N, D] by ids [N], summed wide."""
    zeros = jnp.zeros((size, dy.shape[-1]), wide(dy.dtype))
    # A scatter of a sharded batch must say how its result lies: whole.
    return zeros.at[ids].add(dy.astype(zeros.dtype), mode="drop", out_sharding=cut_as(dy, 0))


def _of_window(factor: Window, param: Array, correlation: Callable[..., Array]) -> Array:
    """The gradient of the kernel by `correlation(x, dy, geometry, kernel)`."""
    if not factor.transposed:
        return correlation(factor.x, factor.dy, factor.geometry, param)
    answer = correlation(factor.dy, factor.x, factor.geometry, jnp.swapaxes(param, -1, -2))
    return lax.rev(jnp.swapaxes(answer, -1, -2), range(param.ndim - 2))


def _touched(ids: Array, dy: Array, size: int) -> Rows:
    """The same table as its rows."""
    unique, place = jnp.unique(ids, return_inverse=True, size=ids.size, fill_value=size)
    return Rows(unique, _table(place, dy, ids.size))


@contraction(joined=joined)
def total(factor: Factor, param: Array) -> Array:
    """The gradient: summed over examples and positions in float32 or wider, in the parameter's dtype and sharding."""
    match factor:
        case Outer(x, dy):
            answer = product(flat(x), flat(dy), (0, 0), param)
        case Shift(dy):
            answer = placed(jnp.sum(dy.reshape(-1, *param.shape), axis=0, dtype=wide(dy.dtype)), param)
        case Scale(x_hat, dy):
            high = wide(dy.dtype)
            answer = placed(jnp.sum(flat(x_hat).astype(high) * flat(dy).astype(high), axis=0), param)
        case Gather(size=size):
            ids, dy = _in_table(factor)
            answer = placed(_table(ids.reshape(-1), flat(dy), size), param)
        case Window():
            answer = placed(_of_window(factor, param, correlation), param)
        case Sum(factors):
            answer = reduce(jnp.add, [total(each, param.astype(wide(param.dtype))) for each in factors])
        case Pulled(gradient):
            answer = gradient
        case _:
            raise _unknown(factor, "total")
    return answer.astype(param.dtype)


@contraction(lambda answer: jnp.moveaxis(answer, 0, 1), by_example=True, joined=joined)
def per_example(factor: Factor, param: Array) -> Array:
    """One gradient an example, [B, *param] ([B, L, *param] under `repeat`), in the parameter's dtype."""
    return _per_example(factor, param, "per_example").astype(param.dtype)


def _per_example(factor: Factor, param: Array, name: str) -> Array:
    match factor:
        case Outer(x, dy):
            return jnp.einsum("bti,btj->bij", _wide_examples(x, name), _wide_examples(dy, name))
        case Shift(dy):
            return jnp.sum(_wide_examples(dy, name, param.ndim), axis=1)
        case Scale(x_hat, dy):
            return jnp.sum(_wide_examples(x_hat, name) * _wide_examples(dy, name), axis=1)
        case Gather(size=size):
            return jax.vmap(partial(_table, size=size))(*_examples_in_table(factor, name))
        case Window(x, dy):
            one = lambda x, dy: replace(factor, x=x[None], dy=dy[None])
            return jax.vmap(lambda x, dy: _of_window(one(x, dy), param, correlation_by_taps))(x, dy)
        case Sum(factors):
            return reduce(jnp.add, [_per_example(each, param, name) for each in factors])
        case Blocks():
            return per_example(factor, param.astype(wide(param.dtype)))
        case Pulled():
            return _one_by_one(factor, name, lambda gradient: gradient)
        case _:
            raise _unknown(factor, name)


def _one_by_one(factor: Pulled, name: str, answer: Callable[[Array], Array]) -> Array:
    """The answer for each example's gradient, wide: pulled back of its own cotangent, in turn.

    Slow, a whole backward pass an example, but right whatever the function does with its examples.
    """
    leaves = jax.tree.leaves(factor.dy)
    if any(leaf.ndim == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) != 1:
        remedy = "let the function give outputs with one batch axis, or use total"
        raise InputError(f"an example axis in front for {name}", describe(factor.dy), remedy)
    each = jnp.arange(leaves[0].shape[0])

    def one(i: Array) -> Array:
        own = lambda leaf: jnp.where((each == i).reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))
        gradient = factor.pull(factor.params, factor.x, jax.tree.map(own, factor.dy))[factor.leaf]
        return answer(gradient.astype(wide(gradient.dtype)))

    return lax.map(one, each)


@contraction(
    lambda answer: jnp.sum(answer, axis=0), by_example=True, joined=lambda answers, param: jnp.sum(answers, axis=0)
)
def squared_norm(factor: Factor, param: Array) -> Array:
    """One squared gradient norm an example, [B], in float32 or wider; summed over the layers of `repeat`.

    For a kernel the gradient of an example is G = X^T dY with X [T, D] and dY [T, F], which is not formed where its two
    T x T Gram matrices are smaller (2 T^2 <= D F), and what rounding does to their product is small beside it: the
    relative error is below 1e-3 (`funcnet.gram`). Where G is formed, its error is that of any sum of T terms, as in
    `per_example`. The positions of a parameter that is used several times are those of all its uses.

    For a table G is not formed either: the squares are those of its touched rows, the sums over equal ids.
    """
    if isinstance(factor, Pulled):
        return _one_by_one(factor, "squared_norm", lambda gradient: jnp.sum(jnp.square(gradient)))
    uses = factor.factors if isinstance(factor, Sum) else (factor,)
    products = [_as_product(each) for each in uses if isinstance(each, (Outer, Gather))]
    tables = [each for each in uses if isinstance(each, Gather)]
    if len(tables) == len(uses):
        ids, dy = (jnp.concatenate(parts, axis=1) for parts in zip(*products, strict=True))
        sums = jax.vmap(partial(_touched, size=tables[0].size))(ids, dy).rows
        return jnp.sum(jnp.square(sums), axis=(1, 2))
    positions = sum(dy.shape[1] for _, dy in products)
    if len(products) == len(uses) and 2 * positions**2 <= math.prod(param.shape):
        return squared_norms(products, param.shape[0])
    gradient = _per_example(factor, param, "squared_norm")
    return jnp.sum(jnp.square(gradient), axis=tuple(range(1, gradient.ndim)))


def _as_product(factor: Outer | Gather) -> tuple[Array, Array]:
    """x [B, T, D] and dy [B, T, F], wide; of a table ids [B, T], which stand for rows x of the identity."""
    if isinstance(factor, Gather):
        return _examples_in_table(factor, "squared_norm")
    return _wide_examples(factor.x, "squared_norm"), _wide_examples(factor.dy, "squared_norm")


def _examples_in_table(factor: Gather, name: str) -> tuple[Array, Array]:
    """ids [B, T] and dy [B, T, D] in the accumulation dtype."""
    ids, dy = _in_table(factor)
    dy = _wide_examples(dy, name)
    return ids.reshape(dy.shape[:2]), dy


@contraction(joined=joined)
def rows(factor: Factor, param: Array) -> Array | Rows:
    """The touched rows of a table's gradient, as `Rows`; for every other factor what `total` gives.

    Duplicate ids are summed, in float32 or wider, so that squares, moments and clipping of the rows are those of the
    gradient. Their number is that of the ids, whatever the size of the table: no array of the table's size is formed.
    A table that is looked up several times counts as one of all its ids; one that is a head's kernel too has no rows.
    """
    if isinstance(factor, Sum) and all(isinstance(each, Gather) for each in factor.factors):
        ids, dys = zip(*(_in_table(each) for each in factor.factors), strict=True)
        joined = jnp.concatenate([each.reshape(-1) for each in ids]), jnp.concatenate([flat(dy) for dy in dys])
        factor = Gather(*joined, param.shape[0])
    if not isinstance(factor, Gather):
        return total.of(factor, param)
    ids, dy = _in_table(factor)
    touched = _touched(ids.reshape(-1), flat(dy), factor.size)
    return replace(touched, rows=touched.rows.astype(param.dtype))


@contraction(lambda factor: replace(factor, layers=factor.layers + 1))
def keep(factor: Factor, param: Array) -> Factor:
    """The factor itself. Contract it later: `total(factor, param)`, `squared_norm(factor, param)`.

    Factors of layers in front of one that mixes examples do not know of it: of them `total` alone means anything.
    """
    return factor


def _unknown(factor: Any, name: str) -> InputError:
    known = ", ".join(kind.__name__ for kind in Factor.__args__)
    return InputError(f"a factor that {name} knows ({known})", describe(factor), "return one of them from bwd")
