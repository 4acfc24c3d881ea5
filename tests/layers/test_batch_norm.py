"""batch_norm: against NumPy and PyTorch, its state, what it refuses (under meshes: tests/gradients/test_meshes.py)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)
SHAPES = [(6, 3), (4, 5, 3), (3, 4, 5, 2)]


def setting(shape, dtype=np.float64, **options):
    """Layer, params and state that are not those of init, x and dy."""
    layer = fn.batch_norm(**options)
    draw = lambda shape: jnp.asarray(RNG.normal(size=shape).astype(dtype))
    params, state = jax.eval_shape(layer.init, KEY, jax.ShapeDtypeStruct(shape, dtype))
    params = {name: draw(leaf.shape) for name, leaf in params.items()}
    state = {"mean": draw(state["mean"].shape), "var": jnp.abs(draw(state["var"].shape)) + 0.5}
    return layer, params, state, 3 * draw(shape) + 1, draw(shape)


@pytest.mark.parametrize("shape", SHAPES)
def test_training_normalises_by_the_batch_and_moves_the_state(shape, x64):
    layer, params, state, x, _ = setting(shape, momentum=0.7, eps=0.01)
    y, moved, residuals = layer.fwd(params, state, x, None)
    axes = tuple(range(x.ndim - 1))
    mean, var = np.asarray(x).mean(axes), np.asarray(x).var(axes)
    wanted = (np.asarray(x) - mean) / np.sqrt(var + 0.01) * np.asarray(params["scale"]) + np.asarray(params["bias"])
    np.testing.assert_allclose(y, wanted, rtol=1e-11, atol=1e-12)
    for name, batch in (("mean", mean), ("var", var)):
        np.testing.assert_allclose(moved[name], 0.7 * np.asarray(state[name]) + 0.3 * batch, rtol=1e-12)
    assert residuals.x is x
    assert {a.shape for a in jax.tree.leaves(residuals[1:])} == {(1,) * (len(shape) - 1) + shape[-1:]}


@pytest.mark.parametrize("shape", SHAPES)
def test_evaluation_normalises_by_the_state(shape, x64):
    layer, params, state, x, _ = setting(shape, eps=0.01)
    mean, var, scale, bias = (np.asarray(a) for a in (state["mean"], state["var"], params["scale"], params["bias"]))
    wanted = (np.asarray(x) - mean) / np.sqrt(var + 0.01) * scale + bias
    np.testing.assert_allclose(layer.apply(params, state, x), wanted, rtol=1e-11, atol=1e-12)
    np.testing.assert_allclose(layer.apply(params, state, x[:1]), wanted[:1], rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float32, 1e-5), (np.float64, 1e-10)])
def test_output_gradients_and_statistics_are_pytorchs(dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    layer, params, state, x, dy = setting((3, 4, 5, 2), dtype)
    y, moved, residuals = layer.fwd(params, state, x, None)
    dparams, dx = layer.bwd(params, residuals, dy)

    twin = torch.nn.BatchNorm2d(2, momentum=0.1, dtype=getattr(torch, np.dtype(dtype).name))
    values = {"weight": params["scale"], "bias": params["bias"]}
    values |= {"running_mean": state["mean"], "running_var": state["var"]}
    twin.load_state_dict({k: torch.tensor(np.array(v)) for k, v in values.items()}, strict=False)
    first = lambda a: torch.tensor(np.array(np.moveaxis(np.asarray(a), -1, 1)))
    there = first(x).requires_grad_()
    out = twin(there)
    out.backward(first(dy))
    last = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)
    n = x.size // 2
    var = 0.9 * np.asarray(state["var"]) + (np.asarray(moved["var"]) - 0.9 * np.asarray(state["var"])) * n / (n - 1)
    pairs = [(y, last(out)), (dx, last(there.grad)), (moved["mean"], twin.running_mean.numpy())]
    pairs += [(var, twin.running_var.numpy())]
    pairs += [(dparams["scale"], twin.weight.grad.numpy()), (dparams["bias"], twin.bias.grad.numpy())]
    twin.eval()
    pairs.append((layer.apply(params, moved | {"var": jnp.asarray(var)}, x), last(twin(there))))
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=tolerance, atol=tolerance * np.abs(wanted).max())


def test_without_parameters_it_only_normalises(x64):
    layer, params, state, x, dy = setting((6, 3), use_scale=False, use_bias=False)
    assert params == {}
    y, _, residuals = layer.fwd(params, state, x, None)
    np.testing.assert_allclose(np.mean(y, axis=0), 0, atol=1e-12)
    np.testing.assert_allclose(np.var(y, axis=0), 1, rtol=1e-4)
    assert layer.bwd(params, residuals, dy)[0] == {}
    assert set(setting((6, 3), use_bias=False)[1]) == {"scale"}
    assert set(setting((6, 3), use_scale=False)[1]) == {"bias"}


@pytest.mark.parametrize("contract", [fn.per_example, fn.squared_norm], ids=lambda c: c.name)
@pytest.mark.parametrize("options", [{}, {"use_scale": False, "use_bias": False}])
def test_an_examples_own_gradient_is_refused_for_the_whole_model(contract, options):
    model = fn.serial(fn.dense(4), fn.batch_norm(**options), fn.dense(2))
    x = jnp.ones((3, 5))
    params, state = model.init(KEY, x)
    _, _, residuals = model.fwd(params, state, x, None)
    with pytest.raises(fn.InputError, match=f"(?s)batch_norm.*no.*gradient of its own.*{contract.name}.*group_norm"):
        model.bwd(params, residuals, jnp.ones((3, 2)), contract)


def test_kept_factors_give_the_total_and_refuse_the_rest(x64):
    layer, params, state, x, dy = setting((4, 5, 3))
    residuals = layer.fwd(params, state, x, None)[2]
    kept, wanted = layer.bwd(params, residuals, dy, fn.keep)[0], layer.bwd(params, residuals, dy)[0]
    for name in ("scale", "bias"):
        np.testing.assert_allclose(fn.total(kept[name], params[name]), wanted[name], rtol=1e-12)
        for contract in (fn.per_example, fn.squared_norm):
            with pytest.raises(fn.InputError, match="gradient of its own"):
                contract(kept[name], params[name])


def test_repeated_layers_have_statistics_of_their_own(x64):
    model = fn.repeat(fn.serial(fn.dense(3), fn.batch_norm()), 2)
    x = jnp.asarray(RNG.normal(size=(5, 3)))
    params, state = model.init(KEY, x)
    _, moved, _ = model.fwd(params, state, x, None)
    one = fn.serial(fn.dense(3), fn.batch_norm())
    for i in range(2):
        own = jax.tree.map(lambda leaf, i=i: leaf[i], (params, state, moved))
        x, wanted, _ = one.fwd(own[0], own[1], x, None)
        for name in ("mean", "var"):
            np.testing.assert_allclose(own[2]["batch_norm"][name], wanted["batch_norm"][name], rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_statistics_are_float32(dtype):
    """4096 values of 16 and 18: their sum and squares are beyond float16, and bfloat16 has no 17.0625."""
    x = jnp.where(jnp.arange(4096) % 2 == 0, 16, 18).astype(dtype)[:, None]
    layer = fn.batch_norm(momentum=0.0)
    params, state = layer.init(KEY, x)
    y, moved, _ = layer.fwd(params, state, x, None)
    assert (y.dtype, moved["mean"].dtype, moved["var"].dtype) == (dtype, jnp.float32, jnp.float32)
    assert (moved["mean"].item(), moved["var"].item()) == (17.0, 1.0)
    np.testing.assert_array_equal(y[:2, 0].astype(jnp.float32), [-1.0, 1.0])
    layer_in = fn.mixed(fn.batch_norm(momentum=0.0), compute=dtype)
    params, state = layer_in.init(KEY, x.astype(jnp.float32))
    assert layer_in.fwd(params, state, x.astype(jnp.float32), None)[1]["mean"].item() == 17.0


def test_far_from_zero_the_variance_is_kept_and_equal_values_give_the_bias():
    x = jnp.asarray([[1e4], [1e4 + 1.0], [1e4 + 2.0]], jnp.float32)
    layer = fn.batch_norm(momentum=0.0)
    params, state = layer.init(KEY, x)
    np.testing.assert_allclose(layer.fwd(params, state, x, None)[1]["var"], [2 / 3], rtol=1e-6)
    y, _, residuals = layer.fwd(params, state, jnp.full((4, 1), 3.0), None)
    np.testing.assert_array_equal(y, np.zeros((4, 1)))
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(layer.bwd(params, residuals, jnp.ones((4, 1)))))


@pytest.mark.parametrize("shape", [(7, 1), (7, 3), (3, 5, 2), (1, 4), (1000, 1), (4097, 2)])
@pytest.mark.parametrize("value", [101325.1, 0.1, -1e8 / 3, 1e4 / 3, 1e20 / 3, 3e38])
def test_of_equal_values_far_from_zero_all_is_the_limit(shape, value):
    """y is the bias, dscale 0, dx that of rstd = 1 / sqrt(eps), the running variance 0 and the mean the value."""
    layer, x, rng = fn.batch_norm(momentum=0.0), jnp.full(shape, value, jnp.float32), np.random.default_rng(1)
    params, state = layer.init(KEY, x)
    dy = rng.normal(size=shape).astype(np.float32)

    @jax.jit
    def both(x, dy):
        y, moved, residuals = layer.fwd(params, state, x, None)
        return y, moved, *layer.bwd(params, residuals, dy)

    y, moved, dparams, dx = both(x, dy)
    np.testing.assert_allclose(y, 0, atol=1e-6)
    np.testing.assert_allclose(dparams["scale"], 0, atol=1e-5)
    np.testing.assert_allclose(moved["mean"], x[(0,) * (x.ndim - 1)], rtol=1e-7)
    assert not moved["var"].any()
    wide = dy.astype(np.float64)
    wanted = (wide - wide.mean(tuple(range(len(shape) - 1)), keepdims=True)) / np.sqrt(1e-5)
    np.testing.assert_allclose(dx, wanted, atol=1e-3)


@pytest.mark.parametrize("far", [3.0, 100.0, 1e4, 101325.1, 1e7])
def test_features_far_from_zero_are_those_of_float64_beside_others(far):
    """Near 1e7 neighbours in float32 are 1 apart: the mean is no float32, and x less a rounded one is off by half."""
    rng = np.random.default_rng(2)
    x = np.float32(rng.normal(size=(64, 3)) + np.array([far, 0, -far]))
    dy, layer = np.float32(rng.normal(size=x.shape)), fn.batch_norm(momentum=0.0)
    params, state = layer.init(KEY, x)
    y, moved, residuals = layer.fwd(params, state, x, None)
    dparams, dx = layer.bwd(params, residuals, dy)
    high, g = x.astype(np.float64), dy.astype(np.float64)
    x_hat, rstd = (high - high.mean(0)) / np.sqrt(high.var(0) + 1e-5), 1 / np.sqrt(high.var(0) + 1e-5)
    np.testing.assert_allclose(y, x_hat, atol=2e-6)
    np.testing.assert_allclose(dparams["scale"], (x_hat * g).sum(0), atol=3e-5)
    np.testing.assert_allclose(dx, rstd * (g - g.mean(0) - x_hat * (x_hat * g).mean(0)), atol=4e-6)
    np.testing.assert_allclose(moved["mean"], high.mean(0), rtol=1e-7, atol=1e-7)
    np.testing.assert_allclose(moved["var"], high.var(0), rtol=2e-6)


def test_a_variance_is_kept_where_the_sum_of_squares_overflows_and_infinite_where_it_is_itself():
    x = jnp.tile(jnp.array([[1e19, 1e20], [-1e19, -1e20]], jnp.float32), (32, 1))
    layer = fn.batch_norm(momentum=0.0)
    params, state = layer.init(KEY, x)
    y, moved, _ = layer.fwd(params, state, x, None)
    np.testing.assert_allclose(moved["var"], [1e38, jnp.inf], rtol=1e-5)
    np.testing.assert_allclose(y, np.sign(x), rtol=1e-6)
    np.testing.assert_array_equal(moved["mean"], [0, 0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"momentum": 1.5}, "momentum from 0"),
        ({"momentum": np.float32(-0.5)}, "momentum from 0"),
        ({"momentum": float("nan")}, "momentum as a number"),
        ({"momentum": "0.9"}, "momentum as a real number"),
        ({"eps": 0.0}, "eps"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(fn.InputError, match=message):
        fn.batch_norm(**options)


def test_bad_input_is_refused():
    layer = fn.batch_norm()
    params, state = layer.init(KEY, jnp.ones((2, 3)))
    for x, message in [
        (jnp.ones(3), "at least 2 axes"),
        (jnp.ones((2, 3), jnp.int32), "floating"),
        (jnp.ones((2, 4)), "statistics mean and var of 4"),
        (jnp.ones((2, 3), jnp.bfloat16), "scale: bfloat16"),
    ]:
        for call in (lambda x: layer.apply(params, state, x), lambda x: layer.fwd(params, state, x, None)):
            with pytest.raises(fn.InputError, match=message) as caught:
                call(x)
            assert str(caught.value).startswith("batch_norm")
    with pytest.raises(fn.InputError, match="statistics"):
        layer.fwd(params, (), jnp.ones((2, 3)), None)
    residuals = layer.fwd(params, state, jnp.ones((2, 3)), None)[2]
    with pytest.raises(fn.InputError, match="cotangent"):
        layer.bwd(params, residuals, jnp.ones((3, 3)))
