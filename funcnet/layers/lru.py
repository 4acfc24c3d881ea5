"""A diagonal linear recurrence: complex states, driven by the input, that rotate and decay independently.

With states n, decay a_n = -e^(nu_n) < 0 and angle b_n = e^(theta_n):

    lambda = e^(a + i b)        gamma = sqrt(1 - e^(2a))        u_t = gamma (x_t @ (K + i L))
    h_t = lambda h_{t-1} + u_t,  h_0 = 0                        y_t = Re(h_t @ (P + i Q)) = Re(h_t) @ P - Im(h_t) @ Q

gamma keeps the size of h whatever the decay. As the recurrence is linear, one associative scan, log T steps deep, gives
all h_t.

Backward, with cotangents of complex numbers written as dL/dRe + i dL/dIm, and * for the conjugate:

    p_t = dy_t @ P^T - i dy_t @ Q^T         g_t = p_t + lambda* g_{t+1}     the same scan, from the end
    dv_t = gamma g_t                        dx_t = Re(dv_t) @ K^T + Im(dv_t) @ L^T
    dK, dL: Outer(x, Re(dv)), Outer(x, Im(dv))      dP, dQ: Outer(Re(h), dy), Outer(Im(h), -dy)

and with w_t = lambda h_{t-1}, so that u_t = h_t - w_t, for each position

    da_t = Re(w_t* g_t) - Re(u_t* g_t) / (e^(-2a) - 1)         db_t = Im(w_t* g_t)

from which nu and theta have the factors Shift(a da) and Shift(b db). As a goes to 0, a / (e^(-2a) - 1) goes to -1/2.

Residuals: x [B, T, D] and h [B, T, N].  Why these: autodiff would keep the tree of the scan, some more arrays like h; w
and u follow from h.
Numerics: states and sums are in float32 (complex64) for half precision. nu and theta are float32 or wider whatever x's
dtype is, and `mixed` leaves them so: rounded to bfloat16 these logarithms are off by up to 1/64 where they are below 8,
which is then the relative error of the angle of every step.
Initial values: |lambda|^2 is uniform between r_min^2 and r_max^2, the angle uniform up to max_phase; the kernels are
normal and keep the variance of their inputs, of which the real and the imaginary part have half each.
Source: Orvieto et al. 2023, arXiv:2303.06349, section 3 (the linear recurrent unit); Blelloch 1990, "Prefix sums and
their applications" (the scan); Martin and Cundy 2018, arXiv:1709.04057 (its backward pass).
"""

from dataclasses import replace
from math import log
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError
from funcnet._internal.numerics import contract_last, in_front, sum_dtype
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.layer import Layer, stateless
from funcnet.structure import constructor

LOGARITHMS = ("nu", "theta")
KERNELS = ("kernel_real", "kernel_imag", "out_real", "out_imag")


class LruResiduals(NamedTuple):
    """Residuals of `lru`: x [B, T, D] and the states h [B, T, N], complex."""

    x: Array
    h: Array


class Turning(NamedTuple):
    """The constants of the recurrence, all [N]: a, b, gamma, and lambda."""

    decay: Array
    angle: Array
    gain: Array
    factor: Array


