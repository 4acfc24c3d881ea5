"""weight_norm and spectral_norm: against PyTorch's, every contraction, their state, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def drawn(tree):
    return jax.tree.map(lambda leaf: jnp.asarray(RNG.normal(size=leaf.shape), leaf.dtype), tree)


def setting(layer, shape):
    """(params, state, x, dy) at random, the state that of init."""
    x = jnp.asarray(RNG.normal(size=shape))
    params, state = layer.init(KEY, x)
    return drawn(params), state, x, drawn(jax.eval_shape(layer.apply, params, state, x))


def theirs(torch, wrap, kernel):
    """PyTorch's Conv1d or Linear with this kernel under its parametrization."""
    if kernel.ndim == 3:
        module = torch.nn.Conv1d(kernel.shape[1], kernel.shape[2], kernel.shape[0], bias=False, dtype=torch.float64)
        weight = np.moveaxis(np.asarray(kernel), (-1, -2), (0, 1))
    else:
        module, weight = torch.nn.Linear(*kernel.shape, bias=False, dtype=torch.float64), np.asarray(kernel).T
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.array(weight)))
    return wrap(module)


LAYERS = {"dense": (fn.dense(3, use_bias=False), (4, 5)), "conv": (fn.conv(3, 2, 1, 0, use_bias=False), (4, 5, 2))}


def channels_first(a):
    return np.array(np.moveaxis(np.asarray(a), -1, 1))


def back(a):
    """PyTorch's weight as a kernel."""
    return np.moveaxis(a, (0, 1), (-1, -2))


@pytest.mark.parametrize("kind", LAYERS)
def test_weight_norm_is_pytorchs(kind, x64):
    torch = pytest.importorskip("torch")
    inner, shape = LAYERS[kind]
    layer = fn.weight_norm(inner)
    params, state, x, dy = setting(layer, shape)
    y, _, residuals = layer.fwd(params, state, x, None)
    dparams, dx = layer.bwd(params, residuals, dy)
    weight_norm = torch.nn.utils.parametrizations.weight_norm
    module = theirs(torch, weight_norm, params["kernel"]["direction"])
    length, direction = module.parametrizations.weight.original0, module.parametrizations.weight.original1
    with torch.no_grad():
        length.copy_(torch.tensor(np.asarray(params["kernel"]["scale"])).reshape(length.shape))
    there = torch.tensor(channels_first(x), requires_grad=True)
    out = module(there)
    out.backward(torch.tensor(channels_first(dy)))
    last = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)
    pairs = [(y, last(out)), (dx, last(there.grad))]
    pairs += [(dparams["kernel"]["direction"], back(direction.grad.numpy()))]
    pairs += [(dparams["kernel"]["scale"], length.grad.numpy().reshape(-1))]
    for got, wanted in pairs:
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", LAYERS)
def test_spectral_norm_is_pytorchs_with_the_same_vectors(kind, x64):
    torch = pytest.importorskip("torch")
    inner, shape = LAYERS[kind]
    layer = fn.spectral_norm(inner, iterations=2)
    params, state, x, dy = setting(layer, shape)
    spectral_norm = lambda module: torch.nn.utils.parametrizations.spectral_norm(module, n_power_iterations=2)
    module = theirs(torch, spectral_norm, params["kernel"])
    norm = module.parametrizations.weight[0]
    # PyTorch orders the entries of a feature by channel, then by offset
    rows = np.arange(params["kernel"].size // 3).reshape(params["kernel"].shape[:-1])
    order = np.moveaxis(rows, -1, 0).reshape(-1)
    vectors = state["vectors"]["kernel"]
    with torch.no_grad():
        norm._u.copy_(torch.tensor(np.array(vectors["left"])))
        norm._v.copy_(torch.tensor(np.array(vectors["right"])[order]))
    y, moved, residuals = layer.fwd(params, state, x, None)
    np.testing.assert_array_equal(y, layer.apply(params, state, x))
    dparams, dx = layer.bwd(params, residuals, dy)
    module.eval()
    there = torch.tensor(channels_first(x), requires_grad=True)
    out = module(there)
    out.backward(torch.tensor(channels_first(dy)))
    last = lambda a: np.moveaxis(a.detach().numpy(), 1, -1)
    dkernel = back(module.parametrizations.weight.original.grad.numpy())
    for got, wanted in ((y, last(out)), (dx, last(there.grad)), (dparams["kernel"], dkernel)):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)
    module.train()
    module(there)
    for got, wanted in (
        (moved["vectors"]["kernel"]["left"], norm._u),
        (moved["vectors"]["kernel"]["right"][order], norm._v),
    ):
        np.testing.assert_allclose(got, wanted, rtol=1e-10, atol=1e-12)


def test_at_init_weight_norm_is_the_layer_itself(x64):
    inner = fn.serial(fn.dense(4), fn.tanh(), fn.dense(2))
    x = jnp.asarray(RNG.normal(size=(3, 5)))
    params, state = inner.init(KEY, x)
    normed, _ = fn.weight_norm(inner).init(KEY, x)
    assert set(normed["dense"]["kernel"]) == {"direction", "scale"}
    assert normed["dense"]["bias"].shape == (4,)
    got = fn.weight_norm(inner).apply(normed, state, x)
    np.testing.assert_allclose(got, inner.apply(params, state, x), rtol=1e-12)


def test_spectral_norm_comes_to_the_largest_singular_value_as_numpy_has_it(x64):
    layer = fn.spectral_norm(fn.dense(6, use_bias=False))
    x = jnp.eye(7)
    params, state = layer.init(KEY, x)
    for _ in range(200):
        state = layer.fwd(params, state, x, None)[1]
    np.testing.assert_allclose(np.linalg.norm(layer.apply(params, state, x), 2), 1, rtol=1e-9)


