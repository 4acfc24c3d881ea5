"""Norms: the rules, the forward pass against NumPy, constant rows, rows of every size, statistics in half precision.

Rows of every size and numbers of options are asked of all five norms, those of other files too.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
RNG = np.random.default_rng(0)
NORMS = {"layer_norm": fn.layer_norm, "rms_norm": fn.rms_norm}
BOTH = pytest.mark.parametrize("name", NORMS)
SHAPES = pytest.mark.parametrize("shape", [(5,), (4, 5), (2, 3, 2, 7), (3, 1)])


def reference(name, x, scale, bias=0.0, eps=1e-6):
    x, scale, bias = (np.asarray(a, np.float64) for a in (x, scale, bias))
    if name == "layer_norm":
        return scale * (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + eps) + bias
    return scale * x / np.sqrt((x**2).mean(-1, keepdims=True) + eps)


def params_of(name, features, dtype=np.float64):
    params = {"scale": RNG.normal(size=features), "bias": RNG.normal(size=features)}
    return {k: jnp.asarray(v.astype(dtype)) for k, v in params.items() if k == "scale" or name == "layer_norm"}


def ones(name, features, dtype=jnp.float32):
    return NORMS[name]().init(None, S((1, features), dtype))[0]


def pull(layer, params, x, dy):
    """(y, residuals, dparams, dx)."""
    y, _, residuals = layer.fwd(params, (), x, None)
    return y, residuals, *layer.bwd(params, residuals, dy)


@BOTH
@SHAPES
def test_the_output_is_numpys(name, shape, x64):
    x, params = RNG.normal(size=shape), params_of(name, shape[-1])
    for eps in (1e-6, 0.3):
        np.testing.assert_allclose(
            NORMS[name](eps=eps).apply(params, (), x), reference(name, x, eps=eps, **params), rtol=1e-11, atol=1e-12
        )


@BOTH
def test_rows_come_out_with_mean_0_or_as_they_are_and_size_1(name):
    x = RNG.normal(size=(6, 64)).astype(np.float32) * np.float32([[1e-2], [1], [30], [1e3], [1e6], [1e15]])
    y = np.asarray(NORMS[name]().apply(ones(name, 64), (), x), np.float64)
    np.testing.assert_allclose((y**2).mean(-1), 1, rtol=2e-2)
    if name == "layer_norm":
        np.testing.assert_allclose(y.mean(-1), 0, atol=1e-6)
    else:
        np.testing.assert_array_equal(np.sign(y), np.sign(x))


@BOTH
def test_scaling_the_input_does_not_change_the_output_nor_moving_it_that_of_layer_norm(name, x64):
    x, params = RNG.normal(size=(3, 5)), params_of(name, 5)
    apply = lambda x: NORMS[name](eps=1e-12).apply(params, (), x)
    np.testing.assert_allclose(apply(1e3 * x), apply(x), rtol=1e-9)
    moved = np.abs(apply(x + 7) - apply(x)).max()
    assert moved < 1e-9 if name == "layer_norm" else moved > 0.1


@BOTH
def test_init_is_the_identity_up_to_normalisation(name):
    params, state = NORMS[name]().init(None, S((4, 2, 5), jnp.bfloat16))
    assert {k: (v.shape, v.dtype) for k, v in params.items()} == dict.fromkeys(params, ((5,), jnp.bfloat16))
    assert set(params) == ({"scale", "bias"} if name == "layer_norm" else {"scale"})
    assert (params["scale"] == 1).all()
    assert not params.get("bias", jnp.zeros(5)).any()
    assert state == ()


@BOTH
def test_residuals_are_x_and_few_numbers_a_position(name):
    x = jnp.asarray(RNG.normal(size=(4, 3, 5)), jnp.bfloat16)
    saved = NORMS[name]().fwd(ones(name, 5, jnp.bfloat16), (), x, None)[2]
    assert saved.x is x
    assert len(saved.means) == (2 if name == "layer_norm" else 0)
    numbers = (saved.power, *saved.means, saved.square, saved.rstd)
    assert {(a.shape, a.dtype) for a in numbers} == {((4, 3, 1), jnp.dtype("float32"))}


@BOTH
def test_in_a_network_x_hat_is_not_kept_beside_x(name):
    model = fn.serial(*[fn.skip(fn.serial(NORMS[name](), fn.dense(64))) for _ in range(8)])
    x = jnp.ones((512, 64))
    objective = fn.objective(model, fn.mse())
    params, state = objective.init(jax.random.key(0), (x, x))
    step = jax.jit(lambda params: fn.value_and_grad(objective)(params, state, (x, x))).lower(params).compile()
    # x and the input of dense; layer norm's centred x too, which the compiler forms early; once for all a large row's
    kept = {"rms_norm": 2, "layer_norm": 3}[name]
    assert step.memory_analysis().temp_size_in_bytes < (8 * kept + 4.5) * x.nbytes


@pytest.mark.parametrize("features", [1, 3, 7, 256, 768])
def test_a_constant_row_gives_x_hat_0_and_finite_gradients(features):
    rows = np.float32([[0.0], [1.0], [0.1], [-12345.678], [1e4 / 3], [1e8 / 3], [1e30]])
    x = np.broadcast_to(rows, (len(rows), features))
    dy = RNG.normal(size=x.shape).astype(np.float32)
    y, _, dparams, dx = jax.jit(lambda *args: pull(fn.layer_norm(), *args))(ones("layer_norm", features), x, dy)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((dparams, dx)))
    np.testing.assert_allclose(np.abs(y).max(1), np.zeros(len(rows)), atol=1e-3)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("size", "eps"), [(1e12, 1e-6), (1e18, 1e-6), (1e-16, 1e-30)])
def test_of_rows_of_extreme_sizes_gradients_are_exact(name, dtype, size, eps):
    x = jnp.asarray(size * np.array([[1, -2, 3, 0.5], [4, -1, 0, 1]]), dtype)
    dy = jnp.asarray([[1, 0.5, -1, 2], [0.25, 1, -0.5, 1]], dtype)
    dx = pull(NORMS[name](eps=eps), ones(name, 4, dtype), x, dy)[-1]
    mean = lambda a: a.mean(-1, keepdims=True)
    high, g = (np.asarray(a, np.float64) for a in (x, dy))
    high, g = (a - mean(a) if name == "layer_norm" else a for a in (high, g))
    rstd = 1 / np.sqrt(mean(high**2) + eps)
    wanted = rstd * (g - high * rstd * mean(g * high * rstd))
    tolerance = 4 * float(jnp.finfo(dtype).eps) * np.abs(wanted).max()
    np.testing.assert_allclose(np.asarray(dx, np.float64), wanted, rtol=0, atol=tolerance)


FIVE = {
    "layer_norm": fn.layer_norm,
    "rms_norm": fn.rms_norm,
    "batch_norm": lambda eps=1e-6: fn.batch_norm(eps=eps),
    "group_norm": lambda eps=1e-6: fn.group_norm(2, eps=eps),
    "instance_norm": fn.instance_norm,
}
DTYPES = ["float64", "float32", "bfloat16", "float16"]


def exact(name, x, scale, dy, eps=1e-6):
    """y, dx, dscale and its terms in NumPy's widest numbers, the bias 0."""
    x, scale, dy = (np.asarray(a, np.longdouble) for a in (x, scale, dy))
    sets = {"layer_norm": (2,), "rms_norm": (2,), "batch_norm": (0, 1), "group_norm": (1, 3), "instance_norm": (1, 3)}
    channels = {"group_norm": 3, "instance_norm": 1}.get(name)

    def mean(a):
        split = a if channels is None else a.reshape(*a.shape[:2], -1, channels)
        return np.broadcast_to(split.mean(sets[name], keepdims=True), split.shape).reshape(a.shape)

    centred = x if name == "rms_norm" else x - mean(x)
    rstd, g = 1 / np.sqrt(mean(centred**2) + eps), dy * scale
    x_hat = centred * rstd
    dx = rstd * (g - (0 if name == "rms_norm" else mean(g)) - x_hat * mean(g * x_hat))
    return x_hat * scale, dx, x_hat * dy, rstd


