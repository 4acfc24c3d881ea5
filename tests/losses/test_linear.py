"""linear_cross_entropy against the logits of `dense` and their loss, by optax and PyTorch; both of its ways agree."""

import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

ROOT = Path(__file__).parents[2]
RNG = np.random.default_rng(0)
N, D, V = 7, 5, 11
X, KERNEL, BIAS = RNG.normal(size=(N, D)), RNG.normal(size=(D, V)), RNG.normal(size=V)
LABELS = np.array([0, 10, 3, 3, 7, 2, 5], np.int32)
WEIGHTS = np.linspace(-1.0, 2.0, N)
HEAD = {"kernel": KERNEL, "bias": BIAS}


def general(loss, params, x, label, dy):
    """(values, (dparams, dx)) by fwd and bwd."""
    values, _, residuals = loss.fwd(params, (), (x, label), None)
    dparams, (dx, dlabel) = loss.bwd(params, residuals, dy)
    assert dlabel is None
    return values, (dparams, dx)


def at_once(loss, params, x, label, dy):
    values, (dparams, (dx, dlabel)) = loss.at_once(params, (x, label), dy)
    assert dlabel is None
    return values, (dparams, dx)


WAYS = pytest.mark.parametrize("way", [general, at_once], ids=["fwd and bwd", "at once"])


def close(a, b, rtol=1e-10):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol), a, b)


def plain(z, label, smoothing=0.0, ignore=None, z_loss=0.0):
    """The same of logits, as one would write it."""
    lse = jax.nn.logsumexp(z, axis=-1)
    q = jax.nn.one_hot(label, z.shape[-1], dtype=z.dtype) * (1 - smoothing) + smoothing / z.shape[-1]
    values = lse - jnp.sum(q * z, axis=-1) + z_loss * lse**2
    return values if ignore is None else jnp.where(label == ignore, 0.0, values)


@WAYS
@pytest.mark.parametrize("chunk", [1, 20, 2**24])
def test_values_and_gradients_are_those_of_the_logits(way, chunk, x64):
    loss = fn.linear_cross_entropy(V, chunk=chunk)

    def reference(params, x):
        return plain(x @ params["kernel"] + params["bias"][None], LABELS)

    values, pullback = jax.vjp(reference, HEAD, X)
    got = jax.jit(partial(way, loss))(HEAD, X, LABELS, WEIGHTS)
    close(got, (values, pullback(jnp.asarray(WEIGHTS))))


@WAYS
def test_options_are_those_of_pytorch(way, x64):
    """Smoothing and ignored labels by torch's own cross_entropy; the z-loss added to it."""
    torch = pytest.importorskip("torch")
    loss = fn.linear_cross_entropy(V, label_smoothing=0.1, ignore_index=3, z_loss=0.01, chunk=30)
    k, b, x = (torch.tensor(a, requires_grad=True) for a in (KERNEL, BIAS, X))
    z = x @ k + b
    label = torch.tensor(LABELS, dtype=torch.int64)
    values = torch.nn.functional.cross_entropy(z, label, ignore_index=3, label_smoothing=0.1, reduction="none")
    values = values + torch.where(label == 3, 0.0, 0.01 * torch.logsumexp(z, -1) ** 2)
    values.backward(torch.tensor(WEIGHTS))
    got = way(loss, HEAD, X, LABELS, WEIGHTS)
    close(got, (values.detach().numpy(), ({"kernel": k.grad.numpy(), "bias": b.grad.numpy()}, x.grad.numpy())))


@WAYS
def test_a_vocabulary_of_several_blocks_in_the_pass_at_once(way, x64):
    """More classes than `COLUMNS`, and no multiple of it; two leading axes; no bias."""
    rng = np.random.default_rng(1)
    x, kernel = rng.normal(size=(2, 3, 2)), rng.normal(size=(2, 4099))
    label, dy = rng.integers(0, 4099, (2, 3)), rng.normal(size=(2, 3))
    loss = fn.linear_cross_entropy(4099, use_bias=False, chunk=9000)
    values, pullback = jax.vjp(lambda p, x: plain(x @ p["kernel"], label), {"kernel": kernel}, x)
    close(way(loss, {"kernel": kernel}, x, label, dy), (values, pullback(jnp.asarray(dy))))


