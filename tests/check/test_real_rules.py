"""What `check_vjp` says of rules that nobody here wrote: those of JAX and optax, and those of reported bugs.

Each case is a function, a point and what is to come out: HOLDS, KINK (holds, the kink is noted), SILENT (holds, with an
element of which no oracle can tell), or the beginning of the sentence that refuses it. A refusal stands for a gradient
that is not the derivative there; the reason is given beside it.
"""

import jax
import jax.numpy as jnp
import jax.scipy.special as sp
import numpy as np
import optax
import pytest
from jax.test_util import check_grads

import funcnet as fn

pytestmark = pytest.mark.usefixtures("standard_promotion")

HOLDS, KINK, SILENT = "holds", "kink", "silent"
INF = np.inf
loss = optax.losses
projection = optax.projections


def at(*values, dtype="float32"):
    return np.array(values, dtype)


def sinh_guarded(x):
    return jnp.where(x == 0, 1.0, jnp.sinh(x) / x)


def sqrt_guarded(x):
    return jnp.where(x > 0, jnp.sqrt(x), 0.0)


def sqrt_guarded_twice(x):
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0)


def exp_guarded(x):
    return jnp.where(x == 0, 1.0, jnp.exp(x))


def elu_once(x):
    return jnp.where(x > 0, x, jnp.expm1(x))


def relu_twice(x):
    return jax.nn.relu(x) - jax.nn.relu(-x)


def in_a_scan(x):
    return jax.lax.scan(lambda c, _: (jax.nn.relu(c - 0.1) + jnp.logaddexp(c, 0.0), c), x, None, length=3)


def solve(a, b):
    return jax.lax.custom_linear_solve(
        lambda x: a @ x, b, lambda _, b: jnp.linalg.solve(a, b), lambda _, b: jnp.linalg.solve(a.T, b)
    )


def positive(a):
    return a @ a.T + 3 * jnp.eye(3, dtype=a.dtype)


def zero_log(y):
    return sp.xlogy(at(0, 1), y)


def zero_power(x):
    return jnp.power(x, at(0, 2))


def quantile(q):
    return jnp.quantile(at(1, 2, 4), q)


MASK = np.array([1, 1, 0, 1], bool)
MATRIX = np.array([[2, 1, 0], [-1, 3, 1], [0.5, 0, 1]], "float32")