@constructor
def lru(
    features: int, states: int, *, r_min: float = 0.0, r_max: float = 1.0, max_phase: float = 6.28
) -> Layer[dict[str, Array], tuple[()], LruResiduals]:
    """The linear recurrent unit over [B, T, D], to [B, T, F], with N complex states; h begins at 0.

    Params nu and theta [N], kernel_real and kernel_imag [D, N], out_real and out_imag [N, F]: a, b, K, L, P, Q above;
    nu and theta in float32 for half precision.
    It has no nonlinearity: put one after it, such as `fn.skip(fn.serial(fn.layer_norm(), fn.lru(64, 64), fn.gelu()))`.

    Args:
        features: F.
        states: N.
        r_min, r_max: between which |lambda| is initialised, 0 <= r_min < r_max <= 1.
        max_phase: the greatest initial angle per step, in radians.

    Raises:
        InputError: for options out of range, and for x that is not [B, T, D] or has not the parameters' D.
    """
    features, states = expect.count(features, "features"), expect.count(states, "states")
    r_min, r_max = expect.number(r_min, "r_min"), expect.number(r_max, "r_max")
    max_phase = expect.positive(max_phase, "max_phase", "use the default, 6.28")
    if not 0 <= r_min < r_max <= 1:
        raise InputError("0 <= r_min < r_max <= 1", f"r_min={r_min}, r_max={r_max}", "use the defaults")

    def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
        own = {"nu": (states,), "theta": (states,)}
        return own | dict(zip(KERNELS, [(inputs, states)] * 2 + [(states, features)] * 2, strict=True))

    def fits(params: Any, x: Any) -> None:
        expect.sequences(x, expect.size(params, "kernel_real"))
        expect.fields(params, x.dtype, shapes(x.shape[-1]), LOGARITHMS)

    def init(key: Array, x: Any) -> dict[str, Array]:
        expect.sequences(x)
        keys, dtype = jax.random.split(expect.key(key), 6), expect.dtype(x)
        square, phase = (jax.random.uniform(k, (states,), sum_dtype(dtype), 1e-6) for k in keys[:2])
        within = (1 - square) * (1 - (r_min / r_max) ** 2)  # |lambda|^2 is r_max^2 (1 - within), which may round to 1
        nu = jnp.log(-log(r_max) - 0.5 * jnp.log1p(-within))
        drawn = {"nu": nu, "theta": jnp.log(max_phase * phase)}
        for name, k in zip(KERNELS, keys[2:], strict=True):
            shape = shapes(x.shape[-1])[name]
            variance = (2 if name.startswith("kernel") else 1) * shape[0]
            drawn[name] = jax.random.normal(k, shape, sum_dtype(dtype)) / variance**0.5
        return {name: value if name in LOGARITHMS else value.astype(dtype) for name, value in drawn.items()}

    def turning(params: dict[str, Array], x: Array) -> Turning:
        high = sum_dtype(max((params[name].dtype for name in LOGARITHMS), key=lambda dtype: jnp.finfo(dtype).bits))
        nu = jnp.minimum(params["nu"].astype(high), 80.0)  # beyond, h decays to 0 in one step; e^nu stays finite
        a, b = -jnp.exp(nu), jnp.exp(params["theta"].astype(high))
        factor = jnp.exp(lax.complex(a, b))
        # JAX's derivative of expm1 is expm1 + 1, which loses the digits of e^(2a) where that is small.
        square = jnp.where(2 * a < -1, 1 - jnp.exp(2 * a), -jnp.expm1(2 * a))
        real, imag = (part.astype(sum_dtype(x.dtype)) for part in (jnp.real(factor), jnp.imag(factor)))
        a, b, gain = (each.astype(sum_dtype(x.dtype)) for each in (a, b, jnp.sqrt(square)))
        return Turning(a, b, gain, lax.complex(real, imag))

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, LruResiduals]:
        fits(params, x)
        turn = turning(params, x)
        v = lax.complex(*(contract_last(x, params[name], 0) for name in KERNELS[:2]))
        h = _recurrence(turn.factor, v * in_front(turn.gain, 3).astype(v.dtype), reverse=False)
        real, imag = (contract_last(part.astype(x.dtype), params[name], 0) for part, name in _parts(h, KERNELS[2:]))
        return (real - imag).astype(x.dtype), LruResiduals(x, h)

    def bwd(params, residuals, dy, contract):
        x, h = residuals
        fits(params, x)
        dy = expect.cotangent(dy, (*x.shape[:2], features), x.dtype)
        turn = turning(params, x)
        p = lax.complex(contract_last(dy, params["out_real"], 1), -contract_last(dy, params["out_imag"], 1))
        g = _recurrence(jnp.conj(turn.factor), p, reverse=True)
        w = in_front(turn.factor, 3) * jnp.concatenate([jnp.zeros_like(h[:, :1]), h[:, :-1]], axis=1)
        of_w, of_u = jnp.conj(w) * g, jnp.conj(h - w) * g
        a, b, gain, _ = (in_front(each, 3) for each in turn)
        rest = jnp.expm1(-2 * a)
        share = a / jnp.where(rest > 0, rest, 1.0)  # without any decay u is 0, and so is its share
        factors = {"nu": Shift(a * jnp.real(of_w) - share * jnp.real(of_u)), "theta": Shift(b * jnp.imag(of_w))}
        dv = [(gain * part).astype(x.dtype) for part, _ in _parts(g, KERNELS[:2])]
        dx = contract_last(dv[0], params["kernel_real"], 1) + contract_last(dv[1], params["kernel_imag"], 1)
        factors |= {name: Outer(x, part) for part, name in zip(dv, KERNELS[:2], strict=True)}
        real, imag = (part.astype(x.dtype) for part, _ in _parts(h, KERNELS[2:]))
        factors |= {"out_real": Outer(real, dy), "out_imag": Outer(imag, -dy)}
        return {name: contract(factors[name], params[name]) for name in params}, dx.astype(x.dtype)

    return replace(stateless("lru", init, fwd, bwd), unrounded=LOGARITHMS)


def _recurrence(factor: Array, u: Array, reverse: bool) -> Array:
    """h_t = factor h_{t-1} + u_t over axis 1 of u [B, T, N], from the first step or from the last."""

    def after(first: tuple[Array, Array], then: tuple[Array, Array]) -> tuple[Array, Array]:
        return first[0] * then[0], then[0] * first[1] + then[1]

    factors = jnp.broadcast_to(factor[None, None], (1, *u.shape[1:]))
    return lax.associative_scan(after, (factors, u), reverse=reverse, axis=1)[1]


def _parts(z: Array, names: tuple[str, ...]) -> zip:
    return zip((jnp.real(z), jnp.imag(z)), names, strict=True)
