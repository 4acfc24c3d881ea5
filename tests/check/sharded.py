"""Cases and training steps inside `jax.shard_map` on two simulated devices, held against one: the program of a test.

Each device has inputs of its own and the same parameters. What a layer gives there, `check_vma` or not, is what it
gives for these inputs alone; the gradients of the parameters are each device's share, and their sum that of both.
"""

import json
import sys
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from funcnet.check.cases import CASES, Case
from tests.check import walk

Tree = Any
P = jax.P
MESH = jax.make_mesh((2,), ("i",), axis_types=(jax.sharding.AxisType.Auto,))
FEW = ["attention/causal, tiles", "lstm/lengths, reverse", "lru", "ctc", "repeat/once, random", "from_function"]
FEW += ["stacked/lengths", "linear_cross_entropy/blocks", "conv/strides", "weight_norm/other names", "serial"]


def near(got: Tree, wanted: Tree) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(*map(jax.tree.leaves, (got, wanted)), strict=True):
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=2e-5, atol=2e-5)


def stacked(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def added(*trees: Tree) -> Tree:
    return jax.tree.map(lambda *leaves: sum(leaves), *trees)


def sharded(f: Callable, out_specs: Tree, vma: bool, params: int = 1) -> Callable:
    """f(*replicated, *cut along the batch), compiled."""
    specs = lambda args: tuple(P() if i < params else P("i") for i in range(len(args)))
    return lambda *args: jax.jit(jax.shard_map(f, mesh=MESH, in_specs=specs(args), out_specs=out_specs, check_vma=vma))(
        *args
    )


def check_case(case: Case, vma: bool) -> None:
    """apply, fwd and bwd; the batch of a device is one entry of an axis in front, so that any input will do."""
    xs = [walk.inputs(case, seed) for seed in (0, 1)]
    params, state = walk.start(case, xs[0])
    y = jax.eval_shape(case.layer.fwd, params, state, xs[0], walk.KEY)[0]
    dys = [walk.random(y, seed) for seed in (5, 6)]

    def alone(params, state, x, dy):
        evaluated = case.layer.apply(params, state, x)
        y, new, residuals = case.layer.fwd(params, state, x, walk.KEY)
        dparams, dx = case.layer.bwd(params, residuals, dy)
        return (evaluated, y, new, dx), dparams

    def device(params, state, x, dy):
        own, dparams = alone(params, state, *jax.tree.map(lambda a: a[0], (x, dy)))
        return jax.tree.map(lambda a: a[None], own), jax.lax.psum(dparams, "i")

    compiled = jax.jit(alone)
    own, dparams = zip(*(compiled(params, state, x, dy) for x, dy in zip(xs, dys, strict=True)), strict=True)
    got = sharded(device, (P("i"), P()), vma, params=2)(params, state, stacked(*xs), stacked(*dys))
    near(got, (stacked(*own), added(*dparams)))


INNER = fn.serial(fn.embedding(7, 4), fn.lstm(4), fn.repeat(fn.transformer_block(4, 2), 2))
LANGUAGE = fn.objective(INNER, fn.linear_cross_entropy(7, chunk=20))
RECOGNISER = fn.objective(fn.serial(fn.gru(3), fn.dense(4)), fn.ctc())
IDS = np.random.default_rng(0).integers(0, 7, (4, 6)).astype(np.int32)
SPOKEN = np.random.default_rng(1).standard_normal((4, 5, 2)).astype(np.float32)
LABELS = {
    "labels": np.int32([[1, 2], [3, 1], [2, 2], [1, 0]]),
    "label_lengths": np.int32([2, 2, 2, 1]),
    "logit_lengths": np.int32([5, 4, 5, 3]),
}


def check_objective(objective: fn.Objective, batch: Tree, vma: bool) -> None:
    """The loss and the gradients of a batch that is cut are, summed over devices, those of the whole one."""
    params, state = objective.init(walk.KEY, batch)
    passes = fn.value_and_grad(objective)
    counted = objective.loss.counted(batch[1])
    weights = np.full(counted.shape, 1 / counted.size, np.float32)
    whole = lambda params, batch, weights: passes(params, state, batch, weights=weights)
    (loss, _), grads = jax.jit(whole)(params, batch, weights)

    def device(params, batch, weights):
        (loss, _), grads = whole(params, batch, weights)
        return jax.lax.psum((loss, grads), "i")

    near(sharded(device, P(), vma)(params, batch, weights), (loss, grads))


def check_steps(vma: bool) -> None:
    """Two accumulated training steps, the gradients summed by the optimizer: params and loss of one device."""
    update = lambda grads, state, params=None: (jax.lax.psum(grads, "i"), state)
    summing = optax.GradientTransformation(lambda params: optax.EmptyState(), update)
    batch, weights = (IDS[:, :-1], IDS[:, 1:]), np.full((4, 5), 1 / 20, np.float32)

    def trained(optimizer, batch, weights):
        start = fn.init_train_state(LANGUAGE, optimizer, walk.KEY, jax.tree.map(jnp.asarray, batch))
        step = fn.train_step(LANGUAGE, optimizer, accumulate=2, steps=2)
        state, metrics = step(start, *jax.tree.map(lambda a: jnp.stack([a, a]), (batch, weights)))
        return state.params, metrics["loss"]

    wanted = jax.jit(lambda *args: trained(optax.sgd(0.5, momentum=0.9), *args))(batch, weights)

    def device(batch, weights):
        params, loss = trained(optax.chain(summing, optax.sgd(0.5, momentum=0.9)), batch, weights)
        return params, jax.lax.psum(loss, "i")

    near(sharded(device, P(), vma, params=0)(batch, weights), wanted)


def check_differentiable(layer: fn.Layer, x: Tree, vma: bool) -> None:
    """`jax.grad` of a loss over all devices: of shared parameters, of a shared input, and of what is not shared."""
    params, state = layer.init(walk.KEY, x)
    run = fn.differentiable(layer)
    shift = np.float32(0.5)

    def loss(params, shift, x):
        y = run(params, x + shift, state=state)
        return jnp.sum(jnp.sin(y[0] if isinstance(y, tuple) else y))

    whole = lambda params, shift, x: jax.grad(loss, (0, 1, 2))(params, shift, x)

    def device(params, shift, x):
        dparams, dshift, dx = whole(params, shift, x)
        return (dparams, dshift, dx) if vma else (*jax.lax.psum((dparams, dshift), "i"), dx)

    wanted = jax.jit(whole)(params, shift, x)
    near(sharded(device, (P(), P(), P("i")), vma, params=2)(params, shift, x), wanted)


def check_own_params(vma: bool) -> None:
    """A shared input to parameters that are a device's own: the gradient of the input is summed, theirs is not."""
    run, x = fn.differentiable(fn.repeat(fn.dense(3), 2)), walk.random(jax.ShapeDtypeStruct((2, 3), jnp.float32), 2)
    each = [fn.repeat(fn.dense(3), 2).init(jax.random.key(i), x)[0] for i in range(2)]
    pull = jax.jit(jax.grad(lambda x, params: jnp.sum(jnp.sin(run(params, x))), (0, 1)))
    dx, dparams = zip(*(pull(x, params) for params in each), strict=True)

    def device(x, params):
        dx, dparams = pull(x, jax.tree.map(lambda a: a[0], params))
        return dx if vma else jax.lax.psum(dx, "i"), jax.tree.map(lambda a: a[None], dparams)

    got = sharded(device, (P(), P("i")), vma)(x, stacked(*each))
    near(got, (added(*dx), stacked(*dparams)))


def check_pmap() -> None:
    loss = fn.linear_cross_entropy(7, chunk=8)
    x, labels, weights = SPOKEN[:, :, 0], IDS[:, 0], np.float32([1, 2, 0, 3])
    params, _ = loss.init(walk.KEY, (x, labels))
    both = lambda params, x, labels, weights: loss.at_once(params, (x, labels), weights)
    values, (dparams, (dx, _)) = both(params, x, labels, weights)
    cut = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), (x, labels, weights))
    got, (dshares, (dx_cut, _)) = jax.pmap(both, "i", in_axes=(None, 0, 0, 0))(params, *cut)
    near((got.reshape(4), dx_cut.reshape(x.shape)), (values, dx))
    near(jax.tree.map(lambda a: a.sum(0), dshares), dparams)