def test_the_heads_params_serve_a_dense_layer():
    loss = fn.linear_cross_entropy(V)
    x = np.float32(X)
    params, state = loss.init(jax.random.key(3), (x, LABELS))
    assert state == ()
    assert params.keys() == {"kernel", "bias"}
    same = fn.dense(V).init(jax.random.key(3), x)[0]
    jax.tree.map(np.testing.assert_array_equal, params, same)
    logits = fn.dense(V).apply(params, (), x)
    wanted = fn.cross_entropy().apply({}, (), (logits, LABELS))
    np.testing.assert_allclose(loss.apply(params, (), (x, LABELS)), wanted, rtol=1e-5)


def test_initialisers_and_no_bias():
    loss = fn.linear_cross_entropy(V, kernel_init=jax.nn.initializers.ones, bias_init=jax.nn.initializers.ones)
    params, _ = loss.init(jax.random.key(0), (np.float32(X), LABELS))
    assert all(np.all(leaf == 1) for leaf in jax.tree.leaves(params))
    params, _ = fn.linear_cross_entropy(V, use_bias=False).init(jax.random.key(0), (np.float32(X), LABELS))
    assert params.keys() == {"kernel"}


@WAYS
def test_half_precision_features_give_float32_values_and_half_precision_gradients(way):
    half, single = (jax.tree.map(lambda a, t=t: jnp.asarray(a, t), (HEAD, X)) for t in (jnp.bfloat16, jnp.float32))
    weights = np.float32(WEIGHTS)
    values, grads = way(fn.linear_cross_entropy(V, chunk=30), *half, LABELS, weights)
    rounded = jax.tree.map(lambda a: a.astype(jnp.float32), half)
    wanted, wanted_grads = way(fn.linear_cross_entropy(V), *rounded, LABELS, weights)
    assert values.dtype == jnp.float32
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.bfloat16)}
    np.testing.assert_allclose(values, wanted, rtol=1e-5)
    for a, b in zip(jax.tree.leaves(grads), jax.tree.leaves(wanted_grads), strict=True):
        np.testing.assert_allclose(a.astype(jnp.float32), b, atol=0.01 * np.abs(b).max())
    assert single[1].dtype == jnp.float32


@WAYS
def test_huge_logits_and_masked_classes_are_finite(way):
    head = {"kernel": np.float32(1e4 * KERNEL), "bias": np.where(np.arange(V) < 4, -np.inf, np.float32(BIAS))}
    head["bias"] = head["bias"].astype(np.float32)
    values, grads = way(fn.linear_cross_entropy(V, chunk=14), head, np.float32(X), np.full(N, 7), np.float32(WEIGHTS))
    assert np.isfinite(values).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads))
    assert not np.any(grads[0]["kernel"][:, :4])


def exactly(kernel, bias, x, label, smoothing, z_loss, weights):
    """Values, dx and dkernel in float64, for a cotangent of ones."""
    z = x.astype(np.float64) @ kernel + bias
    shifted = z - z.max(1, keepdims=True)
    log_total = np.log(np.exp(shifted).sum(1))
    w, own = np.asarray(weights, float), np.eye(V)[label]
    q = w * ((1 - smoothing) * own + smoothing / V)
    lse, mine = z.max(1) + log_total, w[label]
    values = (q * (log_total[:, None] - shifted)).sum(1) + z_loss * mine * lse**2
    dz = np.exp(shifted - log_total[:, None]) * (q.sum(1) + 2 * z_loss * mine * lse)[:, None] - q
    return values, dz @ kernel.T, x.T @ dz, lse


SMOOTH = {"label_smoothing": 0.2}


@WAYS
@pytest.mark.parametrize("options", [{}, SMOOTH, SMOOTH | {"class_weights": range(V)}, SMOOTH | {"z_loss": 1e-4}])
@pytest.mark.parametrize("offset", [0.0, -1024.0, 16384.0])
def test_what_all_logits_have_in_common_costs_no_digits(way, options, offset):
    """Features are eighths, kernels quarters, so that the logits are exact; of the z-loss lse alone is rounded."""
    rng = np.random.default_rng(2)
    x, kernel = rng.integers(-16, 17, (N, D)) / 8, rng.integers(-4, 5, (D, V)) / 4
    bias = offset + rng.integers(-16, 17, V) / 8
    loss, z_loss = fn.linear_cross_entropy(V, chunk=30, **options), options.get("z_loss", 0.0)
    args = *jax.tree.map(np.float32, ({"kernel": kernel, "bias": bias}, x)), LABELS
    values, (dparams, dx) = jax.jit(partial(way, loss))(*args, np.ones(N, np.float32))
    weights = options.get("class_weights", np.ones(V))
    smoothing = options.get("label_smoothing", 0.0)
    wanted, wanted_dx, dkernel, lse = exactly(kernel, bias, x, LABELS, smoothing, z_loss, weights)
    rounded = z_loss * max(weights) * 2**-24 * np.abs(lse).max()
    np.testing.assert_allclose(values, wanted, rtol=1e-6, atol=1e-6 + 6 * rounded * np.abs(lse).max())
    slack = 1e-6 * max(1, max(weights)) + 40 * rounded
    np.testing.assert_allclose(dx, wanted_dx, rtol=3e-6, atol=4 * slack)
    np.testing.assert_allclose(dparams["kernel"], dkernel, rtol=3e-6, atol=16 * slack)
    if not z_loss:
        assert np.all(values >= 0)


