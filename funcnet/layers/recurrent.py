"""Recurrent layers over time: rnn, gru and lstm.

With a_t = x_t @ kernel + bias and u_t = h_{t-1} @ recurrent_kernel, each split into blocks of H, and s the sigmoid:

    rnn     h = tanh(a + u)
    gru     r = s(a_r + u_r)    z = s(a_z + u_z)    q = u_n + recurrent_bias    n = tanh(a_n + r * q)
            h = (1 - z) * n + z * h_{t-1}
    lstm    i, f, o = s(a + u)    g = tanh(a_g + u_g)    c = f * c_{t-1} + i * g    h = o * tanh(c)

Backward through time, with dh the cotangent of h_t from the output and from the step that followed:

    rnn     da = dh (1 - h^2)
    gru     da_z = dh (h_{t-1} - n) z (1 - z)    da_n = dh (1 - z) (1 - n^2)    dq = da_n r
            da_r = da_n q r (1 - r)
    lstm    da_o = dh tanh(c) o (1 - o)    dc += dh o (1 - tanh(c)^2)    dc_{t-1} = dc f
            da_i = dc g i (1 - i)    da_f = dc c_{t-1} f (1 - f)    da_g = dc i (1 - g^2)

    dh_{t-1} = du @ recurrent_kernel^T    (gru: + dh z)        du = da, but for the gru's du_n = dq

The reverse scan emits da and du alone. All else is contracted over all steps at once, after the scan:

    dx = da @ kernel^T    dkernel: Outer(x, da)    drecurrent_kernel: Outer(h_prev, du)
    dbias: Shift(da)      drecurrent_bias: Shift(dq)

Where autodiff adds up the [H, 4H] gradient of the recurrent kernel step by step, this is a single large product.

Lengths: positions t >= length give y = 0 and leave the state unchanged, so the final state is that after the last valid
step, and `reverse` begins with the last valid position. x at those positions has no influence, and its cotangent is 0.
Residuals: the input as given, y [B, T, H], and for each step, time first: lstm the gates i, f, g, o [T, B, 4H] and
c_prev [T, B, H]; gru r, z, n, q [T, B, 4H]; rnn nothing.  Why these: h_prev is y shifted by one step, and c and tanh(c)
cost next to nothing to form again. In half precision the inputs of the gates are kept in place of the gates, and for an
rnn a + u: near 1 a rounded gate has lost the digits of the 1 - g^2 or i (1 - i) in its derivative.
Numerics: in half precision the products with x and h, gates, state and sums are computed in float32; residuals and da
are rounded.
Initial values: kernel LeCun's normal. Each block of the recurrent kernel is orthogonal by itself, so that each keeps
the length of h; an orthogonal [H, 4H] as a whole would halve it. Biases 0, but 1 for the lstm's forget gate (Keras's
choice, not PyTorch's uniform): with 0 the cell and its gradient are halved every step, since f = s(0) = 1/2.
Source: Elman 1990; Cho et al. 2014, arXiv:1406.1078, reset after the product as in cuDNN and PyTorch; Hochreiter and
Schmidhuber 1997; Gers, Schmidhuber and Cummins 2000 (forget gate); Jozefowicz, Zaremba and Sutskever 2015 (its bias).
"""

from collections.abc import Mapping

import jax.numpy as jnp
from jax import Array
from jax.nn import sigmoid

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, ORTHOGONAL, Initializer
from funcnet.layer import Layer
from funcnet.layers.over_time import Cell, RecurrentResiduals, join, over_time
from funcnet.structure import constructor


@constructor
def rnn(
    features: int,
    *,
    reverse: bool = False,
    return_state: bool = False,
    kernel_init: Initializer = LECUN_NORMAL,
    recurrent_init: Initializer = ORTHOGONAL,
) -> Layer[dict[str, Array], tuple[()], RecurrentResiduals]:
    """The simple recurrent layer with tanh, [B, T, D] -> [B, T, H]; its state is h [B, H].

    Params kernel [D, H], recurrent_kernel [H, H], bias [H]. Input, arguments and errors as for `lstm`.
    """

    def step(gates, states):
        return (gates,), {}

    def back(h, kept, h_prev, dstates):
        return (0.0,), dstates[0] * (1 - h**2)

    features = expect.count(features, "features")
    inits = kernel_init, recurrent_init, lambda dtype: {"bias": jnp.zeros(features, dtype)}
    cell = Cell(1, 1, _sum, jnp.tanh, step, back)
    return over_time("rnn", features, cell, inits, reverse, return_state)


