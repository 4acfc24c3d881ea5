"""Activations: one table of functions and their derivatives.

    y = f(x)        dx = dy * f'(x)

Each rule saves one array, the cheaper of x and y. Where f' can be written in terms of y, that is y: the next layer
usually saves y as its own input, so that the two share their memory. Otherwise it is x; in half precision it is x also
where f' is a difference, such as 1 - y^2, in which a rounded y leaves no correct digit. Each docstring states f', what
is saved, and the value of f' at a kink, where f has no derivative; JAX's derivative of the forward has the same value.

Numerics: half precision is computed in float32 and rounded once: for every half-precision x, y is within 1 unit in the
last place of the exact value, and f' within 2. At infinite inputs y and f' are the limits, and y of NaN is NaN. One
exception: on CPUs XLA takes subnormal numbers for 0, so in float32 and bfloat16 a result below 1e-35 may be 0, and the
result of a subnormal x that of x = 0. The derivatives of gelu and silu are written to share no expensive subexpression
with f: the compiler would keep a shared one for the backward pass, in addition to x.
"""

import math
from dataclasses import replace

import jax.numpy as jnp
from jax import Array, lax, nn

from funcnet._internal import expect
from funcnet._internal.numerics import sum_dtype
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, elementwise
from funcnet.structure import constructor

Activation = Layer[dict, tuple[()], Array]

_SELU_ALPHA, _SELU_SCALE = 1.6732632423543772, 1.0507009873554805
_TANH_SCALE, _TANH_CUBE = math.sqrt(2 / math.pi), 0.044715


@constructor
def identity() -> Activation:
    """y = x; y' = 1. Saves y."""
    return elementwise("identity", lambda x: x, jnp.ones_like, "output")


@constructor
def relu() -> Activation:
    """y = max(x, 0); y' = [y > 0], so 0 at the kink x = 0. Saves y."""
    # Written with `where`: with a maximum, XLA derives the mask from x, and keeps x as well.
    return elementwise("relu", lambda x: jnp.where(x <= 0, 0.0, x), lambda y: _one_where(y > 0, y), "output")


@constructor
def relu6() -> Activation:
    """y = min(max(x, 0), 6); y' = [0 < y < 6], so 0 at the kinks 0 and 6. Saves y."""
    return elementwise("relu6", lambda x: _clip(x, 0.0, 6.0), lambda y: _one_where((y > 0) & (y < 6), y), "output")


@constructor
def leaky_relu(slope: float = 0.01) -> Activation:
    """y = x for x > 0, else slope * x; y' = 1 for y > 0, else slope, at the kink x = 0 too. Saves y. slope >= 0."""
    slope = expect.not_negative(slope, "slope", "use the default, 0.01")
    f = lambda x: jnp.where(x <= 0, slope * x if slope else 0.0, x)  # 0 times an infinity is NaN
    return elementwise("leaky_relu", f, lambda y: jnp.where(y > 0, jnp.ones_like(y), slope), "output")


@constructor
def elu(alpha: float = 1.0) -> Activation:
    """y = x for x > 0, else alpha * (e^x - 1); y' = 1 for y > 0, else y + alpha (alpha at x = 0). alpha > 0.

    Saves y; in half precision x, with y' = alpha e^x for x <= 0.
    Source: Clevert, Unterthiner and Hochreiter 2016, arXiv:1511.07289.
    """
    alpha = expect.positive(alpha, "alpha", "use the default, 1.0")
    f = lambda x: jnp.where(x <= 0, alpha * _expm1_below_zero(x), x)
    return _by_precision(
        elementwise("elu", f, lambda y: jnp.where(y > 0, jnp.ones_like(y), y + alpha), "output"),
        elementwise("elu", f, lambda x: jnp.where(x > 0, jnp.ones_like(x), alpha * _exp_below_zero(x))),
    )


@constructor
def celu(alpha: float = 1.0) -> Activation:
    """y = x for x > 0, else alpha * (e^(x / alpha) - 1); y' = 1 for y > 0, else 1 + y / alpha. alpha > 0.

    Saves y; in half precision x, with y' = e^(x / alpha) for x <= 0.
    Source: Barron 2017, arXiv:1704.07483.
    """
    alpha = expect.positive(alpha, "alpha", "use the default, 1.0")
    f = lambda x: jnp.where(x <= 0, alpha * _expm1_below_zero(x / alpha), x)
    return _by_precision(
        elementwise("celu", f, lambda y: jnp.where(y > 0, jnp.ones_like(y), 1 + y / alpha), "output"),
        elementwise("celu", f, lambda x: jnp.where(x > 0, jnp.ones_like(x), _exp_below_zero(x / alpha))),
    )


