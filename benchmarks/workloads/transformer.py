"""A language model of four pre-norm transformer blocks: embedding, learned positions, causal attention, gelu, head.

The blocks have no biases: that of the keys has the gradient 0, of which every side would compare its own rounding.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload

DEPTH, WIDTH, HEADS, VOCAB, SHAPE = 4, 256, 8, 256, (8, 256)
NAMES = [f"block_{i}" for i in range(DEPTH)]
PROJECTIONS = ("query", "key", "value", "out")


def workload(dtype: str = "float32") -> Workload:
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCAB, (2, *SHAPE), dtype=np.int32)
    block = fn.transformer_block(WIDTH, HEADS, causal=True, use_bias=False)
    model = fn.serial(
        fn.embedding(VOCAB, WIDTH, dtype=dtype),
        fn.position_embedding(SHAPE[1]),
        **dict.fromkeys(NAMES, block),
        norm=fn.layer_norm(),
        head=fn.dense(VOCAB),
    )
    size = f"{DEPTH} transformer blocks without biases, D={WIDTH}, {HEADS} heads, B={SHAPE[0]}, T={SHAPE[1]}, V={VOCAB}"
    return Workload(
        title=f"{size}, cross-entropy, Adam, {dtype}",
        sides=peers.sides(
            model,
            peers.cross_entropy(),
            (ids, targets),
            plain=_plain,
            equinox=_equinox,
            flax=_flax,
            torch=_torch,
            places=_places,
        ),
        step_target=1 / 1.9,
        temp_target=0.7,
        exact=1e-6,  # Flax takes the square root of 32 in float32
    )


def _places(network: Any) -> dict[str, Any]:
    """Where in a peer's network funcnet's layers are; all three name their parts alike."""
    found = {"embedding": network.embedding, "position_embedding": network.positions}
    for name, block in zip(NAMES, network.blocks, strict=True):
        found |= {f"{name}/attention/norm": block.norm_1, f"{name}/mlp/norm": block.norm_2}
        found |= {f"{name}/mlp/mlp/hidden": block.hidden, f"{name}/mlp/mlp/out": block.out}
        found |= {f"{name}/attention/attention/{p}": block.projection(p) for p in PROJECTIONS}
    return found | {"norm": network.norm, "head": network.head}


def _plain(params, ids):
    x = params["embedding"]["embedding"][ids] + params["position_embedding"]["embedding"][: ids.shape[1]]
    for name in NAMES:
        p, q = params[name]["attention"], params[name]["mlp"]
        x = x + _plain_attention(p["attention"], peers.layer_norm(p["norm"], x))
        hidden = jax.nn.gelu(peers.layer_norm(q["norm"], x) @ q["mlp"]["hidden"]["kernel"], approximate=False)
        x = x + hidden @ q["mlp"]["out"]["kernel"]
    return peers.dense(params["head"], peers.layer_norm(params["norm"], x))


def _plain_attention(p, x):
    q, k, v = ((x @ p[name]["kernel"]).reshape(*x.shape[:2], HEADS, -1) for name in PROJECTIONS[:3])
    scores = jnp.einsum("bthd,bshd->bhts", q, k) / np.sqrt(q.shape[-1]).astype(x.dtype)
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))
    weights = jax.nn.softmax(jnp.where(seen, scores, -jnp.inf), axis=-1)
    return jnp.einsum("bhts,bshd->bthd", weights, v).reshape(x.shape) @ p["out"]["kernel"]


def _equinox():
    import equinox as eqx

    class Block(eqx.Module):
        norm_1: eqx.nn.LayerNorm
        norm_2: eqx.nn.LayerNorm
        attention: eqx.nn.MultiheadAttention
        hidden: eqx.nn.Linear
        out: eqx.nn.Linear

        def __init__(self, key):
            self.norm_1, self.norm_2 = (eqx.nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.attention = eqx.nn.MultiheadAttention(HEADS, WIDTH, key=key)
            self.hidden = eqx.nn.Linear(WIDTH, 4 * WIDTH, use_bias=False, key=key)
            self.out = eqx.nn.Linear(4 * WIDTH, WIDTH, use_bias=False, key=key)

        def projection(self, name):
            return getattr(self.attention, f"{'output' if name == 'out' else name}_proj")

        def __call__(self, x):
            seen = jnp.tril(jnp.ones((len(x), len(x)), bool))
            normed = jax.vmap(self.norm_1)(x)
            x = x + self.attention(normed, normed, normed, seen)
            feed = lambda x: self.out(jax.nn.gelu(self.hidden(self.norm_2(x)), approximate=False))
            return x + jax.vmap(feed)(x)

    class Network(eqx.Module):
        embedding: eqx.nn.Embedding
        positions: eqx.nn.Embedding
        blocks: list[Block]
        norm: eqx.nn.LayerNorm
        head: eqx.nn.Linear

        def __call__(self, ids):
            x = jax.vmap(self.embedding)(ids) + jax.vmap(self.positions)(jnp.arange(len(ids)))
            for block in self.blocks:
                x = block(x)
            return jax.vmap(lambda x: self.head(self.norm(x)))(x)

    key = jax.random.key(0)
    table, positions = (eqx.nn.Embedding(rows, WIDTH, key=key) for rows in (VOCAB, SHAPE[1]))
    blocks, norm = [Block(key) for _ in NAMES], eqx.nn.LayerNorm(WIDTH, eps=1e-6)
    return Network(table, positions, blocks, norm, eqx.nn.Linear(WIDTH, VOCAB, key=key))


def _flax():
    from flax import nnx

    class Flat:
        """A kernel of Flax's attention, whose heads have an axis of their own, as a dense layer's."""

        def __init__(self, kernel):
            self.kernel, self.inner = self, kernel

        def set_value(self, value):
            self.inner.set_value(value.reshape(self.inner.shape))

        def __getitem__(self, index):
            return self.inner[...].reshape(WIDTH, WIDTH)[index]

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.norm_1, self.norm_2 = (nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs) for _ in range(2))
            self.attention = nnx.MultiHeadAttention(HEADS, WIDTH, use_bias=False, decode=False, rngs=rngs)
            self.hidden = nnx.Linear(WIDTH, 4 * WIDTH, use_bias=False, rngs=rngs)
            self.out = nnx.Linear(4 * WIDTH, WIDTH, use_bias=False, rngs=rngs)

        def projection(self, name):
            return Flat(getattr(self.attention, name).kernel)

        def __call__(self, x):
            x = x + self.attention(self.norm_1(x), mask=nnx.make_causal_mask(x[..., 0]))
            return x + self.out(nnx.gelu(self.hidden(self.norm_2(x)), approximate=False))

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.embedding = nnx.Embed(VOCAB, WIDTH, rngs=rngs)
            self.positions = nnx.Embed(SHAPE[1], WIDTH, rngs=rngs)
            self.blocks = nnx.List([Block(rngs) for _ in NAMES])
            self.norm = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

        def __call__(self, ids):
            x = self.embedding(ids) + self.positions(jnp.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x))

    return Network(nnx.Rngs(0))


def _torch():
    import torch
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm_1, self.norm_2 = (nn.LayerNorm(WIDTH, eps=1e-6) for _ in range(2))
            self.attention = nn.ModuleDict({f"{name}_": nn.Linear(WIDTH, WIDTH, bias=False) for name in PROJECTIONS})
            self.hidden = nn.Linear(WIDTH, 4 * WIDTH, bias=False)
            self.out = nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def projection(self, name):
            return self.attention[f"{name}_"]

        def forward(self, x):
            normed = self.norm_1(x)
            q, k, v = (
                self.projection(name)(normed).unflatten(-1, (HEADS, -1)).transpose(1, 2) for name in PROJECTIONS[:3]
            )
            o = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.projection("out")(o.transpose(1, 2).flatten(2))
            return x + self.out(functional.gelu(self.hidden(self.norm_2(x))))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.positions = nn.Embedding(VOCAB, WIDTH), nn.Embedding(SHAPE[1], WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in NAMES)
            self.norm, self.head = nn.LayerNorm(WIDTH, eps=1e-6), nn.Linear(WIDTH, VOCAB)

        def forward(self, ids):
            x = self.embedding(ids) + self.positions(torch.arange(ids.shape[1]))
            for block in self.blocks:
                x = block(x)
            return self.head(self.norm(x)).transpose(1, 2)  # classes on the second axis, as its cross_entropy wants

    return Network()