@constructor
def gru(
    features: int,
    *,
    reverse: bool = False,
    return_state: bool = False,
    kernel_init: Initializer = LECUN_NORMAL,
    recurrent_init: Initializer = ORTHOGONAL,
) -> Layer[dict[str, Array], tuple[()], RecurrentResiduals]:
    """The gated recurrent unit, reset after the product, [B, T, D] -> [B, T, H]; its state is h [B, H].

    Params kernel [D, 3H], recurrent_kernel [H, 3H] and bias [3H] in blocks for r, z, n, and recurrent_bias [H], which
    is added to n's recurrent part, before the reset. (PyTorch's recurrent biases of r and z merely add to
    `bias`.) Input, arguments and errors as for `lstm`.
    """

    def enter(params, a, u):
        (a_r, a_z, a_n), (u_r, u_z, u_n) = _blocks(a, 3), _blocks(u, 3)
        r, q = a_r + u_r, u_n + params["recurrent_bias"].astype(u.dtype)[None]
        return join(r, a_z + u_z, a_n + sigmoid(r) * q, q)

    def gates(entering):
        r, z, n, q = _blocks(entering, 4)
        return join(sigmoid(r), sigmoid(z), jnp.tanh(n), q)

    def step(gates, states):
        _, z, n, _ = _blocks(gates, 4)
        return ((1 - z) * n + z * states[0],), {}

    def back(gates, kept, h_prev, dstates):
        r, z, n, q = _blocks(gates, 4)
        (dh,) = dstates
        da_n = dh * (1 - z) * (1 - n**2)
        return (dh * z,), join(da_n * q * r * (1 - r), dh * (h_prev - n) * z * (1 - z), da_n, da_n * r)

    def split(dz):
        r, z, n, q = _blocks(dz, 4)
        return join(r, z, n), join(r, z, q)

    def bias_init(dtype):
        return {"bias": jnp.zeros(3 * features, dtype), "recurrent_bias": jnp.zeros(features, dtype)}

    features = expect.count(features, "features")
    inits = kernel_init, recurrent_init, bias_init
    cell = Cell(3, 1, enter, gates, step, back, split)
    return over_time("gru", features, cell, inits, reverse, return_state)


@constructor
def lstm(
    features: int,
    *,
    reverse: bool = False,
    return_state: bool = False,
    forget_bias: float = 1.0,
    kernel_init: Initializer = LECUN_NORMAL,
    recurrent_init: Initializer = ORTHOGONAL,
) -> Layer[dict[str, Array], tuple[()], RecurrentResiduals]:
    """Long short-term memory, [B, T, D] -> [B, T, H]; its state is (h, c), each [B, H].

    Params kernel [D, 4H], recurrent_kernel [H, 4H], bias [4H], in blocks for the gates i, f, g, o. The input is x
    [B, T, D] alone, or a dict of `x` and, where wanted, `lengths` (integers [B], 0 to T) and the initial `state`
    (zeros otherwise). For positions beyond a length see the module's docstring.

    Args:
        features: H.
        reverse: run from the last valid position to the first; y stays in the order of x.
        return_state: return (y, final state).
        forget_bias: the initial bias of the forget gate.
        kernel_init, recurrent_init: as in `jax.nn.initializers`; the latter for each gate's block [H, H].

    Raises:
        InputError: for an x that is not floating [B, T, D], or for lengths, state or params that do not fit it.
    """

    def gates(entering):
        i, f, g, o = _blocks(entering, 4)
        return join(sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o))

    def step(gates, states):
        (i, f, g, o), c_prev = _blocks(gates, 4), states[1]
        c = f * c_prev + i * g
        return (o * jnp.tanh(c), c), {"c_prev": c_prev}

    def back(gates, kept, h_prev, dstates):
        (i, f, g, o), c_prev = _blocks(gates, 4), kept["c_prev"]
        dh, dc = dstates
        tanh_c = jnp.tanh(f * c_prev + i * g)
        dc = dc + dh * o * (1 - tanh_c**2)
        da_i, da_f, da_g = dc * g * i * (1 - i), dc * c_prev * f * (1 - f), dc * i * (1 - g**2)
        return (0.0, dc * f), join(da_i, da_f, da_g, dh * tanh_c * o * (1 - o))

    def bias_init(dtype):
        return {"bias": jnp.zeros(4 * features, dtype).at[features : 2 * features].set(forget_bias)}

    features, forget_bias = expect.count(features, "features"), expect.number(forget_bias, "forget_bias")
    inits = kernel_init, recurrent_init, bias_init
    cell = Cell(4, 2, _sum, gates, step, back)
    return over_time("lstm", features, cell, inits, reverse, return_state)


def _sum(params: Mapping[str, Array], a: Array, u: Array) -> Array:
    return a + u


def _blocks(x: Array, n: int) -> list[Array]:
    return jnp.split(x, n, axis=-1)