@WAYS
@pytest.mark.parametrize("options", [{}, {"ignore_index": 3}, {"label_smoothing": 0.1, "ignore_index": 3}])
def test_weights_of_classes_are_those_of_pytorch(way, options, x64):
    """Values and gradients by torch's own; the z-loss, weighted alike, added to it; the mean by the labels' weights."""
    torch = pytest.importorskip("torch")
    w = np.abs(RNG.normal(size=V)) * (np.arange(V) != 7)
    loss = fn.linear_cross_entropy(V, z_loss=0.01, chunk=30, class_weights=w, **options)
    k, b, x = (torch.tensor(a, requires_grad=True) for a in (KERNEL, BIAS, X))
    z, label, weight = x @ k + b, torch.tensor(LABELS, dtype=torch.int64), torch.tensor(w)
    own = torch.where(label == options.get("ignore_index", -100), 0.0, weight[label])
    values = torch.nn.functional.cross_entropy(z, label, weight=weight, reduction="none", **options)
    values = values + 0.01 * own * torch.logsumexp(z, -1) ** 2
    values.backward(torch.tensor(WEIGHTS))
    gradients = {"kernel": k.grad.numpy(), "bias": b.grad.numpy()}, x.grad.numpy()
    close(jax.jit(partial(way, loss))(HEAD, X, LABELS, WEIGHTS), (values.detach().numpy(), gradients))
    objective = fn.objective(fn.identity(), loss)
    (mean, _), _ = fn.value_and_grad(objective)({"model": {}, "loss": HEAD}, {"model": (), "loss": ()}, (X, LABELS))
    close(mean, (values.sum() / own.sum()).item())


@WAYS
@pytest.mark.parametrize("dtype", [np.int8, np.uint32])
def test_labels_of_any_integer_dtype(way, dtype):
    args = jax.tree.map(np.float32, (HEAD, X))
    loss = fn.linear_cross_entropy(V, ignore_index=3)
    want = way(loss, *args, LABELS, np.float32(WEIGHTS))
    got = way(loss, *args, LABELS.astype(dtype), np.float32(WEIGHTS))
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(loss.counted(LABELS.astype(dtype)), LABELS != 3)


@WAYS
@pytest.mark.parametrize("label", [-1, V])
def test_labels_out_of_range_under_jit_give_nan_in_their_own_value_and_dx(way, label):
    labels = jnp.asarray(LABELS).at[3].set(label)
    args = jax.tree.map(np.float32, (HEAD, X))
    values, (_, dx) = jax.jit(partial(way, fn.linear_cross_entropy(V)))(*args, labels, np.float32(WEIGHTS))
    np.testing.assert_array_equal(np.isnan(values), np.arange(N) == 3)
    np.testing.assert_array_equal(np.isnan(dx).all(1), np.arange(N) == 3)
    np.testing.assert_array_equal(np.isnan(dx).any(1), np.arange(N) == 3)


@WAYS
def test_an_ignored_label_keeps_bad_features_out_of_the_rest(way):
    x = np.float32(X)
    x[2] = np.inf
    labels = LABELS.copy()
    labels[2] = -100
    values, (_, dx) = way(
        fn.linear_cross_entropy(V, ignore_index=-100), jax.tree.map(np.float32, HEAD), x, labels, np.float32(WEIGHTS)
    )
    assert values[2] == 0
    assert np.isfinite(values).all()
    assert np.isfinite(np.delete(dx, 2, 0)).all()


