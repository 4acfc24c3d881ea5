"""Every contraction against `jax.vmap(jax.grad)` of one example's own loss, and under a mesh with explicit axes."""

import json
import os
import subprocess
import sys
from contextlib import nullcontext
from functools import cache
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import funcnet as fn
from funcnet.gradients.blocked import block as block_of
from funcnet.gradients.blocked import fresh
from funcnet.gradients.contraction import refuse_single_examples
from funcnet.layer import no_params
from tests.trees import normal

HALF = [jnp.float16, jnp.bfloat16]
# Integers out of floats, so that an embedding can stand in the tables below.
largest_feature = fn.stateless(
    "largest_feature",
    no_params,
    lambda _, x: (jnp.argmax(x, -1), x),
    lambda p, x, dy, contract: ({}, 0 * x),
)
label = lambda x: jnp.argmax(x[..., 1:], -1) + 1


def spoken(x):
    """Two labels of each example, for all of its steps."""
    labels = label(x[:, :2])
    whole = lambda n: jnp.full_like(labels[:, 0], n)
    return {"labels": labels, "label_lengths": whole(2), "logit_lengths": whole(x.shape[1])}


def beside(target):
    """A layer that puts target(x) beside x, for a loss in the tables below."""
    return fn.stateless("beside", no_params, lambda _, x: ((x, target(x)), ()), lambda p, r, dy, contract: ({}, dy[0]))


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


def draw(model, shape, dtype=jnp.float64):
    """Params, state, input and cotangent."""
    x = jax.ShapeDtypeStruct(shape, dtype)
    params, state = jax.eval_shape(model.init, jax.random.key(0), x)
    return normal(1, params), normal(4, state), normal(2, x), normal(3, jax.eval_shape(model.apply, params, state, x))


def contract(factors, params, how):
    return jax.tree.map(how, factors, params, is_leaf=fn.is_factor)


@cache
def answers(name):
    """(each contraction's answer at once, the same from kept factors, one gradient an example by jax)."""
    model, shape = MODELS[name]
    with jax.enable_x64(True):
        params, state, x, dy = draw(model, shape)

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


def assert_trees_close(got, wanted, **tolerance):
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), got, wanted)


