"""`python -m benchmarks.floor`: what no formula can save of two workloads: their matrix products, and Adam.

A step of gelu_blocks has 24 matrix products of the same size, 2 * 2048 * 256 * 1024 operations each: two a block
forward, two for the cotangents of the inputs and two for the gradients of the kernels. One of residual_repeat has 72 of
2 * 256 * 1024 * 1024, three a block, in a scan over stacked kernels. Here they run alone, in one compiled program, each
on the result of one before it; and once more followed by the Adam update that every side makes. Both are timed in turn
with the whole step of plain JAX, funcnet and PyTorch.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, peers
from benchmarks.harness import Side
from benchmarks.workloads import _residual, gelu_blocks, residual_repeat

ROUNDS = 20


def products(params, x):
    """The gradients of the kernels of a network that is nothing but its matrix products."""
    inputs = []
    for up, down in params:
        hidden = x @ up
        inputs.append((x, hidden))
        x = hidden @ down
    dy, grads = x, []
    for (up, down), (x, hidden) in zip(reversed(params), reversed(inputs), strict=True):
        dhidden = dy @ down.T
        grads.append((x.T @ dhidden, hidden.T @ dy))
        dy = dhidden @ up.T
    return grads[::-1], dy


def stacked_products(kernels, x):
    """The same for one kernel a block, all of them in one array."""

    def forward(x, kernel):
        return x @ kernel, x

    def backward(dy, layer):
        kernel, x = layer
        return dy @ kernel.T, x.T @ dy

    dy, inputs = jax.lax.scan(forward, x, kernels)
    dx, grads = jax.lax.scan(backward, dy, (kernels, inputs), reverse=True)
    return grads, dx


def normal(*shape):
    """Random numbers that keep the variance of what they are multiplied with along their last axis but one."""
    return jnp.array(np.random.default_rng(0).standard_normal(shape) / shape[-2] ** 0.5, jnp.float32)


def gelu_kernels():
    width, hidden = gelu_blocks.WIDTH, gelu_blocks.HIDDEN
    kernels = [(normal(width, hidden), normal(hidden, width)) for _ in range(gelu_blocks.DEPTH)]
    return kernels, normal(int(np.prod(gelu_blocks.SHAPE)), width)


def residual_kernels():
    width = _residual.WIDTH
    return normal(_residual.DEPTH, width, width), normal(_residual.BATCH, width)


def alone(products, kernels, adam: bool) -> Side:
    """A side that times `products` of (kernels, x), with an Adam update after them or without."""
    (params, x), optimizer = kernels(), optax.adam(1e-3)
    carried = [(params, optimizer.init(params))]

    def body(carry, x):
        params, opt_state = carry
        grads, dx = products(params, x)
        if not adam:
            return carry, (grads, dx)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return (optax.apply_updates(params, updates), opt_state), dx

    call = jax.jit(body, donate_argnums=0)

    def step():
        carried[0], out = call(carried[0], x)
        return jax.block_until_ready(out)

    def no_gradients():
        raise NotImplementedError("this side is timed only")

    return Side(no_gradients, step)


def show(name: str, workload, products, kernels) -> None:
    network = workload.workload().sides
    sides = {
        **{side: network[side]() for side in ("plain", "funcnet", "torch")},
        "matrix products in XLA": alone(products, kernels, adam=False),
        "these and Adam": alone(products, kernels, adam=True),
    }
    _, seconds = harness.time_interleaved(sides, ROUNDS)
    print(f"\n{name + ', a step':24}{'ms':>8}{'/ plain':>10}")
    for side, times in seconds.items():
        ratio = statistics.median(t / plain for t, plain in zip(times, seconds["plain"], strict=True))
        print(f"{side:24}{statistics.median(times) * 1e3:8.1f}{ratio:10.3f}", flush=True)


def main() -> None:
    print(f"jax {jax.__version__}, {peers.cores()} cores, medians of {ROUNDS} rounds")
    show("gelu_blocks", gelu_blocks, products, gelu_kernels)
    show("residual_repeat", residual_repeat, stacked_products, residual_kernels)


if __name__ == "__main__":
    main()