MODELS = {
    "weight_norm": (fn.weight_norm(fn.serial(fn.dense(4), fn.tanh(), fn.dense(2))), (3, 5)),
    "weight_norm, positions": (fn.weight_norm(fn.conv(2, 3)), (3, 4, 2)),
    "spectral_norm": (fn.spectral_norm(fn.serial(fn.dense(4), fn.tanh(), fn.dense(2))), (3, 2, 5)),
    "repeated": (fn.repeat(fn.weight_norm(fn.serial(fn.dense(4), fn.tanh())), 2), (3, 4)),
}


@pytest.mark.parametrize("name", MODELS)
def test_every_contraction_is_that_of_one_examples_own_gradient(name, x64):
    layer, shape = MODELS[name]
    params, state, x, dy = setting(layer, shape)
    own = lambda x, dy: jax.grad(lambda params: jnp.vdot(layer.apply(params, state, x[None])[0], dy))(params)
    each = jax.jit(jax.vmap(own))(x, dy)
    squares = jax.tree.map(lambda g: jnp.sum(jnp.square(g.reshape(len(x), -1)), axis=1), each)
    wanted = {"total": jax.tree.map(lambda g: g.sum(0), each), "per_example": each, "squared_norm": squares}
    wanted["rows"] = wanted["total"]

    @jax.jit
    def contracted(params, x, dy):
        """By each contraction, at once and of what was kept."""
        residuals = layer.fwd(params, state, x, None)[2]
        kept = layer.bwd(params, residuals, dy, fn.keep)[0]
        later = lambda contract: jax.tree.map(contract, kept, params, is_leaf=fn.is_factor)
        hows = (fn.total, fn.per_example, fn.squared_norm, fn.rows)
        return {how.name: (layer.bwd(params, residuals, dy, how)[0], later(how)) for how in hows}

    for name, both in contracted(params, x, dy).items():
        for got in both:
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-11), got, wanted[name])


def test_a_batch_norm_inside_refuses_examples_still():
    layer = fn.weight_norm(fn.serial(fn.dense(3), fn.batch_norm()))
    params, state = layer.init(KEY, jnp.ones((2, 3)))
    _, moved, residuals = layer.fwd(params, state, jnp.ones((2, 3)), None)
    assert set(moved["batch_norm"]) == {"mean", "var"}
    layer.bwd(params, residuals, jnp.ones((2, 3)))
    with pytest.raises(fn.InputError, match="gradient of its own"):
        layer.bwd(params, residuals, jnp.ones((2, 3)), fn.per_example)


def test_a_feature_of_zeros_stays_finite():
    layer = fn.weight_norm(fn.dense(2))
    params, _ = layer.init(KEY, jnp.ones((2, 3)))
    params["kernel"]["direction"] = params["kernel"]["direction"].at[:, 0].set(0)
    y, _, residuals = layer.fwd(params, (), jnp.ones((2, 3)), None)
    grads = layer.bwd(params, residuals, jnp.ones((2, 2)))
    assert not y[:, 0].any()
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))


@pytest.mark.parametrize("wrap", [fn.weight_norm, fn.spectral_norm])
def test_what_makes_no_sense_is_refused(wrap):
    with pytest.raises(fn.InputError, match="a layer"):
        wrap(fn.dense)
    with pytest.raises(fn.InputError, match="names of params"):
        wrap(fn.dense(3), "kernel")
    for layer, names in ((fn.relu(), ("kernel",)), (fn.dense(3), ("weights",)), (fn.dense(3), ("bias",))):
        with pytest.raises(fn.InputError, match="at least two axes") as caught:
            wrap(layer, names).init(KEY, jnp.ones((2, 3)))
        assert str(caught.value).startswith(wrap.__name__)
    with pytest.raises(fn.InputError, match="iterations"):
        fn.spectral_norm(fn.dense(3), iterations=0)


def test_params_and_state_of_the_layer_inside_are_refused():
    x = jnp.ones((2, 3))
    params, _ = fn.dense(3).init(KEY, x)
    with pytest.raises(fn.InputError, match="weight_norm"):
        fn.weight_norm(fn.dense(3)).apply(params, (), x)
    for run in (fn.spectral_norm(fn.dense(3)).apply, lambda *args: fn.spectral_norm(fn.dense(3)).fwd(*args, None)):
        with pytest.raises(fn.InputError, match=r"spectral_norm\n.*state"):
            run(params, (), x)


def test_a_kernel_that_was_zero_finds_its_singular_vectors_again():
    layer = fn.spectral_norm(fn.dense(3, use_bias=False, kernel_init=jax.nn.initializers.zeros))
    x = jnp.ones((2, 4))
    _, state = layer.init(jax.random.key(0), x)
    kernel = jnp.asarray(np.random.default_rng(0).normal(size=(4, 3)), jnp.float32)
    step = jax.jit(lambda state: layer.fwd({"kernel": 50 * kernel}, state, x, None)[1])
    for _ in range(30):
        state = step(state)
    y = layer.apply({"kernel": 50 * kernel}, state, x)
    np.testing.assert_allclose(y, x @ kernel / np.linalg.norm(kernel, 2), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("norm", [fn.weight_norm, fn.spectral_norm])
def test_a_loss_stays_a_loss(norm):
    loss = fn.linear_cross_entropy(8, ignore_index=-1)
    normed, labels = norm(loss), jnp.array([1, -1, -1])
    assert isinstance(normed, fn.Loss)
    np.testing.assert_array_equal(normed.counted(labels), loss.counted(labels))
