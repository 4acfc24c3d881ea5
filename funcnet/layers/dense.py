"""A dense layer: an affine map of the last axis.

    y = x @ kernel + bias

Backward, with the leading axes of x [.., D] and dy [.., F] flattened to one axis n:

    dx              = dy @ kernel^T
    dkernel[i, j]   = sum_n x[n, i] dy[n, j]        the factor Outer(x, dy)
    dbias[j]        = sum_n dy[n, j]                the factor Shift(dy)

Residuals: x [.., D].  The kernel is not among them: `bwd` is handed the parameters.
Numerics: gradients are summed in float32 for half-precision inputs, then rounded once.
Source: Rumelhart, Hinton and Williams 1986, "Learning representations by back-propagating errors".
"""

from collections.abc import Mapping
from typing import Any

from jax import Array

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ZEROS, Initializer
from funcnet._internal.numerics import contract_last, flat
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.layer import Layer, child, stateless
from funcnet.structure import constructor


@constructor
def dense(
    features: int,
    *,
    use_bias: bool = True,
    kernel_init: Initializer = LECUN_NORMAL,
    bias_init: Initializer = ZEROS,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """y = x @ kernel + bias on the last axis of x [.., D], any rank; params kernel [D, F] and bias [F].

    Args:
        features: F, the size of the output's last axis.
        use_bias: whether to add a bias.
        kernel_init, bias_init: as in `jax.nn.initializers`, `(key, shape, dtype) -> array`. LeCun's normal keeps the
            variance of its input: std = sqrt(1 / D).

    Raises:
        InputError: if x is not floating, its last axis is not D, or its dtype is not the parameters'.
    """
    features = expect.count(features, "features")
    expect.flags(use_bias=use_bias)

    def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
        return {"kernel": (inputs, features), "bias": (features,)} if use_bias else {"kernel": (inputs, features)}

    def init(key: Array, x: Any) -> dict[str, Array]:
        expect.float_array(x)
        return drawn(key, {"kernel": kernel_init, "bias": bias_init}, shapes(x.shape[-1]), expect.dtype(x))

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        expect.float_array(x, features=expect.size(params, "kernel"))
        expect.fields(params, x.dtype, shapes(x.shape[-1]))
        y = flat(x) @ params["kernel"]
        if use_bias:
            y = y + params["bias"][None]
        return y.reshape(*x.shape[:-1], features), x

    def bwd(params, x, dy, contract):
        expect.fields(params, x.dtype, shapes(x.shape[-1]))
        dy = expect.cotangent(dy, (*x.shape[:-1], features), x.dtype)
        dx = contract_last(dy, params["kernel"], 1, like=x).astype(x.dtype)
        dparams = {"kernel": contract(Outer(x, dy), params["kernel"])}
        if use_bias:
            dparams["bias"] = contract(Shift(dy), params["bias"])
        return dparams, dx

    return stateless("dense", init, fwd, bwd, positionwise=True)


def drawn(
    key: Array, inits: Mapping[str, Initializer], shapes: Mapping[str, tuple[int, ...]], dtype: Any
) -> dict[str, Array]:
    """Parameters of these shapes, each drawn with a key of its own, so that no two draws are the same."""
    expect.key(key)
    return {name: inits[name](child(key, i), shape, dtype) for i, (name, shape) in enumerate(shapes.items())}