def sized(dtype, kind):
    """x [4, 5, 6] of ordinary numbers and others."""
    x, most = np.random.default_rng(5).normal(size=(4, 5, 6)), float(jnp.finfo(dtype).max)
    sizes = np.minimum([1, most / 8, 1e20, 1e-5, most**0.5, 1e-30], most / 8)
    return {
        "ordinary and large rows": x * np.resize(sizes, (4, 5, 1)),
        "ordinary and large examples": x * sizes[:4, None, None],
        "ordinary and large features": x * sizes,
        "large": x * most**0.65,
        "the largest of both signs": most * np.sign(x),
        "the largest, and once less it": np.where(np.arange(120).reshape(x.shape) % 30 == 7, -most, most),
        "the largest throughout": np.full(x.shape, most),
        "equal and large": np.full(x.shape, most**0.6),
        "tiny": x * 1e-30,
        "zeros": np.zeros(x.shape),
    }[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FIVE)
def test_rows_of_every_finite_size_have_their_output_and_gradients(name, dtype, x64):
    """Where the squares overflow, the sums, or differences; mixed, next to one another, and under vmap."""
    layer, rng, info = FIVE[name](), np.random.default_rng(6), jnp.finfo(dtype)
    scale, dy = (jnp.asarray(rng.normal(size=shape), dtype) for shape in ((6,), (4, 5, 6)))

    @jax.jit
    def both(x, dy):
        params, state = layer.init(None, x)
        params = params | {"scale": scale}
        y, _, residuals = layer.fwd(params, state, x, None)
        dparams, dx = layer.bwd(params, residuals, dy)
        return y, dx, dparams["scale"]

    across = {"batch_norm": (0, 1), "group_norm": 1, "instance_norm": 1}.get(name, -1)
    for kind in ("ordinary and large rows", "ordinary and large examples", "ordinary and large features", "large",
                 "the largest of both signs", "the largest, and once less it", "the largest throughout",
                 "equal and large", "tiny", "zeros"):  # fmt: skip
        x = jnp.asarray(sized(dtype, kind), dtype)
        y, dx, terms, rstd = exact(name, x, scale, dy)
        answers = [both(x, dy)]
        if name != "batch_norm":
            each = jax.vmap(both)(x[:, None], dy[:, None])
            answers.append((each[0][:, 0], each[1][:, 0], each[2].astype(jnp.float64).sum(0)))
        for got_y, got_dx, got_scale in answers:
            for got, wanted, terms_of in ((got_y, y, y), (got_dx, dx, rstd * np.abs(dy).max())):
                room = 40 * float(info.eps) * np.abs(terms_of).max(across, keepdims=True) + 4 * float(info.tiny)
                error = np.abs(np.asarray(got, np.longdouble) - wanted)
                assert (error <= room).all(), (kind, (error / room).max())
            room = 40 * float(info.eps) * np.abs(terms).sum((0, 1)).max() + 0.01 * float(info.eps)
            assert (np.abs(np.asarray(got_scale, np.longdouble) - terms.sum((0, 1))) <= room).all(), kind


