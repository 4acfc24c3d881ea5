"""`python -m benchmarks.linear_cross_entropy`: a head over a large vocabulary and its loss, and all their gradients.

The mean loss, dx, dkernel and dbias, in float32, by four programs that are shown to agree before they are timed, in
interleaved rounds: funcnet, both passes at once, as `value_and_grad` and `train_step` run it; funcnet's fwd and then
bwd; logits and their loss under `jax.grad`; the same in chunks of positions, under `jax.checkpoint` in a scan.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

import funcnet as fn
from benchmarks.harness import orders

AGREE = 1e-4
OURS, BOTH, PLAIN, CHUNKS = "funcnet, at once", "funcnet, fwd and bwd", "jax.grad", "jax.grad, checkpointed chunks"
TARGETS = {PLAIN: "time at most 1.05, temp at most 0.25 of it", CHUNKS: "1.2 times as fast"}


def mean_loss(params: dict[str, Array], x: Array, labels: Array) -> Array:
    z = x @ params["kernel"] + params["bias"][None]
    own = jnp.take_along_axis(z, labels[:, None], axis=1)[:, 0]
    return jnp.mean(jax.nn.logsumexp(z, axis=1) - own)


def in_chunks(params: dict[str, Array], x: Array, labels: Array, chunk: int) -> Array:
    def body(total, each):
        return total + jax.checkpoint(mean_loss)(params, *each), None

    each = x.reshape(-1, chunk, x.shape[1]), labels.reshape(-1, chunk)
    return lax.scan(body, jnp.zeros(()), each)[0] * chunk / len(x)


def sides(positions: int, features: int, vocab: int, chunk: int) -> tuple[dict[str, Callable], tuple[Any, ...]]:
    """Name -> a function that returns (loss, (dparams, dx)); and the arguments of all."""
    loss = fn.linear_cross_entropy(vocab)
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((positions, features)), jnp.float32)
    labels = jnp.asarray(rng.integers(0, vocab, positions), jnp.int32)
    params, _ = loss.init(jax.random.key(0), (x, labels))
    weights = jnp.full(positions, 1 / positions, jnp.float32)

    def at_once(params, x, labels):
        assert loss.at_once is not None
        values, (dparams, (dx, _)) = loss.at_once(params, (x, labels), weights)
        return jnp.sum(weights * values), (dparams, dx)

    def fwd_and_bwd(params, x, labels):
        values, _, residuals = loss.fwd(params, (), (x, labels), None)
        dparams, (dx, _) = loss.bwd(params, residuals, weights)
        return jnp.sum(weights * values), (dparams, dx)

    chunked = lambda params, x, labels: in_chunks(params, x, labels, chunk)
    functions = {
        OURS: at_once,
        BOTH: fwd_and_bwd,
        PLAIN: jax.value_and_grad(mean_loss, (0, 1)),
        CHUNKS: jax.value_and_grad(chunked, (0, 1)),
    }
    return functions, (params, x, labels)


def check(answers: dict[str, Any]) -> None:
    """Raise where a side's loss or a gradient leaf is not that of `jax.grad`, but for rounding."""
    wanted = jax.tree.leaves(answers[PLAIN])
    for name, answer in answers.items():
        for a, b in zip(jax.tree.leaves(answer), wanted, strict=True):
            error = float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
            if not error <= AGREE:
                raise AssertionError(f"{name} differs from {PLAIN} by {error:.1e} of a leaf of shape {list(a.shape)}")


def measure(
    positions: int, features: int, vocab: int, chunk: int, rounds: int
) -> tuple[dict[str, int], dict[str, list[float]]]:
    """Bytes of temporary memory, and seconds a call for each round, by side, once all sides have agreed."""
    functions, args = sides(positions, features, vocab, chunk)
    compiled: dict[str, Any] = {name: jax.jit(f).lower(*args).compile() for name, f in functions.items()}
    check({name: f(*args) for name, f in compiled.items()})
    temp = {name: f.memory_analysis().temp_size_in_bytes for name, f in compiled.items()}

    seconds: dict[str, list[float]] = {name: [] for name in compiled}
    for order in orders(list(compiled), rounds):  # a call takes seconds: one is a sample
        for name in order:
            start = time.perf_counter()
            jax.block_until_ready(compiled[name](*args))
            seconds[name].append(time.perf_counter() - start)
    return temp, seconds


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--positions", type=int, default=2048)
    parser.add_argument("--features", type=int, default=512)
    parser.add_argument("--vocab", type=int, default=50_000)
    parser.add_argument("--chunk", type=int, default=256, help="positions at a time, of the checkpointed chunks")
    parser.add_argument("--rounds", type=int, default=8)
    options = parser.parse_args(arguments)
    sizes = f"N={options.positions}, D={options.features}, V={options.vocab}"
    print(f"jax {jax.__version__}: head and loss, {sizes}, float32, loss and all gradients")
    temp, seconds = measure(options.positions, options.features, options.vocab, options.chunk, options.rounds)
    print(f"{'':32}{'ms':>8}{'time / ours':>14}{'temp MB':>10}{'temp / ours':>14}  to be reached")
    for name, times in seconds.items():
        ratio = statistics.median(t / ours for t, ours in zip(times, seconds[OURS], strict=True))
        cells = f"{1e3 * statistics.median(times):8.0f}{ratio:14.2f}{temp[name] / 1e6:10.1f}"
        print(f"{name:32}{cells}{temp[name] / temp[OURS]:14.2f}  {TARGETS.get(name, '')}".rstrip())


if __name__ == "__main__":
    main()