ORDINARY = {
    "relu": (jax.nn.relu, "f32[6]"),
    "relu bf16": (jax.nn.relu, "bf16[6]"),
    "relu6": (jax.nn.relu6, "f32[6]"),
    "silu": (jax.nn.silu, "f32[6]"),
    "gelu": (jax.nn.gelu, "f32[6]"),
    "softplus": (jax.nn.softplus, "f32[6]"),
    "softmax": (jax.nn.softmax, "f32[6]"),
    "softmax where": (lambda x: jax.nn.softmax(x, where=MASK), "f32[4]"),
    "log_softmax bf16": (jax.nn.log_softmax, "bf16[6]"),
    "logsumexp": (jax.nn.logsumexp, "f32[6]"),
    "logaddexp": (jnp.logaddexp, "f32[6]", "f32[6]"),
    "logaddexp complex": (jnp.logaddexp, "c64[4]", "c64[4]"),
    "log1mexp": (jax.nn.log1mexp, "f32[6]>0.1"),
    "xlogy": (sp.xlogy, "f32[6]", "f32[6]>0.1"),
    "xlog1py": (sp.xlog1py, "f32[6]", "f32[6]>0.1"),
    "entr": (sp.entr, "f32[6]>0.1"),
    "logit": (sp.logit, "f32[6]>0.01<0.99"),
    "gammaln": (sp.gammaln, "f32[6]>0.1"),
    "digamma": (sp.digamma, "f32[6]>0.3"),
    "zeta": (lambda q: sp.zeta(3.0, q), "f32[4]>0.5"),
    "i0e": (sp.i0e, "f32[6]"),
    "i1e": (sp.i1e, "f32[6]"),
    "sinc": (jnp.sinc, at(0, 1, 1e-5, -0.5)),
    "frexp": (lambda x: jnp.frexp(x)[0], at(0.7, 1.3, 3.1)),
    "norm": (jnp.linalg.norm, "f32[6]"),
    "cumprod": (jnp.cumprod, "f32[6]"),
    "slogdet": (jnp.linalg.slogdet, MATRIX),
    "det": (jnp.linalg.det, MATRIX),
    "pinv": (jnp.linalg.pinv, MATRIX[:, :2]),
    "cholesky": (lambda a: jnp.linalg.cholesky(positive(a)), "f32[3,3]"),
    "eigh": (lambda a: jnp.linalg.eigh(a + a.T), MATRIX),
    "qr": (jnp.linalg.qr, MATRIX),
    "linear solve": (solve, MATRIX, "f32[3]"),
    "scan": (in_a_scan, "f32[6]"),
    "checkpoint": (jax.checkpoint(lambda x: jax.nn.relu(jnp.sin(x))), "f32[6]"),
    "attention bf16": (lambda q: jax.nn.dot_product_attention(q, q, q, is_causal=True), "bf16[1,3,1,2]"),
    "segment_sum": (lambda x: jax.ops.segment_sum(x, np.array([0, 0, 1, 2]), 3), "f32[4]"),
    "simplex": (projection.projection_simplex, "f32[6]"),
    "l1_ball": (projection.projection_l1_ball, "f32[6]"),
    "l2_ball": (projection.projection_l2_ball, "f32[6]"),
    "focal": (lambda x: loss.sigmoid_focal_loss(x, at(1, 0, 1, 0)), "f32[4]"),
    "safe cross-entropy": (loss.safe_softmax_cross_entropy, "f32[2,4]", "f32[2,4]>0<1"),
    "sparsemax": (loss.sparsemax_loss, "f32[4]", "f32[4]>0<1"),
    "fenchel_young": (loss.make_fenchel_young_loss(jax.nn.logsumexp), "f32[4]", "f32[4]>0<1"),
    "safe_norm": (lambda x: optax.safe_norm(x, 1e-3), "f32[6]"),
    "safe_rms": (lambda x: optax.safe_root_mean_squares(x, 1e-3), "f32[6]"),
    "empty": (jax.nn.relu, "f32[0,3]"),
}  # fmt: skip
QUICK = {"relu", "relu bf16", "softplus", "softmax where", "logaddexp", "xlogy", "sinc", "frexp", "pinv", "scan"}
QUICK |= {"linear solve", "attention bf16", "simplex", "safe cross-entropy", "empty"}


def quick(names, wanted):
    """The names, those that are not `wanted` in every run marked slow."""
    return [pytest.param(name, marks=[] if name in wanted else [pytest.mark.slow]) for name in names]


@pytest.mark.parametrize("name", quick(ORDINARY, QUICK))
def test_it_holds_at_an_ordinary_point(name):
    f, *args = ORDINARY[name]
    report = fn.check_vjp(f, *args)
    assert report.ok, str(report)


