"""A pre-norm residual MLP in every framework: blocks x + relu(dense(layer_norm(x))), then a dense head.

With `stacked` the parameters of all blocks lie along a leading axis and each framework scans over them, except PyTorch
eager, which has no scan; otherwise the blocks are written out one after the other.
"""

from typing import Any

import jax
import numpy as np

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload

DEPTH, WIDTH, CLASSES, BATCH = 24, 1024, 10, 256


def residual(dtype: str, *, stacked: bool) -> Workload:
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((BATCH, WIDTH)).astype(dtype)
    labels = rng.integers(0, CLASSES, BATCH, dtype=np.int32)
    block = fn.skip(fn.serial(fn.layer_norm(), fn.dense(WIDTH), fn.relu()))
    names = [f"block_{i}" for i in range(DEPTH)]
    blocks = {"blocks": fn.repeat(block, DEPTH)} if stacked else dict.fromkeys(names, block)

    def plain_block(p, x):
        return x + jax.nn.relu(peers.dense(p["dense"], peers.layer_norm(p["layer_norm"], x)))

    def plain(params, x):
        if stacked:
            x, _ = jax.lax.scan(lambda x, p: (plain_block(p, x), None), x, params["blocks"])
        else:
            for name in names:
                x = plain_block(params[name], x)
        return peers.dense(params["head"], x)

    def places(network):
        kinds = ("layer_norm", "dense")
        if not stacked:
            pairs = list(zip(names, network.blocks, strict=True))
            found = {f"{name}/{kind}": getattr(block, kind) for name, block in pairs for kind in kinds}
        elif hasattr(network.blocks, "dense"):
            found = {f"blocks/{kind}": getattr(network.blocks, kind) for kind in kinds}
        else:
            found = {f"blocks/{kind}": [getattr(block, kind) for block in network.blocks] for kind in kinds}
        return found | {"head": network.head}

    form = "`repeat` (scan)" if stacked else "`serial`"
    size = f"{DEPTH} blocks x + relu(dense(layer_norm(x))) of width {WIDTH} as {form}, dense {CLASSES}"
    return Workload(
        rounding=2e-2,  # rounding decides on which side of its kink a relu is for a few of six million units
        title=f"{size}, cross-entropy, batch of {BATCH}, Adam, {dtype}",
        sides=peers.sides(
            fn.serial(**blocks, head=fn.dense(CLASSES)),
            peers.cross_entropy(),
            (inputs, labels),
            plain=plain,
            equinox=lambda: _equinox(stacked),
            flax=lambda: _flax(stacked),
            torch=_torch,
            places=places,
        ),
    )


def _equinox(stacked: bool):
    import equinox as eqx

    class Block(eqx.Module):
        layer_norm: eqx.nn.LayerNorm
        dense: eqx.nn.Linear

        def __init__(self, key):
            self.layer_norm = eqx.nn.LayerNorm(WIDTH, eps=1e-6)
            self.dense = eqx.nn.Linear(WIDTH, WIDTH, key=key)

        def __call__(self, x):
            return x + jax.nn.relu(self.dense(self.layer_norm(x)))

    class Network(eqx.Module):
        blocks: Block | list[Block]
        head: eqx.nn.Linear

        def __call__(self, x):
            if isinstance(self.blocks, list):
                for block in self.blocks:
                    x = block(x)
            else:
                arrays, rest = eqx.partition(self.blocks, eqx.is_array)
                x, _ = jax.lax.scan(lambda x, block: (eqx.combine(block, rest)(x), None), x, arrays)
            return self.head(x)

    keys = jax.random.split(jax.random.key(0), DEPTH)
    blocks = eqx.filter_vmap(Block)(keys) if stacked else [Block(key) for key in keys]
    return Network(blocks, eqx.nn.Linear(WIDTH, CLASSES, key=keys[0]))


def _flax(stacked: bool):
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.layer_norm = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
            self.dense = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + nnx.relu(self.dense(self.layer_norm(x)))

    @nnx.split_rngs(splits=DEPTH)
    @nnx.vmap(in_axes=0, out_axes=0)
    def stack(rngs):
        return Block(rngs)

    @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
    def scan(x, block):
        return block(x)

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.blocks: Any = stack(rngs) if stacked else nnx.List([Block(rngs) for _ in range(DEPTH)])
            self.head = nnx.Linear(WIDTH, CLASSES, rngs=rngs)

        def __call__(self, x):
            if stacked:
                return self.head(scan(x, self.blocks))
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Network(nnx.Rngs(0))


def _torch():
    import torch
    from torch import nn

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm = nn.LayerNorm(WIDTH, eps=1e-6)
            self.dense = nn.Linear(WIDTH, WIDTH)

        def forward(self, x):
            return x + torch.relu(self.dense(self.layer_norm(x)))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block() for _ in range(DEPTH))
            self.head = nn.Linear(WIDTH, CLASSES)

        def forward(self, x):
            for block in self.blocks:
                x = block(x)
            return self.head(x)

    return Network()
