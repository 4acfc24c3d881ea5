"""Four pre-norm gelu blocks x + dense(gelu(dense(layer_norm(x)))) on sequences: a transformer's feed-forward half."""

import jax
import numpy as np

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload

DEPTH, WIDTH, HIDDEN, SHAPE = 4, 256, 1024, (8, 256)
KINDS = ("layer_norm", "dense", "dense_1")
NAMES = [f"block_{i}" for i in range(DEPTH)]


def workload(dtype: str = "float32") -> Workload:
    rng = np.random.default_rng(0)
    inputs, targets = rng.standard_normal((2, *SHAPE, WIDTH)).astype(dtype)
    block = fn.skip(fn.serial(fn.layer_norm(), fn.dense(HIDDEN), fn.gelu(), fn.dense(WIDTH)))

    def places(network):
        layers = getattr(network, "layers", network)  # PyTorch's Sequential is indexed itself
        return {f"{name}/{kind}": getattr(layers[i], kind) for i, name in enumerate(NAMES) for kind in KINDS}

    size = f"{DEPTH} blocks x + dense_{WIDTH}(gelu(dense_{HIDDEN}(layer_norm(x)))) on [{SHAPE[0]}, {SHAPE[1]}, {WIDTH}]"
    return Workload(
        title=f"{size}, mean squared error, Adam, {dtype}",
        sides=peers.sides(
            fn.serial(**dict.fromkeys(NAMES, block)),
            peers.mse(),
            (inputs, targets),
            plain=_plain,
            equinox=_equinox,
            flax=_flax,
            torch=_torch,
            places=places,
        ),
        step_target=0.6,
    )


def _plain(params, x):
    for name in NAMES:
        p = params[name]
        hidden = jax.nn.gelu(peers.dense(p["dense"], peers.layer_norm(p["layer_norm"], x)), approximate=False)
        x = x + peers.dense(p["dense_1"], hidden)
    return x


def _equinox():
    import equinox as eqx

    class Block(eqx.Module):
        layer_norm: eqx.nn.LayerNorm
        dense: eqx.nn.Linear
        dense_1: eqx.nn.Linear

        def __init__(self, key):
            self.layer_norm = eqx.nn.LayerNorm(WIDTH, eps=1e-6)
            self.dense = eqx.nn.Linear(WIDTH, HIDDEN, key=key)
            self.dense_1 = eqx.nn.Linear(HIDDEN, WIDTH, key=key)

        def __call__(self, x, *, key=None):
            return x + self.dense_1(jax.nn.gelu(self.dense(self.layer_norm(x)), approximate=False))

    return eqx.nn.Sequential([Block(key) for key in jax.random.split(jax.random.key(0), DEPTH)])


def _flax():
    from flax import nnx

    class Block(nnx.Module):
        def __init__(self, rngs):
            self.layer_norm = nnx.LayerNorm(WIDTH, epsilon=1e-6, rngs=rngs)
            self.dense = nnx.Linear(WIDTH, HIDDEN, rngs=rngs)
            self.dense_1 = nnx.Linear(HIDDEN, WIDTH, rngs=rngs)

        def __call__(self, x):
            return x + self.dense_1(nnx.gelu(self.dense(self.layer_norm(x)), approximate=False))

    rngs = nnx.Rngs(0)
    return nnx.Sequential(*(Block(rngs) for _ in range(DEPTH)))


def _torch():
    from torch import nn
    from torch.nn import functional

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer_norm = nn.LayerNorm(WIDTH, eps=1e-6)
            self.dense = nn.Linear(WIDTH, HIDDEN)
            self.dense_1 = nn.Linear(HIDDEN, WIDTH)

        def forward(self, x):
            return x + self.dense_1(functional.gelu(self.dense(self.layer_norm(x))))

    return nn.Sequential(*(Block() for _ in range(DEPTH)))