SPECIAL = {
    # kinks: what JAX takes is between the two sides
    "relu at 0": (KINK, jax.nn.relu, at(0, 1, -2)),
    "relu6 at 0 and 6": (KINK, jax.nn.relu6, at(0, 6, 7)),
    "abs at 0": (KINK, jnp.abs, at(0, 1)),
    "max of equals": (KINK, jnp.max, at(1, 1, 0)),
    "three equal values sorted": (KINK, lambda x: jax.lax.top_k(x, 2)[0], at(1, 1, 1, 0)),
    "median of equals": (KINK, jnp.median, at(1, 1, 1, 2)),
    "hinge at its kink": (KINK, lambda x: loss.hinge_loss(x, at(1, -1)), at(1, -1)),
    "simplex at a corner": (KINK, projection.projection_simplex, at(1, 0, 0)),
    "l2 ball at its edge": (KINK, projection.projection_l2_ball, at(1, 0)),
    # the rule is right where autodiff of what it replaces is not
    "softplus at 0": (HOLDS, jax.nn.softplus, at(0, 1, -2)),
    "logaddexp of equals": (HOLDS, jnp.logaddexp, at(0, 1), at(0, 1)),
    "log_cosh at 0": (HOLDS, lambda x: loss.log_cosh(x, at(0, 0)), at(0, 100)),
    "label 0 of a safe cross-entropy": (HOLDS, loss.safe_softmax_cross_entropy, at(0, 2, 1), at(1, 0, 0)),
    # products with zeros, infinities
    "prod with one zero": (HOLDS, jnp.prod, at(0, 1, 2)),
    "prod with two zeros": (HOLDS, jnp.prod, at(0, 0, 2)),
    "cumprod with zeros": (HOLDS, jnp.cumprod, at(1, 0, 2, 0)),
    "softmax of -inf": (HOLDS, jax.nn.softmax, at(0, -INF, 1)),
    "log_softmax of -inf": (HOLDS, jax.nn.log_softmax, at(0, -INF, 1)),
    "safe cross-entropy at -inf": (HOLDS, lambda x: loss.safe_softmax_cross_entropy(x, at(1, 0, 0)), at(0, -INF, 1)),
    "softplus far out": (HOLDS, jax.nn.softplus, at(1e3, -1e3)),
    "guarded twice": (HOLDS, sqrt_guarded_twice, at(1, -1)),
    # no derivative, no verdict
    "sqrt at 0": (SILENT, jnp.sqrt, at(0, 1)),
    "arctan2 at the origin": (SILENT, lambda y: jnp.arctan2(y, at(0, 1)), at(0, 1)),
    "equal eigenvectors": (SILENT, lambda a: jnp.linalg.eigh(a)[1], np.eye(2, dtype="float32")),
    "logsumexp of -inf alone": (SILENT, jax.nn.logsumexp, at(-INF, -INF)),
    "gammaln at a pole": (SILENT, sp.gammaln, at(0, 0.5)),
    # a NaN where the function has a slope, or two
    "norm at 0": ("the gradient at [0] is nan, at a kink", jnp.linalg.norm, at(0, 0)),
    "tree.norm at 0": ("the gradient at [0] is nan, at a kink", optax.tree.norm, at(0, 0)),
    "std of equals": ("the gradient at [0] is nan, at a kink", jnp.std, at(1, 1, 1)),
    "xlogy(0, 0)": ("the gradient at [0] is nan, where the function has the slope 0", zero_log, at(0, 2)),
    "power(0, 0)": ("the gradient at [0] is nan, where the function has the slope 0", zero_power, at(0, 2)),
    "guarded once at 0": ("the gradient at [0] is nan, where the function has the slope", sinh_guarded, at(0, 1)),
    "guarded once below 0": ("the gradient at [1] is nan, where the function has the slope 0", sqrt_guarded, at(1, -1)),
    "guarded once, far out": ("the gradient at [0] is nan", elu_once, at(100, 1)),
    # a finite number that is not the derivative
    "relu(x) - relu(-x) at 0": ("along a random direction the slope is", relu_twice, at(0, 1)),
    "exp guarded at 0": ("along a random direction the slope is", exp_guarded, at(0, 1)),
    "an index out of bounds": ("along a random direction the slope is", lambda x: x[np.array([0, 7])], at(1, 2, 3)),
    "quantile at a value": ("at a kink, [], the slope is 0 by the rule", quantile, np.float32(0.5)),
    "logaddexp(inf, 5)": ("the gradient at [0] is", lambda y: jnp.logaddexp(at(INF), y), at(5)),
    "log_ndtr far out": ("the gradient at [0] is", sp.log_ndtr, at(-30)),
    # a derivative other than that of the function, on purpose
    "scale_gradient": ("the gradient at", lambda x: optax.scale_gradient(x, 2.0), at(1, 2)),
}  # fmt: skip
SLOW_POINTS = {"median of equals", "quantile at a value", "log_ndtr far out", "gammaln at a pole", "equal eigenvectors"}
SLOW_POINTS |= {"simplex at a corner", "safe cross-entropy at -inf", "label 0 of a safe cross-entropy", "std of equals"}
SLOW_POINTS |= {"relu6 at 0 and 6", "hinge at its kink", "prod with one zero", "prod with two zeros", "log_cosh at 0"}
SLOW_POINTS |= {"softplus far out", "tree.norm at 0", "logaddexp(inf, 5)", "cumprod with zeros", "softmax of -inf"}


@pytest.mark.parametrize("name", quick(SPECIAL, SPECIAL.keys() - SLOW_POINTS))
def test_it_is_judged_rightly_at_a_special_point(name):
    wanted, f, *args = SPECIAL[name]
    report = fn.check_vjp(f, *args, shrink=False)
    verdicts = {verdict for leaf in report.leaves for verdict in leaf.verdicts.values()}
    if wanted in (HOLDS, KINK, SILENT):
        assert report.ok, str(report)
        assert ("kink" in verdicts) == (wanted == KINK)
        assert wanted != SILENT or "-" in verdicts
    else:
        assert any(failure.message.startswith(wanted) for failure in report.failures), str(report)


