"""Wrong rules for attention, recurrent cells, convolution and pooling."""

from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import sigmoid, softmax

from tests.check.rules import Right, total
from tests.check.wrong_elementwise import TANH

LOWER = np.tri(5, dtype=bool)


def attention(q, k, v, mask=LOWER):
    return softmax(jnp.where(mask, q @ k.T / 3**0.5, -1e9)) @ v


def attention_bwd(q, k, v, y, dy, mask=LOWER, scale=3**-0.5, centred=True):
    p = softmax(jnp.where(mask, q @ k.T / 3**0.5, -1e9))
    dp = dy @ v.T
    ds = p * (dp - total(dp * p)) if centred else p * dp
    return scale * ds @ k, scale * ds.T @ q, p.T @ dy


def lstm(x, h, c, w):
    i, f, g, o = jnp.split(jnp.concatenate([x, h], 1) @ w, 4, 1)
    c = sigmoid(f) * c + sigmoid(i) * jnp.tanh(g)
    return sigmoid(o) * jnp.tanh(c), c


def lstm_bwd(x, h, c, w, y, dy, order=(0, 1, 2, 3), through_h=True, forget=True):
    z = jnp.concatenate([x, h], 1)
    i, f, g, o = jnp.split(z @ w, 4, 1)
    i, f, g, o = sigmoid(i), sigmoid(f), jnp.tanh(g), sigmoid(o)
    t = jnp.tanh(y[1])
    dc = dy[1] + dy[0] * o * (1 - t * t) if through_h else dy[1]
    gates = dc * g * i * (1 - i), dc * c * f * (1 - f), dc * i * (1 - g * g), dy[0] * t * o * (1 - o)
    dz = jnp.concatenate([gates[n] for n in order], 1)
    dx, dh = jnp.split(dz @ w.T, [x.shape[1]], 1)
    return dx, dh, dc * f if forget else dc, z.T @ dz


def gated(x, h, a, b):
    return jnp.tanh(x + sigmoid(h @ a) * (h @ b))


def gated_bwd(x, h, a, b, y, dy, reset=True, gate=True):
    r = sigmoid(h @ a)
    dn = dy * (1 - y * y)
    dr = dn * (h @ b) * r * (1 - r)
    dh = (dn * r if reset else dn) @ b.T
    return dn, dh + dr @ a.T if gate else dh, h.T @ dr, h.T @ (dn * r)


def convolution(x, k, stride=2, pad=(1, 1)):
    return lax.conv_general_dilated(x, k, (stride,), [pad], dimension_numbers=("NWC", "WIO", "NWC"))


def convolution_bwd(x, k, y, dy, **wrong):
    return jax.vjp(partial(convolution, **wrong), x, k)[1](dy)


def pooled(x, reduce):
    return reduce(x.reshape(2, 4, 2))


def unpooled(dy, window=2):
    return jnp.repeat(dy, window, 1)


ATTENTION = Right("attention", attention, attention_bwd, ("f32[5,3]",) * 3)
LSTM = Right("lstm", lstm, lstm_bwd, ("f32[3,2]", "f32[3,3]", "f32[3,3]", "f32[5,12]"))
GATED = Right("gated cell", gated, gated_bwd, ("f32[3,4]", "f32[3,4]", "f32[4,4]", "f32[4,4]"))
RNN = Right(
    "tanh in a recurrent scan",
    jnp.tanh,
    TANH.bwd,
    ("f32[4,2,3]", "f32[3,3]"),
    lambda ruled: lambda x, w: lax.scan(lambda h, row: (ruled(h @ w + row), None), jnp.zeros_like(x[0]), x)[0],
)
CONVOLUTION = Right("convolution", convolution, convolution_bwd, ("f32[2,8,2]", "f32[3,2,3]"))
FLAT = replace(
    CONVOLUTION,
    name="convolution of stride 1",
    f=partial(convolution, stride=1, pad=(0, 0)),
    bwd=partial(convolution_bwd, stride=1, pad=(0, 0)),
)
AVERAGE = Right(
    "average pool", lambda x: pooled(x, lambda a: a.mean(2)), lambda x, y, dy: (unpooled(dy) / 2,), ("f32[2,8]",)
)
POOL = Right(
    "max pool",
    lambda x: pooled(x, lambda a: a.max(2)),
    lambda x, y, dy: (jnp.where(x == unpooled(y), unpooled(dy), 0.0),),
    ("f32[2,8]",),
)


