"""Contractions of one's own, which know no combinator, against one gradient an example by `jax.grad`."""

import pydoc
from dataclasses import dataclass
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet._internal.casting import cast
from tests.trees import normal


@fn.contraction
def fisher_diagonal(gradients, param):
    """The diagonal of the empirical Fisher matrix."""
    return jnp.mean(gradients**2, axis=0)


@fn.contraction
def agreement(gradients, param):
    return jnp.abs(jnp.mean(jnp.sign(gradients), axis=0))


@fn.contraction
def largest_entry(gradients, param):
    return jnp.max(jnp.abs(gradients), axis=tuple(range(1, gradients.ndim)))


@fn.contraction(reads="sum")
def along_itself(gradient, param):
    return jnp.vdot(gradient, param)


@fn.contraction(reads="factors")
def kept_with_name(factor, param):
    return {"factor": factor, "shape": jnp.asarray(param.shape)}


@fn.contraction(reads="factors", by_example=False)
def kept(factor, param):
    return factor


def experts(layer, count):
    """The same layer `count` times side by side: `vmap` over stacked params, as a user would write it."""

    def init(key, x):
        return jax.vmap(lambda key: layer.init(key, x))(jax.random.split(key, count))

    def apply(params, state, x):
        return jnp.sum(jax.vmap(lambda p, s: layer.apply(p, s, x))(params, state), axis=0)

    def fwd(params, state, x, key):
        ys, state, residuals = jax.vmap(lambda p, s: layer.fwd(p, s, x, key))(params, state)
        return jnp.sum(ys, axis=0), state, residuals

    def bwd(params, residuals, dy, contract=fn.total):
        one = lambda p, r: layer.bwd(p, r, dy, contract.of_one_layer)
        answers, dxs = jax.vmap(one)(params, residuals)
        return contract.stack(params, answers), jnp.sum(dxs, axis=0)

    made = fn.Wrapped(layer, lambda layer: experts(layer, count), direct=False)
    return fn.Layer("experts", init, apply, fwd, bwd, made)


def a_scaled(features):
    """A layer of a user's own, whose factor is `Use`: y = (x * scale) W, with W used as it comes."""

    def init(key, x):
        return {
            "kernel": jax.random.normal(key, (x.shape[-1], features), x.dtype),
            "scale": jnp.ones((x.shape[-1], 1), x.dtype),
        }

    def fwd(params, x):
        return _scaled(params["scale"], x) @ params["kernel"], x

    def bwd(params, x, dy, contract):
        scale, kernel = params["scale"], params["kernel"]
        dparams = {
            "kernel": contract(fn.Use(_product, _scaled(scale, x), dy), kernel),
            "scale": contract(fn.Use(_scaled, x, dy @ kernel.T), scale),
        }
        return dparams, _scaled(scale, dy @ kernel.T)

    return fn.stateless("scaled", init, fwd, bwd)


def _product(kernel, x):
    return x @ kernel


def _scaled(scale, x):
    return x @ jnp.diag(scale[:, 0])