def test_the_slope_of_i0_at_0():
    """1 in jax 0.10.2, for 0; mended by 0.12."""
    report = fn.check_vjp(sp.i0, at(0, 1), oracles=("numerical",), shrink=False)
    assert report.ok == (jax.grad(sp.i0)(0.0) == 0)


# jax #7742 (and #39821, which would mend it): in half precision the step of check_grads is lost in rounding.


def tanh(factor):
    f = jax.custom_vjp(jnp.tanh)
    f.defvjp(lambda x: (jnp.tanh(x), x), lambda x, dy: ((factor * (1 - jnp.tanh(x) ** 2) * dy).astype(x.dtype),))
    return f


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_jax_7742_half_precision(dtype):
    x = at(0.3, -0.7, 1.1, dtype=dtype)
    with pytest.raises(AssertionError):
        check_grads(tanh(1.0), (x,), order=1, modes=["rev"])
    assert fn.check_vjp(tanh(1.0), x).ok
    assert not fn.check_vjp(tanh(1.1), x, shrink=False).ok
    for oracle in ("autodiff", "numerical"):
        assert not fn.check_vjp(tanh(1.3), x, oracles=(oracle,), shrink=False).ok


# jax #23779: what a bwd returns is dropped, without a word, because of its dtype.


def looked_up(scale, gradient):
    """A table quantised to int8 with a rule that returns a gradient for it: JAX drops it."""
    f = jax.custom_vjp(lambda table, x: x * table.astype(x.dtype) * scale)
    saved = lambda table, x: (x * table.astype(x.dtype) * scale, (table, x))
    f.defvjp(saved, lambda res, dy: (gradient(dy * res[1] * scale), dy * res[0].astype(dy.dtype) * scale))
    return f


def test_jax_23779_a_gradient_dropped_for_its_dtype():
    table, x = at(3, -4, 5, dtype="int8"), at(1, 2, 3)
    dropped = jax.grad(lambda t, x: looked_up(0.5, lambda g: g)(t, x).sum(), argnums=(0, 1), allow_int=True)(table, x)[
        0
    ]
    assert dropped.dtype == jax.dtypes.float0
    report = fn.check_vjp(looked_up(0.5, lambda g: g), table, x, shrink=False)
    assert [failure.leaf for failure in report.failures] == ["[0]"]
    assert "for a leaf that has none" in report.failures[0].message
    assert fn.check_vjp(looked_up(0.5, lambda g: None), table, x).ok


# Liger-Kernel #968: the backward pass of a fused linear layer and cross-entropy multiplies the gradients, summed over
# the tokens in the forward pass, by the first token's cotangent.


def losses(x, w, b, labels):
    return optax.losses.softmax_cross_entropy_with_integer_labels(x @ w + b, labels)


def fused(right):
    f = jax.custom_vjp(losses)

    def fwd(x, w, b, labels):
        g = jax.nn.softmax(x @ w + b) - jax.nn.one_hot(labels, b.size)
        return losses(x, w, b, labels), (g, x, w, (g @ w.T, x.T @ g, g.sum(0)))

    def bwd(saved, dy):
        g, x, w, summed = saved
        if not right:
            return *(dy[0] * each for each in summed), None
        g = g * dy[:, None]
        return g @ w.T, x.T @ g, g.sum(0), None

    f.defvjp(fwd, bwd)
    return f


def test_liger_968_one_cotangent_for_all_tokens():
    point = "f32[4,3]", "f32[3,5]", "f32[5]", "i32[4]<5"
    args = [jnp.ones(shape) for shape in ((4, 3), (3, 5), (5,))] + [jnp.arange(4)]
    grads = [jax.grad(lambda *a, f=f: f(*a, args[3]).sum(), (0, 1, 2))(*args[:3]) for f in (fused(False), losses)]
    assert all(np.allclose(a, b, atol=1e-6) for a, b in zip(*grads, strict=True))  # a cotangent of ones hides it
    report = fn.check_vjp(fused(False), *point, shrink=False)
    assert {leaf.leaf for leaf in report.leaves if not leaf.ok} == {"[0]", "[1]", "[2]"}
    assert fn.check_vjp(fused(True), *point).ok
