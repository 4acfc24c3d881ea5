"""`python -m benchmarks.layerwise`: each layer updated as soon as its gradient exists, beside the ordinary steps.

The network is the one of the workloads residual_serial and residual_repeat: 24 pre-norm residual blocks of width 1024
under Adam. That all sides compute the same is checked first: the losses of two steps, from the same
parameters, within a thousandth (Adam magnifies rounding in its first steps).
"""

import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from benchmarks import harness, peers
from benchmarks.harness import Side

DEPTH, WIDTH, CLASSES, BATCH, ROUNDS = 24, 1024, 10, 256, 20
BLOCK = fn.skip(fn.serial(fn.layer_norm(), fn.dense(WIDTH), fn.relu()))


def batch() -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(0)
    inputs, labels = rng.standard_normal((BATCH, WIDTH)), rng.integers(0, CLASSES, BATCH)
    return jnp.array(inputs, jnp.float32), jnp.array(labels, jnp.int32)


def model(depth: int, stacked: bool) -> fn.Layer:
    blocks = {"blocks": fn.repeat(BLOCK, depth)} if stacked else {f"block_{i}": BLOCK for i in range(depth)}
    return fn.serial(**blocks, head=fn.dense(CLASSES))


def side(make: Callable[..., fn.TrainStep], stacked: bool, depth: int = DEPTH) -> Side:
    """A training step of funcnet; both forms start from the parameters of the stacked one."""
    objective, optimizer = fn.objective(model(depth, stacked), fn.cross_entropy(), metrics={}), optax.adam(1e-3)
    step, data = make(objective, optimizer), batch()
    carried = [fn.init_train_state(objective, optimizer, jax.random.key(0), data)]
    if not stacked:
        source = fn.objective(model(depth, stacked=True), fn.cross_entropy(), metrics={})
        params = fn.init_train_state(source, optimizer, jax.random.key(0), data).params["model"]
        layers = {f"block_{i}": jax.tree.map(lambda p, i=i: p[i], params["blocks"]) for i in range(depth)}
        state = carried[0]
        params = {"model": layers | {"head": params["head"]}, "loss": {}}
        carried[0] = fn.TrainState(params, state.state, state.opt_state, state.key, state.step)
    return _side(step, carried, data)


def autodiff(depth: int = DEPTH) -> Side:
    """`jax.grad` of a scan over the stacked blocks, and optax, as one writes it."""
    optimizer, data = optax.adam(1e-3), batch()
    objective = fn.objective(model(depth, stacked=True), fn.cross_entropy())
    params = fn.init_train_state(objective, optimizer, jax.random.key(0), data).params["model"]

    def block(x, p):
        return x + jax.nn.relu(peers.dense(p["dense"], peers.layer_norm(p["layer_norm"], x))), None

    def loss(params, batch):
        logits = peers.dense(params["head"], jax.lax.scan(block, batch[0], params["blocks"])[0])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch[1]).mean()

    @partial(jax.jit, donate_argnums=0)
    def step(carry, batch):
        params, opt_state = carry
        value, grads = jax.value_and_grad(loss)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), {"loss": value}

    return _side(step, [(params, optimizer.init(params))], data)


def _side(step: Any, carried: list, data: Any) -> Side:
    def advance():
        carried[0], metrics = step(carried[0], data)
        return metrics["loss"].block_until_ready()

    def no_gradients():
        raise NotImplementedError("this side is timed only")

    return Side(no_gradients, advance, lambda: step.lower(carried[0], data))


def compiled(side: Side) -> tuple[float, Any]:
    """Seconds to trace, lower and compile, and the program."""
    assert side.lower
    jax.clear_caches()
    begin = time.perf_counter()
    program = side.lower().compile()
    return time.perf_counter() - begin, program


def main() -> None:
    jax.config.update("jax_enable_compilation_cache", False)
    ordinary = partial(fn.train_step, norms=False)
    makers: dict[str, Callable[[int], Side]] = {
        "train_step, serial": lambda depth: side(ordinary, stacked=False, depth=depth),
        "train_step, repeat": lambda depth: side(ordinary, stacked=True, depth=depth),
        "jax.grad, lax.scan": autodiff,
        "layerwise_step, repeat": lambda depth: side(fn.layerwise_step, stacked=True, depth=depth),
    }
    sides = {name: make(DEPTH) for name, make in makers.items()}
    losses = {name: [float(side.step()) for _ in range(2)] for name, side in sides.items()}
    for name, values in losses.items():
        np.testing.assert_allclose(values, losses["jax.grad, lax.scan"], rtol=1e-3, err_msg=name)
    _, seconds = harness.time_interleaved(sides, ROUNDS)
    faster = min(("train_step, serial", "train_step, repeat"), key=lambda name: statistics.median(seconds[name]))
    depths = (DEPTH // 2, DEPTH, DEPTH * 2)
    print(
        f"jax {jax.__version__}, {peers.cores()} cores; {DEPTH} residual blocks of width {WIDTH}, batch {BATCH}, Adam"
    )
    kept = fn.summary(model(DEPTH, stacked=True), jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)).residual_bytes
    one_layer = 3 * 4 * (WIDTH * WIDTH + 3 * WIDTH)
    print(f"the activations kept for the backward pass: {kept / 1e6:.1f} MB")
    print(f"one block's parameters and its two moments: {one_layer / 1e6:.1f} MB")
    print(f"ms: a step, medians of {ROUNDS} rounds; ratio: to `{faster}`, the faster ordinary step, within each round")
    print(f"compile: seconds for {', '.join(map(str, depths))} blocks\n")
    print(f"{'':24}{'ms':>8}{'ratio':>8}{'temp, MB':>10}{'compile, s':>22}")
    for name, make in makers.items():
        ratio = statistics.median(t / base for t, base in zip(seconds[name], seconds[faster], strict=True))
        spent = [compiled(make(depth))[0] for depth in depths]
        temp = compiled(sides[name])[1].memory_analysis().temp_size_in_bytes / 1e6
        times = "".join(f"{s:7.2f}" for s in spent)
        print(f"{name:24}{statistics.median(seconds[name]) * 1e3:8.1f}{ratio:8.2f}{temp:10.1f}{times:>22}")


if __name__ == "__main__":
    main()
