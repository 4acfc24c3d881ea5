"""Every contraction against `jax.vmap(jax.grad)` of one example's own loss."""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.gradients.contraction import refuse_single_examples
from funcnet.layer import no_params
from tests.trees import assert_close, draw_with_dy

S = jax.ShapeDtypeStruct
HALF = [jnp.float16, jnp.bfloat16]
# Integers out of floats, so that an embedding can stand in the tables below.
largest_feature = fn.stateless(
    "largest_feature",
    no_params,
    lambda _, x: (jnp.argmax(x, -1), x),
    lambda p, x, dy, contract: ({}, 0 * x),
)
look_up = fn.serial(largest_feature, fn.embedding(5, 3, dtype=float))
block = fn.serial(fn.layer_norm(), fn.dense(6), fn.gelu(), fn.dense(5))
MODELS = {
    "dense, no positions": (fn.dense(3), (4, 5)),
    "dense, wider than its input": (fn.dense(7), (4, 5)),
    "dense, few positions": (fn.dense(3), (4, 2, 5)),
    "dense, many positions": (fn.dense(3), (4, 7, 5)),
    "dense, two position axes": (fn.dense(4), (3, 2, 3, 5)),
    "dense, sizes 1": (fn.dense(1), (1, 1)),
    "layer_norm": (fn.layer_norm(), (4, 3, 5)),
    "rms_norm": (fn.rms_norm(), (4, 5)),
    "embedding": (look_up, (4, 2, 5)),
    "embedding, more positions than features": (look_up, (2, 3, 2, 5)),
    "embedding, no positions": (look_up, (4, 5)),
    "position_embedding": (fn.position_embedding(3), (4, 2, 5)),
    "repeated position_embedding": (fn.repeat(fn.position_embedding(3), 2), (4, 3, 5)),
    "block": (block, (4, 3, 5)),
    "skip": (fn.skip(block), (4, 5)),
    "parallel in serial": (fn.serial(fn.remat(fn.dense(5)), fn.skip(fn.dense(5))), (3, 5)),
    "repeat": (fn.repeat(block, 3), (4, 2, 5)),
    "nested repeat": (fn.repeat(fn.serial(fn.repeat(fn.dense(5), 2), fn.tanh()), 3), (4, 2, 5)),
}
CONTRACTIONS = [fn.total, fn.per_example, fn.squared_norm]


@fn.contraction(reads="factors", by_example=False)
def largest(factor, param):
    """The largest magnitude in a gradient: a contraction of the user's own, of all layers together."""
    return jnp.max(jnp.abs(fn.total(factor, param)))


def contract(factors, params, how):
    return jax.tree.map(how, factors, params, is_leaf=fn.is_factor)


@cache
def answers(name):
    """(each contraction's answer at once, the same from kept factors, one gradient an example by jax)."""
    model, shape = MODELS[name]
    with jax.enable_x64(True):
        params, state, x, dy = draw_with_dy(model, S(shape, jnp.float64))

        def one(params, x, dy):
            return jnp.sum(dy * model.fwd(params, state, x[None], None)[0][0])

        @jax.jit
        def all_of_them(params, x, dy):
            residuals = model.fwd(params, state, x, None)[2]
            hows = [*CONTRACTIONS, largest]
            once = {how.name: model.bwd(params, residuals, dy, how)[0] for how in hows}
            kept = model.bwd(params, residuals, dy, fn.keep)[0]
            later = {how.name: contract(kept, params, how) for how in hows}
            return once, later, jax.vmap(jax.grad(one), (None, 0, 0))(params, x, dy)

        return jax.tree.map(np.asarray, all_of_them(params, x, dy))