block = fn.serial(fn.dense(4), fn.tanh(), fn.layer_norm())
head = fn.serial(embedding=fn.embedding(6, 4), block=block, head=fn.dense(6, use_bias=False))
MODELS = {
    "block": (block, (3, 2, 4)),
    "use": (a_scaled(3), (3, 2, 4)),
    "conv": (fn.serial(fn.conv(3, 2), fn.relu(), fn.flatten(), fn.dense(2)), (3, 4, 2)),
    "attention": (fn.attention(2, use_bias=False), (2, 3, 4)),
    "lstm": (fn.lstm(3), (2, 3, 4)),
    "repeat": (fn.repeat(block, 2), (3, 2, 4)),
    "nested repeat": (fn.repeat(fn.serial(fn.repeat(fn.dense(4), 2), fn.tanh()), 3), (3, 4)),
    "weight_norm": (fn.weight_norm(block), (3, 2, 4)),
    "weight_norm of repeat": (fn.weight_norm(fn.serial(fn.repeat(block, 2), fn.dense(2))), (3, 2, 4)),
    "spectral_norm": (fn.spectral_norm(block), (3, 2, 4)),
    "spectral_norm of repeat": (fn.spectral_norm(fn.repeat(block, 2)), (3, 2, 4)),
    "repeat of weight_norm": (fn.repeat(fn.weight_norm(block), 2), (3, 2, 4)),
    "experts": (experts(block, 3), (3, 2, 4)),
    "weight_norm of experts": (fn.weight_norm(experts(fn.serial(fn.dense(5)), 3)), (3, 4)),
    "experts of weight_norm": (experts(fn.weight_norm(fn.serial(fn.dense(5))), 3), (3, 4)),
    "repeat of experts": (fn.repeat(experts(block, 2), 3), (3, 4)),
    "tied": (fn.tied(head, {"head/kernel": "embedding/embedding.T"}), (3, 2)),
    "tied, in a repeat": (
        fn.repeat(fn.tied(fn.serial(a=fn.dense(4), b=fn.dense(4)), {"b/kernel": "a/kernel"}), 2),
        (3, 4),
    ),
    "tied, of a repeat": (
        fn.tied(fn.repeat(fn.serial(a=fn.dense(4), b=fn.dense(4)), 2), {"b/kernel": "a/kernel.T"}),
        (3, 4),
    ),
    "tied experts": (
        fn.tied(experts(fn.serial(a=fn.dense(4), b=fn.dense(4)), 2), {"b/kernel": "a/kernel"}),
        (3, 4),
    ),
    "mixed": (fn.mixed(block, "float64", "float64", "float64"), (3, 4)),
    "remat, skip": (fn.skip(fn.remat(block)), (3, 4)),
    "reversible": (fn.repeat(fn.reversible(fn.dense(2), fn.dense(2)), 2), (3, 4)),
    "from_function": (
        fn.from_function(lambda p, x: jnp.tanh(x @ p["w"]), lambda key, x: {"w": jnp.ones((4, 3))}),
        (3, 4),
    ),
}
OWN = [fisher_diagonal, agreement, largest_entry, along_itself]


@cache
def answers(name):
    """(each contraction's answer at once, the same of what a contraction of one's own kept, jax's gradients)."""
    layer, shape = MODELS[name]
    with jax.enable_x64(True):
        kind = jnp.int32 if name == "tied" else jnp.float64
        x = jnp.arange(6).reshape(3, 2) % 5 if name == "tied" else normal(2, jax.ShapeDtypeStruct(shape, kind))
        params, state = layer.init(jax.random.key(0), x)
        params = normal(1, cast(params, "float64"))
        dy = normal(3, jax.eval_shape(layer.apply, params, state, x))

        def own(x, dy):
            return jax.grad(lambda params: jnp.vdot(layer.fwd(params, state, x[None], None)[0], dy[None]))(params)

        @jax.jit
        def all_of_them(params, x, dy):
            residuals = layer.fwd(params, state, x, None)[2]
            pull = lambda contract: layer.bwd(params, residuals, dy, contract)[0]
            factors = pull(kept)
            later = lambda how: jax.tree.map(how, factors, params, is_leaf=fn.is_factor)
            named = jax.tree.map(lambda p, both: fn.total(both["factor"], p), params, pull(kept_with_name))
            hows = [*OWN, fn.total, fn.per_example, fn.squared_norm]
            once = {how.name: pull(how) for how in hows}
            return once, {how.name: later(how) for how in hows}, named, jax.vmap(own)(x, dy)

        return params, *jax.tree.map(np.asarray, all_of_them(params, x, dy))


