"""`python -m benchmarks.reversible`: temporary memory of 24 reversible blocks, and of the same that save as usual.

All of them compute y1 = x1 + f(x2), y2 = x2 + g(y1), f and g pre-norm gelu blocks. That their gradients are equal is
asserted first: in float64 for a narrow stack, in float32 for the stack that is measured.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcnet as fn

WIDTH, BATCH, BLOCKS = 256, 1024, 24
Sides = dict[str, Callable]


def branch_of(width: int) -> fn.Layer:
    return fn.serial(fn.layer_norm(), fn.dense(4 * width), fn.gelu(), fn.dense(width))


def saving(f: fn.Layer, g: fn.Layer) -> fn.Layer:
    """`fn.reversible(f, g)` of a pair, with the residuals of f and g saved, as skips do."""

    def fwd(params, state, x, key):
        x1, x2 = x
        u, state_f, saved_f = f.fwd(params["f"], state["f"], x2, key)
        v, state_g, saved_g = g.fwd(params["g"], state["g"], x1 + u, key)
        return (x1 + u, x2 + v), {"f": state_f, "g": state_g}, {"f": saved_f, "g": saved_g}

    def bwd(params, residuals, dy, contract=fn.total):
        dy1, dy2 = dy
        dg, through = g.bwd(params["g"], residuals["g"], dy2, contract)
        dx1 = dy1 + through
        df, through = f.bwd(params["f"], residuals["f"], dx1, contract)
        return {"f": df, "g": dg}, (dx1, dy2 + through)

    return replace(fn.reversible(f, g), fwd=fwd, bwd=bwd, made=None)


def sides(width: int, batch: int, blocks: int, dtype: Any) -> tuple[Sides, tuple]:
    """Gradients of sum(y^2) in params and x, by side; and params and x to call them with."""
    halves = branch_of(width), branch_of(width)
    models = {
        "fn.repeat(fn.reversible(f, g), L)": fn.repeat(fn.reversible(*halves), blocks),
        "fn.repeat of the same, saving as skips do": fn.repeat(saving(*halves), blocks),
        "the same, fn.remat around a block": fn.repeat(fn.remat(saving(*halves)), blocks),
    }
    rng = np.random.default_rng(0)
    x = tuple(jnp.asarray(rng.normal(size=(batch, width)), dtype) for _ in range(2))
    first = next(iter(models.values()))
    params, state = first.init(jax.random.key(0), x)

    def by_hand(model: fn.Layer) -> Callable:
        def gradients(params, x):
            y, _, residuals = model.fwd(params, state, x, None)
            return model.bwd(params, residuals, jax.tree.map(lambda half: 2 * half, y))

        return gradients

    def loss(params, x):
        return sum(jnp.sum(jnp.square(half)) for half in first.apply(params, state, x))

    hand = {name: by_hand(model) for name, model in models.items()}
    return {**hand, "jax.grad of the forward pass": jax.grad(loss, (0, 1))}, (params, x)


def assert_equal(sides: Sides, point: tuple, rounding: float) -> None:
    """That no leaf differs between any two by more than `rounding` of its size."""
    leaves = [jax.tree.leaves(jax.jit(gradients)(*point)) for gradients in sides.values()]
    for name, others in zip(sides, leaves, strict=True):
        for got, wanted in zip(others, leaves[-1], strict=True):
            error = float(jnp.linalg.norm((got - wanted).reshape(-1)) / jnp.linalg.norm(wanted.reshape(-1)))
            if not error <= rounding:
                raise AssertionError(f"{name}: a gradient differs by {error:.1e} of its size, more than {rounding:.0e}")


def temp_bytes(gradients: Callable, point: tuple) -> int:
    analysis: Any = jax.jit(gradients).lower(*point).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def main() -> None:
    with jax.enable_x64(True):
        assert_equal(*sides(8, 16, BLOCKS, jnp.float64), rounding=1e-10)
    stack, point = sides(WIDTH, BATCH, BLOCKS, jnp.float32)
    assert_equal(stack, point, rounding=1e-4)
    sizes = {name: temp_bytes(gradients, point) for name, gradients in stack.items()}
    print(
        f"jax {jax.__version__}: {BLOCKS} blocks, f and g 256 -> 1024 -> 256, a batch of {BATCH}; gradients are equal"
    )
    print("temporary memory of the gradients, from compiled.memory_analysis()")
    for name, size in sizes.items():
        print(f"{name:44}{size / 1e6:8.1f} MB{size / sizes['fn.repeat of the same, saving as skips do']:8.3f}")


if __name__ == "__main__":
    main()
