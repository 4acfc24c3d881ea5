"""`python -m benchmarks.floor`: what no formula can save of the gelu_blocks step: its matrix products, and Adam.

A step has 24 matrix products of the same size, 2 * 2048 * 256 * 1024 operations each: two a block forward, two for the
cotangents of the inputs and two for the gradients of the kernels. Here they run alone, in one compiled program, each on
the result of one before it; and once more followed by the Adam update that every side makes. Both are timed in turn
with the whole step of plain JAX, funcnet and PyTorch.
"""

import statistics

import jax
import jax.numpy as jnp
import numpy as np
import optax

from benchmarks import harness, peers
from benchmarks.harness import Side
from benchmarks.workloads import gelu_blocks

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


def alone(adam: bool) -> Side:
    """A side that times `products`, with an Adam update after them or without."""
    width, hidden, examples = gelu_blocks.WIDTH, gelu_blocks.HIDDEN, int(np.prod(gelu_blocks.SHAPE))
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.array(rng.standard_normal(shape) / shape[0] ** 0.5, jnp.float32)

    params = [(normal(width, hidden), normal(hidden, width)) for _ in range(gelu_blocks.DEPTH)]
    x, optimizer = normal(examples, width), optax.adam(1e-3)
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


def main() -> None:
    network = gelu_blocks.workload().sides
    sides = {
        **{name: network[name]() for name in ("plain", "funcnet", "torch")},
        "matrix products in XLA": alone(adam=False),
        "these and Adam": alone(adam=True),
    }
    _, seconds = harness.time_interleaved(sides, ROUNDS)
    print(f"jax {jax.__version__}, {peers.cores()} cores, medians of {ROUNDS} rounds")
    print(f"{'gelu_blocks, a step':24}{'ms':>8}{'/ plain':>10}")
    for name, times in seconds.items():
        ratio = statistics.median(t / plain for t, plain in zip(times, seconds["plain"], strict=True))
        print(f"{name:24}{statistics.median(times) * 1e3:8.1f}{ratio:10.3f}")


if __name__ == "__main__":
    main()
