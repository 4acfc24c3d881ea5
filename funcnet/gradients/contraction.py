"""Contractions: what is computed from a parameter's gradient.

A layer's `bwd` hands each parameter's factor (`funcnet.gradients.factor`) to `contract`, whose answer takes the
parameter's place in what `bwd` returns. So the same backward pass gives any of these:

    total          the gradient itself: [*param]
    per_example    one gradient an example: [B, *param]
    squared_norm   one squared norm an example, float32 or wider: [B]
    rows           the touched rows of a table, `Rows`; for every other factor the gradient itself
    keep           the factor as it is, to be contracted later, as often as one likes

A contraction of one's own is a function of what it reads:

    @fn.contraction
    def fisher_diagonal(gradients, param):          # [B, *param], each example's gradient
        return jnp.sum(gradients**2, axis=0)

Under `repeat`, `weight_norm`, `tied` and the other combinators it is given what it reads for the whole parameter: for a
parameter that `repeat` stacks, gradients are [B, L, *param].
"""

import inspect
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import flat, sum_dtype
from funcnet.gradients.blocked import block, blocks, joined
from funcnet.gradients.common_factors import Gather, Sum, touched
from funcnet.gradients.factor import Blocks, Factor, Stacked, is_factor, no_single_examples

Tree = Any


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rows:
    """The gradient of a table as its touched rows: `jnp.zeros_like(table).at[ids].add(rows)`, and zero elsewhere.

    Attributes:
        ids: [N], ascending: each touched row of the table once, then, to fill up, the table's size, which is no row:
            JAX drops it in `table.at[ids].add(..)`. N is the number of ids looked up. Stacked [L, N] by `repeat`.
        rows: [N, D], the sum of dy over the positions of that id; zero where there is no row.
    """

    ids: Array
    rows: Array


@dataclass(frozen=True, eq=False)
class Contraction:
    """A question about a parameter's gradient; `contraction` makes one from a function.

    Called with (factor, param) it answers for that parameter, which may be stacked by `repeat`.

    Attributes:
        name: how errors call it.
        of: (what it reads, param) -> any pytree of arrays.
        reads: "examples": each example's gradient [B, *param]; "sum": the gradient [*param], in which `of` should be
            linear; both in float32 for half precision. "factors": the factor itself.
        by_example: whether its answers are about single examples, so that layers which mix examples refuse it.
        stacked: answers for single layers, stacked in front -> the answer for the parameter that `repeat` stacks. None
            if there is no such function: the layers' factors are then kept, and read together.
        joined: (answers, param) -> the answer for a parameter from those for the blocks of its last axis, stacked in
            front. None if there is no such function: a factor in blocks is then read as a whole.
        changes: what combinators make of factors before they are read, (factor, param) -> both, in this order.
    """

    name: str
    of: Callable[[Any, Array], Any]
    reads: Literal["examples", "sum", "factors"] = "examples"
    by_example: bool = True
    stacked: Callable[[Any], Any] | None = None
    joined: Callable[[Any, Array], Any] | None = None
    changes: tuple[Callable[[Factor, Array], tuple[Factor, Array]], ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "__doc__", self.of.__doc__)

    def __call__(self, factor: Any, param: Array) -> Any:
        if not is_factor(factor):
            remedy = "return contract(factor, param) from bwd, the factor such as fn.Outer(x, dy) or fn.Use(f, x, dy)"
            raise InputError(f"a factor for {self.name}", describe(factor), remedy)
        if jax.tree_util.all_leaves([factor]):
            remedy = "write @jax.tree_util.register_dataclass and @dataclass(frozen=True) above its class"
            raise InputError("a factor that is a pytree of arrays", type(factor).__name__, remedy)
        if self.stacked is not None and isinstance(factor, Stacked):
            return self.stacked(jax.vmap(self)(factor.factor, param))
        if self.joined is not None and isinstance(factor, Blocks):
            each = lambda i: self(factor.of(factor.saved, i, factor.size), block(param, i, factor.size))
            return self.joined(lax.map(each, blocks(param, factor.size)), param)
        match self.reads:
            case "examples":
                return self.of(_fitting(factor.per_example(param), ("examples", *param.shape), factor), param)
            case "sum":
                return self.of(_fitting(factor.total(param), param.shape, factor), param)
        return self.of(factor, param)

    @property
    def keeping(self) -> "Contraction":
        """`keep`, for a combinator that contracts the factors afterwards; refused wherever this contraction is."""
        return replace(keep, name=self.name, by_example=self.by_example)

    @property
    def of_one_layer(self) -> "Contraction":
        """The contraction that a combinator passes to each layer of a stack; `stack` completes what it returns."""
        return self.keeping if self.stacked is None else self

    def stack(self, params: Tree, answers: Tree) -> Tree:
        """The answers for stacked params [L, ..], from those of `of_one_layer`, stacked in front."""
        stacked = self.stacked
        if stacked is None:
            return jax.tree.map(lambda param, factor: self(Stacked(factor), param), params, answers)
        return jax.tree.map(lambda _, answer: stacked(answer), params, answers)

    def after(self, change: Callable[[Factor, Array], tuple[Factor, Array]]) -> "Contraction":
        """This contraction of `change(factor, param)`, for a combinator that wraps factors."""
        of = lambda factor, param: self(*change(factor, param))
        return replace(self, of=of, reads="factors", changes=(change, *self.changes))

    def changed(self, factor: Factor, param: Array) -> Factor:
        """The factor that is read, for a combinator that takes it out of what others have wrapped around."""
        for change in self.changes:
            factor, param = change(factor, param)
        return factor


