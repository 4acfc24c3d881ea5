"""The full Jacobians of a layer, against what `bwd` returns and against their sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from funcnet._internal.expect import is_floating
from funcnet.check.cases import CASES
from funcnet.check.spec import drawn, settled, specs

RNG = np.random.default_rng(0)
X = RNG.standard_normal((3, 4))
BLOCK = fn.serial(fn.layer_norm(), fn.dense(4), fn.tanh())
# The first case of each constructor; where it computes in float32 whatever it is given, another one.
LAYERS = {case.constructor: (case.layer, case.x) for case in reversed(CASES)} | {
    "embedding": (fn.embedding(7, 5, dtype="float64"), "i32[4,3]<7"),
    "mixed": (fn.mixed(BLOCK, "float64", "float64", "float64"), "f32[3,4]"),
}
QUICK = "dense embedding layer_norm conv lstm dropout prelu cross_entropy serial parallel skip repeat remat mixed"


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK.split())) for name in LAYERS]
)
def test_the_jacobians_multiplied_by_the_cotangent_are_what_bwd_returns(name):
    layer, x = LAYERS[name]
    with jax.enable_x64(True):
        key = jax.random.key(1)
        x = cast(drawn(settled(specs(x), 0), 0), "float64")
        params, state = cast(jax.jit(layer.init)(key, x), "float64")
        y = jax.eval_shape(layer.fwd, params, state, x, key)[0]
        draw = lambda leaf: jnp.asarray(RNG.standard_normal(leaf.shape), leaf.dtype) if is_floating(leaf) else None
        dy = jax.tree.map(draw, y)

        @jax.jit
        def both(params, state, x, dy):
            residuals = layer.fwd(params, state, x, key)[2]
            return layer.bwd(params, residuals, dy), fn.layer_jacobians(layer, params, state, x, key)

        (dparams, dx), jacobians = both(params, state, x, dy)

        def product(cotangent, jacobian):
            return np.tensordot(cotangent, jacobian, axes=cotangent.ndim)

        def products(of):
            outer = jax.tree.structure(dy).flatten_up_to(of)  # the tree of the output is the outer one
            parts = [
                jax.tree.map(lambda j, cotangent=cotangent: product(cotangent, j), jacobian)
                for cotangent, jacobian in zip(jax.tree.leaves(dy), outer, strict=True)
            ]
            return jax.tree.map(lambda *terms: sum(terms), *parts)

        for hand, wanted in ((dparams, products(jacobians.params)), (dx, products(jacobians.x))):
            assert jax.tree.structure(hand) == jax.tree.structure(wanted)
            for got, want in zip(jax.tree.leaves(hand), jax.tree.leaves(wanted), strict=True):
                np.testing.assert_allclose(got, want, rtol=1e-10, atol=1e-12)


def test_jacobians_have_the_axes_of_the_output_in_front():
    params, state = fn.dense(2).init(jax.random.key(0), X[:, :3])
    jacobians = fn.layer_jacobians(fn.dense(2), params, state, X[:, :3].astype(np.float32))
    assert {name: leaf.shape for name, leaf in jacobians.params.items()} == {"kernel": (3, 2, 3, 2), "bias": (3, 2, 2)}
    assert jacobians.x.shape == (3, 2, 3, 3)


def test_jacobians_that_are_too_large_are_refused_before_they_are_formed():
    layer, x = fn.dense(1024), jnp.ones((64, 1024))
    params, state = layer.init(jax.random.key(0), x)
    with pytest.raises(fn.InputError, match="at most 268 MB") as error:
        fn.layer_jacobians(layer, params, state, x)
    assert "292 GB" in error.value.received


def test_jacobians_of_an_output_with_integers_are_those_of_its_floats():
    x = {"x": np.ones((1, 2, 2), np.float32), "lengths": np.int32([2])}
    layer = fn.serial(fn.dense(3))
    params, state = layer.init(jax.random.key(0), x)
    found = fn.layer_jacobians(layer, params, state, x)
    assert found.x["lengths"] is None
    assert found.x["x"]["x"].shape == (1, 2, 3, 1, 2, 2)
    assert found.x["x"]["lengths"] is None
