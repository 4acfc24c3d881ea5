"""Cases and training steps inside `jax.shard_map` on two simulated devices, held against one: the program of a test.

Each device has inputs of its own and the same parameters. What a layer gives there, `check_vma` or not, is what it
gives for these inputs alone; the gradients of the parameters are each device's share, and their sum that of both.
Cases are held to it in float64 wherever they have it: in float32 rounding alone can be more than the tolerance.
"""

import json
import sys
from collections.abc import Callable
from functools import partial
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
        tolerance = 1e-9 if b.dtype == np.float64 else 2e-5
        np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tolerance, atol=tolerance)


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


# What each of these gives: a function of `check_vma` that runs on both devices, and what it is to give.
Check = tuple[Callable[[bool], Tree], Tree]


def of_case(case: Case) -> Check:
    """apply, fwd and bwd; the batch of a device is one entry of an axis in front, so that any input will do."""
    xs = [walk.inputs(case, seed, dtype=walk.widest(case)) for seed in (0, 1)]
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
    both = lambda vma: sharded(device, (P("i"), P()), vma, params=2)(params, state, stacked(*xs), stacked(*dys))
    return both, (stacked(*own), added(*dparams))


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


def of_objective(objective: fn.Objective, batch: Tree) -> Check:
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

    return lambda vma: sharded(device, P(), vma)(params, batch, weights), (loss, grads)


def of_steps() -> Check:
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

    return lambda vma: sharded(device, P(), vma, params=0)(batch, weights), wanted


def of_differentiable(layer: fn.Layer, x: Tree) -> Check:
    """`jax.grad` of a loss over all devices: of shared parameters, of a shared input, and of what is not shared."""
    params, state = layer.init(walk.KEY, x)
    run = fn.differentiable(layer)
    shift = np.float32(0.5)

    def loss(params, shift, x):
        y = run(params, x + shift, state=state)
        return jnp.sum(jnp.sin(y[0] if isinstance(y, tuple) else y))

    whole = lambda params, shift, x: jax.grad(loss, (0, 1, 2))(params, shift, x)

    def device(vma, params, shift, x):
        dparams, dshift, dx = whole(params, shift, x)
        return (dparams, dshift, dx) if vma else (*jax.lax.psum((dparams, dshift), "i"), dx)

    both = lambda vma: sharded(partial(device, vma), (P(), P(), P("i")), vma, params=2)(params, shift, x)
    return both, jax.jit(whole)(params, shift, x)


def of_own_params() -> Check:
    """A shared input to parameters that are a device's own: the gradient of the input is summed, theirs is not."""
    run, x = fn.differentiable(fn.repeat(fn.dense(3), 2)), walk.random(jax.ShapeDtypeStruct((2, 3), jnp.float32), 2)
    each = [fn.repeat(fn.dense(3), 2).init(jax.random.key(i), x)[0] for i in range(2)]
    pull = jax.jit(jax.grad(lambda x, params: jnp.sum(jnp.sin(run(params, x))), (0, 1)))
    dx, dparams = zip(*(pull(x, params) for params in each), strict=True)

    def device(vma, x, params):
        dx, dparams = pull(x, jax.tree.map(lambda a: a[0], params))
        return dx if vma else jax.lax.psum(dx, "i"), jax.tree.map(lambda a: a[None], dparams)

    both = lambda vma: sharded(partial(device, vma), (P(), P("i")), vma)(x, stacked(*each))
    return both, (added(*dx), stacked(*dparams))


def of_pmap() -> Check:
    """Which has no `check_vma`."""
    loss = fn.linear_cross_entropy(7, chunk=8)
    x, labels, weights = SPOKEN[:, :, 0], IDS[:, 0], np.float32([1, 2, 0, 3])
    params, _ = loss.init(walk.KEY, (x, labels))
    both = lambda params, x, labels, weights: loss.at_once(params, (x, labels), weights)
    values, (dparams, (dx, _)) = jax.jit(both)(params, x, labels, weights)

    def cut(_):
        halves = jax.tree.map(lambda a: a.reshape(2, 2, *a.shape[1:]), (x, labels, weights))
        got, (dshares, (dx_cut, _)) = jax.pmap(both, "i", in_axes=(None, 0, 0, 0))(params, *halves)
        return got.reshape(4), dx_cut.reshape(x.shape), jax.tree.map(lambda a: a.sum(0), dshares)

    return cut, (values, dx, dparams)


OTHERS: dict[str, Callable[[], Check]] = {
    "language model": lambda: of_objective(LANGUAGE, (IDS[:, :-1], IDS[:, 1:])),
    "recogniser": lambda: of_objective(RECOGNISER, (SPOKEN, LABELS)),
    "training steps": of_steps,
    "differentiable dense": lambda: of_differentiable(fn.dense(3), SPOKEN),
    "differentiable lstm": lambda: of_differentiable(fn.lstm(3), SPOKEN),
    "differentiable attention": lambda: of_differentiable(fn.attention(1, causal=True, block=2), SPOKEN),
    "differentiable from_function": lambda: of_differentiable(
        fn.from_function(lambda params, x: x * params["s"], lambda key, x: {"s": jnp.float32(2)}), SPOKEN
    ),
    "differentiable, own params": of_own_params,
    "pmap": of_pmap,
}


def failures(few: bool) -> dict[str, str]:
    """What went wrong, by name."""
    found = {}
    cases = {case.name: case for case in CASES if not few or case.name in FEW}
    for name in [*cases, *OTHERS]:
        with jax.enable_x64(name in cases and walk.widest(cases[name]) == "float64"):
            made = None
            for vma in (True, False):
                try:
                    made = made or (of_case(cases[name]) if name in cases else OTHERS[name]())
                    near(made[0](vma), made[1])
                except Exception as error:
                    found[f"{name}, check_vma={vma}"] = f"{type(error).__name__}: {error}"[:600]
    return found


if __name__ == "__main__":
    jax.config.update("jax_numpy_rank_promotion", "raise")
    jax.config.update("jax_numpy_dtype_promotion", "strict")
    print(json.dumps(failures(few=sys.argv[1] == "few"), indent=1))
