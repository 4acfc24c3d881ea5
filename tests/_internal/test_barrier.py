"""`after` changes no bit of a normal number, and the compiler keeps the order that it makes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.barrier import after

SPECIAL = [0.0, -0.0, 1.5, -np.inf, np.inf, np.nan, 1.2e-38, 3e38]
BITS = {2: np.uint16, 4: np.uint32, 8: np.uint64}


def bits(v):
    v = np.asarray(v)
    return v.view(BITS[v.dtype.itemsize]) if np.issubdtype(v.dtype, np.floating) else v


@pytest.mark.parametrize("done", [0.0, -3.0, np.inf, -np.inf, np.nan, 3e38])
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["eager", "jit"])
def test_every_value_stays_bit_for_bit_whatever_was_done(done, transform):
    x = {
        "float": jnp.asarray(SPECIAL, jnp.float32),
        "half": jnp.asarray([1.5, -0.0, np.inf, 65504], jnp.float16),
        "integer": jnp.asarray([-128, 0, 127], jnp.int8),
        "unsigned": jnp.asarray([0, 2**32 - 1], jnp.uint32),
        "truth": jnp.asarray([True, False]),
        "scalar": jnp.float32(7),
        "empty": jnp.zeros((0, 2)),
    }
    got = transform(after)([jnp.full((2, 2), done), jnp.full(1, done)], x)
    assert jax.tree.structure(got) == jax.tree.structure(x)
    for name in x:
        assert got[name].dtype == x[name].dtype, name
        np.testing.assert_array_equal(bits(got[name]), bits(x[name]), err_msg=name)


def test_double_precision_stays_bit_for_bit(x64):
    x = jnp.asarray([np.pi, 1e-300, 1e308, 2.0**53 + 1])
    np.testing.assert_array_equal(after(jnp.float16(3), x), x)
    np.testing.assert_array_equal(after(jnp.float64(1e300), jnp.asarray([2**53 + 1])), [2**53 + 1])


def sines(f):
    """How many sines are left in the compiled program."""
    x = jnp.ones(8)
    return jax.jit(f).lower(x, x).compile().as_text().count(" sine(")


def test_the_compiler_does_not_merge_what_comes_after_with_what_came_before():
    assert sines(lambda done, x: (jnp.sin(x), jnp.sin(x))) == 1
    assert sines(lambda done, x: (jnp.sin(x), jnp.sin(after(done, x)))) == 2
    whole = lambda x: x.astype(jnp.int32)
    assert sines(lambda done, x: (jnp.sin(whole(x) / 2), jnp.sin(after(done, whole(x)) / 2))) == 2


@pytest.mark.parametrize("done", [(), None, jnp.arange(3), jnp.zeros((0, 2)), {"a": jnp.ones(2, bool)}])
def test_without_a_floating_number_nothing_is_ordered(done):
    x = {"a": jnp.ones(3)}
    assert after(done, x) is x


def test_the_first_number_of_every_array_counts_and_empty_ones_are_passed_over():
    """What a program does not read, JAX does not even hand it."""
    done = {"a": jnp.ones((2, 2)), "b": jnp.zeros((0,)), "c": jnp.ones(3, jnp.bfloat16), "n": jnp.arange(3)}
    lowered = jax.jit(after).lower(done, jnp.ones(2))
    used = lowered.compile().as_text()
    assert "f32[2,2]" in used
    assert "bf16[3]" in used
    assert "s32[3]" not in used
    assert "f32[0]" not in used