@pytest.mark.parametrize("size", [1e19, 1e30, 1e33, 1e37])
@pytest.mark.parametrize("name", ["layer_norm", "group_norm", "batch_norm"])
def test_large_rows_that_are_nearly_constant_have_their_gradients(name, size, x64):
    layer, (near, dy) = FIVE[name](), np.random.default_rng(8).normal(size=(2, 6, 6))
    x, dy = (jnp.asarray(a, jnp.float32) for a in (size * (1 + 1e-6 * near), dy))
    params, state = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), layer.init(None, x))
    dx = layer.bwd(params, layer.fwd(params, state, x, None)[2], dy)[1]
    _, wanted, _, _ = exact(name, x[:, None], np.ones(x.shape[-1]), dy[:, None])
    error = np.abs(np.asarray(dx, np.longdouble) - wanted[:, 0])
    assert (error <= 1e-3 * np.abs(wanted).max()).all()


@pytest.mark.parametrize("name", ["layer_norm", "rms_norm"])
def test_rows_whose_mean_square_is_just_within_range_have_their_gradients(name):
    x = jnp.float32([[1.7e19, -1.75e19, 0.3e19], [1.25e19, 0.5e19, -1e19]])
    dy = jnp.float32([[1, -2, 1], [3, 1, 0]])
    dx = pull(NORMS[name](), ones(name, 3), x, dy)[-1]
    _, wanted, _, _ = exact(name, x[None], np.ones(3), dy[None])
    np.testing.assert_allclose(dx, wanted[0].astype(np.float64), rtol=0, atol=4e-6 * float(np.abs(wanted).max()))


@pytest.mark.parametrize("name", FIVE)
def test_an_ordinary_row_is_what_it_is_without_a_large_neighbour(name):
    layer, x = FIVE[name](), jnp.asarray(np.random.default_rng(7).normal(size=(4, 5, 6)), jnp.float32)
    params, state = layer.init(None, x)
    place = (..., slice(2, 4)) if name == "batch_norm" else slice(2, 4)
    spoiled = x.at[place].multiply(1e25)

    def pulled(x, dy):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y, layer.bwd(params, residuals, dy)[1]

    rest = (..., slice(2)) if name == "batch_norm" else slice(2)
    for got, wanted in zip(jax.jit(pulled)(spoiled, x), jax.jit(pulled)(x, x), strict=True):
        np.testing.assert_array_equal(got[rest], wanted[rest])