@pytest.mark.parametrize("contract", [fn.total, fn.per_example, fn.squared_norm, fn.rows])
@pytest.mark.parametrize("weights", [None, np.arange(V) / 3])
def test_contractions_of_blocks_are_those_of_the_dense_layer_and_its_loss(contract, weights, x64):
    """At once, and of what `keep` has kept."""
    x, label, dy = RNG.normal(size=(3, 2, D)), LABELS[:6].reshape(3, 2), RNG.normal(size=(3, 2))
    loss, split = fn.linear_cross_entropy(V, chunk=24, class_weights=weights), fn.dense(V)
    z, _, saved = split.fwd(HEAD, (), x, None)
    plain = fn.cross_entropy(class_weights=weights)
    of_loss = plain.fwd({}, (), (z, label), None)[2]
    wanted = split.bwd(HEAD, saved, plain.bwd({}, of_loss, dy)[1][0], contract)[0]
    residuals = loss.fwd(HEAD, (), (x, label), None)[2]
    close(loss.bwd(HEAD, residuals, dy, contract)[0], wanted)
    kept = jax.jit(lambda r: loss.bwd(HEAD, r, dy, fn.keep)[0])(residuals)
    assert all(isinstance(leaf, fn.Blocks) for leaf in jax.tree.leaves(kept, is_leaf=fn.is_factor))
    close(jax.tree.map(contract, kept, HEAD, is_leaf=fn.is_factor), wanted)


def test_infinite_features_without_weight_add_nothing_however_the_gradient_is_read():
    """Block by block, from what was kept, and whole, as a contraction of one's own reads it."""
    loss, dy = fn.linear_cross_entropy(V, chunk=3 * N), jnp.float32(WEIGHTS).at[2].set(0)
    bad, good = np.float32(X), np.float32(X)
    bad[2], good[2] = np.inf, 0
    params = jax.tree.map(np.float32, HEAD)

    def answers(x):
        residuals = loss.fwd(params, (), (x, LABELS), None)[2]
        by = lambda contract: loss.bwd(params, residuals, dy, contract)[0]
        read = fn.contraction(lambda gradients, param: jnp.sum(gradients**2, axis=0))
        kept = jax.tree.map(fn.total, by(fn.keep), params, is_leaf=fn.is_factor)
        return by(fn.total), kept, by(fn.squared_norm), by(read)

    close(*map(jax.jit(answers), (bad, good)), rtol=1e-5)


def test_a_contraction_of_ones_own_says_how_blocks_are_joined():
    """Without that it takes the whole factor, as `keep` does; with it, a block at a time."""
    largest = lambda factor, param: jnp.max(jnp.abs(fn.total(factor, param)))
    args = jax.tree.map(np.float32, (HEAD, X))
    loss = fn.linear_cross_entropy(V, chunk=24)
    residuals = loss.fwd(args[0], (), (args[1], LABELS), None)[2]
    wanted = jax.tree.map(lambda g: np.abs(g).max(), loss.bwd(args[0], residuals, np.float32(WEIGHTS))[0])
    whole = fn.contraction(largest, reads="factors")
    for contract in (whole, fn.contraction(largest, reads="factors", joined=lambda a, param: jnp.max(a))):
        close(loss.bwd(args[0], residuals, np.float32(WEIGHTS), contract)[0], wanted, 1e-6)


def largest_array(f, *args):
    """Entries of the largest array that a program forms, at any depth."""
    sizes = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            sizes.extend(v.aval.size for v in equation.outvars)
            for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
                inner = getattr(value, "jaxpr", value)
                if hasattr(inner, "eqns"):
                    walk(inner)

    walk(jax.make_jaxpr(f)(*args).jaxpr)
    return max(sizes)


@WAYS
def test_logits_are_never_whole(way):
    positions, classes, chunk = 64, 96, 512
    loss = fn.linear_cross_entropy(classes, chunk=chunk)
    args = {"kernel": jnp.ones((2, classes)), "bias": jnp.ones(classes)}, jnp.ones((positions, 2))
    label = jnp.zeros(positions, jnp.int32)
    assert largest_array(partial(way, loss), *args, label, jnp.ones(positions)) <= chunk < positions * classes


