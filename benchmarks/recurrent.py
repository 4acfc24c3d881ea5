"""`python -m benchmarks.recurrent`: lstm's and gru's output and gradients beside `jax.grad` of a cell in `lax.scan`.

Three sides compute sum(y * w) and its gradients with respect to parameters and input, and are shown to agree before
they are timed, in interleaved rounds: funcnet; the cell in the scan, as it is usually written, under `jax.grad`; the
same with the input's product taken out of the scan. Beside them stands what no rule can save: the matrix products of
both passes alone, a recurrent one a step each way and three over all steps.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, nn

import funcnet as fn
from benchmarks.harness import Side, time_interleaved

WANTED = {1: (3.0, 1.5), 8: (3.5, 1.7), 64: (1.05, 1.05)}  # batch -> times the cell in scan, times the hoisted one
AGREE = 1e-4

States = tuple[Array, ...]


class Cell(NamedTuple):
    """A layer, and in plain JAX (params, the input's part of the gates, states) -> the next states, h the first."""

    layer: Callable[[int], fn.Layer]
    step: Callable[[Any, Array, States], States]
    states: int


def lstm(params: Any, a: Array, states: States) -> States:
    h, c = states
    i, f, g, o = jnp.split(a + h @ params["recurrent_kernel"], 4, axis=-1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(c), c


def gru(params: Any, a: Array, states: States) -> States:
    (h,) = states
    inputs, recurrent = jnp.split(a, 3, axis=-1), jnp.split(h @ params["recurrent_kernel"], 3, axis=-1)
    r, z = (nn.sigmoid(i + u) for i, u in zip(inputs[:2], recurrent[:2], strict=True))
    n = jnp.tanh(inputs[2] + r * (recurrent[2] + params["recurrent_bias"][None]))
    return ((1 - z) * n + z * h,)


CELLS = {"lstm": Cell(fn.lstm, lstm, 2), "gru": Cell(fn.gru, gru, 1)}


def in_scan(cell: Cell, params: Any, x: Array, hoisted: bool) -> Array:
    """y [B, T, H] by plain JAX; `hoisted` multiplies all of x by the kernel before the scan."""
    kernel, bias = params["kernel"], params["bias"][None]
    zeros = jnp.zeros((x.shape[0], params["recurrent_kernel"].shape[0]), x.dtype)

    def body(states, x):
        states = cell.step(params, x if hoisted else x @ kernel + bias, states)
        return states, states[0]

    x = jnp.swapaxes(x, 0, 1)
    x = x @ kernel + bias[None] if hoisted else x
    return jnp.swapaxes(lax.scan(body, (zeros,) * cell.states, x)[1], 0, 1)


def products(params: Any, x: Array, w: Array) -> tuple[Array, ...]:
    """As many matrix products of the same sizes, each on the result of one before it."""
    kernel, recurrent = params["kernel"], params["recurrent_kernel"]
    features, blocks = recurrent.shape[0], recurrent.shape[1] // recurrent.shape[0]
    x, w = jnp.swapaxes(x, 0, 1), jnp.swapaxes(w, 0, 1)

    def forward(h, a):
        h = jnp.mean((a + h @ recurrent).reshape(-1, blocks, features), axis=1)
        return h, h

    def backward(dh, dy):
        dz = jnp.concatenate([dh + dy] * blocks, axis=1) / blocks
        return dz @ recurrent.T, dz

    flat = lambda a: a.reshape(-1, a.shape[-1])
    _, h = lax.scan(forward, jnp.zeros_like(w[0]), (flat(x) @ kernel).reshape(*x.shape[:2], -1))
    _, dz = lax.scan(backward, jnp.zeros_like(w[0]), w, reverse=True)
    return flat(dz) @ kernel.T, flat(x).T @ flat(dz), flat(h).T @ flat(dz)


def sides(cell: Cell, batch: int, steps: int, features: int) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Name -> a compiled function that returns (y, (dparams, dx)), and its arguments."""
    layer = cell.layer(features)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((batch, steps, features)), jnp.float32) for _ in range(2))
    params, state = layer.init(jax.random.key(0), x)

    def by_hand(params, x, w):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y, layer.bwd(params, residuals, w)

    def by_grad(hoisted):
        def loss(params, x, w):
            y = in_scan(cell, params, x, hoisted)
            return jnp.sum(y * w), y

        def gradients(params, x, w):
            grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, x, w)
            return y, grads

        return gradients

    functions = {"funcnet": by_hand, "cell in scan": by_grad(False), "input product hoisted": by_grad(True)}
    return {name: (jax.jit(f), (params, x, w)) for name, f in functions.items()}


def check(answers: dict[str, Any]) -> None:
    """Raise where a side's output or a gradient leaf is not funcnet's, but for rounding."""
    wanted = jax.tree.leaves(answers["funcnet"])
    for name, answer in answers.items():
        for a, b in zip(jax.tree.leaves(answer), wanted, strict=True):
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            if not error <= AGREE:
                raise AssertionError(f"{name} differs from funcnet by {error:.1e} of a leaf of shape {list(a.shape)}")


def measure(cell: Cell, batch: int, steps: int, features: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call for each round, by side, once all sides have agreed."""
    found = sides(cell, batch, steps, features)
    check({name: f(*args) for name, (f, args) in found.items()})
    found["matrix products alone"] = jax.jit(products), found["funcnet"][1]

    def side(f, args):
        return Side(lambda: (0.0, {}), lambda: jax.block_until_ready(f(*args)))

    return time_interleaved({name: side(*each) for name, each in found.items()}, rounds)[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of: {', '.join(CELLS)}; all by default")
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=list(WANTED))
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - CELLS.keys():
        parser.error(f"{', '.join(sorted(unknown))}: none of {', '.join(CELLS)}")
    sizes = f"T={options.steps}, D=H={options.features}"
    print(f"jax {jax.__version__}: {sizes}, float32, output and all gradients; the ratio is to funcnet's time")
    for name in options.names or CELLS:
        for batch in options.batches:
            seconds = measure(CELLS[name], batch, options.steps, options.features, options.rounds)
            print(f"{name}, batch {batch}")
            for i, (side, times) in enumerate(seconds.items()):
                ratio = statistics.median(t / ours for t, ours in zip(times, seconds["funcnet"], strict=True))
                wanted = f"  wanted {WANTED[batch][i - 1]}" if batch in WANTED and i in (1, 2) else ""
                print(f"  {side:24}{1e3 * statistics.median(times):9.2f} ms{ratio:8.2f}x{wanted}", flush=True)


if __name__ == "__main__":
    main()