@constructor
def selu() -> Activation:
    """y = s * elu(x; a), a = 1.6733, s = 1.0507; y' = s for y > 0, else y + s * a, at the kink x = 0 too.

    Saves y; in half precision x, with y' = s a e^x for x <= 0.
    Source: Klambauer et al. 2017, arXiv:1706.02515.
    """
    a, s = _SELU_ALPHA, _SELU_SCALE
    f = lambda x: jnp.where(x <= 0, s * a * _expm1_below_zero(x), s * x)
    return _by_precision(
        elementwise("selu", f, lambda y: jnp.where(y > 0, s * jnp.ones_like(y), y + s * a), "output"),
        elementwise("selu", f, lambda x: jnp.where(x > 0, s * jnp.ones_like(x), s * a * _exp_below_zero(x))),
    )


@constructor
def gelu(*, approximate: bool = False) -> Activation:
    """y = x Phi(x), Phi the standard normal distribution function and phi its density; y' = Phi(x) + x phi(x). Saves x.

    With approximate=True, y = x s(x) with s = sigmoid(2u), u = sqrt(2/pi) (x + 0.044715 x^3), which is the tanh form
    x (1 + t) / 2, t = tanh u; y' = (1 + t) / 2 + x (1 - t^2) u' / 2.

    Numerics: in float32 Phi is computed as (1 + erf(x / sqrt 2)) / 2, or (1 + t) / 2, which is fastest: y is off by at
    most 8e-7, which from x = -3 down is more than the last digits of y, and at -6 all of them. In half precision it is
    computed as erfc(-x / sqrt 2) / 2, or s, which keep those digits.
    Source: Hendrycks and Gimpel 2016, arXiv:1606.08415.
    """
    expect.flags(approximate=approximate)
    if approximate:
        return _by_precision(elementwise("gelu", _gelu_tanh, _gelu_tanh_slope), GELU_TANH_IN_HALF)
    root, density = math.sqrt(0.5), 1 / math.sqrt(2 * math.pi)

    def f(x: Array) -> Array:
        return jnp.maximum(x, -40.0) * (0.5 + 0.5 * lax.erf(x * root))

    def df(x: Array) -> Array:
        x = jnp.clip(x, -40.0, 40.0)  # beyond, the slope is 0 or 1, and at an infinity x phi(x) is NaN
        # erf is odd: with its argument negated it is not the erf in f, which the compiler would otherwise keep.
        return 0.5 - 0.5 * lax.erf(x * -root) + x * (density * jnp.exp(-0.5 * x * x))

    return _by_precision(elementwise("gelu", f, df), GELU_IN_HALF)


@constructor
def silu() -> Activation:
    """y = x s(x), s the sigmoid; y' = s (1 + x (1 - s)). Saves x. Also called swish."""

    def df(x: Array) -> Array:
        x = jnp.clip(x, -1e3, 1e3)
        s, rest = _sigmoids(x)
        return s * (1 + x * rest)

    return elementwise("silu", lambda x: jnp.maximum(x, -1e3) * nn.sigmoid(x), df)


@constructor
def mish() -> Activation:
    """y = x t, t = tanh(log(1 + e^x)); y' = t + x (1 - t^2) sigmoid(x). Saves x.

    Source: Misra 2020, arXiv:1908.08681.
    """

    def df(x: Array) -> Array:
        x = jnp.clip(x, -1e3, 1e3)
        u = jnp.exp(jnp.minimum(x, -x))  # e^-|x|: t and t' are rational functions of it
        above, below = 1 + 2 * u + 2 * u * u, 2 + 2 * u + u * u
        t = jnp.where(x >= 0, (1 + 2 * u) / above, (2 * u + u * u) / below)
        return t + x * (4 * (1 + u) * jnp.where(x >= 0, jnp.square(u / above), u / jnp.square(below)))

    return elementwise("mish", lambda x: jnp.maximum(x, -1e3) * jnp.tanh(nn.softplus(x)), df)