def contraction(
    of: Callable[[Any, Array], Any] | None = None,
    *,
    reads: Literal["examples", "sum", "factors"] = "examples",
    by_example: bool | None = None,
    stacked: Callable[[Any], Any] | None = None,
    joined: Callable[[Any, Array], Any] | None = None,
) -> Any:
    """Make a contraction of a function of what it reads and the parameter; `@contraction` or `@contraction(reads=..)`.

    Args:
        of: (gradients [B, *param], param) -> any pytree of arrays; with other `reads` it is given something else.
        reads: "examples", each example's gradient, which is right for any `of`; "sum", the gradient, if `of` is linear
            in it; "factors", the factor, which `of` may match on (`fn.Outer(x, dy)`); for kinds that it does not know
            there are `factor.per_example(param)` and `factor.total(param)`.
        by_example: for reads="factors", False if no answer is about single examples; then layers that mix examples,
            such as batch norm, allow it.
        stacked, joined: for speed alone, see `Contraction`: how the answer for the whole parameter is computed from
            those for the layers of a `repeat`, or for the blocks of a long axis.

    Raises:
        InputError: for an `of` that is no function, an unknown `reads`, and options that do not apply to it.
    """
    if of is None:
        return lambda of: contraction(of, reads=reads, by_example=by_example, stacked=stacked, joined=joined)
    if not callable(of) or not _takes_two(of):
        received = f"{getattr(of, '__name__', 'f')}{inspect.signature(of)}" if callable(of) else describe(of)
        remedy = "write @fn.contraction above def f(gradients, param), and options by name"
        raise InputError("a function of gradients and a parameter", received, remedy)
    if reads not in ("examples", "sum", "factors"):
        raise InputError('reads="examples", "sum" or "factors"', repr(reads), "say what the function is given")
    if by_example is not None and reads != "factors":
        raise InputError('by_example for reads="factors" alone', f"by_example={by_example}", "leave it out")
    if not all(each is None or callable(each) for each in (stacked, joined)):
        received = f"stacked={stacked!r}, joined={joined!r}"
        raise InputError("stacked and joined as functions", received, "leave them out, or see fn.Contraction")
    by_example = reads != "sum" if by_example is None else by_example
    return Contraction(getattr(of, "__name__", "contraction"), of, reads, by_example, stacked, joined)


def _takes_two(of: Callable) -> bool:
    """Whether a function can be called with two arguments; True where that cannot be told."""
    with suppress(ValueError):  # it is written in C
        try:
            inspect.signature(of).bind(None, None)
        except TypeError:
            return False
    return True


