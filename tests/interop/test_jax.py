"""differentiable inside JAX, Flax and Equinox, from_function inside models, and what both refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

KEY = jax.random.key(0)
MODEL = fn.serial(fn.dense(6), fn.layer_norm(), fn.gelu(), fn.dense(4))
BLOCK = fn.skip(fn.serial(fn.layer_norm(), fn.dense(4), fn.tanh()))


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape))


def assert_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, **({"rtol": 1e-10, "atol": 1e-12} | tolerance)), got, wanted
    )


def marked(layer):
    """The layer with a gradient that autodiff would not give: 3 times too long. Whose rule ran can be seen by it."""
    bwd = lambda *args: jax.tree.map(lambda g: 3 * g, layer.bwd(*args))
    return fn.Layer(layer.name, layer.init, layer.apply, layer.fwd, bwd)


def loss(f, params, x):
    return jnp.sum(jnp.sin(f(params, x)))


# differentiable


def test_its_gradient_is_the_layers_own_rule(x64):
    params, _ = MODEL.init(KEY, normal(0, 3, 5))
    x = normal(1, 3, 5)
    plain = lambda params, x: MODEL.apply(params, MODEL.init(KEY, x)[1], x)
    wanted = jax.grad(loss, (1, 2))(plain, params, x)
    assert_close(jax.grad(loss, (1, 2))(fn.differentiable(MODEL), params, x), wanted)
    tripled = jax.grad(loss, (1, 2))(fn.differentiable(marked(MODEL)), params, x)
    assert_close(tripled, jax.tree.map(lambda g: 3 * g, wanted))
    assert_close(fn.differentiable(MODEL)(params, x), plain(params, x))


TRANSFORMS = {
    "jit": lambda f: jax.jit(f),
    "vmap over x": lambda f: lambda p, x: jnp.sum(jax.vmap(f, (None, 0))(p, jnp.stack([x, 2 * x])), 0),
    "vmap over params": lambda f: (
        lambda p, x: jnp.sum(jax.vmap(f, (0, None))(jax.tree.map(lambda w: jnp.stack([w, w * w]), p), x), 0)
    ),
    "scan": lambda f: lambda p, x: jax.lax.scan(lambda h, _: (f(p, h), None), x, None, length=3)[0],
    "checkpoint": lambda f: jax.checkpoint(lambda p, x: f(p, f(p, x))),
    "while in the primal": lambda f: (
        lambda p, x: f(p, x) + jax.lax.stop_gradient(jax.lax.fori_loop(0, 2, lambda _, h: f(p, h), x))
    ),
    "grad of grad": lambda f: lambda p, x: jax.grad(lambda x: jnp.sum(f(p, x) ** 2))(x),
}


@pytest.mark.parametrize("name", TRANSFORMS)
def test_it_goes_under_every_transformation(name, x64):
    x = normal(2, 3, 4)
    params, state = BLOCK.init(KEY, x)
    plain = lambda params, x: BLOCK.apply(params, state, x)
    both = [jax.jit(jax.value_and_grad(lambda *a, f=f: loss(TRANSFORMS[name](f), *a), (0, 1))) for f in
            (fn.differentiable(BLOCK), plain)]  # fmt: skip
    got, wanted = (f(params, x) for f in both)
    assert_close(got, wanted, rtol=1e-9)


def test_forward_mode_goes_over_its_gradient_and_not_through_itself(x64):
    x = normal(3, 3, 4)
    params, state = BLOCK.init(KEY, x)
    f = fn.differentiable(BLOCK)
    product = lambda f: jax.jvp(jax.grad(lambda x: loss(f, params, x)), (x,), (jnp.cos(x),))[1]
    assert_close(product(f), product(lambda params, x: BLOCK.apply(params, state, x)))
    with pytest.raises(TypeError, match="custom_vjp"):
        jax.jvp(lambda x: f(params, x), (x,), (x,))
    jax.jvp(lambda x: BLOCK.fwd(params, state, x, None)[0], (x,), (x,))  # what its docstring recommends


def test_integers_have_no_gradient_and_unused_outputs_a_zero_one(x64):
    ids, x = jnp.array([[1, 4], [0, 4]]), normal(4, 2, 3)
    layer = fn.parallel(fn.embedding(5, 3, dtype=float), fn.dense(3), fn.flatten())
    params, _ = layer.init(KEY, (ids, x, ids))
    f = fn.differentiable(layer)

    def second(params, x):
        y = f(params, (ids, x, ids))  # the third output is of integers
        assert y[2].dtype == ids.dtype
        return jnp.sum(y[1] ** 2)

    grads = jax.jit(jax.grad(second))(params, x)
    assert not np.any(grads["embedding"]["embedding"])
    y = x @ params["dense"]["kernel"] + params["dense"]["bias"][None]
    assert_close(grads["dense"]["kernel"], 2 * x.T @ y)
    pulled = jax.vjp(lambda ids: f(params, (ids, x, ids)), ids)[1]
    zeros = jax.tree.map(jnp.zeros_like, f(params, (ids, x, ids))[:2])
    assert pulled((*zeros, np.zeros(ids.shape, jax.dtypes.float0)))[0].dtype == jax.dtypes.float0


def test_dropout_draws_from_the_key_and_its_gradient_from_the_same():
    layer = fn.serial(fn.dense(8), fn.dropout(0.5))
    x = normal(5, 4, 3).astype(jnp.float32)
    params, state = layer.init(KEY, x)
    f = jax.jit(fn.differentiable(layer))
    y, _, residuals = layer.fwd(params, state, x, jax.random.key(7))
    np.testing.assert_array_equal(f(params, x, key=jax.random.key(7)), y)
    grads = jax.grad(lambda params: jnp.sum(f(params, x, key=jax.random.key(7))))(params)
    assert_close(grads, layer.bwd(params, residuals, jnp.ones_like(y))[0], rtol=1e-6)
    with pytest.raises(fn.InputError, match="random key"):
        f(params, x)


def counting():
    """y = n x, and n + 1."""
    return fn.Layer(
        "counting",
        lambda key, x: ({}, jnp.ones(())),
        lambda params, n, x: n * x,
        lambda params, n, x, key: (n * x, n + 1, n),
        lambda params, n, dy, contract=fn.total: ({}, n * dy),
    )


def test_a_layer_with_a_state_returns_the_new_one_which_nothing_is_differentiated_through(x64):
    f = fn.differentiable(fn.serial(fn.tanh(), counting()))
    params, x = {"tanh": {}, "counting": {}}, normal(6, 3)
    state = {"tanh": (), "counting": jnp.full((), 2.0)}

    def of(x, state):
        y, new = f(params, x, state=state)
        return jnp.sum(y) + 5 * new["counting"], new

    grads, new = jax.grad(of, (0, 1), has_aux=True)(x, state)
    assert new["counting"] == 3
    assert_close(grads, (2 * (1 - jnp.tanh(x) ** 2), {"tanh": (), "counting": jnp.zeros(())}))
    with pytest.raises(fn.InputError, match="f\\(params, x, state=state\\)"):
        f(params, x)


def test_frozen_and_half_precision_layers_go_in():
    x = normal(7, 3, 5).astype(jnp.float32)
    layer = fn.mixed(fn.serial(fn.freeze(fn.dense(4)), fn.dense(2)))
    params, state = layer.init(KEY, x)
    f = fn.differentiable(layer)
    grads, new = jax.grad(lambda params: (lambda y, new: (jnp.sum(y), new))(*f(params, x, state=state)), has_aux=True)(
        params
    )
    assert [leaf.dtype for leaf in jax.tree.leaves(grads)] == [jnp.float32] * 2
    assert_close(new, state)


def test_the_checker_finds_its_rule():
    x = normal(17, 3, 4).astype(jnp.float32)
    params, _ = BLOCK.init(KEY, x)
    report = fn.check_vjp(fn.differentiable(BLOCK), params, x, oracles=("autodiff",))
    assert report.ok
    assert "custom rules: custom_vjp skip" in report.notes
    wrong = fn.check_vjp(fn.differentiable(marked(BLOCK)), params, x, oracles=("autodiff",), shrink=False)
    assert len(wrong.failures) == 5


def test_what_is_no_layer_and_what_does_not_fit_is_refused():
    with pytest.raises(fn.InputError, match="call its constructor"):
        fn.differentiable(fn.relu)
    f = fn.differentiable(fn.dense(3))
    with pytest.raises(fn.InputError, match="5 features"):
        jax.jit(f)({"kernel": jnp.ones((5, 3)), "bias": jnp.ones(3)}, jnp.ones((2, 4)))


# Inside other frameworks


def test_inside_a_flax_module(x64, standard_promotion):
    nnx = pytest.importorskip("flax.nnx")
    x = normal(8, 3, 4)
    start, state = BLOCK.init(KEY, x)

    class Block(nnx.Module):
        def __init__(self, f):
            self.block, self.f = nnx.data(jax.tree.map(nnx.Param, start)), f

        def __call__(self, x):
            return self.f(jax.tree.map(lambda p: p[...], self.block, is_leaf=lambda p: isinstance(p, nnx.Param)), x)

    def total_of(f):
        model = Block(f)
        value, grads = nnx.jit(nnx.value_and_grad(scanned))(model, x)
        return value, jax.tree.leaves(nnx.to_pure_dict(grads))

    def scanned(model, x):
        graph, weights = nnx.split(model)
        step = jax.checkpoint(lambda h, _: (nnx.merge(graph, weights)(h), None))
        h = jax.lax.scan(step, x, None, length=2)[0]
        return jnp.sum(jax.vmap(model)(jnp.stack([h, x])) ** 2)

    got, wanted = total_of(fn.differentiable(BLOCK)), total_of(lambda p, x: BLOCK.apply(p, state, x))
    assert_close(got, wanted)
    assert len(got[1]) == 4
    assert_close(total_of(fn.differentiable(marked(BLOCK)))[0], wanted[0])


def test_inside_an_equinox_module(x64, standard_promotion):
    eqx = pytest.importorskip("equinox")
    x = normal(9, 3, 4)
    start, state = BLOCK.init(KEY, x)

    class Block(eqx.Module):
        params: dict
        f: object = eqx.field(static=True)

        def __call__(self, x):
            return self.f(self.params, x)

    @eqx.filter_jit
    @eqx.filter_value_and_grad
    def total(model, x):
        step = eqx.filter_checkpoint(lambda h: model(h))
        h = jax.lax.scan(lambda h, _: (step(h), None), x, None, length=2)[0]
        return jnp.sum(jax.vmap(model)(jnp.stack([h, x])) ** 2)

    got = total(Block(start, fn.differentiable(BLOCK)), x)
    wanted = total(Block(start, lambda p, x: BLOCK.apply(p, state, x)), x)
    assert_close((got[0], got[1].params), (wanted[0], wanted[1].params))
    tripled = total(Block(start, fn.differentiable(marked(BLOCK))), x)
    assert not np.allclose(tripled[1].params["dense"]["bias"], wanted[1].params["dense"]["bias"])


# from_function


def affine(params, x):
    return jnp.tanh(x @ params["kernel"] + params["bias"][None])


def affine_init(key, x):
    return fn.dense(4).init(key, x)[0]


def test_a_function_makes_the_layer_that_is_written_by_hand(x64):
    odd, by_hand = fn.from_function(affine, affine_init), fn.serial(fn.dense(4), fn.tanh())
    x, dy = normal(10, 5, 3), normal(11, 5, 4)
    params, state = odd.init(KEY, x)
    assert (odd.name, state) == ("affine", ())
    nested = {"dense": params, "tanh": {}}
    y, _, residuals = odd.fwd(params, (), x, None)
    z, _, nested_residuals = by_hand.fwd(nested, {"dense": (), "tanh": ()}, x, None)
    assert_close((y, odd.apply(params, (), x)), (z, z))
    np.testing.assert_array_equal(residuals, x)
    for contract in (fn.total, fn.per_example, fn.squared_norm, fn.rows):
        dparams, dx = odd.bwd(params, residuals, dy, contract)
        wanted, wanted_dx = by_hand.bwd(nested, nested_residuals, dy, contract)
        assert_close((dparams, dx), (wanted["dense"], wanted_dx))


def test_each_examples_gradient_is_right_though_the_function_mixes_them(x64):
    mixing = fn.from_function(
        lambda p, x: (x - x.mean(0, keepdims=True)) * p["scale"][None] ** 2, lambda key, x: {"scale": x[0]}
    )
    x, dy = normal(12, 4, 3), normal(13, 4, 3)
    params = {"scale": normal(14, 3)}
    each = mixing.bwd(params, x, dy, fn.per_example)[0]["scale"]
    for i in range(4):
        alone = jnp.zeros_like(dy).at[i].set(dy[i])
        np.testing.assert_allclose(each[i], mixing.bwd(params, x, alone)[0]["scale"], rtol=1e-12)


@pytest.mark.parametrize("contract", [fn.total, fn.per_example, fn.squared_norm])
def test_its_kept_factors_are_contracted_later_under_repeat_too(contract, x64):
    model = fn.repeat(fn.skip(fn.from_function(affine, affine_init)), 3)
    x = normal(15, 5, 4)
    params, state = model.init(KEY, x)
    y, _, residuals = model.fwd(params, state, x, None)
    kept = jax.jit(lambda *args: model.bwd(*args, fn.keep)[0])(params, residuals, y)
    assert all(map(fn.is_factor, kept.values()))
    later = jax.tree.map(contract, kept, params, is_leaf=fn.is_factor)
    assert_close(later, model.bwd(params, residuals, y, contract)[0])


def test_without_a_batch_axis_there_is_no_examples_gradient():
    layer = fn.from_function(lambda p, x: jnp.sum(x * p["w"]), lambda key, x: {"w": x})
    x = jnp.ones(3)
    assert layer.bwd({"w": x}, x, jnp.ones(()))[0]["w"].shape == (3,)
    with pytest.raises(fn.InputError, match="axis of examples in front"):
        layer.bwd({"w": x}, x, jnp.ones(()), fn.per_example)


def test_it_is_marked_in_the_summary():
    x = jax.ShapeDtypeStruct((2, 4), jnp.float32)
    odd = fn.from_function(affine, affine_init)
    rows = fn.summary(
        fn.serial(fn.dense(4), odd, fn.skip(fn.named("strange", odd)), last=fn.from_function(lambda p, x: x)), x
    ).rows
    assert [row.kind for row in rows] == ["dense", "affine by jax.vjp", "skip by jax.vjp", "from_function by jax.vjp"]


def test_in_a_model_it_trains_as_the_layer_by_hand():
    images = normal(16, 6, 4).astype(jnp.float32), jnp.array([0, 1, 2, 3, 0, 1])
    optax = pytest.importorskip("optax")
    losses = []
    for layer in (fn.from_function(affine, affine_init), fn.serial(fn.dense(4), fn.tanh())):
        objective = fn.objective(fn.serial(odd=layer, last=fn.dense(4)), fn.cross_entropy())
        state = fn.init_train_state(objective, optax.sgd(0.5), KEY, images)
        odd = state.params["model"]["odd"]
        odd.update(jax.tree.map(lambda leaf: 0.1 + 0 * leaf, odd))
        step = fn.train_step(objective, optax.sgd(0.5))
        for _ in range(3):
            state, metrics = step(state, images)
        losses.append(metrics["loss"])
    np.testing.assert_allclose(*losses, rtol=1e-6)


REFUSED = {
    "no function": (lambda x: fn.from_function(3), "functions f"),
    "no init": (lambda x: fn.from_function(affine, {"kernel": x}), "functions f"),
    "params that are no dict": (lambda x: fn.from_function(affine, lambda key, x: [x]).init(KEY, x), "a dict"),
    "integers among the params": (
        lambda x: fn.from_function(affine, lambda key, x: {"n": jnp.arange(3)}).init(KEY, x),
        "floating arrays",
    ),
    "no key": (lambda x: fn.from_function(affine, affine_init).init(3, x), "random key"),
    "a value that is no array": (
        lambda x: fn.from_function(lambda p, x: "y").fwd({}, (), x, None),
        "arrays as its value",
    ),
    "no value": (lambda x: fn.from_function(lambda p, x: None).fwd({}, (), x, None), "arrays as its value"),
    "a cotangent of another shape": (lambda x: fn.from_function(lambda p, x: x).bwd({}, x, x[:1]), "like the output"),
    "one of two cotangents": (lambda x: fn.from_function(lambda p, x: (x, x)).bwd({}, x, (x,)), "like the output"),
    "none for floats": (lambda x: fn.from_function(lambda p, x: x).bwd({}, x, None), "like the output"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals_of_from_function(name):
    call, message = REFUSED[name]
    with pytest.raises(fn.InputError, match=message):
        call(jnp.ones((2, 3)))
