"""Gated linear units: SciPy and PyTorch, the order of the halves, and odd inputs."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special as sp

import funcnet as fn
from tests.halves import HALVES, assert_within, every, exact
from tests.layers.test_activation import SLOPES

RNG = np.random.default_rng(0)
X, DY = 2 * RNG.normal(size=(4, 3, 10)), RNG.normal(size=(4, 3, 5))
# name: (layer, the gate in SciPy, its name in PyTorch, its options there)
TABLE = {
    "glu": (fn.glu(), sp.expit, "sigmoid", {}),
    "swiglu": (fn.swiglu(), lambda b: b * sp.expit(b), "silu", {}),
    "geglu": (fn.geglu(), lambda b: b * sp.ndtr(b), "gelu", {}),
    "geglu, tanh": (
        fn.geglu(approximate=True),
        lambda b: b * sp.expit(2 * np.sqrt(2 / np.pi) * (b + 0.044715 * b**3)),
        "gelu",
        {"approximate": "tanh"},
    ),
}
NAMES = pytest.mark.parametrize("name", TABLE)


@NAMES
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("float64", 1e-10)])
def test_the_second_half_gates_the_first_and_gradients_are_those_of_pytorch(name, dtype, tolerance, x64):
    layer, gate, theirs, options = TABLE[name]
    x = X.astype(dtype)
    y, _, saved = layer.fwd({}, (), x, None)
    np.testing.assert_allclose(y, X[..., :5] * gate(X[..., 5:]), rtol=tolerance, atol=tolerance)
    np.testing.assert_array_equal(saved, x)
    torch = pytest.importorskip("torch")
    t = torch.tensor(x, requires_grad=True)
    a, b = t.chunk(2, -1)
    (a * getattr(torch.nn.functional, theirs)(b, **options)).backward(torch.tensor(DY.astype(dtype)))
    dx = layer.bwd({}, saved, DY.astype(dtype))[1]
    np.testing.assert_allclose(dx, t.grad.numpy(), rtol=tolerance, atol=tolerance)


def test_glu_has_the_order_of_pytorch():
    torch = pytest.importorskip("torch")
    x = X.astype(np.float32)
    np.testing.assert_allclose(
        fn.glu().apply({}, (), x), torch.nn.functional.glu(torch.tensor(x)), rtol=1e-5, atol=1e-6
    )


@NAMES
def test_far_away_the_gate_is_open_or_shut(name):
    x = jnp.array([[2.0, 2.0, 90.0, -90.0]])
    y, _, saved = TABLE[name][0].fwd({}, (), x, None)
    np.testing.assert_allclose(y, [[2.0 if name == "glu" else 180.0, 0.0]], atol=1e-6)
    assert np.isfinite(TABLE[name][0].bwd({}, saved, jnp.ones((1, 2)))[1]).all()


@NAMES
def test_odd_inputs_and_other_cotangents_are_refused(name):
    layer = TABLE[name][0]
    for x, message in ((jnp.ones((2, 5)), "even number"), (jnp.ones((2, 4), jnp.int32), "floating")):
        with pytest.raises(fn.InputError, match=message):
            layer.apply({}, (), x)
    with pytest.raises(fn.InputError, match=r"float32\[2, 2\]"):
        layer.bwd({}, jnp.ones((2, 4)), jnp.ones((2, 4)))


@NAMES
@pytest.mark.parametrize("dtype", HALVES)
def test_every_gate_of_half_precision_has_its_value_and_its_slope(name, dtype):
    layer, gate, theirs, options = TABLE[name]
    b = every(dtype)
    b = b[np.isfinite(exact(b))]
    rng = np.random.default_rng(1)
    a, dy = (rng.uniform(0.5, 2, len(b)).astype(b.dtype) for _ in range(2))

    @jax.jit
    def run(a, b, dy):
        y, _, saved = layer.fwd({}, (), jnp.stack([a, b], axis=-1), None)
        return y[:, 0], *layer.bwd({}, saved, dy[:, None])[1].T

    y, da, db = map(np.asarray, run(a, b, dy))
    slope = SLOPES[f"gelu{', tanh' if options else ''}" if theirs == "gelu" else theirs](exact(b))
    with np.errstate(over="ignore"):
        s = gate(np.clip(exact(b), -1e30, 1e100))
    assert_within(0.51, y, exact(a) * s, b)
    assert_within(2, da, exact(dy) * s, b)
    assert_within(2, db, exact(dy) * exact(a) * slope, b)
