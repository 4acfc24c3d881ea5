"""What a loss is: a layer over (prediction, target) that returns one value an example, or one a position.

The training step owns the reduction: the weights of a mean, a mask or a loss scale are the cotangent that it feeds into
`bwd`. Values are float32, or float64 for a float64 prediction. A floating target gets a cotangent like any other
input; an integer target gets None.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.defaults import Default
from funcnet._internal.errors import InputError, describe
from funcnet.layer import Layer, no_params, stateless


def one_an_example(target: Any) -> Array:
    return jnp.ones(jnp.shape(target)[:1], bool)


ONE_AN_EXAMPLE = Default(one_an_example, "one_an_example")
NOTHING = Default(lambda prediction, target: None, "nothing")


class Ahead(NamedTuple):
    """Both passes of a loss in one, for a cotangent that is known before the values are, as the weights of a mean are.

    Attributes:
        run: (params, x, dy) -> (values, (dparams, dx)): what `fwd`, and then `bwd` with `fn.total`, give.
        fwd, bwd: those that `run` stands for.
    """

    run: Callable[[Any, Any, Any], tuple[Array, tuple[Any, Any]]]
    fwd: Callable
    bwd: Callable


@dataclass(frozen=True, eq=False, repr=False)
class Loss(Layer):
    """A layer over (prediction, target), and what a training step wants to know about its values.

    Attributes:
        counted: target -> a boolean for each value: whether it counts in a mean.
        mass: target -> what each value adds to the divisor of a mean; None for 1 where it counts, which makes the
            divisor the number of values that count. With class weights and integer labels the divisor is the sum of
            these weights.
        metrics: name -> (prediction, target) -> one number for each value, to be averaged as the loss is.
        check: (prediction, target) raises `InputError` for shapes, dtypes and, where the target is not traced, values
            that do not fit. Only shape and dtype of the prediction are read.
        ahead: both passes in one; None for a loss that gains nothing by it. Unused once fwd or bwd is replaced.
    """

    counted: Callable[[Any], Array] = ONE_AN_EXAMPLE
    metrics: Mapping[str, Callable[[Any, Any], Array]] = field(default_factory=dict)
    check: Callable[[Any, Any], None] = NOTHING
    ahead: Ahead | None = None
    mass: Callable[[Any], Array] | None = None

    @property
    def at_once(self) -> Callable[[Any, Any, Any], tuple[Array, tuple[Any, Any]]] | None:
        """`ahead.run`, if it stands for this loss's own fwd and bwd."""
        ahead = self.ahead
        return ahead.run if ahead and ahead.fwd is self.fwd and ahead.bwd is self.bwd else None


def as_loss(layer: Layer) -> Loss:
    """A layer over (prediction, target) with one value an example, as a `Loss` without metrics."""
    return layer if isinstance(layer, Loss) else Loss(**_fields(layer))


def stateless_loss(name, fwd, bwd, counted, metrics, check) -> Loss:
    """A loss without parameters, state or randomness: `fwd(params, (prediction, target))` and `bwd`."""

    def paired(params, x):
        a_pair(x)
        return fwd(params, x)

    return Loss(**_fields(stateless(name, no_params, paired, bwd)), counted=counted, metrics=metrics, check=check)


def a_pair(x: Any) -> None:
    if not isinstance(x, tuple) or len(x) != 2:
        raise InputError("a pair (prediction, target)", describe(x), "give the loss both, in a tuple")


def silenced(dy: Array, a: Array) -> Array:
    """`a`, but 0 where it is not finite and dy is 0, so that entries of weight 0 add nothing in dy * a.

    Finite entries stay, since they are the product's derivative in dy.
    """
    return jnp.where((dy == 0) & ~jnp.isfinite(a), 0.0, a)


def _fields(layer: Layer) -> dict[str, Any]:
    return {f.name: getattr(layer, f.name) for f in fields(Layer)}


def one_a_row(target: Any) -> Array:
    return jnp.ones(jnp.shape(target)[:-1], bool)


def same_shape(prediction: Any, target: Any) -> None:
    expect.float_array(prediction)
    if not expect.is_array(target) or target.shape != prediction.shape:
        remedy = "reshape one of them; shapes are never broadcast"
        raise InputError(f"a target of the prediction's shape, {list(prediction.shape)}", describe(target), remedy)


def same_dtype(prediction: Any, target: Any) -> None:
    if expect.dtype(target) != expect.dtype(prediction):
        remedy = f"convert it with target.astype(jnp.{prediction.dtype})"
        raise InputError(f"a target of the prediction's dtype, {prediction.dtype}", describe(target), remedy)