@pytest.mark.parametrize("name", MODELS)
def test_per_example_is_the_gradient_of_each_example_alone(name):
    once, _, wanted = answers(name)
    assert_trees_close(once["per_example"], wanted, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_total_is_the_sum_over_examples(name):
    once, _, wanted = answers(name)
    assert_trees_close(once["total"], jax.tree.map(lambda g: g.sum(0), wanted), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_squared_norm_is_that_of_each_examples_gradient_summed_over_layers(name):
    once, _, wanted = answers(name)
    squares = jax.tree.map(lambda g: np.square(g).reshape(len(g), -1).sum(1), wanted)
    assert_trees_close(once["squared_norm"], squares, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("how", [*CONTRACTIONS, largest], ids=lambda how: how.name)
@pytest.mark.parametrize("name", MODELS)
def test_contracting_kept_factors_later_equals_contracting_at_once(name, how):
    once, later, _ = answers(name)
    assert_trees_close(later[how.name], once[how.name], rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", ["block", "repeat", "nested repeat"])
def test_a_contraction_of_the_users_own_answers_for_all_layers_of_repeat(name):
    once, _, wanted = answers(name)
    assert_trees_close(once["largest"], jax.tree.map(lambda g: np.abs(g.sum(0)).max(), wanted), rtol=1e-10)


def test_stacked_combines_the_layers_of_repeat():
    sum_of_squares = fn.contraction(
        lambda gradient, param: jnp.sum(jnp.square(gradient)), reads="sum", stacked=lambda answer: jnp.sum(answer, 0)
    )
    model = fn.repeat(fn.repeat(fn.dense(5), 2), 3)
    params, state, x, dy = draw(model, (4, 5), jnp.float32)
    residuals = model.fwd(params, state, x, None)[2]
    got = model.bwd(params, residuals, dy, sum_of_squares)[0]
    wanted = jax.tree.map(lambda g: np.sum(np.square(g)), model.bwd(params, residuals, dy)[0])
    assert_trees_close(got, wanted, rtol=1e-5)


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
    params, state, x, dy = draw(model, shape, jnp.float32)
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
    params, state, x, dy = draw(model, (5,), jnp.float32)
    residuals = model.fwd(params, state, x, None)[2]
    with pytest.raises(fn.InputError, match=r"example axis.*each example") as error:
        model.bwd(params, residuals, dy, how)
    assert error.value.path == (name,)
    wanted = jax.grad(lambda params: jnp.sum(dy * model.fwd(params, state, x, None)[0]))(params)
    assert_trees_close(model.bwd(params, residuals, dy)[0], wanted, rtol=1e-5, atol=1e-6)


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


# Meshes with explicit axes: this file runs itself once in a process of its own, with four devices.

P = jax.P
# name: (model, input shape, the input's layout, layouts of the params that are not replicated)
SHARDED = {
    "data-parallel dense": (fn.dense(16), (8, 12), P("data"), {}),
    "data-parallel dense over positions": (fn.dense(16), (8, 3, 12), P("data"), {}),
    "data-parallel dense, narrower than its input": (fn.dense(4), (8, 12), P("data"), {}),
    "tensor-parallel kernel": (fn.dense(16), (8, 12), P(), {"kernel": P(None, "model"), "bias": P("model")}),
    "tensor-parallel kernel over positions": (fn.dense(16), (8, 3, 12), P(), {"kernel": P(None, "model")}),
    "data and tensor-parallel": (fn.dense(4), (8, 12), P("data"), {"kernel": P(None, "model"), "bias": P("model")}),
    "fully sharded kernel": (fn.dense(16), (8, 12), P("data"), {"kernel": P("data")}),
    "fully sharded kernel and bias": (fn.dense(4), (8, 12), P("data"), {"kernel": P("data"), "bias": P("model")}),
    "sharded bias alone": (fn.dense(16), (8, 12), P(), {"bias": P("data")}),
    "gelu": (fn.gelu(), (8, 12), P("data"), {}),
    "layer_norm": (fn.layer_norm(), (8, 3, 12), P("data"), {}),
    "rms_norm, sharded scale": (fn.rms_norm(), (8, 12), P(), {"scale": P("data")}),
    "batch_norm": (fn.batch_norm(), (8, 3, 12), P("data"), {}),
    "batch_norm, sharded parameters": (fn.batch_norm(), (8, 12), P("data"), {"scale": P("model"), "bias": P("model")}),
    "conv": (fn.conv(6, 3, 2), (8, 5, 4, 12), P("data"), {}),
    "conv, kernel larger than its input": (fn.conv(16, 3), (8, 2, 2, 12), P("data"), {}),
    "conv in groups": (fn.conv(6, 3, groups=2), (8, 5, 4, 12), P("data"), {}),
    "conv_transpose": (fn.conv_transpose(6, 3, 2), (8, 5, 4, 12), P("data"), {}),
    "max_pool": (fn.max_pool(3, 2, "SAME"), (8, 5, 4, 3), P("data"), {}),
    "avg_pool": (fn.avg_pool(2), (8, 6, 4, 3), P("data"), {}),
    "group_norm": (fn.group_norm(2), (8, 3, 2, 12), P("data"), {}),
    "lstm": (fn.lstm(4), (8, 3, 12), P("data"), {}),
    "bidirectional gru": (fn.bidirectional(fn.gru(4), fn.gru(4, reverse=True)), (8, 3, 12), P("data"), {}),
    "linear_cross_entropy": (fn.serial(beside(label), fn.linear_cross_entropy(13)), (8, 3, 12), P("data"), {}),
    "ctc": (fn.serial(beside(spoken), fn.ctc()), (8, 5, 6), P("data"), {}),
    "depthwise conv": (fn.conv(12, 3, groups=12), (8, 5, 4, 12), P("data"), {}),
    "embedding": (fn.serial(largest_feature, fn.embedding(12, 4)), (8, 3, 12), P("data"), {}),
    "embedding, no positions": (fn.serial(largest_feature, fn.embedding(12, 4)), (8, 12), P("data"), {}),
    "position_embedding": (fn.position_embedding(4), (8, 3, 12), P("data"), {}),
    "sinusoidal_positions": (fn.sinusoidal_positions(), (8, 3, 12), P("data"), {}),
    "serial": (fn.serial(fn.layer_norm(), fn.dense(6), fn.gelu(), fn.dense(4)), (8, 3, 12), P("data"), {}),
    "skip": (fn.skip(fn.dense(12)), (8, 12), P("data"), {}),
    "repeat": (fn.repeat(fn.skip(fn.serial(fn.dense(12), fn.gelu())), 3), (8, 12), P("data"), {}),
    "repeat, sharded kernel": (fn.repeat(fn.dense(12), 3), (8, 12), P("data"), {"kernel": P(None, "data")}),
    "remat": (fn.remat(fn.serial(fn.dense(12), fn.gelu())), (8, 12), P("data"), {}),
    "mixed": (fn.mixed(fn.dense(16)), (8, 12), P("data"), {}),
    "flatten": (fn.flatten(), (8, 3, 4), P("data"), {}),
}
# where a model above runs: (what is around the call, what is made of the function)
WAYS = {
    "under jit": (jax.set_mesh, jax.jit),
    "eagerly": (jax.set_mesh, lambda f: f),
    "under jit, the mesh not set": (nullcontext, jax.jit),
}
EAGERLY = ("conv", "max_pool", "group_norm", "lstm", "linear_cross_entropy", "ctc", "embedding")  # slower to run
CALLS = {f"{name}, {way}": (name, way) for way in WAYS for name in (EAGERLY if way == "eagerly" else SHARDED)}
# name: (factor of a and b [8, 12] and [8, 16], parameter's shape, the factor's layout, the parameter's layout)
SHARDED_FACTORS = {
    f"{kind}, {name}": (kind, factor, param)
    for kind in ("Outer", "Shift", "Scale", "Gather")
    for name, factor, param in (
        ("replicated parameter", P("data"), P()),
        ("parameter along the batch's axis", P("data"), P("data")),
        ("parameter along another axis", P("data"), P("model")),
    )
}


def in_child(f):
    """f's complaint, or an empty string."""
    try:
        f()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def same_and_alike(got, params, wanted):
    """Equal to the reference in value, and to the parameters in sharding."""
    assert_trees_close(got, wanted, rtol=1e-4, atol=1e-4)
    for (path, g), p in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(params), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, p.ndim), f"{path}: {g.sharding.spec} for {p.sharding.spec}"


@cache
def on_one_device(name):
    """What a model computes, what it is given, and (dparams, dx, new_state)."""
    model, shape, *_ = SHARDED[name]
    params, state, *given = draw(model, shape, jnp.float32)

    def gradients(params, x, dy):
        _, new_state, residuals = model.fwd(params, state, x, None)
        return *model.bwd(params, residuals, dy), new_state

    return gradients, (params, state, *given), jax.tree.map(np.asarray, jax.jit(gradients)(params, *given))


def check_sharded(name, way, mesh):
    model, _, layout, layouts = SHARDED[name]
    gradients, (params, state, x, dy), (*wanted, wanted_state) = on_one_device(name)
    around, transform = WAYS[way]
    at = lambda spec: jax.NamedSharding(mesh, spec)
    with around(mesh):
        params = {k: jax.device_put(v, at(layouts.get(k, P()))) for k, v in params.items()}
        x = jax.device_put(x, at(layout))
        y = jax.eval_shape(lambda params, x: model.fwd(params, state, x, None)[0], params, x)
        dparams, dx, new_state = transform(gradients)(params, x, jax.device_put(dy, at(y.sharding.spec)))
        same_and_alike((dparams, dx), (params, x), tuple(wanted))
        assert_trees_close(new_state, wanted_state, rtol=1e-5, atol=1e-6)


def check_sharded_factor(name, mesh):
    kind, layout, param_layout = SHARDED_FACTORS[name]
    rng = np.random.default_rng(0)
    a, b = (jnp.asarray(rng.normal(size=(8, n)), jnp.float32) for n in (12, 16))
    make = {
        "Outer": fn.Outer,
        "Shift": lambda a, b: fn.Shift(b),
        "Scale": lambda a, b: fn.Scale(2 * b, b),
        "Gather": lambda a, b: fn.Gather(jnp.argmax(a, 1), b, 12),
    }[kind]
    param = jnp.ones((12, 16) if kind in ("Outer", "Gather") else 16)
    wanted = np.asarray(fn.total(make(a, b), param))
    with jax.set_mesh(mesh):
        param = jax.device_put(param, param_layout)
        got = jax.jit(lambda a, b, param: fn.total(make(a, b), param))(*jax.device_put((a, b), layout), param)
        same_and_alike(got, param, wanted)


def check_sharded_objective(mesh):
    """Forward, cross-entropy and backward at once, and one answer an example."""
    model = fn.serial(
        fn.dense(12), fn.repeat(fn.skip(fn.serial(fn.layer_norm(), fn.dense(12), fn.gelu())), 2), fn.dense(5)
    )
    params, state, x, _ = draw(model, (8, 12), jnp.float32)
    params, state = {"model": params, "loss": {}}, {"model": state, "loss": ()}
    labels = jnp.arange(8, dtype=jnp.int32) % 5
    run = fn.value_and_grad(fn.objective(model, fn.cross_entropy(label_smoothing=0.1)))
    hows = [fn.total, fn.squared_norm, fn.per_example]
    every = jax.jit(lambda params, x, labels: [run(params, state, (x, labels), None, contract=how) for how in hows])
    wanted = jax.tree.map(np.asarray, every(params, x, labels))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, P())
        got = every(params, *jax.device_put((x, labels), P("data")))
        assert_trees_close(got, wanted, rtol=1e-4, atol=1e-4)
        same_and_alike(got[0][1], params, wanted[0][1])


STEPS = {
    "train_step": fn.train_step,
    "train_step in micro-batches": lambda *args: fn.train_step(*args, accumulate=2),
    "layerwise_step": fn.layerwise_step,
}


def check_sharded_step(name, mesh):
    """A step on a batch that is cut along the mesh gives the params of the same step on the whole batch."""
    block = fn.skip(fn.serial(fn.layer_norm(), fn.dense(12), fn.gelu(), fn.dropout(0.2)))
    model = fn.serial(fn.dense(12), fn.repeat(block, 2), fn.remat(block), fn.dense(5))
    objective, optimizer = fn.objective(model, fn.cross_entropy()), optax.sgd(0.1)
    weights = jnp.arange(8, dtype=jnp.float32)
    batch = draw(fn.dense(5), (8, 12), jnp.float32)[2], jnp.arange(8, dtype=jnp.int32) % 5, weights

    def after(batch):
        state = fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
        return STEPS[name](objective, optimizer)(state, batch)[0].params

    with jax.numpy_dtype_promotion("standard"):
        wanted = jax.tree.map(np.asarray, after(batch))
        with jax.set_mesh(mesh):
            assert_trees_close(after(jax.device_put(batch, P("data"))), wanted, rtol=1e-4, atol=1e-5)


def check_batch_statistics(kind):
    """The running statistics and gradients of a batch cut along four devices are those of the whole batch."""
    model = fn.serial(fn.dense(6), fn.batch_norm(), fn.relu(), fn.dense(3))
    params, state, x, dy = draw(model, (8, 5), jnp.float32)

    @jax.jit
    def one_pass(params, x, dy):
        y, new_state, residuals = model.fwd(params, state, x, None)
        return y, new_state, model.bwd(params, residuals, dy)

    wanted = jax.tree.map(np.asarray, one_pass(params, x, dy))
    mesh = jax.make_mesh((4,), ("data",), axis_types=(kind,))
    with jax.set_mesh(mesh):
        cut = [jax.device_put(a, jax.NamedSharding(mesh, P("data"))) for a in (x, dy)]
        assert len(cut[0].sharding.device_set) == 4
        got = one_pass(jax.device_put(params, jax.NamedSharding(mesh, P())), *cut)
        assert_trees_close(got, wanted, rtol=1e-4, atol=1e-5)


def check_all_sharded():
    mesh = jax.make_mesh((2, 2), ("data", "model"))
    assert set(mesh.axis_types) == {jax.sharding.AxisType.Explicit}
    report = {name: in_child(lambda call=call: check_sharded(*call, mesh)) for name, call in CALLS.items()}
    report |= {name: in_child(lambda name=name: check_sharded_factor(name, mesh)) for name in SHARDED_FACTORS}
    report |= {name: in_child(lambda name=name: check_sharded_step(name, mesh)) for name in STEPS}
    report |= {
        f"batch statistics, {kind.name}": in_child(lambda kind=kind: check_batch_statistics(kind))
        for kind in (jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit)
    }
    return report | {"value_and_grad": in_child(lambda: check_sharded_objective(mesh))}


@pytest.fixture(scope="module")
def sharded_report():
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(fn.__file__).parents[1]),
    }
    child = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, timeout=300)
    assert child.returncode == 0, child.stderr
    return json.loads(child.stdout)


