"""Trees that tests draw, and compare."""

import jax
import jax.numpy as jnp
import numpy as np


def normal(seed, like):
    """Standard normal floats in the shapes and dtypes of `like`, zeros for the rest, by NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)
    draw = lambda leaf: (
        rng.normal(size=leaf.shape) if jnp.issubdtype(leaf.dtype, jnp.floating) else np.zeros(leaf.shape)
    )
    return jax.tree.map(lambda leaf: jnp.asarray(draw(leaf).astype(leaf.dtype)), like)


def draw(model, x):
    """Params, state and an input of the shape of x."""
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    return normal(1, params), normal(2, state), normal(3, x)


def draw_with_dy(model, x):
    """The same, and a cotangent."""
    params, state, x = draw(model, x)
    return params, state, x, normal(4, jax.eval_shape(model.apply, params, state, x))


def turns(params, n):
    """The params of each turn of a repeated layer."""
    return [jax.tree.map(lambda leaf, i=i: leaf[i], params) for i in range(n)]


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [leaf.dtype for leaf in jax.tree.leaves(wanted)]


def assert_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, wanted)


def dtypes(tree):
    return {str(leaf.dtype) for leaf in jax.tree.leaves(tree)}
