"""Blocks of an axis: together they are the axis, each entry once."""

import jax.numpy as jnp
import numpy as np
import pytest

from funcnet.gradients.blocked import add_block, block, blocks, fresh, joined


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
