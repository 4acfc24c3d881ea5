"""A recurrent language model: embedding, an lstm of 512, a dense head of 256."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload
from benchmarks.recurrent import CELLS, in_scan

WIDTH, VOCAB, SHAPE = 512, 256, (16, 128)


def workload(dtype: str = "float32") -> Workload:
    rng = np.random.default_rng(0)
    ids, targets = rng.integers(0, VOCAB, (2, *SHAPE), dtype=np.int32)
    model = fn.serial(fn.embedding(VOCAB, WIDTH, dtype=dtype), fn.lstm(WIDTH), head=fn.dense(VOCAB))
    size = f"embedding {WIDTH}, lstm {WIDTH}, dense {VOCAB}, B={SHAPE[0]}, T={SHAPE[1]}"
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
            places=lambda network: {"embedding": network.embedding, "lstm": network.weights(), "head": network.head},
        ),
        step_target=1 / 2,
    )


class Weights(NamedTuple):
    """An Equinox or PyTorch lstm's arrays by the names that `peers` looks for."""

    weight: Any
    recurrent_weight: Any
    bias: Any


def _plain(params, ids):
    x = params["embedding"]["embedding"][ids]
    return peers.dense(params["head"], in_scan(CELLS["lstm"], params["lstm"], x, hoisted=False))


def _equinox():
    import equinox as eqx

    class Network(eqx.Module):
        embedding: eqx.nn.Embedding
        cell: eqx.nn.LSTMCell
        head: eqx.nn.Linear

        def weights(self):
            return Weights(self.cell.weight_ih, self.cell.weight_hh, self.cell.bias)

        def __call__(self, ids):
            x = jax.vmap(self.embedding)(ids)

            def body(state, x):
                state = self.cell(x, state)
                return state, state[0]

            zeros = jnp.zeros(WIDTH, x.dtype)
            return jax.vmap(self.head)(lax.scan(body, (zeros, zeros), x)[1])

    key = jax.random.key(0)
    table, cell = eqx.nn.Embedding(VOCAB, WIDTH, key=key), eqx.nn.LSTMCell(WIDTH, WIDTH, key=key)
    return Network(table, cell, eqx.nn.Linear(WIDTH, VOCAB, key=key))


def _flax():
    from flax import nnx

    class Fields(NamedTuple):
        kernel: Any
        recurrent_kernel: Any
        bias: Any

    class Network(nnx.Module):
        def __init__(self, rngs):
            dtype = jnp.zeros(()).dtype  # its own is float32, to which it would cast float64 parameters
            self.embedding = nnx.Embed(VOCAB, WIDTH, param_dtype=dtype, rngs=rngs)
            self.cell = nnx.OptimizedLSTMCell(WIDTH, WIDTH, rngs=rngs)
            self.rnn: Any = nnx.RNN(self.cell)
            self.head = nnx.Linear(WIDTH, VOCAB, rngs=rngs)

        def weights(self):
            return Fields(self.cell.dense_i.kernel, self.cell.dense_h.kernel, self.cell.dense_h.bias)

        def __call__(self, ids):
            x = self.embedding(ids)
            zeros = jnp.zeros((len(ids), WIDTH), x.dtype)  # its own would be float32
            return self.head(self.rnn(x, initial_carry=(zeros, zeros)))

    return Network(nnx.Rngs(0))


def _torch():
    """PyTorch's second bias, which adds to the first, stays zero."""
    from torch import nn

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCAB, WIDTH), nn.Linear(WIDTH, VOCAB)
            self.lstm: Any = nn.LSTM(WIDTH, WIDTH, batch_first=True)
            nn.init.zeros_(self.lstm.bias_hh_l0).requires_grad_(False)

        def weights(self):
            return Weights(self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, self.lstm.bias_ih_l0)

        def forward(self, ids):
            return self.head(self.lstm(self.embedding(ids))[0]).transpose(1, 2)  # classes second, for cross_entropy

    return Network()