CUT = """
import sys, jax, numpy as np, funcnet as fn
rng = np.random.default_rng(0)
batch = rng.standard_normal((16, 4)).astype(np.float32), rng.integers(0, 50, 16).astype(np.int32)
weights = rng.uniform(0, 2, 50) if int(sys.argv[2]) == 150 else None
objective = fn.objective(fn.dense(8), fn.linear_cross_entropy(50, chunk=int(sys.argv[2]), class_weights=weights))
params, state = objective.init(jax.random.key(0), batch)
f = jax.jit(fn.value_and_grad(objective))
wanted = f(params, state, batch)
mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType[sys.argv[1]],))
at = lambda *axes: jax.sharding.NamedSharding(mesh, jax.P(*axes))
args = jax.device_put(params, at()), state, jax.device_put(batch, at("data"))
jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), f(*args), wanted)
program = f.lower(*args).compile().as_text()
assert "all-reduce" in program
assert not any(word in program for word in ("all-gather", "all-to-all", "collective-permute"))
"""


@pytest.mark.parametrize(("axes", "chunk"), [("Auto", 200), ("Explicit", 200), ("Explicit", 150), ("Explicit", 1)])
def test_a_batch_that_is_cut_along_a_mesh_stays_so_in_the_chunks(axes, chunk):
    """Data-parallel, on two simulated devices: gradients are summed over them, all else stays where it is."""
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
    run = [sys.executable, "-c", CUT, axes, str(chunk)]
    done = subprocess.run(run, env=environment, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-2000:]


def test_at_once_stands_for_the_losss_own_passes_alone():
    loss = fn.linear_cross_entropy(V)
    assert loss.at_once is not None
    assert fn.cross_entropy().at_once is None
    assert fn.remat(loss).at_once is None
    assert fn.mixed(loss).at_once is None


GOOD = np.float32(X), LABELS


@pytest.mark.parametrize(
    ("params", "pair", "message"),
    [
        (HEAD, GOOD, "float32"),
        ({"kernel": np.float32(KERNEL)}, GOOD, "bias"),
        ({}, GOOD, "kernel"),
        (jax.tree.map(np.float32, HEAD), (GOOD[0][:, :4], LABELS), "5 features"),
        (jax.tree.map(np.float32, HEAD), (GOOD[0], LABELS[:5]), r"integer labels \[7\]"),
        (jax.tree.map(np.float32, HEAD), (GOOD[0], np.float32(LABELS)), r"integer labels \[7\]"),
        (jax.tree.map(np.float32, HEAD), (GOOD[0], LABELS + 1), "labels from 0 to 10"),
        (jax.tree.map(np.float32, HEAD), (LABELS, LABELS), "floating"),
        (jax.tree.map(np.float32, HEAD), GOOD[0], "a pair"),
    ],
)
def test_what_does_not_fit_is_refused(params, pair, message, x64):
    loss = fn.linear_cross_entropy(V)
    for call in (lambda: loss.fwd(params, (), pair, None), lambda: loss.at_once(params, pair, np.float32(WEIGHTS))):
        with pytest.raises(fn.InputError, match=message):
            call()


@pytest.mark.parametrize("dy", [np.ones((N, 1), np.float32), np.ones(N, jnp.bfloat16)])
def test_a_cotangent_of_another_shape_or_dtype_is_refused(dy):
    loss, params = fn.linear_cross_entropy(V), jax.tree.map(np.float32, HEAD)
    residuals = loss.fwd(params, (), GOOD, None)[2]
    with pytest.raises(fn.InputError, match="cotangent"):
        loss.bwd(params, residuals, dy)


@pytest.mark.parametrize(
    "options", [{"label_smoothing": 1.0}, {"z_loss": -1.0}, {"z_loss": float("inf")}, {"chunk": 0}, {"vocab": 0}]
)
def test_options_out_of_range_are_refused(options):
    with pytest.raises(fn.InputError):
        fn.linear_cross_entropy(**{"vocab": V} | options)


def test_hessian_vector_products_by_forward_mode_agree(x64):
    loss = fn.linear_cross_entropy(V, chunk=30, z_loss=0.1)
    tangent = jax.tree.map(lambda a: jnp.asarray(RNG.normal(size=a.shape)), (HEAD, X))

    def product(f):
        return jax.jvp(f, jax.tree.map(jnp.asarray, (HEAD, X)), tangent)[1]

    def gradient(params, x):
        value = lambda params, x: jnp.sum(
            WEIGHTS * plain(x @ params["kernel"] + params["bias"][None], LABELS, z_loss=0.1)
        )
        return jax.grad(value, (0, 1))(params, x)

    wanted = product(gradient)
    for way in (general, at_once):
        close(product(lambda params, x, way=way: way(loss, params, x, LABELS, WEIGHTS)[1]), wanted)