STATISTICS = ["batch statistics, Auto", "batch statistics, Explicit"]


def test_under_explicit_axes_gradients_are_right_and_lie_like_their_parameters(sharded_report):
    """One test, so that of several workers only one makes the report."""
    names = [*CALLS, *SHARDED_FACTORS, *STEPS, *STATISTICS, "value_and_grad"]
    assert sharded_report == dict.fromkeys(names, "")


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(check_all_sharded()))


def outer_of_columns(saved, i, size):
    """Block i of Outer(x, dy), as a layer makes it that forms no more of dy at a time."""
    x, dy = saved
    new = fresh(i, size, dy.shape[-1])[1]
    return fn.Outer(x, jnp.where(new, block_of(dy, i, size), 0.0))


@pytest.mark.parametrize("size", [1, 3, 4, 7])
@pytest.mark.parametrize("how", [fn.total, fn.per_example, fn.squared_norm, fn.rows], ids=lambda how: how.name)
def test_blocks_are_contracted_as_what_they_are_blocks_of(how, size):
    """Also where `repeat` has stacked them, and where the last block reaches into the one before it."""
    x, dy, kernel = normal(0, jnp.ones((2, 4, 3, 5))), normal(1, jnp.ones((2, 4, 3, 7))), jnp.ones((2, 5, 7))
    with jax.numpy_rank_promotion("allow"):
        alone = how(fn.Blocks((x[0], dy[0]), outer_of_columns, size), kernel[0])
        stacked = how(fn.Stacked(fn.Blocks((x, dy), outer_of_columns, size)), kernel)
    np.testing.assert_allclose(alone, how(fn.Outer(x[0], dy[0]), kernel[0]), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(stacked, how(fn.Stacked(fn.Outer(x, dy)), kernel), rtol=1e-5, atol=1e-5)


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


@pytest.mark.parametrize("how", [fn.total, fn.per_example, fn.squared_norm], ids=lambda how: how.name)
def test_blocks_are_one_of_several_uses(how):
    x, dy, kernel = normal(0, jnp.ones((4, 3, 5))), normal(1, jnp.ones((4, 3, 7))), jnp.ones((5, 7))
    other = fn.Outer(normal(2, x), normal(3, dy))
    with jax.numpy_rank_promotion("allow"):
        got = how(fn.Sum((fn.Blocks((x, dy), outer_of_columns, 3), other)), kernel)
    np.testing.assert_allclose(got, how(fn.Sum((fn.Outer(x, dy), other)), kernel), rtol=1e-5, atol=1e-4)


def test_a_layer_that_mixes_examples_refuses_answers_for_each_alone():
    for how in (fn.per_example, fn.squared_norm):
        with pytest.raises(fn.InputError, match="depends on all others"):
            refuse_single_examples(how)
    for how in (fn.total, fn.keep, fn.rows, largest):
        refuse_single_examples(how)
