"""Blocks of an axis are together the axis, each entry once; factors in blocks are contracted as the whole is."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.gradients.blocked import add_block, block, blocks, fresh, joined
from tests.trees import normal


@pytest.mark.parametrize("size", [1, 3, 4, 7])
def test_blocks_cover_an_axis_once(size):
    param, added = jnp.arange(14.0).reshape(2, 7), jnp.zeros((2, 7))
    numbers = blocks(param, size)
    answers = jnp.stack([block(param, i, size) for i in numbers])
    np.testing.assert_array_equal(joined(answers, param), param)
    entries = np.concatenate([np.asarray(e)[np.asarray(new)] for e, new in (fresh(i, size, 7) for i in numbers)])
    np.testing.assert_array_equal(entries, np.arange(7))
    for i in numbers:
        new = fresh(i, size, 7)[1][None]
        added = add_block(added, jnp.where(new, block(param, i, size), 0.0), i, size)
    np.testing.assert_array_equal(added, param)


def outer_of_columns(saved, i, size):
    """Block i of Outer(x, dy), as a layer makes it that forms no more of dy at a time."""
    x, dy = saved
    new = fresh(i, size, dy.shape[-1])[1]
    return fn.Outer(x, jnp.where(new, block(dy, i, size), 0.0))


@pytest.mark.parametrize("size", [1, 3, 4, 7])
@pytest.mark.parametrize("how", [fn.total, fn.per_example, fn.squared_norm, fn.rows], ids=lambda how: how.name)
def test_blocks_are_contracted_as_what_they_are_blocks_of(how, size):
    """Also where `repeat` has stacked them, and where the last block reaches into the one before it."""
    x, dy, kernel = normal(0, jnp.ones((2, 4, 3, 5))), normal(1, jnp.ones((2, 4, 3, 7))), jnp.ones((2, 5, 7))
    with jax.numpy_rank_promotion("allow"):
        alone = how(fn.Blocks((x[0], dy[0]), outer_of_columns, size), kernel[0])
        stacked = how(fn.Stacked(fn.Blocks((x, dy), outer_of_columns, size)), kernel)
    np.testing.assert_allclose(alone, how(fn.Outer(x[0], dy[0]), kernel[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stacked, how(fn.Stacked(fn.Outer(x, dy)), kernel), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("how", [fn.total, fn.per_example, fn.squared_norm], ids=lambda how: how.name)
def test_blocks_are_one_of_several_uses(how):
    x, dy, kernel = normal(0, jnp.ones((4, 3, 5))), normal(1, jnp.ones((4, 3, 7))), jnp.ones((5, 7))
    other = fn.Outer(normal(2, x), normal(3, dy))
    with jax.numpy_rank_promotion("allow"):
        got = how(fn.Sum((fn.Blocks((x, dy), outer_of_columns, 3), other)), kernel)
    np.testing.assert_allclose(got, how(fn.Sum((fn.Outer(x, dy), other)), kernel), rtol=1e-5, atol=1e-4)
