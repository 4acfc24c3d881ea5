"""A parameter's gradient as its factors: what it is computed from, before it is summed.

A layer uses a parameter as y = f(param, x), linear in the parameter, and y has the cotangent dy. A factor records such
a use, and a layer's `bwd` hands it to `contract` together with the parameter:

    {"kernel": contract(Outer(x, dy), kernel), "bias": contract(Shift(dy), bias)}

Every factor gives three things for a parameter:

    total(param)          the gradient, [*param]                                   float32 or wider, as all of these
    per_example(param)    each example's own gradient, [B, *param]
    squared_norm(param)   the square of its norm, [B]; computed from per_example, unless there is a faster way

`Use` records f, x and dy alone, and is right for any layer; `funcnet.gradients.common_factors` has faster factors for
the usual uses. The others here stand for gradients that come about in another way:

    Stacked(factor)                       of layers that are stacked along a first axis, as `repeat` does
    Mapped(factor, kernel, saved, pull)   of a parameter that the kernel is computed from: pull(saved, dkernel)
    Mixing(factor)                        of a layer that mixes examples: an output for one depends on the others
    Blocks(saved, of, size)               of a parameter whose last axis is too long to form its gradient whole
    Pulled(gradient, ..)                  of a function without factors, `from_function`: its VJP is asked again

A factor of one's own is a subclass with `total` and `per_example`, registered as a pytree
(`jax.tree_util.register_dataclass`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_floating
from funcnet._internal.numerics import sum_dtype
from funcnet._internal.sharding import placed, varies, varying
from funcnet.gradients.blocked import block, blocks, joined

Tree = Any


class Factor:
    """What the gradient of one parameter is made of. See the module's docstring."""

    def total(self, param: Array) -> Array:
        """The gradient, [*param], in float32 or wider."""
        raise InputError("a factor with a method total(param)", type(self).__name__, "write it")

    def per_example(self, param: Array) -> Array:
        """Each example's own gradient, [B, *param], in float32 or wider."""
        remedy = "write it, or ask for what reads the sum alone, such as total"
        raise InputError("a factor with a method per_example(param)", type(self).__name__, remedy)

    def squared_norm(self, param: Array) -> Array:
        """The squared norm of each example's own gradient, [B], in float32 or wider."""
        return _squares(self.per_example(param))