@constructor
def softplus() -> Activation:
    """y = log(1 + e^x); y' = sigmoid(x) = 1 - e^-y. Saves y."""
    return elementwise("softplus", nn.softplus, lambda y: -jnp.expm1(-y), "output")


@constructor
def sigmoid() -> Activation:
    """y = 1 / (1 + e^-x); y' = y (1 - y). Saves y; in half precision x."""
    return _by_precision(elementwise("sigmoid", nn.sigmoid, lambda y: y * (1 - y), "output"), SIGMOID_IN_HALF)


@constructor
def log_sigmoid() -> Activation:
    """y = -log(1 + e^-x); y' = sigmoid(-x) = 1 - e^y. Saves y."""
    return elementwise("log_sigmoid", lambda x: -nn.softplus(-x), lambda y: -jnp.expm1(y), "output")


@constructor
def tanh() -> Activation:
    """y = tanh(x); y' = 1 - y^2 = (1 - y)(1 + y). Saves y; in half precision x, with y' = 4 s (1 - s), s = s(2 x)."""
    return _by_precision(
        elementwise("tanh", jnp.tanh, lambda y: (1 - y) * (1 + y), "output"),
        elementwise("tanh", jnp.tanh, lambda x: 4 * _sigmoid_slope(2 * x)),
    )


@constructor
def hard_tanh() -> Activation:
    """y = min(max(x, -1), 1); y' = [-1 < y < 1], so 0 at the kinks. Saves y."""
    return elementwise("hard_tanh", lambda x: _clip(x, -1.0, 1.0), lambda y: _one_where(jnp.abs(y) < 1, y), "output")


@constructor
def hard_sigmoid() -> Activation:
    """y = min(max(x + 3, 0), 6) / 6; y' = [0 < y < 1] / 6, so 0 at the kinks -3 and 3. Saves y.

    Numerics: where y rounds to 1, at the largest float32 numbers below 3, y' is already 0.
    """
    f = lambda x: jnp.where(x <= -3, 0.0, jnp.where(x >= 3, 1.0, (x + 3) / 6))
    df = lambda y: _one_where((y > 0) & (y < 1), y) / 6
    return elementwise("hard_sigmoid", f, df, "output")


@constructor
def hard_silu() -> Activation:
    """y = x hard_sigmoid(x); y' = 0 for x <= -3, 1 for x >= 3, else (2 x + 3) / 6. Saves x."""
    f = lambda x: jnp.where(x <= -3, 0.0, jnp.where(x >= 3, x, x * ((x + 3) / 6)))
    df = lambda x: jnp.where(x <= -3, 0.0, jnp.where(x >= 3, 1.0, (2 * x + 3) / 6))
    return elementwise("hard_silu", f, df)


@constructor
def squareplus(b: float = 4.0) -> Activation:
    """y = (x + sqrt(x^2 + b)) / 2; y' = 1 / (1 + b / (2 y)^2). Saves y. b > 0.

    Numerics: for x < 0, y = (b / 2) / (sqrt(x^2 + b) - x), which does not cancel. In half precision y' is within 2.5
    units in the last place: it doubles the relative error of a rounded y.
    Source: Barron 2021, arXiv:2112.11687.
    """
    b = expect.positive(b, "b", "use the default, 4.0")

    def f(x: Array) -> Array:
        far = jnp.abs(x) > math.sqrt(b / float(jnp.finfo(x.dtype).eps))  # there the root is |x|, and x^2 may overflow
        root = jnp.where(far, jnp.abs(x), jnp.sqrt(jnp.square(jnp.where(far, 0.0, x)) + b))
        below = (b / 2) / jnp.where(x < 0, root - x, 1.0)
        return jnp.where(x < 0, below, jnp.where(far, x, (x + root) / 2))

    return elementwise("squareplus", f, lambda y: 1 / (1 + jnp.square(math.sqrt(b) / 2 / y)), "output")


