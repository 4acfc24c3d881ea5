"""Wrong layers. A mistake is a function of (dparams, dx, params, residuals, dy), or a `Whole` layer."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import sigmoid

import funcnet as fn
from tests.check.rules import Right, Whole, masking, mean

KERNEL, BIAS_, SCALE = "params['kernel']", "params['bias']", "params['scale']"
DENSE = Right("dense", fn.dense(3), None, ({"kernel": "f32[4,3]", "bias": "f32[3]"}, "f32[5,4]"))
EVEN = Right("square dense", fn.dense(4), None, ({"kernel": "f32[4,4]", "bias": "f32[4]"}, "f32[5,4]"))
LAYER_NORM = Right("layer_norm", fn.layer_norm(), None, ({"scale": "f32[6]", "bias": "f32[6]"}, "f32[3,6]"))
RMS_NORM = Right("rms_norm", fn.rms_norm(), None, ({"scale": "f32[6]"}, "f32[3,6]"))
SKIP = Right("skip", fn.skip(fn.dense(4)), None, EVEN.args)
REPEAT = Right("repeat", fn.repeat(fn.dense(4), 2), None, ({"kernel": "f32[2,4,4]", "bias": "f32[2,4]"}, "f32[5,4]"))
PARALLEL = Right(
    "parallel",
    fn.parallel(a=fn.dense(3), b=fn.dense(3)),
    None,
    ({"a": DENSE.args[0], "b": DENSE.args[0]}, ("f32[5,4]", "f32[5,4]")),
    options={"state": {"a": (), "b": ()}},
)
SERIAL = Right(
    "serial",
    fn.serial(fn.dense(3), fn.tanh()),
    None,
    ({"dense": DENSE.args[0], "tanh": {}}, "f32[5,4]"),
    options={"state": {"dense": (), "tanh": ()}},
)
CROSS_ENTROPY = Right("cross_entropy", fn.cross_entropy(label_smoothing=0.1), None, ({}, ("f32[4,5]", "i32[4]<5")))
MSE = Right("mse", fn.mse(), None, ({}, ("f32[4,3]", "f32[4,3]")))
HUBER = Right("huber", fn.huber(0.5), None, ({}, ("f32[4,3]", "f32[4,3]")))
BINARY = Right("binary_cross_entropy", fn.binary_cross_entropy(), None, ({}, ("f32[4,3]", "f32[4,3]>0<1")))
FLATTEN = Right("flatten", fn.flatten(), None, ({}, "f32[2,3,4]"))
GELU = Right("gelu", fn.gelu(), None, ({}, "f32[3,4]"))
SILU = Right("silu", fn.silu(), None, ({}, "f32[3,4]"))
LEAKY = Right("leaky_relu", fn.leaky_relu(), None, ({}, "f32[3,4]"))


def x_hat(residuals):
    """What a norm makes of its input."""
    return (residuals.x - sum(residuals.means)) * residuals.rstd


def parameter(name, f):
    """The gradient of one parameter put through f(g, params, residuals, dy)."""
    return lambda dp, dx, *rest: ({**dp, name: f(dp[name], *rest)}, dx)


def x(f):
    """The gradient of the input put through f(dx, params, residuals, dy)."""
    return lambda dp, dx, *rest: (dp, f(dx, *rest))


def saving(layer, f, unpack):
    """A layer that saves f(params, residuals), and unpacks it for its own bwd."""

    def fwd(params, state, x, key):
        y, state, residuals = layer.fwd(params, state, x, key)
        return y, state, f(params, residuals)

    return Whole(
        lambda: replace(layer, fwd=fwd, bwd=lambda p, r, dy, contract=fn.total: layer.bwd(p, unpack(r), dy, contract))
    )


def with_slope(right, slope):
    """An activation with another derivative."""
    return Whole(lambda: fn.elementwise(right.name, lambda x: right.f.apply({}, (), x), slope))


def sums_itself(params, x, dy, contract=fn.total):
    return {"kernel": x.T @ dy, "bias": dy.sum(0)}, dy @ params["kernel"].T


def keeping(dtype):
    """A layer that keeps the mean of what it saw."""
    fwd = lambda params, state, x, key: (2 * x, (0.9 * state + 0.1 * x.mean(0)).astype(dtype or x.dtype), x[:1])
    bwd = lambda params, saved, dy, contract=fn.total: ({}, 2 * dy)
    return fn.Layer("keeping", lambda key, x: ({}, x[0]), lambda params, state, x: 2 * x, fwd, bwd)


def of_another_key(dp, dx, params, saved, dy):
    return fn.remat(masking()).bwd(params, saved._replace(key=jax.random.fold_in(saved.key, 1)), dy)


KEEPING = Right("running mean", keeping(None), None, ({}, "f32[5,3]"), options={"state": np.ones(3)})
REMAT = Right("remat of a dropout", fn.remat(masking()), None, ({}, "f32[4,5]"))

LAYERS = [
    *DENSE.wrong(
        ("the bias is a mean", parameter("bias", lambda g, *_: g / 5), BIAS_, "divided by 5, the size of axis 0"),
        ("the bias is left out", parameter("bias", lambda g, *_: 0 * g), BIAS_, "zero: no gradient"),
        ("the bias of each example", parameter("bias", lambda g, p, r, dy: dy), BIAS_, "not summed over axis 0"),
        ("a ten-thousandth too much", parameter("bias", lambda g, *_: g * (1 + 1e-4)), BIAS_, "times 1 + 0.0001"),
        ("the kernel is transposed", parameter("kernel", lambda g, *_: g.T), KERNEL, "transposed"),
        (
            "one column at 0.9",
            parameter("kernel", lambda g, *_: g.at[:, 1].multiply(0.9)),
            KERNEL,
            "only index 1 of axis 1",
        ),
        (
            "in bfloat16",
            parameter("kernel", lambda g, *_: g.astype(jnp.bfloat16)),
            KERNEL,
            "bfloat16[4, 3] for float64",
        ),
        (
            "a gradient is missing",
            lambda dp, dx, *_: ({"kernel": dp["kernel"]}, dx),
            BIAS_,
            "no gradient for float64[3]",
        ),
        (
            "a gradient too many",
            lambda dp, dx, *_: ({**dp, "more": dx}, dx),
            "params['more']",
            "for a leaf that has none",
        ),
        ("no dx", x(lambda g, *_: None), "x", "no gradient for float64[5, 4]"),
        ("dx of another shape", x(lambda g, *_: g.reshape(4, 5)), "x", "the right numbers in another shape"),
        (
            "contract is ignored",
            Whole(lambda: replace(fn.dense(3), bwd=sums_itself)),
            f"{KERNEL} {BIAS_}",
            "per_example gives",
            "laws",
        ),
        (
            "the kernel among the residuals",
            saving(fn.dense(3), lambda p, r: (r, p["kernel"]), lambda r: r[0]),
            "residuals[1]",
            "parameters alone",
            "residuals",
        ),
        (
            "a number among the residuals",
            saving(fn.dense(3), lambda p, r: (r, 3), lambda r: r[0]),
            "residuals[1]",
            "not an array",
            "residuals",
        ),
        ("a stale residual", saving(fn.dense(3), lambda p, r: r + 1, lambda r: r), KERNEL, "the same along axis 0"),
        (
            "apply is not fwd",
            Whole(lambda: replace(fn.dense(3), apply=lambda p, s, x: 1.01 * fn.dense(3).apply(p, s, x))),
            "y",
            "by apply",
            "laws",
        ),
    ),
    *EVEN.wrong(
        (
            "dx by the kernel, not its transpose",
            x(lambda g, p, r, dy: dy @ p["kernel"]),
            "x",
            f"as if {KERNEL} were transposed",
        ),
    ),
    *LAYER_NORM.wrong(
        (
            "mean(g) is missing",
            x(lambda g, p, r, dy: g + r.rstd * mean(dy * p["scale"][None])),
            "x",
            "the same along axis 1",
        ),
        (
            "mean(g x_hat) is missing",
            x(lambda g, p, r, dy: g + r.rstd * x_hat(r) * mean(dy * p["scale"][None] * x_hat(r))),
            "x",
            "like x less its mean along axis 1",
        ),
        (
            "n - 1 in the variance",
            x(lambda g, p, r, dy: g - r.rstd * x_hat(r) * mean(dy * p["scale"][None] * x_hat(r)) / 5),
            "x",
            "like x less its mean along axis 1",
        ),
        ("rstd is forgotten", x(lambda g, p, r, dy: g / r.rstd), "x", "have the wrong weights"),
        (
            "the scale is forgotten",
            lambda dp, dx, p, r, dy: (dp, fn.layer_norm().bwd({**p, "scale": 1 + 0 * p["scale"]}, r, dy)[1]),
            "x",
            f"a factor {SCALE} is missing",
        ),
        (
            "the scale's without x_hat",
            parameter("scale", lambda g, p, r, dy: dy.sum(0)),
            SCALE,
            f"this is the gradient of {BIAS_}",
        ),
        (
            "swapped",
            lambda dp, dx, *_: ({"scale": dp["bias"], "bias": dp["scale"]}, dx),
            f"{SCALE} {BIAS_}",
            f"this is the gradient of {SCALE}",
        ),
    ),
    *RMS_NORM.wrong(
        (
            "as if rstd were constant",
            x(lambda g, p, r, dy: r.rstd * dy * p["scale"][None]),
            "x",
            "like x along axis 1",
        ),
        (
            "sum for mean",
            x(lambda g, p, r, dy: g - 5 * r.rstd * x_hat(r) * mean(dy * p["scale"][None] * x_hat(r))),
            "x",
            "like x along axis 1",
        ),
    ),
    *SKIP.wrong(("the connection is forgotten", x(lambda g, p, r, dy: g - dy), "x", "off by -1 times dy")),
    *REPEAT.wrong(
        ("turns in the wrong order", parameter("kernel", lambda g, *_: g[::-1]), KERNEL, "reversed along axis 0"),
        ("the first turn alone", parameter("bias", lambda g, *_: g.at[1].set(0.0)), BIAS_, "zero that should not be"),
    ),
    *PARALLEL.wrong(
        ("dx swapped", x(lambda g, *_: g[::-1]), "x[0] x[1]", "this is the gradient of x[1]"),
        (
            "one kernel twice",
            lambda dp, dx, *_: ({**dp, "b": dp["a"]}, dx),
            "params['b']['kernel'] params['b']['bias']",
            "this is the gradient of params['a']['kernel']",
        ),
    ),
    *SERIAL.wrong(
        (
            "the activation is left out",
            lambda dp, dx, p, r, dy: SERIAL.f.bwd(p, r, dy / (1 - r["tanh"] ** 2)),
            "params['dense']['kernel'] params['dense']['bias'] x",
            "a factor 1 - y^2 is missing",
        ),
        (
            "an inner bias",
            lambda dp, dx, *_: ({**dp, "dense": {**dp["dense"], "bias": -dp["dense"]["bias"]}}, dx),
            "params['dense']['bias']",
            "the sign is flipped",
        ),
    ),
    *CROSS_ENTROPY.wrong(
        ("the smoothing is forgotten", x(lambda g, p, r, dy: fn.cross_entropy().bwd(p, r, dy)[1]), "x[0]", ""),
        (
            "dy is left out",
            x(lambda g, p, r, dy: CROSS_ENTROPY.f.bwd(p, r, jnp.ones_like(dy))[1]),
            "x[0]",
            "dy is left out",
        ),
    ),
    *MSE.wrong(
        ("the target's sign", x(lambda g, *_: (g[0], g[0])), "x[1]", "the sign is flipped"),
        (
            "not divided by n",
            x(lambda g, *_: (3 * g[0], -3 * g[0])),
            "x[0] x[1]",
            "a division by 3, the size of axis 1 of x[0], is missing",
        ),
        (
            "the last example is lost",
            x(lambda g, *_: (g[0].at[3].set(0.0), g[1])),
            "x[0]",
            "only index 3 of axis 0 is wrong: it is zero",
        ),
    ),
    *HUBER.wrong(("not clipped", x(lambda g, p, r, dy: ((r[0] - r[1]) * dy[:, None] / 3, g[1])), "x[0]", "")),
    *BINARY.wrong(("y for t", x(lambda g, p, r, dy: (g[0], g[1] * r[1])), "x[1]", "a factor x[1] too many")),
    *FLATTEN.wrong(
        (
            "in another order",
            x(lambda g, p, r, dy: dy.reshape(2, 4, 3).transpose(0, 2, 1)),
            "x",
            "the right numbers in other places",
        ),
        ("not folded back", x(lambda g, p, r, dy: dy), "x", "the right numbers in another shape"),
    ),
    *GELU.wrong(("x phi(x) is missing", with_slope(GELU, lambda x: jax.scipy.stats.norm.cdf(x)), "x", "")),
    *SILU.wrong(("sigmoid(x) alone", with_slope(SILU, sigmoid), "x", "")),
    *LEAKY.wrong(
        (
            "zero for what is negative",
            with_slope(LEAKY, lambda x: jnp.where(x > 0, 1.0, 0.0).astype(x.dtype)),
            "x",
            "zero that should not be",
        ),
        (
            "the slope's sign",
            with_slope(LEAKY, lambda x: jnp.where(x > 0, 1.0, -0.01).astype(x.dtype)),
            "x",
            "right but for the sign",
        ),
    ),
    *KEEPING.wrong(
        ("the state in float32", Whole(lambda: keeping(jnp.float32)), "-", "fwd returned the state", "laws"),
        ("dx by the factor of apply, twice", x(lambda g, *_: 2 * g), "x", "twice the gradient"),
    ),
    *REMAT.wrong(("run again with another key", of_another_key, "x", "another mask")),
]
