"""`python -m benchmarks.convolution`: pools and convolutions beside `jax.grad` of the natural forward.

Equality is asserted first. Medians of interleaved repetitions, so only the ratios mean anything, and they only on a
machine that does nothing else.
"""

import argparse
import time
from collections.abc import Callable
from statistics import geometric_mean, median
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import funcnet as fn
from funcnet import Layer

ROUNDS = 15
CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")


def max_pool(size: int, stride: int) -> Callable:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lambda params, x: lax.reduce_window(x, -jnp.inf, lax.max, window, strides, "VALID")


def avg_pool(size: int, stride: int) -> Callable:
    window, strides = (1, size, size, 1), (1, stride, stride, 1)
    return lambda params, x: lax.reduce_window(x, 0.0, lax.add, window, strides, "VALID") / size**2


def conv(stride: int = 1, groups: int = 1) -> Callable:
    def forward(params, x):
        y = lax.conv_general_dilated(
            x,
            params["kernel"],
            (stride, stride),
            "SAME",
            dimension_numbers=CHANNELS_LAST,
            feature_group_count=groups,
        )
        return y + params["bias"]

    return forward


WORKLOADS: dict[str, tuple[Layer, Callable, tuple[int, ...]]] = {
    "max_pool 2x2/2, 32x32x32x64": (fn.max_pool(2), max_pool(2, 2), (32, 32, 32, 64)),
    "max_pool 3x3/2, 32x32x32x64": (fn.max_pool(3, 2), max_pool(3, 2), (32, 32, 32, 64)),
    "avg_pool 3x3/2, 32x32x32x64": (fn.avg_pool(3, 2), avg_pool(3, 2), (32, 32, 32, 64)),
    "conv 3x3, 32x28x28x32 to 64": (fn.conv(64, 3), conv(), (32, 28, 28, 32)),
    "conv 1x1, 8x56x56x64 to 64": (fn.conv(64, 1), conv(), (8, 56, 56, 64)),
    "conv 3x3, 4 groups, 16x16x16x64": (fn.conv(64, 3, groups=4), conv(groups=4), (16, 16, 16, 64)),
    "depthwise 3x3, 16x32x32x128": (fn.conv(128, 3, groups=128), conv(groups=128), (16, 32, 32, 128)),
}
# the convolutions of ResNet-18 on images of 32 x 32, batch 16: height and width, channels, features, stride
RESNET_18 = ((32, 3, 64, 1), (32, 64, 64, 1), (32, 64, 128, 2), (16, 128, 128, 1), (16, 128, 256, 2), (8, 256, 256, 1))
RESNET_18 += ((4, 512, 512, 1),)
USUAL = {
    f"conv 3x3{f'/{stride}' * (stride > 1)}, 16x{size}x{size}x{channels} to {features}": (
        fn.conv(features, 3, stride),
        conv(stride),
        (16, size, size, channels),
    )
    for size, channels, features, stride in RESNET_18
}


def sides(layer: Layer, natural: Callable, shape: tuple[int, ...]) -> dict[str, tuple[Callable[[], Any], ...]]:
    """For the forward and the backward pass: the hand-written one and autodiff's, each ready to call."""
    x = jax.random.normal(jax.random.key(0), shape)
    params, _ = layer.init(jax.random.key(1), x)
    y, _, residuals = jax.jit(lambda params, x: layer.fwd(params, (), x, None))(params, x)
    dy = jax.random.normal(jax.random.key(2), y.shape)
    forward, plain = jax.jit(lambda params, x: layer.fwd(params, (), x, None)[0]), jax.jit(natural)
    backward, pullback = jax.jit(layer.bwd), jax.jit(lambda params, x, dy: jax.vjp(natural, params, x)[1](dy))
    return {
        "forward": (lambda: forward(params, x), lambda: plain(params, x)),
        "backward": (lambda: backward(params, residuals, dy), lambda: pullback(params, x, dy)),
    }


def assert_equal(given: Any, wanted: Any) -> None:
    for a, b in zip(jax.tree.leaves(given), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5 * float(jnp.abs(b).max()))


def milliseconds(calls: tuple[Callable[[], Any], ...]) -> list[float]:
    """The median time of each, in turn."""
    seconds: list[list[float]] = [[] for _ in calls]
    for _ in range(ROUNDS):
        for call, times in zip(calls, seconds, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            times.append(time.perf_counter() - start)
    return [1e3 * median(times) for times in seconds]


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", help="beginnings of names, or `usual` for the seven shapes of ResNet-18")
    names = parser.parse_args(arguments).names
    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}: milliseconds by hand, by jax.grad, and their ratio")
    ratios = []
    for name, workload in (WORKLOADS | USUAL).items():
        if names and not name.startswith(tuple(names)) and not ("usual" in names and name in USUAL):
            continue
        for way, calls in sides(*workload).items():
            assert_equal(*(call() for call in calls))
            hand, autodiff = milliseconds(calls)
            print(f"{name:34}{way:10}{hand:9.2f}{autodiff:9.2f}{autodiff / hand:8.2f}x", flush=True)
            ratios += [autodiff / hand] * (name in USUAL and way == "backward")
    if len(ratios) == len(USUAL):
        print(f"geometric mean of the seven usual shapes' backward passes: {geometric_mean(ratios):.2f}x")


if __name__ == "__main__":
    main()
