"""A relu MLP in every framework, for the workloads that differ in size only."""

from itertools import pairwise

import jax
import numpy as np

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload


def mlp(sizes: list[int], batch: int, dtype: str) -> Workload:
    """Dense layers of these sizes with relu between them, cross-entropy, on random inputs and labels."""
    rng = np.random.default_rng(0)
    inputs = rng.standard_normal((batch, sizes[0])).astype(dtype)
    labels = rng.integers(0, sizes[-1], batch, dtype=np.int32)
    shapes = list(pairwise(sizes))
    names = ["dense", *(f"dense_{i}" for i in range(1, len(shapes)))]

    def chain(dense, relu):
        """dense, relu, dense, .., dense"""
        return [layer for shape in shapes for layer in (dense(*shape), relu())][:-1]

    def plain(params, x):
        for name in names[:-1]:
            x = jax.nn.relu(peers.dense(params[name], x))
        return peers.dense(params[names[-1]], x)

    def equinox():
        from equinox import nn

        key = jax.random.key(0)
        return nn.Sequential(chain(lambda i, o: nn.Linear(i, o, key=key), lambda: nn.Lambda(jax.nn.relu)))

    def flax():
        from flax import nnx

        rngs = nnx.Rngs(0)
        return nnx.Sequential(*chain(lambda i, o: nnx.Linear(i, o, rngs=rngs), lambda: nnx.relu))

    def torch():
        from torch import nn

        return nn.Sequential(*chain(nn.Linear, nn.ReLU))

    def places(network):
        layers = getattr(network, "layers", network)  # PyTorch's Sequential is indexed itself
        return {name: layers[2 * i] for i, name in enumerate(names)}

    model = fn.serial(*chain(lambda _, o: fn.dense(o), fn.relu))
    return Workload(
        title=f"dense {'-'.join(map(str, sizes))} with relu, cross-entropy, batch of {batch}, Adam, {dtype}",
        sides=peers.sides(
            model,
            peers.cross_entropy(),
            (inputs, labels),
            plain=plain,
            equinox=equinox,
            flax=flax,
            torch=torch,
            places=places,
        ),
    )