def test_numbers_that_are_not_finite_spoil_their_own_row_alone():
    x = jnp.ones((3, 4)).at[:, 0].set(jnp.array([2.0, jnp.inf, 3e38]))
    for name in ("layer_norm", "rms_norm"):
        y = NORMS[name]().apply(ones(name, 4), (), x)
        np.testing.assert_array_equal(np.isnan(y).any(1), [False, True, False])


@pytest.mark.parametrize("number", [np.float32, np.float64, np.float16, jnp.float32, jnp.bfloat16], ids=repr)
@pytest.mark.parametrize("wide", [False, True])
def test_a_number_of_numpy_or_jax_as_an_option_changes_no_dtype(number, wide):
    with jax.enable_x64(wide):
        eps, momentum = number(0.25), number(0.75)
        for layer in (*[make(eps=eps) for make in FIVE.values()], fn.batch_norm(momentum=momentum, eps=eps)):
            for dtype in DTYPES[not wide :]:

                def all_of(x, layer=layer):
                    params, state = layer.init(None, x)
                    y, moved, residuals = layer.fwd(params, state, x, None)
                    dparams, dx = layer.bwd(params, residuals, x)
                    return (y, layer.apply(params, moved, x), dx, dparams, moved), (x, x, x, params, state)

                got, wanted = jax.eval_shape(all_of, S((2, 3, 4), dtype))
                assert jax.tree.map(lambda a: a.dtype, got) == jax.tree.map(lambda a: a.dtype, wanted), layer.name


@pytest.mark.parametrize("eps", [0.0, -1.0, float("nan"), float("inf"), "1", None, True])
@pytest.mark.parametrize("name", FIVE)
def test_an_eps_that_is_no_positive_number_is_refused(name, eps):
    with pytest.raises(fn.InputError, match="eps"):
        FIVE[name](eps=eps)


def test_rms_norm_of_a_zero_row_is_0_with_finite_gradients():
    layer, params = fn.rms_norm(), ones("rms_norm", 5)
    y, _, dparams, dx = pull(layer, params, jnp.zeros((2, 5)), jnp.ones((2, 5)))
    assert not y.any()
    np.testing.assert_allclose(dx, np.full((2, 5), 1e3), rtol=1e-6)
    assert not dparams["scale"].any()


@BOTH
def test_nan_spoils_its_own_row_alone(name):
    x = jnp.asarray(RNG.normal(size=(3, 5)), jnp.float32).at[1, 2].set(jnp.nan)
    layer, params = NORMS[name](), ones(name, 5)
    y, _, _, dx = pull(layer, params, x, jnp.ones_like(x))
    for a in (y, dx):
        np.testing.assert_array_equal(np.isnan(a).any(1), [False, True, False])


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_takes_its_statistics_in_float32(name, dtype):
    """Values whose squares overflow float16, and rows so long that bfloat16 could not add them up."""
    x = jnp.asarray(1000 + 300 * RNG.normal(size=(2, 4096)), dtype)
    params = ones(name, 4096, dtype)
    y, _, dparams, dx = pull(NORMS[name](), params, x, x)
    assert {a.dtype for a in jax.tree.leaves((y, dx, dparams))} == {jnp.dtype(dtype)}
    wanted = reference(name, x, 1.0)
    np.testing.assert_allclose(np.asarray(y, np.float64), wanted, rtol=4 * float(jnp.finfo(dtype).eps), atol=1e-4)


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_in_half_precision_output_and_gradients_are_rounded_once(name, dtype):
    x, dy = (jnp.asarray(3 + RNG.normal(size=(50, 6)), dtype) for _ in range(2))
    params = params_of(name, 6, dtype)
    y, _, dparams, dx = pull(NORMS[name](), params, x, dy)
    high, d, scale = (np.asarray(a, np.float64) for a in (x, dy, params["scale"]))
    mean = lambda a: a.mean(-1, keepdims=True)
    centred, g = (a - mean(a) if name == "layer_norm" else a for a in (high, d * scale))
    rstd = 1 / np.sqrt(mean(centred**2) + 1e-6)
    x_hat = centred * rstd
    exact = rstd * (g - x_hat * mean(g * x_hat)), (x_hat * d).sum(0), reference(name, x, **params)
    for got, wanted in zip((dx, dparams["scale"], y), exact, strict=True):
        room = 0.51 * float(jnp.finfo(dtype).eps) * np.abs(wanted) + 2e-6 * np.abs(wanted).max()
        assert (np.abs(np.asarray(got, np.float64) - wanted) <= room).all()


