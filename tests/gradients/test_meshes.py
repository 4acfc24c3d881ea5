"""Gradients and steps under a mesh with explicit axes, against the same on one device.

The file runs itself once, in a process of its own with four devices.
"""

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

import funcnet as fn
from funcnet.layer import no_params
from tests.trees import assert_close, draw, draw_with_dy

P, S = jax.P, jax.ShapeDtypeStruct


def integers():
    """Integers out of floats, so that an embedding can stand in the table below."""
    largest = lambda _, x: (jnp.argmax(x, -1), x)
    return fn.stateless("integers", no_params, largest, lambda p, x, dy, contract: ({}, 0 * x))


def label(x):
    return jnp.argmax(x[..., 1:], -1) + 1


def spoken(x):
    """Two labels of each example, for all of its steps."""
    labels = label(x[:, :2])
    whole = lambda n: jnp.full_like(labels[:, 0], n)
    return {"labels": labels, "label_lengths": whole(2), "logit_lengths": whole(x.shape[1])}


def beside(target):
    """A layer that puts target(x) beside x, for a loss in the tables below."""
    return fn.stateless("beside", no_params, lambda _, x: ((x, target(x)), ()), lambda p, r, dy, contract: ({}, dy[0]))


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
    "embedding": (fn.serial(integers(), fn.embedding(12, 4)), (8, 3, 12), P("data"), {}),
    "embedding, no positions": (fn.serial(integers(), fn.embedding(12, 4)), (8, 12), P("data"), {}),
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
    assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    for (path, g), p in zip(jax.tree.leaves_with_path(got), jax.tree.leaves(params), strict=True):
        assert g.sharding.is_equivalent_to(p.sharding, p.ndim), f"{path}: {g.sharding.spec} for {p.sharding.spec}"


@cache
def on_one_device(name):
    """What a model computes, what it is given, and (dparams, dx, new_state)."""
    model, shape, *_ = SHARDED[name]
    params, state, *given = draw_with_dy(model, S(shape, jnp.float32))

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
        assert_close(new_state, wanted_state, rtol=1e-5, atol=1e-6)


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
    params, state, x, _ = draw_with_dy(model, S((8, 12), jnp.float32))
    params, state = {"model": params, "loss": {}}, {"model": state, "loss": ()}
    labels = jnp.arange(8, dtype=jnp.int32) % 5
    run = fn.value_and_grad(fn.objective(model, fn.cross_entropy(label_smoothing=0.1)))
    hows = [fn.total, fn.squared_norm, fn.per_example]
    every = jax.jit(lambda params, x, labels: [run(params, state, (x, labels), None, contract=how) for how in hows])
    wanted = jax.tree.map(np.asarray, every(params, x, labels))
    with jax.set_mesh(mesh):
        params = jax.device_put(params, P())
        got = every(params, *jax.device_put((x, labels), P("data")))
        assert_close(got, wanted, rtol=1e-4, atol=1e-4)
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
    batch = draw(fn.dense(5), S((8, 12), jnp.float32))[2], jnp.arange(8, dtype=jnp.int32) % 5, weights

    def after(batch):
        state = fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
        return STEPS[name](objective, optimizer)(state, batch)[0].params

    with jax.numpy_dtype_promotion("standard"):
        wanted = jax.tree.map(np.asarray, after(batch))
        with jax.set_mesh(mesh):
            assert_close(after(jax.device_put(batch, P("data"))), wanted, rtol=1e-4, atol=1e-5)


def check_batch_statistics(kind):
    """The running statistics and gradients of a batch cut along four devices are those of the whole batch."""
    model = fn.serial(fn.dense(6), fn.batch_norm(), fn.relu(), fn.dense(3))
    params, state, x, dy = draw_with_dy(model, S((8, 5), jnp.float32))

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
        assert_close(got, wanted, rtol=1e-4, atol=1e-5)


STATISTICS = ["batch statistics, Auto", "batch statistics, Explicit"]


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


def test_under_explicit_axes_gradients_are_right_and_sharded_like_their_parameters():
    """One test, so that of several workers only one starts the process."""
    env = os.environ | {
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=4",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(Path(fn.__file__).parents[1]),
    }
    child = subprocess.run([sys.executable, __file__], env=env, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    names = [*CALLS, *SHARDED_FACTORS, *STEPS, *STATISTICS, "value_and_grad"]
    assert json.loads(child.stdout) == dict.fromkeys(names, "")


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(check_all_sharded()))
