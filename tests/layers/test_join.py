"""concat and add against NumPy, through models, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

RNG = np.random.default_rng(0)


def arrays(*shapes, dtype=np.float32):
    return tuple(jnp.asarray(RNG.normal(size=shape).astype(dtype)) for shape in shapes)


@pytest.mark.parametrize(
    ("axis", "shapes"),
    [(-1, [(2, 3), (2, 1), (2, 4)]), (1, [(2, 3, 2), (2, 1, 2)]), (-2, [(2, 3, 2), (2, 5, 2)]), (-1, [(3, 2)])],
)
def test_concat_joins_and_its_cotangent_is_cut_apart(axis, shapes):
    xs, layer = arrays(*shapes), fn.concat(axis)
    y, state, residuals = jax.jit(layer.fwd)({}, (), xs, None)
    np.testing.assert_array_equal(y, np.concatenate(xs, axis))
    assert sum(leaf.nbytes for leaf in residuals) == 0
    (dy,) = arrays(y.shape)
    dparams, dxs = jax.jit(layer.bwd)({}, residuals, dy)
    assert (dparams, state) == ({}, ())
    for got, wanted in zip(dxs, np.split(dy, np.cumsum([x.shape[axis] for x in xs])[:-1], axis), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_add_sums_wide_and_gives_everyone_the_cotangent():
    one, small = jnp.ones((2, 1), jnp.bfloat16), jnp.full((2, 1), 2**-8, jnp.bfloat16)
    y, _, residuals = fn.add().fwd({}, (), (one, small, small), None)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_array_equal(y.astype(jnp.float32), 1 + 2**-7)  # one by one, both small ones would be lost
    dxs = fn.add().bwd({}, residuals, small)[1]
    assert len(dxs) == 3
    assert all(dx is not None and np.array_equal(dx, small) for dx in dxs)


def test_an_inception_block_and_its_gradient(x64):
    model = fn.serial(fn.branch(fn.dense(3), wide=fn.serial(fn.dense(4), fn.tanh()), same=fn.identity()), fn.concat())
    (x,) = arrays((5, 2), dtype=np.float64)
    params, state = model.init(jax.random.key(0), x)
    p = params["branch"]
    dense = lambda p, x: x @ p["kernel"] + p["bias"][None]

    def plain(x):
        return jnp.concatenate([dense(p["dense"], x), jnp.tanh(dense(p["wide"]["dense"], x)), x], axis=-1)

    y, _, residuals = model.fwd(params, state, x, None)
    np.testing.assert_allclose(y, plain(x), rtol=1e-12)
    np.testing.assert_allclose(
        model.bwd(params, residuals, jnp.sin(y))[1], jax.vjp(plain, x)[1](jnp.sin(y))[0], rtol=1e-12
    )


X = jnp.ones((2, 3))
REFUSED = {
    "an array": (fn.concat(), X, "a tuple of arrays"),
    "a list": (fn.add(), [X, X], "a tuple of arrays"),
    "nothing": (fn.add(), (), "a tuple of arrays"),
    "integers": (fn.concat(), (X, X.astype(int)), "floating-point"),
    "two dtypes": (fn.concat(), (X, X.astype(jnp.bfloat16)), "one dtype"),
    "two ranks": (fn.concat(), (X, X[None]), "one rank"),
    "other sizes": (fn.concat(), (X, X[:1]), "differ along axis -1 alone"),
    "no such axis": (fn.concat(2), (X, X), "an axis 2"),
    "the batch axis from the back": (fn.concat(-2), (X, X), "an axis -2"),
    "shapes that would broadcast": (fn.add(), (X, X[:, :1]), "arrays of one shape"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name):
    layer, xs, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message) as error:
        layer.fwd({}, (), xs, None)
    assert error.value.kind == layer.name


@pytest.mark.parametrize("axis", [0, 1.0, True, None])
def test_concat_refuses_what_is_no_axis_or_that_of_the_batch(axis):
    with pytest.raises(fn.InputError, match="an axis as a whole number"):
        fn.concat(axis)


@pytest.mark.parametrize("layer", [fn.concat(), fn.add()])
def test_bwd_refuses_another_cotangent(layer):
    y, _, residuals = layer.fwd({}, (), (X, X), None)
    for dy in (y[:1], y.astype(jnp.bfloat16), None):
        with pytest.raises(fn.InputError, match="a cotangent like the output"):
            layer.bwd({}, residuals, dy)