@BOTH
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_parameter_gradients_are_summed_in_float32(name, dtype):
    layer, rows = NORMS[name](), jnp.tile(jnp.array([[1.0, -1.0]], dtype), (4096, 1))
    params = ones(name, 2, dtype)
    dparams = pull(layer, params, rows, jnp.ones_like(rows))[2]
    assert {leaf.dtype for leaf in dparams.values()} == {jnp.dtype(dtype)}
    np.testing.assert_array_equal(dparams["scale"].astype(jnp.float32), [4096, -4096])
    if name == "layer_norm":
        np.testing.assert_array_equal(dparams["bias"].astype(jnp.float32), [4096, 4096])


@BOTH
@pytest.mark.parametrize("eps", [0.0, -1e-6, float("nan")])
def test_an_eps_that_is_not_positive_is_refused(name, eps):
    with pytest.raises(fn.InputError, match="eps as a number" if np.isnan(eps) else "positive eps"):
        NORMS[name](eps=eps)


@BOTH
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (jnp.ones((2, 4)), "5 features"),
        (jnp.ones((2, 5), jnp.int32), "floating"),
        (jnp.ones((0, 5)), "not empty"),
        (jnp.ones((2, 5), jnp.bfloat16), "scale: bfloat16"),
    ],
)
def test_an_input_that_does_not_fit_is_refused(name, x, message):
    with pytest.raises(fn.InputError, match=message):
        NORMS[name]().apply(ones(name, 5), (), x)


@BOTH
@pytest.mark.parametrize("dy", [jnp.ones((2, 4)), jnp.ones((1, 5)), jnp.ones((2, 5), jnp.bfloat16)])
def test_a_cotangent_that_does_not_fit_is_refused(name, dy):
    saved = NORMS[name]().fwd(ones(name, 5), (), jnp.ones((2, 5)), None)[2]
    with pytest.raises(fn.InputError, match=r"float32\[2, 5\]"):
        NORMS[name]().bwd(ones(name, 5), saved, dy)


@pytest.mark.parametrize(
    "params", [{}, {"scale": jnp.ones(5)}, {"kernel": jnp.ones((5, 5)), "bias": jnp.ones(5)}, None]
)
def test_the_params_of_another_layer_are_refused(params):
    with pytest.raises(fn.InputError, match=r"scale: float32\[5\], bias: float32\[5\]"):
        fn.layer_norm().apply(params, (), jnp.ones((2, 5)))


def rounding(layer, x, dy, exact, scale):
    """The error of dx in float32, as a root mean square, in units of rounding of what cancels in it."""
    x, dy = np.float32(x), np.float32(dy)
    params = layer.init(None, S(x.shape, jnp.float32))[0]
    dx = pull(layer, params, jnp.asarray(x), jnp.asarray(dy))[-1]
    return np.sqrt(np.mean(np.square((np.asarray(dx, np.float64) - exact) / scale))) / np.finfo(np.float32).eps


def test_of_a_gradient_that_cancels_rounding_alone_is_lost_not_the_error_of_rstd():
    """One feature of rms norm, and two of layer norm, come out as signs but for eps: next to nothing of dy is left."""
    rng, eps = np.random.default_rng(3), 1e-6
    x, dy = (np.float32(a).astype(np.float64) for a in (rng.uniform(0.5, 2, (4000, 1)), rng.normal(size=(4000, 1))))
    exact, scale = dy * eps * (x**2 + eps) ** -1.5, np.abs(dy) * (x**2 + eps) ** -0.5
    assert rounding(fn.rms_norm(eps=eps), x, dy, exact, scale) < 0.55
    half, shift, pair = x, rng.normal(size=(4000, 1)), np.float32(rng.normal(size=(4000, 2))).astype(np.float64)
    x = np.float32(np.concatenate([shift + half, shift - half], axis=1)).astype(np.float64)
    var, apart = np.square(x[:, :1] - x[:, 1:]) / 4, (pair[:, :1] - pair[:, 1:]) / 2
    exact = np.concatenate([apart, -apart], axis=1) * eps * (var + eps) ** -1.5
    scale = np.abs(pair).max(axis=1, keepdims=True) * (var + eps) ** -0.5
    assert rounding(fn.layer_norm(eps=eps), x, pair, exact, scale) < 0.4
    grouped = (a[:, None] for a in (x, pair, exact, scale))
    assert rounding(fn.group_norm(1, eps=eps), *grouped) < 0.42
