"""Sums in float32 or wider, products of matrices against NumPy, and ranks and integers made equal."""

from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.numerics import added, contract_last, entries_of, flat, in_front, product, sum_dtype, whole
from funcnet._internal.sharding import lasting, placed, regrouped, scan, sharded_as, shards, varies, varying

HALF = [jnp.float16, jnp.bfloat16]
RNG = np.random.default_rng(0)


@pytest.mark.parametrize("dtype", [*HALF, jnp.float8_e4m3fn, jnp.float32])
def test_wide_is_at_least_float32(dtype):
    assert sum_dtype(dtype) == jnp.float32


@pytest.mark.parametrize("dtype", [jnp.float64, jnp.complex64, jnp.complex128])
def test_wide_keeps_what_is_wider(dtype, x64):
    assert sum_dtype(dtype) == dtype


@pytest.mark.parametrize("dtype", HALF)
def test_a_sum_is_rounded_once(dtype):
    """One unit in the last place of 1, in quarters that are each lost when they are added one by one."""
    unit = Fraction(float(jnp.finfo(dtype).eps))
    one, quarter = jnp.ones(2, dtype), jnp.full(2, float(unit / 4), dtype)
    assert float((one + quarter + quarter + quarter + quarter)[0]) == 1
    total = added(one, quarter, quarter, quarter, quarter)
    assert total.dtype == dtype
    assert [Fraction(float(v)) for v in total] == [1 + unit] * 2


def test_a_sum_may_pass_beyond_the_range_of_its_dtype():
    large = jnp.full(1, 6e4, jnp.float16)
    np.testing.assert_array_equal(added(large, large, -large), large)


def test_a_sum_has_the_dtype_of_its_first_term():
    assert added(jnp.ones(2, jnp.bfloat16), jnp.ones(2, jnp.float32)).dtype == jnp.bfloat16
    assert added(jnp.ones(2, jnp.float32), jnp.ones(2, jnp.float16)).dtype == jnp.float32


@pytest.mark.parametrize("shape", [(3,), (2, 3), (2, 4, 3), (2, 1, 4, 3), (0, 4, 3)])
def test_flat_keeps_the_last_axis(shape):
    assert flat(jnp.ones(shape)).shape == (int(np.prod(shape[:-1])), 3)


@pytest.mark.parametrize("axes", [(0, 0), (0, 1), (1, 0), (1, 1)])
def test_a_product_contracts_the_axes_given(axes, x64):
    a, b = RNG.normal(size=(3, 2) if axes[0] == 0 else (2, 3)), RNG.normal(size=(3, 4) if axes[1] == 0 else (4, 3))
    got = product(jnp.asarray(a), jnp.asarray(b), axes, jnp.zeros((2, 4)))
    np.testing.assert_allclose(got, np.tensordot(a, b, [[axes[0]], [axes[1]]]), rtol=1e-13)


@pytest.mark.parametrize("dtype", HALF)
def test_a_product_of_half_precision_is_summed_and_returned_in_float32(dtype):
    """4097 has 13 bits: half precision has no such number, whatever the order of the sum."""
    ones = jnp.ones((1, 4097), dtype)
    got = product(ones, ones, (1, 1), jnp.zeros((1, 1)))
    assert got.dtype == jnp.float32
    assert float(got[0, 0]) == 4097
    assert float(contract_last(ones, ones, 1)[0, 0]) == 4097


@pytest.mark.parametrize("leading", [(), (2,), (2, 3), (2, 1, 3), (0, 3)])
@pytest.mark.parametrize("axis", [0, 1])
def test_the_last_axis_is_contracted_at_every_rank(leading, axis, x64):
    x, kernel = RNG.normal(size=(*leading, 4)), RNG.normal(size=(4, 5))
    laid = kernel if axis == 0 else kernel.T
    like = None if axis == 0 else jnp.zeros((*leading, 5))
    got = contract_last(jnp.asarray(x), jnp.asarray(laid), axis, like)
    assert got.shape == (*leading, 5)
    np.testing.assert_allclose(got, x @ kernel, rtol=1e-12, atol=1e-13)