OTHERS: dict[str, Callable[[bool], None]] = {
    "language model": lambda vma: check_objective(LANGUAGE, (IDS[:, :-1], IDS[:, 1:]), vma),
    "recogniser": lambda vma: check_objective(RECOGNISER, (SPOKEN, LABELS), vma),
    "training steps": check_steps,
    "differentiable dense": lambda vma: check_differentiable(fn.dense(3), SPOKEN, vma),
    "differentiable lstm": lambda vma: check_differentiable(fn.lstm(3), SPOKEN, vma),
    "differentiable attention": lambda vma: check_differentiable(fn.attention(1, causal=True, block=2), SPOKEN, vma),
    "differentiable from_function": lambda vma: check_differentiable(
        fn.from_function(lambda params, x: x * params["s"], lambda key, x: {"s": jnp.float32(2)}), SPOKEN, vma
    ),
    "differentiable, own params": check_own_params,
    "pmap": lambda vma: None if vma else check_pmap(),
}


def failures(few: bool) -> dict[str, str]:
    """What went wrong, by name."""
    found = {}
    chosen = {
        case.name: (lambda vma, case=case: check_case(case, vma), walk.dtype_of(case) == "float64")
        for case in CASES
        if not few or case.name in FEW
    }
    for name, (check, x64) in (chosen | {name: (check, False) for name, check in OTHERS.items()}).items():
        for vma in (True, False):
            with jax.enable_x64(x64):
                try:
                    check(vma)
                except Exception as error:
                    found[f"{name}, check_vma={vma}"] = f"{type(error).__name__}: {error}"[:600]
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(failures(few=sys.argv[1] == "few"), indent=1))
