"""A small convolutional network on images: conv 32, pool, conv 64, pool, dense 128, dense 10."""

import jax
import numpy as np
from jax import lax

import funcnet as fn
from benchmarks import peers
from benchmarks.harness import Workload

SHAPE, CHANNELS, HIDDEN, CLASSES = (64, 32, 32, 3), (32, 64), 128, 10
POSITIONS = (SHAPE[1] // 4) * (SHAPE[2] // 4)
NAMES = ("conv", "conv_1", "dense", "dense_1")


def workload(dtype: str = "float32") -> Workload:
    rng = np.random.default_rng(0)
    images = rng.standard_normal(SHAPE).astype(dtype)
    labels = rng.integers(0, CLASSES, SHAPE[0], dtype=np.int32)
    stages = [layer for width in CHANNELS for layer in (fn.conv(width, 3), fn.relu(), fn.max_pool(2))]
    model = fn.serial(*stages, fn.flatten(), fn.dense(HIDDEN), fn.relu(), fn.dense(CLASSES))
    batch, height, width, colors = SHAPE
    return Workload(
        title=f"conv 3x3 {CHANNELS[0]} and {CHANNELS[1]}, each with relu and max-pool 2x2, dense {HIDDEN} with relu, "
        f"dense {CLASSES}, cross-entropy, on [{batch}, {height}, {width}, {colors}], Adam, {dtype}",
        sides=peers.sides(
            model,
            peers.cross_entropy(),
            (images, labels),
            plain=_plain,
            equinox=_equinox,
            flax=_flax,
            torch=_torch,
            places=lambda network: {name: getattr(network, name) for name in NAMES},
            example_rank=3,
        ),
        step_target=1 / 1.5,
    )


def _plain(params, x):
    for name in NAMES[:2]:
        p = params[name]
        x = lax.conv_general_dilated(x, p["kernel"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + p["bias"])
        x = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(peers.dense(params["dense"], x.reshape(len(x), -1)))
    return peers.dense(params["dense_1"], x)


def _equinox():
    """Channels first inside, as Equinox has it; flattened with the channels last, so that the kernels are the same."""
    import equinox as eqx

    class Network(eqx.Module):
        conv: eqx.nn.Conv2d
        conv_1: eqx.nn.Conv2d
        dense: eqx.nn.Linear
        dense_1: eqx.nn.Linear
        pool: eqx.nn.MaxPool2d

        def __init__(self, key):
            keys = jax.random.split(key, 4)
            self.conv = eqx.nn.Conv2d(SHAPE[3], CHANNELS[0], 3, padding=1, key=keys[0])
            self.conv_1 = eqx.nn.Conv2d(*CHANNELS, 3, padding=1, key=keys[1])
            self.dense = eqx.nn.Linear(POSITIONS * CHANNELS[1], HIDDEN, key=keys[2])
            self.dense_1 = eqx.nn.Linear(HIDDEN, CLASSES, key=keys[3])
            self.pool = eqx.nn.MaxPool2d(2, 2)

        def __call__(self, x):
            x = x.transpose(2, 0, 1)
            x = self.pool(jax.nn.relu(self.conv(x)))
            x = self.pool(jax.nn.relu(self.conv_1(x)))
            return self.dense_1(jax.nn.relu(self.dense(x.transpose(1, 2, 0).reshape(-1))))

    return Network(jax.random.key(0))


def _flax():
    from flax import nnx

    class Network(nnx.Module):
        def __init__(self, rngs):
            self.conv = nnx.Conv(SHAPE[3], CHANNELS[0], (3, 3), rngs=rngs)
            self.conv_1 = nnx.Conv(*CHANNELS, (3, 3), rngs=rngs)
            self.dense = nnx.Linear(POSITIONS * CHANNELS[1], HIDDEN, rngs=rngs)
            self.dense_1 = nnx.Linear(HIDDEN, CLASSES, rngs=rngs)

        def __call__(self, x):
            x = nnx.max_pool(nnx.relu(self.conv(x)), (2, 2), (2, 2))
            x = nnx.max_pool(nnx.relu(self.conv_1(x)), (2, 2), (2, 2))
            return self.dense_1(nnx.relu(self.dense(x.reshape(len(x), -1))))

    return Network(nnx.Rngs(0))


def _torch():
    """A view with the channels second is what PyTorch calls channels last in memory."""
    from torch import channels_last, nn, relu
    from torch.nn.functional import max_pool2d

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(SHAPE[3], CHANNELS[0], 3, padding=1)
            self.conv_1 = nn.Conv2d(*CHANNELS, 3, padding=1)
            self.dense = nn.Linear(POSITIONS * CHANNELS[1], HIDDEN)
            self.dense_1 = nn.Linear(HIDDEN, CLASSES)
            for conv in (self.conv, self.conv_1):
                conv.weight.data = conv.weight.data.contiguous(memory_format=channels_last)

        def forward(self, x):
            x = max_pool2d(relu(self.conv(x.permute(0, 3, 1, 2))), 2)
            x = max_pool2d(relu(self.conv_1(x)), 2)
            return self.dense_1(relu(self.dense(x.permute(0, 2, 3, 1).flatten(1))))

    return Network()
