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


def assert_same(got, wanted):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(np.testing.assert_array_equal, got, wanted)
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [leaf.dtype for leaf in jax.tree.leaves(wanted)]
