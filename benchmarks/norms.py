"""`python -m benchmarks.norms`: norms and activations, output and gradients, beside `jax.vjp` of the natural forward.

Both sides compute y, what becomes of the state, and the gradients for a given dy; equality is asserted first, then they
are timed in interleaved rounds. Wanted: never slower, and no more temporary memory.
"""

import argparse
import statistics
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Side, time_interleaved

Natural = Callable[[Any, Any, Array], tuple[Array, Any]]


class Task(NamedTuple):
    """A layer, (params, state, x) -> (y, new state) in plain JAX, and the shape of x."""

    layer: fn.Layer
    natural: Natural
    shape: tuple[int, ...]


def batch_norm(params: Any, state: Any, x: Array) -> tuple[Array, Any]:
    axes = tuple(range(x.ndim - 1))
    mean, var = jnp.mean(x, axis=axes), jnp.var(x, axis=axes)
    y = (x - mean) * jax.lax.rsqrt(var + 1e-5) * params["scale"] + params["bias"]
    return y, {name: 0.9 * state[name] + 0.1 * batch for name, batch in (("mean", mean), ("var", var))}


def rms_norm(params: Any, x: Array) -> Array:
    return x * jax.lax.rsqrt(jnp.mean(jnp.square(x), axis=-1, keepdims=True) + 1e-6) * params["scale"]


def swiglu(x: Array) -> Array:
    a, b = jnp.split(x, 2, axis=-1)
    return a * jax.nn.silu(b)


TASKS = {
    "batch_norm, 32x32x32x64": Task(fn.batch_norm(), batch_norm, (32, 32, 32, 64)),
    "batch_norm, 16x8x8x256": Task(fn.batch_norm(), batch_norm, (16, 8, 8, 256)),
    "batch_norm, 512x512": Task(fn.batch_norm(), batch_norm, (512, 512)),
    "layer_norm, 8192x768": Task(fn.layer_norm(), lambda p, s, x: (peers.layer_norm(p, x), s), (8192, 768)),
    "layer_norm, 512x512": Task(fn.layer_norm(), lambda p, s, x: (peers.layer_norm(p, x), s), (512, 512)),
    "rms_norm, 8192x768": Task(fn.rms_norm(), lambda p, s, x: (rms_norm(p, x), s), (8192, 768)),
    "rms_norm, 512x512": Task(fn.rms_norm(), lambda p, s, x: (rms_norm(p, x), s), (512, 512)),
    "gelu, 2048x3072": Task(fn.gelu(), lambda p, s, x: (jax.nn.gelu(x, approximate=False), s), (2048, 3072)),
    "gelu tanh, 2048x3072": Task(fn.gelu(approximate=True), lambda p, s, x: (jax.nn.gelu(x), s), (2048, 3072)),
    "swiglu, 2048x4096": Task(fn.swiglu(), lambda p, s, x: (swiglu(x), s), (2048, 4096)),
}


class Compared(NamedTuple):
    """Milliseconds by hand and by autodiff, the median of their ratios, and both temporary sizes in bytes."""

    hand: float
    autodiff: float
    ratio: float
    temp: tuple[int, int]


def programs(task: Task) -> dict[str, tuple[Any, tuple[Any, ...]]]:
    """Name -> a compiled function that returns (y, new state, (dparams, dx)), and its arguments."""
    rng = np.random.default_rng(0)
    x, dy = (jnp.asarray(rng.standard_normal(task.shape), jnp.float32) for _ in range(2))
    params, state = task.layer.init(jax.random.key(0), x)

    def by_hand(params, state, x, dy):
        y, state, residuals = task.layer.fwd(params, state, x, None)
        return y, state, task.layer.bwd(params, residuals, dy)

    def by_vjp(params, state, x, dy):
        y, pull, state = jax.vjp(lambda params, x: task.natural(params, state, x), params, x, has_aux=True)
        return y, state, pull(dy)

    dy = dy[..., : jax.eval_shape(task.layer.apply, params, state, x).shape[-1]]
    arguments = (params, state, x, dy)
    return {f.__name__: (jax.jit(f).lower(*arguments).compile(), arguments) for f in (by_hand, by_vjp)}


def compare(task: Task, rounds: int) -> Compared:
    """One task, once both sides have agreed."""
    found = programs(task)
    hand, autodiff = (f(*arguments) for f, arguments in found.values())
    for a, b in zip(jax.tree.leaves(hand), jax.tree.leaves(autodiff), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))

    def side(f, arguments):
        return Side(lambda: (0.0, {}), lambda: jax.block_until_ready(f(*arguments)))

    _, seconds = time_interleaved({name: side(*each) for name, each in found.items()}, rounds)
    hand, autodiff = seconds.values()
    ratio = statistics.median(b / a for a, b in zip(hand, autodiff, strict=True))
    temp = [f.memory_analysis().temp_size_in_bytes for f, _ in found.values()]
    return Compared(1e3 * statistics.median(hand), 1e3 * statistics.median(autodiff), ratio, (temp[0], temp[1]))


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help=f"beginnings of names, of: {'; '.join(TASKS)}")
    parser.add_argument("--rounds", type=int, default=15)
    options = parser.parse_args(arguments)
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, float32: by hand, by jax.vjp, ratio; temporary MB")
    for name, task in TASKS.items():
        if not options.names or name.startswith(tuple(options.names)):
            found = compare(task, options.rounds)
            hand, autodiff = (size / 1e6 for size in found.temp)
            times = f"{found.hand:9.2f} ms{found.autodiff:9.2f} ms{found.ratio:7.2f}x"
            print(f"{name:26}{times}{hand:10.2f}{autodiff:10.2f}", flush=True)


if __name__ == "__main__":
    main()