def is_factor(x: Any) -> bool:
    """For `jax.tree.map(..., is_leaf=fn.is_factor)` over gradients that `keep` left as factors."""
    return isinstance(x, Factor)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Use(Factor):
    """Any use of a parameter: y = f(param, x), linear in the parameter, with the cotangent dy of y.

    It is slower than a factor that knows its formula, but just as right. Half precision is computed in float32.

    Attributes:
        f: plain JAX, one and the same function at every call, so that nothing is compiled twice; y has the examples on
            its first axis, and example i of y depends on example i of x alone.
        x: a pytree of arrays, examples on the first axis.
        dy: like y.
    """

    f: Callable[[Array, Any], Any] = field(metadata={"static": True})
    x: Tree
    dy: Tree

    def total(self, param: Array) -> Array:
        return placed(self._pulled(param, self.x, self.dy), param)

    def per_example(self, param: Array) -> Array:
        _examples_of((self.x, self.dy), "give x and dy their examples in front, or use total")
        alone = lambda tree: jax.tree.map(lambda leaf: leaf[None], tree)
        return jax.vmap(lambda x, dy: self._pulled(param, alone(x), alone(dy)))(self.x, self.dy)

    def _pulled(self, param: Array, x: Tree, dy: Tree) -> Array:
        widely = lambda tree: jax.tree.map(lambda a: a.astype(sum_dtype(a.dtype)) if is_floating(a) else a, tree)
        param, x, dy = widely((param, x, dy))
        used = lambda param: self.f(param, x)
        y = jax.eval_shape(used, param)
        if jax.tree.map(jnp.shape, y) != jax.tree.map(jnp.shape, dy):
            raise InputError(f"dy like f(param, x), {describe(y)}", describe(dy), "give the cotangent of what f gives")
        dy = jax.tree.map(lambda y, dy: dy.astype(y.dtype), y, dy)
        try:
            return jax.linear_transpose(used, varying(param, varies(x, dy)))(dy)[0]
        except Exception as error:  # f itself runs: it is its transposition that fails, with errors of many kinds
            wanted = f"Use(f, x, dy) with f(param, x) linear in the parameter, {describe(param)}"
            remedy = "give a use of this parameter alone; where y is not linear in it, see docs/layers.md"
            raise InputError(wanted, f"{type(error).__name__}: {str(error)[:200]}", remedy) from error


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pulled(Factor):
    """The gradient [*param], and `pull(params, x, dy)[leaf]`, which gives it for other cotangents too."""

    gradient: Array
    params: Any
    x: Any
    dy: Any
    pull: Callable[[Any, Any, Any], list[Array]] = field(metadata={"static": True})
    leaf: int = field(metadata={"static": True})

    def total(self, param: Array) -> Array:
        return self.gradient.astype(sum_dtype(self.gradient.dtype))

    def per_example(self, param: Array) -> Array:
        return self._one_by_one(lambda gradient: gradient)

    def squared_norm(self, param: Array) -> Array:
        return self._one_by_one(lambda gradient: jnp.sum(jnp.square(gradient)))

    def _one_by_one(self, answer: Callable[[Array], Array]) -> Array:
        """The answer for each example's gradient, pulled back from that example's cotangent, one after the other.

        It is slow, a whole backward pass an example, but right whatever the function does with its examples.
        """
        each = jnp.arange(_examples_of(self.dy, "let the function give outputs with one batch axis, or use total"))

        def one(i: Array) -> Array:
            own = lambda leaf: jnp.where((each == i).reshape(-1, *(1,) * (leaf.ndim - 1)), leaf, jnp.zeros_like(leaf))
            gradient = self.pull(self.params, self.x, jax.tree.map(own, self.dy))[self.leaf]
            return answer(gradient.astype(sum_dtype(gradient.dtype)))

        return lax.map(one, each)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Stacked(Factor):
    """The factor of a parameter [L, ..], its arrays stacked along a first axis: one use for each of L layers."""

    factor: Any

    def total(self, param: Array) -> Array:
        return jax.vmap(lambda factor, param: factor.total(param))(self.factor, param)

    def per_example(self, param: Array) -> Array:
        return jax.vmap(lambda factor, param: factor.per_example(param), out_axes=1)(self.factor, param)

    def squared_norm(self, param: Array) -> Array:
        return jnp.sum(jax.vmap(lambda factor, param: factor.squared_norm(param))(self.factor, param), axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mapped(Factor):
    """The factor of a parameter that a kernel is made of: its gradient is `pull(saved, dkernel)`, linear in dkernel.

    Attributes:
        factor: that of the kernel.
        kernel: the kernel itself, which `factor` takes as its parameter.
        saved: arrays, such as the parameters that the kernel is made of.
        pull: one and the same function at every call.
    """

    factor: Any
    kernel: Array
    saved: Tree
    pull: Callable[[Tree, Array], Array] = field(metadata={"static": True})

    def total(self, param: Array) -> Array:
        return placed(self.pull(self.saved, self.factor.total(self.kernel)), param)

    def per_example(self, param: Array) -> Array:
        return jax.vmap(lambda gradient: self.pull(self.saved, gradient))(self.factor.per_example(self.kernel))


def mapped(factor: Any, kernel: Array, saved: Tree, pull: Callable[[Tree, Array], Array]) -> Factor:
    """The `Mapped` factor; for a stacked factor, the stack of the `Mapped` factors of its layers."""
    if isinstance(factor, Stacked):
        return Stacked(mapped(factor.factor, kernel, saved, pull))
    return Mapped(factor, kernel, saved, pull)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Mixing(Factor):
    """The factor of a layer whose output for one example depends on the others: none has a gradient of its own."""

    factor: Any

    def total(self, param: Array) -> Array:
        return self.factor.total(param)

    def per_example(self, param: Array) -> Array:
        raise no_single_examples("each example's gradient")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Blocks(Factor):
    """A factor that is formed block by block, for a parameter whose last axis is too long to form it whole.

    Attributes:
        saved: arrays, with the batch axis in front or shared by all examples.
        of: (saved, i, size) -> the factor of `block(param, i, size)`, a plain function; entries that the block shares
            with the one before it are zero in it.
        size: of a block.
    """

    saved: Any
    of: Callable[[Any, Array, int], Factor] = field(metadata={"static": True})
    size: int = field(metadata={"static": True})

    def total(self, param: Array) -> Array:
        return joined(self._each(param, lambda factor, part: factor.total(part)), param)

    def per_example(self, param: Array) -> Array:
        return joined(self._each(param, lambda factor, part: factor.per_example(part)), param)

    def squared_norm(self, param: Array) -> Array:
        return jnp.sum(self._each(param, lambda factor, part: factor.squared_norm(part)), axis=0)

    def _each(self, param: Array, answer: Callable[[Factor, Array], Array]) -> Array:
        one = lambda i: answer(self.of(self.saved, i, self.size), block(param, i, self.size))
        return lax.map(one, blocks(param, self.size))


def no_single_examples(received: str) -> InputError:
    """The error for a contraction about single examples in a layer that mixes examples."""
    wanted = "a contraction over the whole batch: each example's output depends on all others here, so none has a"
    remedy = "use total or keep, or a layer that looks at one example at a time, such as group_norm"
    return InputError(f"{wanted} gradient of its own", received, remedy)


def _examples_of(tree: Tree, remedy: str) -> int:
    """How many examples there are, on the first axis of all arrays of a tree."""
    leaves = jax.tree.leaves(tree)
    if any(jnp.ndim(leaf) == 0 for leaf in leaves) or len({leaf.shape[0] for leaf in leaves}) != 1:
        raise InputError("one axis of examples in front of all arrays", describe(tree), remedy)
    return leaves[0].shape[0]


def wide_examples(a: Array, rank: int = 1) -> Array:
    """a [B, .., *param] as [B, T, *param] in the accumulation dtype, `rank` the number of the parameter's axes."""
    if a.ndim < 1 + rank:
        remedy = "give the model a batch axis, or use total"
        raise InputError("an example axis in front, for each example's own gradient", describe(a), remedy)
    steps = math.prod(a.shape[1 : a.ndim - rank])  # not -1, which an empty batch would leave undetermined
    return a.reshape(a.shape[0], steps, *a.shape[a.ndim - rank :]).astype(sum_dtype(a.dtype))


def _squares(gradients: Array) -> Array:
    return jnp.sum(jnp.square(gradients), axis=tuple(range(1, gradients.ndim)))