def close(got, wanted):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-10), got, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_a_contraction_of_ones_own_is_right_under_every_combinator(name, x64):
    params, once, later, named, each = answers(name)
    wanted = {
        how.name: jax.tree.map(lambda g, p, how=how: np.asarray(how.of(g, p)), each, params)
        for how in (fisher_diagonal, agreement, largest_entry)
    }
    total = jax.tree.map(lambda g: g.sum(0), each)
    wanted["along_itself"] = jax.tree.map(lambda g, p: np.vdot(g, p), total, params)
    wanted["total"], wanted["per_example"] = total, each
    wanted["squared_norm"] = jax.tree.map(lambda g: np.square(g).reshape(len(g), -1).sum(1), each)
    for how, answer in wanted.items():
        close(once[how], answer)
        close(later[how], answer)
    close(named, total)


@pytest.mark.parametrize("norm", [fn.weight_norm, fn.spectral_norm])
@pytest.mark.parametrize("stack", [fn.repeat, experts], ids=["repeat", "experts"])
def test_stacked_layers_are_normalised_each_by_itself(stack, norm, x64):
    layer, x = fn.serial(fn.dense(4)), normal(0, jax.ShapeDtypeStruct((3, 4), jnp.float64))
    inside, outside = norm(stack(layer, 3)), stack(norm(layer), 3)
    params, state = inside.init(jax.random.key(0), x)
    if norm is fn.weight_norm:
        assert params["dense"]["kernel"]["scale"].shape == (3, 4)
        own = ()
    else:
        own = {"layer": state["layer"], "vectors": state["vectors"]}
        assert state["vectors"]["dense"]["kernel"]["left"].shape == (3, 4)
    y = inside.apply(params, state, x)
    np.testing.assert_allclose(y, outside.apply(params, own or state, x), rtol=1e-12)


def test_a_combinator_from_outside_is_one_step_of_an_explanation():
    layer = fn.serial(experts=experts(fn.serial(fn.dense(4)), 3), head=fn.dense(2))
    objective = fn.objective(layer, fn.mse())
    batch = jnp.ones((3, 4)), jnp.ones((3, 2))
    params, state = objective.init(jax.random.key(0), batch)
    found = fn.explain(objective, params, state, batch)
    assert [step.path for step in found.steps][:2] == [("experts",), ("head",)]
    fn.check_layer(layer, jax.ShapeDtypeStruct((3, 4), jnp.float32)).raise_for_failure()
    assert next(row.path for row in fn.summary(layer, batch[0]).rows) == ("experts",)
    optimizer = optax.sgd(0.1)
    start = lambda: fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
    one, other = (make(objective, optimizer)(start(), batch)[0] for make in (fn.train_step, fn.layerwise_step))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), one.params, other.params)


def test_a_layer_of_ones_own_by_use_passes_the_checker():
    x = jax.ShapeDtypeStruct((3, 2, 4), jnp.float32)
    for dtype in ("float64", "float32"):
        fn.check_layer(a_scaled(3), x, dtype=dtype).raise_for_failure()


def test_a_use_that_is_not_linear_is_refused():
    x = jnp.ones((2, 3))
    for f in (lambda kernel, x: x @ jnp.exp(kernel), lambda kernel, x: x @ kernel**2):
        with pytest.raises(fn.InputError, match="linear in the parameter"):
            fn.total(fn.Use(f, x, jnp.ones((2, 4))), jnp.ones((3, 4)))
    with pytest.raises(fn.InputError, match=r"dy like f\(param, x\)"):
        fn.total(fn.Use(_product, x, jnp.ones((2, 5))), jnp.ones((3, 4)))
    with pytest.raises(ZeroDivisionError):
        fn.total(fn.Use(lambda kernel, x: x @ kernel * (1 / 0), x, jnp.ones((2, 4))), jnp.ones((3, 4)))
    for given, dy in ((x[0], jnp.ones(4)), ((x, 2.0), jnp.ones((2, 4)))):
        with pytest.raises(fn.InputError, match="axis of examples"):
            fn.per_example(fn.Use(lambda kernel, x: jax.tree.leaves(x)[0] @ kernel, given, dy), jnp.ones((3, 4)))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_use_in_half_precision_is_summed_in_float32(dtype):
    x, dy = jnp.ones((4096, 1), dtype), jnp.ones((4096, 1), dtype)
    assert fn.total(fn.Use(_product, x, dy), jnp.ones((1, 1), dtype)).item() == 4096
    assert fn.squared_norm(fn.Use(_product, x, dy), jnp.ones((1, 1), dtype)).dtype == jnp.float32


