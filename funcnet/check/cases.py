"""The library's own rules, each at the shapes and options it is checked at: one table for tests, command and readers.

A name is the constructor's, then what is special. Shapes have odd sizes and sizes of one, and from one axis to five;
the order is that of the library: layers, losses, combinators.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax.nn import initializers as _init

from funcnet.check.checker import ORACLES, check_layer
from funcnet.check.report import Report
from funcnet.combine import parallel, repeat, serial, skip
from funcnet.layer import Layer, elementwise, no_params, stateless
from funcnet.layers.activation import (
    celu,
    elu,
    gelu,
    hard_sigmoid,
    hard_silu,
    hard_tanh,
    identity,
    leaky_relu,
    log_sigmoid,
    mish,
    relu,
    relu6,
    selu,
    sigmoid,
    silu,
    softplus,
    softsign,
    squareplus,
    tanh,
)
from funcnet.layers.dense import dense
from funcnet.layers.dropout import dropout
from funcnet.layers.norm import layer_norm, rms_norm
from funcnet.layers.reshape import flatten, reshape
from funcnet.losses import binary_cross_entropy, cross_entropy, huber, mae, mse
from funcnet.transform import mixed, remat

DTYPES = ("float64", "float32", "bfloat16", "float16")


@dataclass(frozen=True, eq=False)
class Case:
    """A layer and an input to check it at.

    Attributes:
        name: the constructor's name, and after a slash what is special.
        layer: the layer.
        x: its input in the texts of `funcnet.check.spec`, or a tuple of them; floating arrays are cast to each dtype.
        dtypes: those it is checked in.
    """

    name: str
    layer: Layer
    x: Any
    dtypes: tuple[str, ...] = DTYPES

    @property
    def constructor(self) -> str:
        """The name of the function that makes the layer."""
        return self.name.split("/")[0]

    def check(self, dtype: str = "", oracles: Sequence[str] = (), **options: Any) -> Report:
        """`fn.check_layer` in one of its dtypes, the first by default.

        By default the first is put before all oracles, the others before autodiff alone.
        """
        dtype = dtype or self.dtypes[0]
        oracles = oracles or (ORACLES if dtype == self.dtypes[0] else ("autodiff",))
        return check_layer(self.layer, self.x, dtype=dtype, oracles=oracles, **options)


def _softmax() -> Layer:
    """A rule as a user may write it: y = e^x / sum(e^x) over the last axis, dx = y (dy - sum(dy y))."""

    def fwd(params, x):
        e = jnp.exp(x - jnp.max(x, -1, keepdims=True))
        y = e / jnp.sum(e, -1, keepdims=True)
        return y, y

    def bwd(params, y, dy, contract):
        return {}, y * (dy - jnp.sum(dy * y, -1, keepdims=True))

    return stateless("softmax", no_params, fwd, bwd)


_BLOCK = serial(layer_norm(), dense(3), gelu(), dense(5))

CASES: tuple[Case, ...] = (
    Case("dense", dense(3), "f32[4,5]"),
    Case("dense/rank 1", dense(3), "f32[5]"),
    Case("dense/rank 3", dense(4), "f32[3,2,5]"),
    Case("dense/rank 5", dense(2), "f32[2,1,3,2,5]"),
    Case("dense/one feature of one", dense(1), "f32[1,1]"),
    Case("dense/one feature to many", dense(7), "f32[3,1]"),
    Case("dense/one example", dense(3), "f32[1,5]"),
    Case("dense/no bias", dense(3, use_bias=False), "f32[4,5]"),
    Case("dense/initializers", dense(3, kernel_init=_init.he_uniform(), bias_init=_init.ones), "f32[4,5]"),
    Case("layer_norm", layer_norm(), "f32[4,5]"),
    Case("layer_norm/rank 1", layer_norm(), "f32[5]"),
    Case("layer_norm/rank 5", layer_norm(), "f32[2,1,3,2,7]"),
    Case("layer_norm/one feature", layer_norm(), "f32[3,1]"),
    Case("layer_norm/large eps", layer_norm(eps=0.3), "f32[4,5]"),
    Case("rms_norm", rms_norm(), "f32[4,5]"),
    Case("rms_norm/rank 1", rms_norm(), "f32[5]"),
    Case("rms_norm/rank 5", rms_norm(), "f32[2,1,3,2,7]"),
    # With a small eps dx is eps in size here, which x_hat rounded to half precision does not tell from 0.
    Case("rms_norm/one feature", rms_norm(), "f32[3,1]", ("float64", "float32")),
    Case("rms_norm/one feature, large eps", rms_norm(eps=0.3), "f32[3,1]"),
    Case("rms_norm/large eps", rms_norm(eps=0.3), "f32[4,5]"),
    Case("dropout", dropout(0.4), "f32[4,5]"),
    Case("dropout/rate 0", dropout(0.0), "f32[3]"),
    Case("dropout/rank 5", dropout(0.9), "f32[2,1,3,2,5]"),
    Case("flatten", flatten(), "f32[4,3,5]"),
    Case("flatten/rank 1", flatten(), "f32[3]"),
    Case("flatten/rank 5", flatten(), "f32[1,3,1,2,5]"),
    Case("reshape", reshape(5, 3), "f32[4,3,5]"),
    Case("reshape/one size open", reshape(2, -1, 1), "f32[3,4,5]"),
    Case("reshape/no sizes", reshape(), "f32[3,1,1]"),
    # Wide enough that hard activations are met on every side of their kinks.
    Case("identity", identity(), "f32[5]>-8<8"),
    Case("relu", relu(), "f32[4,5]>-8<8"),
    Case("relu6", relu6(), "f32[4,9]>-8<8"),
    Case("leaky_relu", leaky_relu(), "f32[3,1,5]>-8<8"),
    Case("leaky_relu/slope 0.3", leaky_relu(0.3), "f32[4,5]>-8<8"),
    Case("leaky_relu/slope 0", leaky_relu(0.0), "f32[4,5]>-8<8"),
    Case("elu", elu(), "f32[2,3,1,5]>-8<8"),
    Case("elu/alpha", elu(0.7), "f32[4,5]>-8<8"),
    Case("celu", celu(), "f32[2,1,3,1,5]>-8<8"),
    Case("celu/alpha", celu(2.5), "f32[4,5]>-8<8"),
    Case("selu", selu(), "f32[4,5]>-8<8"),
    Case("gelu", gelu(), "f32[4,5]>-8<8"),
    Case("gelu/approximate", gelu(approximate=True), "f32[4,5]>-8<8"),
    Case("silu", silu(), "f32[4,5]>-8<8"),
    Case("mish", mish(), "f32[4,5]>-8<8"),
    Case("softplus", softplus(), "f32[4,5]>-8<8"),
    Case("sigmoid", sigmoid(), "f32[4,5]>-8<8"),
    Case("log_sigmoid", log_sigmoid(), "f32[4,5]>-8<8"),
    Case("tanh", tanh(), "f32[4,5]>-8<8"),
    Case("hard_tanh", hard_tanh(), "f32[4,9]>-8<8"),
    Case("hard_sigmoid", hard_sigmoid(), "f32[4,9]>-8<8"),
    Case("hard_silu", hard_silu(), "f32[4,9]>-8<8"),
    Case("squareplus", squareplus(), "f32[4,5]>-8<8"),
    Case("squareplus/b", squareplus(0.5), "f32[4,5]>-8<8"),
    Case("softsign", softsign(), "f32[4,5]>-8<8"),
    Case("elementwise/saves the input", elementwise("square", jnp.square, lambda x: 2 * x), "f32[4,5]"),
    Case("elementwise/saves the output", elementwise("exp", jnp.exp, lambda y: y, "output"), "f32[4,5]"),
    Case("stateless", _softmax(), "f32[4,5]"),
    Case("cross_entropy", cross_entropy(), ("f32[6,5]", "i32[6]<5")),
    Case("cross_entropy/one example", cross_entropy(), ("f32[5]", "i32[]<5")),
    Case("cross_entropy/one class", cross_entropy(), ("f32[3,1]", "i32[3]<1")),
    Case("cross_entropy/positions", cross_entropy(), ("f32[2,3,1,2,5]", "i32[2,3,1,2]<5")),
    Case("cross_entropy/smoothing", cross_entropy(0.1), ("f32[6,5]", "u8[6]<5")),
    Case("cross_entropy/ignored", cross_entropy(ignore_index=2), ("f32[6,5]", "i32[6]<5")),
    Case("cross_entropy/smoothing, ignored", cross_entropy(0.2, ignore_index=-1), ("f32[6,5]", "i8[6]>-1<5")),
    Case("cross_entropy/soft labels", cross_entropy(), ("f32[6,5]", "f32[6,5]>0<1")),
    Case("cross_entropy/smoothed soft labels", cross_entropy(0.1), ("f32[2,3,5]", "f32[2,3,5]>0<1")),
    Case("binary_cross_entropy", binary_cross_entropy(), ("f32[6,5]", "f32[6,5]>0<1")),
    Case("binary_cross_entropy/integers", binary_cross_entropy(), ("f32[6,1]", "i32[6,1]<2")),
    Case("binary_cross_entropy/booleans", binary_cross_entropy(), ("f32[6]", "bool[6]")),
    Case("binary_cross_entropy/rank 5", binary_cross_entropy(), ("f32[3,1,2,1,5]", "f32[3,1,2,1,5]>0<1")),
    Case("mse", mse(), ("f32[6,5]", "f32[6,5]")),
    Case("mse/rank 1", mse(), ("f32[1]", "f32[1]")),
    Case("mse/rank 5", mse(), ("f32[3,1,2,1,5]", "f32[3,1,2,1,5]")),
    Case("mae", mae(), ("f32[2,3,5]", "f32[2,3,5]")),
    Case("mae/rank 1", mae(), ("f32[3]", "f32[3]")),
    Case("huber", huber(), ("f32[6,5]", "f32[6,5]")),
    Case("huber/delta", huber(0.3), ("f32[2,3,5]", "f32[2,3,5]")),
    Case("serial", serial(dense(3), tanh(), dense(2)), "f32[4,5]"),
    Case("serial/one layer, named", serial(last=dense(3)), "f32[4,5]"),
    Case("serial/nested, random", serial(serial(dense(3), dropout(0.3)), flatten(), rms_norm()), "f32[4,2,5]"),
    Case("parallel", parallel(dense(3), serial(dense(2), softsign())), ("f32[4,5]", "f32[4,3]")),
    Case("parallel/integers beside floats", parallel(tanh(), flatten()), ("f32[4,5]", "i32[4,2,3]<7")),
    Case("skip", skip(_BLOCK), "f32[4,5]"),
    Case("skip/of a skip", skip(skip(dense(5))), "f32[2,3,5]"),
    Case("repeat", repeat(skip(_BLOCK), 3), "f32[4,5]"),
    Case("repeat/once, random", repeat(dropout(0.4), 1), "f32[4,5]"),
    Case("repeat/of a repeat", repeat(repeat(serial(dense(3), silu()), 2), 2), "f32[4,3]"),
    Case("remat", remat(_BLOCK), "f32[4,5]"),
    Case("remat/random, repeated", repeat(remat(serial(dense(3), dropout(0.4))), 2), "f32[4,3]"),
    Case("mixed", mixed(serial(dense(3), gelu(), rms_norm())), "f32[4,5]", ("float32",)),
    Case("mixed/float16", mixed(serial(dense(3), tanh()), compute="float16"), "f32[4,5]", ("float32",)),
    Case("mixed/float64", mixed(dense(3), "float64", "float32", "float64"), "f32[4,5]", ("float64",)),
    Case("mixed/repeated", repeat(mixed(dense(3)), 2), "f32[4,3]", ("float32",)),
)


def constructors() -> frozenset[str]:
    """The names of the functions whose layers are in the table."""
    return frozenset(case.constructor for case in CASES)