def strided_back(x, k, y, dy):
    """The stride left out: dy at the first places, not at every second."""
    longer = jnp.pad(dy, ((0, 0), (0, 4), (0, 0)))
    return jax.vjp(partial(convolution, stride=1), x, k)[1](longer)


MODELS = [
    *ATTENTION.wrong(
        ("the scale is forgotten", partial(attention_bwd, scale=1.0), "[0] [1]", "a division by the root of 3"),
        (
            "the causal mask is off by one",
            lambda *a: attention_bwd(*a, mask=np.tri(5, k=1, dtype=bool)),
            "[0] [1] [2]",
            "",
        ),
        ("no causal mask", lambda *a: attention_bwd(*a, mask=True), "[0] [1] [2]", ""),
        ("the softmax's sum is missing", partial(attention_bwd, centred=False), "[0] [1]", ""),
        (
            "dq and dk swapped",
            lambda *a: tuple(attention_bwd(*a)[i] for i in (1, 0, 2)),
            "[0] [1]",
            "the gradient of [1]",
        ),
        ("p for its transpose", lambda *a: (*attention_bwd(*a)[:2], attention(*a[:2], jnp.eye(5)) @ a[4]), "[2]", ""),
    ),
    *LSTM.wrong(
        (
            "two gates swapped",
            partial(lstm_bwd, order=(0, 1, 3, 2)),
            "[0] [1] [3]",
            "blocks along axis 1 are in the order [0, 1, 3, 2]",
        ),
        ("the cell gets nothing through h", partial(lstm_bwd, through_h=False), "[0] [1] [2] [3]", "y[0] is lost"),
        ("the forget gate is left out of dc", partial(lstm_bwd, forget=False), "[2]", ""),
    ),
    *GATED.wrong(
        ("the reset gate is left out of dh", partial(gated_bwd, reset=False), "[1]", ""),
        ("nothing through the gate", partial(gated_bwd, gate=False), "[1]", ""),
    ),
    *RNN.wrong(("the derivative is missing", lambda x, y, dy: (dy,), "[0] [1]", "")),
    *CONVOLUTION.wrong(
        ("the padding is off by one", partial(convolution_bwd, pad=(0, 2)), "[0] [1]", "shifted by 1 along axis 1"),
        ("the stride is forgotten", strided_back, "[0] [1]", ""),
        (
            "the last position is lost",
            lambda x, k, y, dy: convolution_bwd(x, k, y, dy.at[:, -1].set(0.0)),
            "[0] [1]",
            "index 3 of axis 1",
        ),
    ),
    *FLAT.wrong(
        (
            "the kernel is not turned round",
            lambda x, k, y, dy: (FLAT.bwd(x, k[::-1], y, dy)[0], FLAT.bwd(x, k, y, dy)[1]),
            "[0]",
            "as if [1] were reversed along axis 0",
        ),
        (
            "a mean over positions",
            lambda x, k, y, dy: (FLAT.bwd(x, k, y, dy)[0], FLAT.bwd(x, k, y, dy)[1] / 6),
            "[1]",
            "divided by 6, the size of axis 1 of y",
        ),
    ),
    *AVERAGE.wrong(
        ("the size of the window is forgotten", lambda x, y, dy: (unpooled(dy),), "[0]", "twice the gradient")
    ),
    *POOL.wrong(
        ("every element of the window", lambda x, y, dy: (unpooled(dy),), "[0]", "a mask is missing"),
        (
            "windows off by one",
            lambda x, y, dy: (jnp.roll(POOL.bwd(x, y, dy)[0], 1, 1),),
            "[0]",
            "shifted by 1 along axis 1",
        ),
    ),
]
