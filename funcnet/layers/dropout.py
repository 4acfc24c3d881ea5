"""Dropout: in training each unit is kept with probability 1 - rate and scaled by 1 / (1 - rate).

    m ~ Bernoulli(1 - rate)        y = x * m / (1 - rate)        dx = dy * m / (1 - rate)

    dropout            an m for each entry
    spatial_dropout    one for each channel of an example: m [B, 1, .., 1, C]
    drop_path          one for each example: m [B, 1, .., 1]

`apply` is the identity, which is the expectation of y.

Residuals: the key.  The mask is drawn again from it in `bwd`, so nothing of x's size is kept. Nor is x's shape: it is
taken from dy, whose shape is not checked.
Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting"; Tompson et al.
2015, arXiv:1411.4280 (channels); Huang et al. 2016, arXiv:1603.09382 (stochastic depth).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import by
from funcnet._internal.sharding import placed
from funcnet.gradients.contraction import total
from funcnet.layer import Layer
from funcnet.structure import constructor


@constructor
def dropout(rate: float) -> Layer[dict, tuple[()], Array]:
    """Drop a share `rate` of the units of x in training, and scale the rest by 1 / (1 - rate).

    Args:
        rate: the share that is dropped, 0 <= rate < 1.

    Raises:
        InputError: if rate is out of range, x is not floating, or `fwd` gets no key.
    """
    return _dropping("dropout", rate, lambda shape: shape)


@constructor
def spatial_dropout(rate: float) -> Layer[dict, tuple[()], Array]:
    """Drop a share `rate` of the channels of each example of x [B, .., C], whole, and scale the rest by 1 / (1 - rate).

    For feature maps whose neighbouring positions are so alike that dropping single entries would remove no information.

    Args:
        rate: the share that is dropped, 0 <= rate < 1.

    Raises:
        InputError: if rate is out of range, x is not floating of at least two axes, or `fwd` gets no key.
    """
    return _dropping("spatial_dropout", rate, lambda shape: (shape[0], *(1,) * (len(shape) - 2), shape[-1]), rank=2)


@constructor
def drop_path(rate: float) -> Layer[dict, tuple[()], Array]:
    """Drop a share `rate` of the examples of x [B, ..], whole, and scale the rest by 1 / (1 - rate).

    As the last layer in a `skip` it is stochastic depth: the dropped examples bypass that block.

    Args:
        rate: the share that is dropped, 0 <= rate < 1.

    Raises:
        InputError: if rate is out of range, x is not floating, or `fwd` gets no key.
    """
    return _dropping("drop_path", rate, lambda shape: (shape[0], *(1,) * (len(shape) - 1)))


def _dropping(
    name: str, rate: float, units: Callable[[tuple[int, ...]], tuple[int, ...]], rank: int = 1
) -> Layer[dict, tuple[()], Array]:
    """Dropout with a mask of shape `units(x.shape)`, which has size one along an axis that is dropped as a whole."""
    rate = expect.fraction(rate, "rate", "rate is the share dropped")

    def drop(key: Array, x: Array) -> Array:
        kept = placed(jnp.broadcast_to(jax.random.bernoulli(key, 1 - rate, units(x.shape)), x.shape), x)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

    @by(name)
    def init(key, x):
        expect.float_array(x, rank=rank)
        return {}, ()

    @by(name)
    def apply(params, state, x):
        expect.float_array(x, rank=rank)
        return jnp.asarray(x)

    @by(name)
    def fwd(params, state, x, key):
        expect.float_array(x, rank=rank)
        return drop(expect.key(key), jnp.asarray(x)), state, key

    @by(name)
    def bwd(params, key, dy, contract=total):
        expect.float_array(dy)
        return {}, drop(jax.random.clone(key), jnp.asarray(dy))  # the same draw, on purpose

    return Layer(name, init, apply, fwd, bwd, positionwise=name == "dropout")