@pytest.mark.parametrize("name", MODELS)
def test_per_example_is_the_gradient_of_each_example_alone(name):
    once, _, wanted = answers(name)
    assert_close(once["per_example"], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_total_is_the_sum_over_examples(name):
    once, _, wanted = answers(name)
    assert_close(once["total"], jax.tree.map(lambda g: g.sum(0), wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_squared_norm_is_that_of_each_examples_gradient_summed_over_layers(name):
    once, _, wanted = answers(name)
    squares = jax.tree.map(lambda g: np.square(g).reshape(len(g), -1).sum(1), wanted)
    assert_close(once["squared_norm"], squares, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", [*CONTRACTIONS, largest], ids=lambda how: how.name)
@pytest.mark.parametrize("name", MODELS)
def test_contracting_kept_factors_later_equals_contracting_at_once(name, how):
    once, later, _ = answers(name)
    assert_close(later[how.name], once[how.name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["block", "repeat", "nested repeat"])
def test_a_contraction_of_the_users_own_answers_for_all_layers_of_repeat(name):
    once, _, wanted = answers(name)
    assert_close(once["largest"], jax.tree.map(lambda g: np.abs(g.sum(0)).max(), wanted), rtol=1e-10)


def test_stacked_combines_the_layers_of_repeat():
    sum_of_squares = fn.contraction(
        lambda gradient, param: jnp.sum(jnp.square(gradient)), reads="sum", stacked=lambda answer: jnp.sum(answer, 0)
    )
    model = fn.repeat(fn.repeat(fn.dense(5), 2), 3)
    params, state, x, dy = draw_with_dy(model, S((4, 5), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    got = model.bwd(params, residuals, dy, sum_of_squares)[0]
    wanted = jax.tree.map(lambda g: np.sum(np.square(g)), model.bwd(params, residuals, dy)[0])
    assert_close(got, wanted, rtol=1e-5)


def intermediates(f, *args):
    """Shapes of everything that f computes on the way."""
    return {v.aval.shape for eqn in jax.make_jaxpr(f)(*args).jaxpr.eqns for v in eqn.outvars}


@pytest.mark.parametrize(("positions", "forms_gradient"), [(2, False), (3, False), (4, True), (9, True)])
def test_squared_norm_forms_the_gradient_only_where_it_is_the_smaller(positions, forms_gradient):
    x, dy = jnp.ones((2, positions, 5)), jnp.ones((2, positions, 6))
    shapes = intermediates(lambda x, dy: fn.squared_norm.of(fn.Outer(x, dy), jnp.ones((5, 6))), x, dy)
    assert ((2, 5, 6) in shapes, (2, positions, positions) in shapes) == (forms_gradient, not forms_gradient)


def test_kept_factors_of_repeat_carry_their_layer_axes_in_front_of_the_batch():
    model, shape = MODELS["nested repeat"]
    params, state, x, dy = draw_with_dy(model, S(shape, jnp.float32))
    kept = model.bwd(params, model.fwd(params, state, x, None)[2], dy, fn.keep)[0]
    kernel = kept["repeat"]["kernel"]
    assert fn.is_factor(kernel)
    assert isinstance(kernel, fn.Stacked)
    assert isinstance(kernel.factor, fn.Stacked)
    outer = kernel.factor.factor
    assert (outer.x.shape, outer.dy.shape) == ((3, 2, 4, 2, 5), (3, 2, 4, 2, 5))


@pytest.mark.parametrize("how", [fn.per_example, fn.squared_norm], ids=lambda how: how.name)
@pytest.mark.parametrize("name", ["dense", "layer_norm"])
def test_without_an_example_axis_only_total_answers(how, name):
    model = fn.serial({"dense": fn.dense(3), "layer_norm": fn.layer_norm()}[name])
    params, state, x, dy = draw_with_dy(model, S((5,), jnp.float32))
    residuals = model.fwd(params, state, x, None)[2]
    with pytest.raises(fn.InputError, match=r"example axis.*each example") as error:
        model.bwd(params, residuals, dy, how)
    assert error.value.path == (name,)
    wanted = jax.grad(lambda params: jnp.sum(dy * model.fwd(params, state, x, None)[0]))(params)
    assert_close(model.bwd(params, residuals, dy)[0], wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("how", CONTRACTIONS, ids=lambda how: how.name)
def test_what_is_not_a_factor_is_refused(how):
    with pytest.raises(fn.InputError, match="a factor for "):
        how(jnp.ones((4, 3)), jnp.ones(3))


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("kind", ["Outer", "Shift", "Scale"])
def test_total_sums_half_precision_in_float32(kind, dtype):
    ones = jnp.ones((64, 64, 1), dtype)
    factor = {"Outer": fn.Outer(ones, ones), "Shift": fn.Shift(ones), "Scale": fn.Scale(ones, ones)}[kind]
    param = jnp.ones((1, 1) if kind == "Outer" else 1, dtype)
    answer = fn.total(factor, param)
    assert answer.dtype == dtype
    assert answer.item() == 4096


@pytest.mark.parametrize("kind", ["Outer", "Shift", "Scale"])
@pytest.mark.parametrize("how", [fn.total, fn.per_example], ids=lambda how: how.name)
def test_the_answer_is_rounded_to_the_parameters_dtype_and_not_before(kind, how):
    ones = jnp.ones((1, 257, 1), jnp.bfloat16)
    factor = {"Outer": fn.Outer(ones, ones), "Shift": fn.Shift(ones), "Scale": fn.Scale(ones, ones)}[kind]
    param = jnp.ones((1, 1) if kind == "Outer" else 1, jnp.float32)
    answer = how(factor, param)
    assert answer.dtype == jnp.float32
    assert answer.item() == 257


@pytest.mark.parametrize("dtype", HALF)
@pytest.mark.parametrize("shape", [(2, 1, 16), (2, 512, 16)])
def test_squared_norm_of_half_precision_is_float32(shape, dtype):
    """4096 and 2^24 are beyond what float16 holds or bfloat16 counts to."""
    many = jnp.full(shape, 16, dtype)
    answer = fn.squared_norm(fn.Outer(many, many), jnp.ones((16, 16), dtype))
    assert answer.dtype == jnp.float32
    np.testing.assert_array_equal(answer, np.full(2, 16.0**2 * (shape[1] * 256.0) ** 2))


def test_uses_of_a_table_leave_out_ids_that_are_none_of_its_rows(x64):
    rng, size = np.random.default_rng(5), 5
    dys = rng.standard_normal((3, 2, 4, 3))
    ids = np.int32([[[-1, 0, 5, 2], [4, 4, 9, 1]], [[0, 0, 1, -7], [3, 2, 5, 5]], [[5, -1, 2, 2], [1, 4, 0, 3]]])
    hot = np.eye(size)[np.clip(ids, 0, size - 1)] * ((ids >= 0) & (ids < size))[..., None]  # as a product would look up
    lookups = [fn.Gather(jnp.asarray(i), jnp.asarray(dy), size) for i, dy in zip(ids, dys, strict=True)]
    head = fn.Outer(jnp.asarray(rng.standard_normal((2, 4, size))), jnp.asarray(dys[2]))
    tables = {factor: np.einsum("bti,btj->bij", a, dy) for factor, a, dy in zip([*range(3)], hot, dys, strict=True)}
    tables["head"] = np.einsum("bti,btj->bij", head.x, head.dy)
    table = jnp.zeros((size, 3))
    for names in ((0, 1), (0, "head"), ("head", 1), (2, "head", 0)):
        both = fn.Sum(tuple(head if name == "head" else lookups[name] for name in names))
        each = sum(tables[name] for name in names)
        np.testing.assert_allclose(fn.per_example(both, table), each, rtol=1e-12, atol=1e-12)
        np.testing.assert_allclose(fn.squared_norm(both, table), np.sum(each**2, axis=(1, 2)), rtol=1e-12)
        np.testing.assert_allclose(fn.total(both, table), each.sum(0), rtol=1e-12, atol=1e-12)


def test_a_layer_that_mixes_examples_refuses_answers_for_each_alone():
    for how in (fn.per_example, fn.squared_norm):
        with pytest.raises(fn.InputError, match="depends on all others"):
            refuse_single_examples(how)
    for how in (fn.total, fn.keep, fn.rows, largest):
        refuse_single_examples(how)
