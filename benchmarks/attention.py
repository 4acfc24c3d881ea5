"""`python -m benchmarks.attention`: a long sequence's attention beside `jax.grad` of the same layer, written naturally.

Both sides compute sum(y * w) and its gradients with respect to parameters and input, projections without biases
included, and are shown to agree before time and temporary memory are taken, in interleaved rounds. A whole transformer
beside Equinox, Flax and PyTorch is the workload `transformer` of `python -m benchmarks`.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

import funcnet as fn
from benchmarks.harness import orders

AGREE, TIME, TEMP = 1e-4, 1.1, 1 / 8


def plain(params: Any, x: Array, heads: int, causal: bool) -> Array:
    """The layer as one writes it in plain JAX, all scores at once."""
    dense = lambda name, a: a @ params[name]["kernel"]
    q, k, v = (dense(name, x).reshape(*x.shape[:2], heads, -1) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(x.dtype)
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[-2:], bool)), scores, -jnp.inf)
    o = jnp.einsum("bhts,bshd->bthd", jax.nn.softmax(scores, axis=-1), v)
    return dense("out", o.reshape(*x.shape[:2], -1))


def sides(steps: int, heads: int, head_dim: int, causal: bool) -> tuple[dict[str, Callable], tuple[Any, ...]]:
    """Name -> a function that returns (y, (dparams, dx)), to be compiled; and the arguments of all."""
    layer = fn.attention(heads, causal=causal, use_bias=False)
    rng = np.random.default_rng(0)
    x, w = (jnp.asarray(rng.standard_normal((1, steps, heads * head_dim)), jnp.float32) for _ in range(2))
    params, state = layer.init(jax.random.key(0), x)

    def by_hand(params, x, w):
        y, _, residuals = layer.fwd(params, state, x, None)
        return y, layer.bwd(params, residuals, w)

    def by_grad(params, x, w):
        def loss(params, x):
            y = plain(params, x, heads, causal)
            return jnp.sum(y * w), y

        grads, y = jax.grad(loss, (0, 1), has_aux=True)(params, x)
        return y, grads

    return {"funcnet": by_hand, "jax.grad": by_grad}, (params, x, w)


def check(ours: Any, theirs: Any) -> None:
    """Raise where the output or a gradient leaf differs by more than rounding."""
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        if not error <= AGREE:
            raise AssertionError(f"funcnet differs from jax.grad by {error:.1e} of a leaf of shape {list(a.shape)}")


def measure(steps: int, heads: int, head_dim: int, causal: bool, rounds: int) -> dict[str, tuple[list[float], int]]:
    """Seconds for each round and bytes of temporary memory, by side, once both have agreed."""
    functions, args = sides(steps, heads, head_dim, causal)
    compiled: dict[str, Any] = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    check(*(f(*args) for f in compiled.values()))
    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for order in orders(list(compiled), rounds):
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[name].append(time.perf_counter() - start)
    return {name: (seconds[name], f.memory_analysis().temp_size_in_bytes) for name, f in compiled.items()}


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=4096)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    size = f"B=1, T={options.steps}, {options.heads} heads of {options.head_dim}"
    print(f"jax {jax.__version__}: attention, {size}, float32, output and all gradients")
    print(f"wanted: at most {TIME} x the time and {TEMP:.3f} x the temporary memory of jax.grad")
    for causal in (False, True):
        found = measure(options.steps, options.heads, options.head_dim, causal, options.rounds)
        theirs, their_temp = found["jax.grad"]
        print("causal" if causal else "not causal")
        for name, (seconds, temp) in found.items():
            ratio = statistics.median(a / b for a, b in zip(seconds, theirs, strict=True))
            print(
                f"  {name:10}{1e3 * statistics.median(seconds):9.1f} ms ({ratio:.2f} x)"
                f"{temp / 1e6:10.1f} MB ({temp / their_temp:.3f} x)"
            )


if __name__ == "__main__":
    main()
