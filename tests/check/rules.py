"""A right backward rule, and the mistakes that people make in it.

A `Right` is a function, or a layer, with its true rule and a point. `Right.wrong` makes mistakes in it, a line each:
what is wrong, the wrong rule, the leaves to blame, and words that the diagnosis is to have. Without words none is
expected, and then there is to be none.

A function's rule is bwd(*args, y, dy) -> one gradient an argument. A layer's mistake is a function of what its own bwd
returned and got, (dparams, dx, params, residuals, dy) -> (dparams, dx), or another layer.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

import funcnet as fn

Tree = Any


@dataclass(frozen=True, eq=False)
class Right:
    """A function with its rule at a point.

    Attributes:
        name: of the function.
        f: the function; or a layer.
        bwd: its right rule; None for a layer, which has its own.
        args: the point, texts as `fn.check_vjp` draws them, or arrays; for a layer (params, x).
        around: what the rule is inside of: from the ruled function to the function that is checked.
        options: of the check.
    """

    name: str
    f: Any
    bwd: Callable | None
    args: tuple
    around: Callable = lambda ruled: ruled
    options: dict = field(default_factory=dict)

    @property
    def rule(self) -> Any:
        """The function, or layer, with the right rule."""
        return self.ruled(self.bwd) if self.bwd else self.f

    def ruled(self, bwd: Callable, fwd: Callable | None = None) -> Any:
        """It with another rule."""
        if isinstance(self.f, fn.Layer):
            return replace(self.f, bwd=partial(_on_top, self.f, bwd))
        ruled = jax.custom_vjp(lambda *args: self.f(*args))
        forward = fwd or self.f

        def save(*args):
            y = forward(*args)
            return y, (args, y)

        ruled.defvjp(save, lambda saved, dy: bwd(*saved[0], saved[1], dy))
        return self.around(ruled)

    def check(self, rule: Any, **options: Any) -> fn.Report:
        """The report on a rule at this point."""
        options = {"shrink": False, **self.options, **options}
        if isinstance(rule, fn.Layer):
            return fn.check_layer(rule, self.args[1], params=self.args[0], **{"state": (), **options})
        return fn.check_vjp(rule, *self.args, **options)

    def wrong(self, *mistakes: tuple) -> list["Wrong"]:
        """The mistakes made in it."""
        return [Wrong(f"{self.name}: {what}", self, *rest) for what, *rest in mistakes]


@dataclass(frozen=True, eq=False)
class Whole:
    """A whole function with a wrong rule inside, or a whole layer, made anew for every check."""

    make: Callable[[], Any]


@dataclass(frozen=True, eq=False)
class Wrong:
    """A wrong rule.

    Attributes:
        name: the function, and what is wrong.
        right: what it was made from.
        mistake: the wrong rule, or a `Whole`.
        leaves: the leaves to blame, with spaces between; "-" is the function as a whole.
        says: words of the diagnosis, or of the failure where there is nothing to diagnose.
        oracle: who finds it, asked alone.
    """

    name: str
    right: Right
    mistake: Any
    leaves: str
    says: str = ""
    oracle: str = "autodiff"

    @property
    def rule(self) -> Any:
        """The function, or layer, with the wrong rule."""
        return self.mistake.make() if isinstance(self.mistake, Whole) else self.right.ruled(self.mistake)

    @property
    def blamed(self) -> set[str]:
        """Paths of the leaves to blame."""
        return {"" if leaf == "-" else leaf for leaf in self.leaves.split()}

    def check(self, **options: Any) -> fn.Report:
        """The report on it."""
        return self.right.check(self.rule, **options)


def _on_top(layer: fn.Layer, bwd: Callable, params: Tree, residuals: Tree, dy: Tree, contract: Any = fn.total) -> Tree:
    """`bwd` of what the layer's own returns for the contraction `total`; the others are left as they are."""
    if contract is not fn.total:
        return layer.bwd(params, residuals, dy, contract)
    return bwd(*layer.bwd(params, residuals, dy, contract), params, residuals, dy)


def total(a, axis=-1):
    return jnp.sum(a, axis, keepdims=True)


def mean(a, axis=-1):
    return jnp.mean(a, axis, keepdims=True)


def masking():
    """A dropout that is cheap to compile: four units of seven, the key deciding which of seven ways."""

    def mask(key, x):
        start = jax.random.key_data(key).sum() % 7
        return ((jnp.arange(x.size, dtype=start.dtype) + start) % 7 < 4).reshape(x.shape)

    return fn.Layer(
        "masking",
        lambda key, x: ({}, ()),
        lambda params, state, x: x / 2,
        lambda params, state, x, key: (jnp.where(mask(key, x), x, 0.0), state, key),
        lambda params, key, dy, contract=fn.total: ({}, jnp.where(mask(key, dy), dy, 0.0)),
    )
