"""`python -m benchmarks.remat`: temporary memory of a backward pass with and without rematerialisation."""

from typing import Any

import jax
import jax.numpy as jnp

import funcnet as fn

WIDTH, BATCH, BLOCKS = 512, 1024, 8


def temp_bytes(wrap, checkpoint=lambda f: f, by_hand: bool = True) -> int:
    """Of eight pre-norm gelu blocks: the hand-written backward pass, or `jax.grad` of the same forward."""
    blocks = [wrap(fn.skip(fn.serial(fn.layer_norm(), fn.dense(4 * WIDTH), fn.gelu(), fn.dense(WIDTH))))] * BLOCKS
    model = fn.serial(*blocks)
    x = jax.ShapeDtypeStruct((BATCH, WIDTH), jnp.float32)
    params, state = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)), x)

    def hand(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        return model.bwd(params, residuals, 2 * y)

    def loss(params, x):
        for name, layer in model.parts.items():
            x = checkpoint(lambda p, x, layer=layer, name=name: layer.apply(p, state[name], x))(params[name], x)
        return jnp.sum(jnp.square(x))

    gradients = jax.jit(hand if by_hand else jax.grad(loss, argnums=(0, 1)))
    analysis: Any = gradients.lower(params, x).compile().memory_analysis()
    return analysis.temp_size_in_bytes


def main() -> None:
    print(f"jax {jax.__version__}: {BLOCKS} gelu blocks of width {WIDTH}, batch of {BATCH}")
    print("temporary memory of the loss's gradients, from compiled.memory_analysis()")
    rows = {
        "funcnet": temp_bytes(lambda layer: layer),
        "funcnet, fn.remat a block": temp_bytes(fn.remat),
        "jax.grad": temp_bytes(lambda layer: layer, by_hand=False),
        "jax.grad, jax.checkpoint a block": temp_bytes(lambda layer: layer, jax.checkpoint, by_hand=False),
    }
    for name, size in rows.items():
        print(f"{name:34}{size / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