def a_contraction(given: Any) -> Contraction:
    """`given` if it is a contraction."""
    if not isinstance(given, Contraction):
        remedy = "pass fn.total, fn.per_example or another one, or make one with @fn.contraction"
        raise InputError("a contraction", describe(given) if not isinstance(given, str) else repr(given), remedy)
    return given


def _fitting(answer: Array, shape: tuple[Any, ...], factor: Factor) -> Array:
    """A factor's answer, if it has this shape ("examples" stands for any size) and an accumulation dtype."""
    fits = answer.ndim == len(shape) and all(b in ("examples", a) for a, b in zip(answer.shape, shape, strict=True))
    if not fits or answer.dtype != sum_dtype(answer.dtype):
        wanted = f"an answer [{', '.join(map(str, shape))}] in float32 or wider"
        remedy = "let total and per_example sum x.astype(jnp.float32) in the parameter's shape"
        raise InputError(f"{wanted} of a {type(factor).__name__}", describe(answer), remedy)
    return answer


def refuse_single_examples(contract: Contraction) -> None:
    """Refuse a contraction about single examples: the `bwd` of a layer that mixes examples calls this."""
    if contract.by_example:
        raise no_single_examples(contract.name)


def _same(answer: Any) -> Any:
    return answer


@contraction(reads="sum", stacked=_same, joined=joined)
def total(gradient: Array, param: Array) -> Array:
    """The gradient: summed over examples and positions in float32 or wider, in the parameter's dtype and sharding."""
    return gradient.astype(param.dtype)


@contraction(stacked=lambda answer: jnp.moveaxis(answer, 0, 1), joined=joined)
def per_example(gradients: Array, param: Array) -> Array:
    """One gradient an example, [B, *param] ([B, L, *param] under `repeat`), in the parameter's dtype."""
    return gradients.astype(param.dtype)


@contraction(
    reads="factors",
    stacked=lambda answers: jnp.sum(answers, axis=0),
    joined=lambda answers, param: jnp.sum(answers, axis=0),
)
def squared_norm(factor: Factor, param: Array) -> Array:
    """One squared gradient norm an example, [B], in float32 or wider; summed over the layers of `repeat`.

    For a kernel the gradient of an example is G = X^T dY with X [T, D] and dY [T, F]. It is not formed where its two
    T x T Gram matrices are smaller (2 T^2 <= D F) and the rounding error of their product is relatively small: below
    1e-3 (`funcnet.gradients.gram`). Where G is formed, its error is that of any sum of T terms, as in `per_example`.
    The positions of a parameter that is used several times are those of all its uses.

    For a table G is not formed either: the squares are those of its touched rows, each the sum of dy over equal ids.
    """
    return _fitting(factor.squared_norm(param), ("examples",), factor)


@contraction(reads="factors", by_example=False, stacked=_same, joined=joined)
def rows(factor: Factor, param: Array) -> Array | Rows:
    """The touched rows of a table's gradient, as `Rows`; for every other factor what `total` gives.

    Duplicate ids are summed, in float32 or wider, so that squares, moments and clipping of the rows are those of the
    gradient. There are as many rows as ids, whatever the size of the table: no array of the table's size is formed. A
    table that is looked up several times gives the rows of all its ids; one that is a head's kernel too has no rows.
    """
    uses = factor.factors if isinstance(factor, Sum) else (factor,)
    lookups = [use for use in uses if isinstance(use, Gather)]
    if len(lookups) < len(uses):
        return total(factor, param)
    ids, dys = zip(*(lookup.in_table() for lookup in lookups), strict=True)
    all_ids, all_dy = jnp.concatenate(list(map(jnp.ravel, ids))), jnp.concatenate(list(map(flat, dys)))
    unique, sums = touched(all_ids, all_dy, param.shape[0])
    return Rows(unique, sums.astype(param.dtype))


@contraction(reads="factors", by_example=False)
def keep(factor: Factor, param: Array) -> Factor:
    """The factor itself. Contract it later: `total(factor, param)`, `squared_norm(factor, param)`.

    The factors of layers in front of one that mixes examples do not record the mixing: only their `total` is valid.
    """
    return factor