@constructor
def softsign() -> Activation:
    """y = x / (1 + |x|); y' = (1 - |y|)^2. Saves y; in half precision x, with y' = 1 / (1 + |x|)^2."""

    def f(x: Array) -> Array:
        largest = float(jnp.finfo(x.dtype).max)
        x = jnp.clip(x, -largest, largest)  # inf / inf is NaN
        return x / (1 + jnp.abs(x))

    return _by_precision(
        elementwise("softsign", f, lambda y: jnp.square(1 - jnp.abs(y)), "output"),
        elementwise("softsign", f, lambda x: jnp.square(1 / (1 + jnp.abs(x)))),
    )


def _by_precision(single: Activation, half: Activation) -> Activation:
    """`single`, but in half precision `half`: slower or with more memory, and small values keep all digits."""

    def of(x: Array) -> Activation:
        return half if expect.is_floating(x) and x.dtype != sum_dtype(x.dtype) else single

    return replace(
        single,
        apply=lambda params, state, x: of(x).apply(params, state, x),
        fwd=lambda params, state, x, key: of(x).fwd(params, state, x, key),
        bwd=lambda params, saved, dy, contract=total: of(saved).bwd(params, saved, dy, contract),
    )


def _one_where(condition: Array, like: Array) -> Array:
    return condition.astype(like.dtype)


def _clip(x: Array, low: float, high: float) -> Array:
    """x clipped to [low, high], with derivative 0 at both ends; that of `jnp.clip` is 1/2 or 1 there, by version."""
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x))


def _expm1_below_zero(x: Array) -> Array:
    """e^x - 1 for x <= 0; 0 above, so that the branch not taken cannot overflow."""
    return jnp.expm1(jnp.where(x <= 0, x, 0.0))


def _exp_below_zero(x: Array) -> Array:
    """e^x for x <= 0; 1 above."""
    return jnp.exp(jnp.where(x <= 0, x, 0.0))


def _sigmoids(x: Array) -> tuple[Array, Array]:
    """sigmoid(x) and sigmoid(-x), which is 1 - sigmoid(x), neither computed as a difference."""
    e = jnp.exp(-jnp.abs(x))
    large = 1 / (1 + e)
    return jnp.where(x >= 0, large, e * large), jnp.where(x >= 0, e * large, large)


def _sigmoid_slope(x: Array) -> Array:
    s, rest = _sigmoids(x)
    return s * rest


def _gelu_tanh(x: Array) -> Array:
    return jnp.maximum(x, -10.0) * (0.5 + 0.5 * jnp.tanh(_TANH_SCALE * (x + _TANH_CUBE * x * x * x)))


def _gelu_tanh_slope(x: Array) -> Array:
    x = jnp.clip(x, -10.0, 10.0)  # beyond, the slope is 0 or 1, and x^3 may overflow
    t = jnp.tanh(-_TANH_SCALE * (x + _TANH_CUBE * x * x * x))  # negated, as erf is in the exact form
    return 0.5 - 0.5 * t + x * ((0.5 - 0.5 * t * t) * (_TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)))


def _erfc_gelu(x: Array) -> Array:
    return jnp.maximum(x, -40.0) * (0.5 * lax.erfc(x * -math.sqrt(0.5)))


def _erfc_gelu_slope(x: Array) -> Array:
    x = jnp.clip(x, -40.0, 40.0)
    tail = 0.5 * lax.erfc(jnp.abs(x) * math.sqrt(0.5))  # of |x|, so that it is not the erfc of the forward either
    return jnp.where(x < 0, tail, 1 - tail) + x * (jnp.exp(-0.5 * x * x) / math.sqrt(2 * math.pi))


def _sigmoid_gelu(x: Array) -> Array:
    x = jnp.maximum(x, -20.0)
    return x * nn.sigmoid(2 * _TANH_SCALE * (x + _TANH_CUBE * x * x * x))


def _sigmoid_gelu_slope(x: Array) -> Array:
    x = jnp.clip(x, -20.0, 20.0)
    s, rest = _sigmoids(2 * _TANH_SCALE * (x + _TANH_CUBE * x * x * x))
    return s * (1 + x * rest * (2 * _TANH_SCALE * (1 + 3 * _TANH_CUBE * x * x)))


SIGMOID_IN_HALF = elementwise("sigmoid", nn.sigmoid, _sigmoid_slope)
GELU_IN_HALF = elementwise("gelu", _erfc_gelu, _erfc_gelu_slope)
GELU_TANH_IN_HALF = elementwise("gelu", _sigmoid_gelu, _sigmoid_gelu_slope)
