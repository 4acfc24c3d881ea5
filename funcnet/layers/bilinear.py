"""A bilinear layer: every output is a weighted sum of the products of entries of two inputs.

    y[k] = sum_ij x[i] kernel[i, j, k] z[j] + bias[k]

Backward, with the leading axes of x [.., I], z [.., J] and dy [.., F] flattened to one axis n:

    dx[n, i]          = sum_jk kernel[i, j, k] z[n, j] dy[n, k]
    dz[n, j]          = sum_ik kernel[i, j, k] x[n, i] dy[n, k]
    dkernel[i, j, k]  = sum_n x[n, i] z[n, j] dy[n, k]          the factor Triple(x, z, dy)
    dbias[k]          = sum_n dy[n, k]                          the factor Shift(dy)

With the kernel as a matrix [I, J F], each of these is a matrix product and an elementwise product with z, dy or both.

Residuals: x and z, the input.
Numerics: products are summed in float32 for half precision, and rounded once.
Source: Tenenbaum and Freeman 2000, "Separating style and content with bilinear models", doi:10.1162/089976600300015349.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.nn import initializers

from funcnet._internal import expect
from funcnet._internal.defaults import ZEROS, Default, Initializer
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import flat, product, sum_dtype
from funcnet._internal.sharding import placed
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.gradients.factor import Factor
from funcnet.layer import Layer, stateless
from funcnet.layers.dense import drawn
from funcnet.structure import constructor


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Triple(Factor):
    """x [B, .., I], z [B, .., J] and dy [B, .., F] of a kernel [I, J, F]."""

    x: Array
    z: Array
    dy: Array

    def total(self, param: Array) -> Array:
        return placed(self._outer().total(_matrix(param)).reshape(param.shape), param)

    def per_example(self, param: Array) -> Array:
        gradients = self._outer().per_example(param)
        return gradients.reshape(gradients.shape[0], *param.shape)

    def squared_norm(self, param: Array) -> Array:
        return self._outer().squared_norm(param)

    def _outer(self) -> Outer:
        """The factor of the kernel as a matrix."""
        return Outer(self.x, _pairs(self.z, self.dy))


@constructor
def bilinear(
    features: int,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = Default(
        initializers.lecun_normal(in_axis=(0, 1), out_axis=2), "lecun_normal(in_axis=(0, 1), out_axis=2)"
    ),
    bias_init: Initializer = ZEROS,
) -> Layer[dict[str, Array], tuple[()], tuple[Array, Array]]:
    """y[k] = x^T W_k z + b[k] of a pair (x [.., I], z [.., J]), to [.., F]; params kernel [I, J, F] and bias [F].

    Put it after `branch` for two views of one input. PyTorch's `Bilinear` has the weight [F, I, J].

    Args:
        features: F, the size of the output's last axis.
        use_bias: whether to add a bias.
        kernel_init, bias_init: as in `jax.nn.initializers`, `(key, shape, dtype) -> array`. LeCun's normal keeps the
            variance of products of independent entries of variance 1: std = sqrt(1 / (I J)).

    Raises:
        InputError: if the input is no pair of floating arrays of one dtype that differ in their last axis alone,
            or does not fit the parameters.
    """
    features = expect.count(features, "features")
    expect.flags(use_bias=use_bias)

    def shapes(x: Any, z: Any) -> dict[str, tuple[int, ...]]:
        kernel = {"kernel": (x.shape[-1], z.shape[-1], features)}
        return kernel | {"bias": (features,)} if use_bias else kernel

    def init(key: Array, pair: Any) -> dict[str, Array]:
        x, z = _a_pair(pair)
        return drawn(key, {"kernel": kernel_init, "bias": bias_init}, shapes(x, z), expect.dtype(x))

    def fwd(params: dict[str, Array], pair: Any) -> tuple[Array, tuple[Array, Array]]:
        x, z = _a_pair(pair)
        expect.fields(params, x.dtype, shapes(x, z))
        y = jnp.sum(_mapped(x, params["kernel"]) * _wide(z)[:, :, None], axis=1)
        if use_bias:
            y = y + params["bias"].astype(y.dtype)[None]
        return y.astype(x.dtype).reshape(*x.shape[:-1], features), (x, z)

    def bwd(params, residuals, dy, contract):
        x, z = residuals
        expect.fields(params, x.dtype, shapes(x, z))
        dy = expect.cotangent(dy, (*x.shape[:-1], features), x.dtype)
        kernel = params["kernel"]
        dx = product(flat(_pairs(z, dy)), _matrix(kernel), (1, 1), flat(x))
        dz = jnp.sum(_mapped(x, kernel) * _wide(dy)[:, None], axis=2)
        dparams = {"kernel": contract(Triple(x, z, dy), kernel)}
        if use_bias:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, (dx.astype(x.dtype).reshape(x.shape), dz.astype(z.dtype).reshape(z.shape))

    return stateless("bilinear", init, fwd, bwd, positionwise=True)


def _a_pair(pair: Any) -> tuple[Array, Array]:
    if not isinstance(pair, tuple) or len(pair) != 2:
        raise InputError(
            "a pair (x, z)", describe(pair), "put it after branch(a, b) or parallel(a, b), or write (x, z)"
        )
    x, z = pair
    for each in pair:
        expect.float_array(each)
    if x.shape[:-1] != z.shape[:-1] or x.dtype != z.dtype:
        wanted = "x and z of one dtype, whose shapes differ in the last axis alone"
        raise InputError(wanted, describe(pair), "bring them to one shape and dtype; nothing is cast or broadcast")
    return pair


def _matrix(kernel: Array) -> Array:
    """A kernel [I, J, F] as [I, J F]."""
    return kernel.reshape(kernel.shape[0], -1)


def _mapped(x: Array, kernel: Array) -> Array:
    """x [.., I] times the kernel, [N, J, F], in the accumulation dtype."""
    rows = flat(x)
    return product(rows, _matrix(kernel), (1, 0), rows).reshape(-1, *kernel.shape[1:])


def _pairs(z: Array, dy: Array) -> Array:
    """All products of an entry of z [.., J] with one of dy [.., F], as [.., J F], in the accumulation dtype."""
    z, dy = (a.astype(sum_dtype(a.dtype)) for a in (z, dy))
    return (z[..., None] * dy[..., None, :]).reshape(*z.shape[:-1], -1)


def _wide(a: Array) -> Array:
    """a [.., D] as [N, D], in the accumulation dtype."""
    return flat(a).astype(sum_dtype(a.dtype))