def test_a_contraction_is_documented_as_itself():
    for how in (fn.total, fn.per_example, fn.squared_norm, fn.rows, fn.keep, fisher_diagonal):
        first = how.of.__doc__.splitlines()[0]
        assert first in pydoc.render_doc(how)


@pytest.mark.parametrize("contract", ["per_example", lambda factor, param: factor, None])
def test_what_is_no_contraction_is_refused(contract):
    objective = fn.objective(fn.serial(fn.dense(2)), fn.mse())
    batch = jnp.ones((3, 4)), jnp.ones((3, 2))
    params, state = objective.init(jax.random.key(0), batch)
    with pytest.raises(fn.InputError, match="a contraction"):
        fn.value_and_grad(objective)(params, state, batch, None, contract=contract)
    layer = fn.dense(2)
    params, _ = layer.init(jax.random.key(0), batch[0])
    with pytest.raises(fn.InputError, match="a contraction"):
        layer.bwd(params, layer.fwd(params, (), batch[0], None)[2], batch[1], contract)


def test_options_of_a_contraction_are_checked():
    with pytest.raises(fn.InputError, match='reads="examples"'):
        fn.contraction(lambda g, p: g, reads="example")
    for given, received in (
        (lambda gradients: gradients, r"<lambda>\(gradients\)"),
        (lambda a, b, c: a, r"\(a, b, c\)"),
    ):
        with pytest.raises(fn.InputError, match=received):
            fn.contraction(given)
    with pytest.raises(fn.InputError, match="a function of gradients"):
        fn.contraction("examples")
    with pytest.raises(fn.InputError, match="by_example for"):
        fn.contraction(by_example=False)(lambda gradients, param: gradients)
    with pytest.raises(fn.InputError, match="as functions"):
        fn.contraction(stacked=3)(lambda gradients, param: gradients)


class Bare(fn.Factor):
    def total(self, param):
        return param


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Given(fn.Factor):
    """A factor of ones own, which answers what it is given."""

    answer: jax.Array

    def total(self, param):
        return self.answer

    def squared_norm(self, param):
        return self.answer


def test_what_a_factor_of_ones_own_answers_is_checked():
    param = jnp.ones((3, 2))
    for contract, answer in (
        (fn.total, jnp.ones((2, 3))),
        (fn.total, jnp.ones((3, 2), jnp.bfloat16)),
        (fn.squared_norm, jnp.ones((4, 1))),
        (fn.squared_norm, jnp.ones(4, jnp.float16)),
    ):
        with pytest.raises(fn.InputError, match="in float32 or wider of a Given"):
            contract(Given(answer), param)
    with pytest.raises(fn.InputError, match=r"a method per_example\(param\)"):
        fn.per_example(Given(param), param)
    with pytest.raises(fn.InputError, match="pytree of arrays"):
        fn.total(Bare(), param)


def test_a_use_may_fix_the_dtype_of_its_output():
    f = lambda kernel, x: (x @ kernel).astype(jnp.bfloat16)
    x, dy = jnp.ones((3, 4), jnp.bfloat16), jnp.ones((3, 2), jnp.bfloat16)
    np.testing.assert_array_equal(fn.total(fn.Use(f, x, dy), jnp.ones((4, 2), jnp.bfloat16)), np.full((4, 2), 3.0))


def test_no_positions_have_no_norm():
    empty = fn.Outer(jnp.zeros((2, 0, 4)), jnp.zeros((2, 0, 2)))
    np.testing.assert_array_equal(fn.squared_norm(empty, jnp.zeros((4, 2))), [0, 0])
