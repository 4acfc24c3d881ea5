"""Dropout: in training each unit is kept with probability 1 - rate and scaled by 1 / (1 - rate).

    m ~ Bernoulli(1 - rate)        y = x * m / (1 - rate)        dx = dy * m / (1 - rate)

`apply` is the identity, which is the expectation of y.

Residuals: the key.  The mask is drawn again from it in `bwd`, so nothing of x's size is kept.
Source: Srivastava et al. 2014, "Dropout: a simple way to prevent neural networks from overfitting".
"""

import jax
import jax.numpy as jnp
from jax import Array

from funcnet import expect
from funcnet.factors import placed, total
from funcnet.layer import Layer


def dropout(rate: float) -> Layer[dict, tuple[()], Array]:
    """Drop a share `rate` of the units of x in training, and scale the rest by 1 / (1 - rate).

    Args:
        rate: the share that is dropped, 0 <= rate < 1.

    Raises:
        expect.InputError: if rate is out of range, x is not floating, or `fwd` gets no key.
    """
    if not 0 <= rate < 1:
        raise expect.InputError("a rate of at least 0 and less than 1", f"rate={rate}", "rate is the share dropped")

    def drop(key: Array, x: Array) -> Array:
        kept = placed(jax.random.bernoulli(key, 1 - rate, x.shape), x)
        return jnp.where(kept, x / (1 - rate), jnp.zeros_like(x))

    @expect.by("dropout")
    def init(key, x):
        expect.float_array(x)
        return {}, ()

    @expect.by("dropout")
    def apply(params, state, x):
        expect.float_array(x)
        return jnp.asarray(x)

    @expect.by("dropout")
    def fwd(params, state, x, key):
        expect.float_array(x)
        return drop(expect.key(key), jnp.asarray(x)), state, key

    @expect.by("dropout")
    def bwd(params, key, dy, contract=total):
        expect.float_array(dy)
        return {}, drop(key, jnp.asarray(dy))

    return Layer("dropout", init, apply, fwd, bwd)
