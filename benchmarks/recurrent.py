"""`python -m benchmarks.recurrent`: an lstm's output and gradients beside `jax.grad` of a cell in `lax.scan`.

Three sides compute sum(y * w) and its gradients with respect to parameters and input, and are shown to agree before
they are timed, in interleaved rounds: funcnet; the cell in the scan, as it is usually written, under `jax.grad`; the
same with the input's product taken out of the scan.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax, nn

import funcnet as fn
from benchmarks.harness import Side, time_interleaved

TARGETS = {1: 3.0, 8: 3.5, 64: 1.05}
AGREE = 1e-4


def cell(z: Array, c: Array) -> tuple[Array, Array]:
    i, f, g, o = jnp.split(z, 4, axis=-1)
    c = nn.sigmoid(f) * c + nn.sigmoid(i) * jnp.tanh(g)
    return nn.sigmoid(o) * jnp.tanh(c), c


def in_scan(params: dict[str, Array], x: Array, hoisted: bool) -> Array:
    """y [B, T, H] by plain JAX; `hoisted` multiplies all of x by the kernel before the scan."""
    kernel, recurrent, bias = params["kernel"], params["recurrent_kernel"], params["bias"][None]
    zeros = jnp.zeros((x.shape[0], recurrent.shape[0]), x.dtype)

    def body(state, x):
        h, c = state
        a = x if hoisted else x @ kernel + bias
        h, c = cell(a + h @ recurrent, c)
        return (h, c), h

    x = jnp.swapaxes(x, 0, 1)
    x = x @ kernel + bias[None] if hoisted else x
    return jnp.swapaxes(lax.scan(body, (zeros, zeros), x)[1], 0, 1)


def sides(batch: int, steps: int, features: int) -> dict[str, tuple[Callable, tuple[Any, ...]]]:
    """Name -> a compiled function that returns (y, (dparams, dx)), and its arguments."""
    layer = fn.lstm(features)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((batch, steps, features)), jnp.float32) for _ in range(2))
    params, state = layer.init(jax.random.key(0), x)

    def by_hand(params, x, w):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y, layer.bwd(params, residuals, w)

    def by_grad(hoisted):
        def loss(params, x, w):
            y = in_scan(params, x, hoisted)
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


def measure(batch: int, steps: int, features: int, rounds: int) -> dict[str, list[float]]:
    """Seconds a call for each round, by side, once all sides have agreed."""
    found = sides(batch, steps, features)
    check({name: f(*args) for name, (f, args) in found.items()})

    def side(f, args):
        return Side(lambda: (0.0, {}), lambda: jax.block_until_ready(f(*args)))

    return time_interleaved({name: side(*each) for name, each in found.items()}, rounds)[1]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=128)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--batches", type=int, nargs="+", default=list(TARGETS))
    parser.add_argument("--rounds", type=int, default=12)
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}: lstm, T={options.steps}, D=H={options.features}, float32, output and all gradients")
    for batch in options.batches:
        seconds = measure(batch, options.steps, options.features, options.rounds)
        target = f", to reach {TARGETS[batch]}x of the cell in scan" if batch in TARGETS else ""
        print(f"batch {batch}{target}")
        for name, times in seconds.items():
            ratio = statistics.median(t / ours for t, ours in zip(times, seconds["funcnet"], strict=True))
            print(f"  {name:24}{1e3 * statistics.median(times):9.2f} ms{ratio:8.2f} x funcnet")


if __name__ == "__main__":
    main()