def test_without_a_mesh_an_array_stays_where_it_is():
    a = jnp.ones((2, 3))
    assert placed(a, jnp.zeros((4, 1))) is a


def test_without_a_mesh_an_array_is_in_one_piece():
    a = jnp.arange(24.0).reshape(4, 3, 2)
    assert shards(a) == 1
    assert sharded_as(a, 1).mesh.empty
    np.testing.assert_array_equal(regrouped(a, (12, 2)), a.reshape(12, 2))


def test_in_front_come_axes_of_size_one():
    v = jnp.arange(6.0).reshape(2, 3)
    assert [in_front(v, rank).shape for rank in (2, 3, 5)] == [(2, 3), (1, 2, 3), (1, 1, 1, 2, 3)]
    assert in_front(jnp.float32(7), 2).shape == (1, 1)
    np.testing.assert_array_equal(in_front(v, 4)[0, 0], v)


@pytest.mark.parametrize(
    ("dtype", "wanted"),
    [
        (jnp.int8, jnp.int32),
        (jnp.uint8, jnp.int32),
        (jnp.int16, jnp.int32),
        (jnp.uint16, jnp.int32),
        (jnp.int32, jnp.int32),
        (jnp.uint32, jnp.uint32),
        (jnp.int64, jnp.int64),
    ],
)
def test_whole_numbers_of_few_bits_become_int32_with_their_values(dtype, wanted, x64):
    ids = jnp.asarray([jnp.iinfo(dtype).min, 0, jnp.iinfo(dtype).max], dtype)
    got = whole(ids)
    assert got.dtype == wanted
    assert [int(v) for v in got] == [jnp.iinfo(dtype).min, 0, jnp.iinfo(dtype).max]


def test_a_symbolic_size_counts_as_32_of_what_is_chosen_by_it():
    (b,) = jax.export.symbolic_shape("b")
    assert entries_of((2, 3, 5)) == 30
    assert entries_of((b, 2 * b, 3)) == 32 * 32 * 3
    assert entries_of(()) == 1


MESH = jax.make_mesh((1, 1), ("i", "j"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def test_outside_of_shard_map_nothing_varies_and_a_carry_is_as_it_is_given():
    carry = {"a": 0.0, "b": object()}
    assert varies("no array") == ()
    assert varying(carry, ()) == carry
    assert lasting(lambda carry: 1 / 0, carry) is carry


def test_a_carry_varies_over_what_a_step_makes_it_vary_over_also_by_way_of_another_and_over_no_more():
    """c comes of b, b of a, a of x: only after three steps does c vary as x does; k never does."""
    seen = []

    def body(carry, w):
        a, b, c, k = carry
        return (a + w, b + a, c + b, k + 1), None

    def device(x, y):
        zero = jnp.zeros(())
        a, b, c, k = scan(body, (zero, zero, zero + y[0], zero), x)[0]
        seen.extend(map(varies, (a, b, c, k, (x, y))))
        return a[None], (b + c)[None], k

    cut = {"mesh": MESH, "in_specs": (jax.P("i"), jax.P("j")), "out_specs": (jax.P("i"), jax.P(("i", "j")), jax.P())}
    a, both, k = jax.jit(jax.shard_map(device, **cut))(jnp.arange(4.0), jnp.ones(1))
    assert seen == [("i",), ("i",), ("i", "j"), (), ("i", "j")]
    assert (a.item(), both.item(), k.item()) == (6, 4 + 1 + 1, 4)


@pytest.mark.parametrize("kind", jax.sharding.AxisType)
def test_pieces_counts_explicit_axes_alone(kind):
    mesh = jax.make_mesh((1,), ("i",), axis_types=(kind,)) if kind != jax.sharding.AxisType.Manual else None
    if mesh is None:
        device = lambda x: x * shards(x)
        assert jax.shard_map(device, mesh=MESH, in_specs=jax.P("i"), out_specs=jax.P("i"))(jnp.ones(2)).tolist() == [
            1,
            1,
        ]
    else:
        assert (
            jax.jit(lambda x: x * shards(x))(jax.device_put(jnp.ones(2), jax.NamedSharding(mesh, jax.P("i")))).sum()
            == 2
        )
