"""Numbers as options: NumPy's and JAX's mean what Python's mean, in every layer, combinator and loss that takes one.

A NumPy scalar is an array to JAX: taken as it is, one of float64 turns a bfloat16 layer into a float32 one.
"""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.numerics import sum_dtype
from funcnet.train.objective import as_layer
from tests.trees import normal

KEY = jax.random.key(0)


def routed(**options):
    model = fn.serial(fn.router_totals(), fn.moe(fn.dense(3), 2))
    return as_layer(fn.objective(model, fn.router_losses(fn.mse(), **options)))


PAIR, LABELLED = [(2, 3), (2, 3)], [(2, 3), 2]

# option: (makes a layer of a number, the number, the shape of x: a list where it is a tuple, 2 for two labels)
REALS = {
    "leaky_relu slope": (fn.leaky_relu, 0.25, (2, 3)),
    "elu alpha": (fn.elu, 0.25, (2, 3)),
    "celu alpha": (fn.celu, 0.25, (2, 3)),
    "squareplus b": (fn.squareplus, 0.25, (2, 3)),
    "prelu slope": (fn.prelu, 0.25, (2, 3)),
    "dropout rate": (fn.dropout, 0.25, (2, 3)),
    "spatial_dropout rate": (fn.spatial_dropout, 0.25, (2, 3)),
    "drop_path rate": (fn.drop_path, 0.25, (2, 3)),
    "mlp rate": (lambda n: fn.mlp(4, 3, rate=n), 0.25, (2, 3)),
    "attention rate": (lambda n: fn.attention(1, rate=n), 0.25, (1, 3, 2)),
    "attention rotary_base": (lambda n: fn.attention(1, rotary=True, rotary_base=n), 16.0, (1, 3, 2)),
    "transformer_block rate": (lambda n: fn.transformer_block(4, 1, rate=n, attention_rate=n), 0.25, (1, 3, 4)),
    "sinusoidal_positions base": (fn.sinusoidal_positions, 16.0, (1, 3, 2)),
    "lstm forget_bias": (lambda n: fn.lstm(2, forget_bias=n), 0.25, (1, 3, 2)),
    "lru r_min": (lambda n: fn.lru(2, 2, r_min=n), 0.25, (1, 3, 2)),
    "lru r_max": (lambda n: fn.lru(2, 2, r_max=n), 0.25, (1, 3, 2)),
    "lru max_phase": (lambda n: fn.lru(2, 2, max_phase=n), 0.25, (1, 3, 2)),
    "layer_norm eps": (lambda n: fn.layer_norm(eps=n), 0.25, (2, 3)),
    "rms_norm eps": (lambda n: fn.rms_norm(eps=n), 0.25, (2, 3)),
    "group_norm eps": (lambda n: fn.group_norm(2, eps=n), 0.25, (2, 4)),
    "instance_norm eps": (lambda n: fn.instance_norm(eps=n), 0.25, (2, 3, 4)),
    "batch_norm eps": (lambda n: fn.batch_norm(eps=n), 0.25, (2, 4)),
    "batch_norm momentum": (lambda n: fn.batch_norm(momentum=n), 0.25, (2, 4)),
    "residual_block eps": (lambda n: fn.residual_block(2, eps=n), 0.25, (1, 3, 2)),
    "residual_block momentum": (lambda n: fn.residual_block(2, momentum=n), 0.25, (1, 3, 2)),
    "cross_entropy label_smoothing": (lambda n: fn.cross_entropy(label_smoothing=n), 0.25, PAIR),
    "binary_cross_entropy pos_weight": (lambda n: fn.binary_cross_entropy(pos_weight=n), 0.25, PAIR),
    "focal gamma": (fn.focal, 2.0, PAIR),
    "focal alpha": (lambda n: fn.focal(alpha=n), 0.25, PAIR),
    "huber delta": (fn.huber, 0.25, PAIR),
    "contrastive temperature": (fn.contrastive, 0.25, PAIR),
    "triplet margin": (fn.triplet, 0.25, [(2, 3), PAIR]),
    "linear_cross_entropy label_smoothing": (lambda n: fn.linear_cross_entropy(3, label_smoothing=n), 0.25, LABELLED),
    "linear_cross_entropy z_loss": (lambda n: fn.linear_cross_entropy(3, z_loss=n), 0.25, LABELLED),
    "moe capacity_factor": (lambda n: fn.moe(fn.dense(2), 2, capacity_factor=n), 0.25, (1, 5, 2)),
    "router_losses balance": (lambda n: routed(balance=n), 0.25, PAIR),
    "router_losses z": (lambda n: routed(z=n), 0.25, PAIR),
}
WHOLES = {
    "dense features": (fn.dense, 2, (2, 3)),
    "maxout pieces": (fn.maxout, 2, (2, 4)),
    "concat axis": (lambda n: fn.serial(fn.branch(fn.relu(), fn.tanh()), fn.concat(n)), 1, (2, 3)),
    "reshape shape": (lambda n: fn.reshape(n, 3), 2, (2, 6)),
    "max_pool window": (lambda n: fn.max_pool(n, n, n // n), 2, (1, 5, 2)),
    "avg_pool window": (lambda n: fn.avg_pool((n,), (n,), ((n // n, 0),), count_include_pad=False), 2, (1, 5, 2)),
    "conv": (lambda n: fn.conv(n, n, n, n, dilation=n, groups=n), 2, (1, 5, 4)),
    "depthwise_conv": (lambda n: fn.depthwise_conv(n, n, n, multiplier=n), 2, (1, 5, 2)),
    "conv_transpose": (lambda n: fn.conv_transpose(n, n, n, n // n, dilation=n), 2, (1, 5, 2)),
    "separable_conv": (lambda n: fn.separable_conv(n, n, n), 2, (1, 5, 2)),
    "residual_block": (lambda n: fn.residual_block(n), 2, (1, 3, 2)),
    "position_embedding length": (fn.position_embedding, 4, (1, 3, 2)),
    "attention sizes": (lambda n: fn.attention(n, kv_heads=n, head_dim=n, window=n, features=n, block=n), 2, (1, 3, 2)),
    "moe sizes": (lambda n: fn.moe(fn.dense(2), n, top_k=n), 2, (1, 3, 2)),
    "mlp features": (lambda n: fn.mlp(n, n), 2, (2, 3)),
    "transformer_block sizes": (lambda n: fn.transformer_block(n, n, hidden=n, window=n), 2, (1, 3, 2)),
    "rnn features": (fn.rnn, 2, (1, 3, 2)),
    "gru features": (fn.gru, 2, (1, 3, 2)),
    "lstm features": (fn.lstm, 2, (1, 3, 2)),
    "lru sizes": (lambda n: fn.lru(n, n), 2, (1, 3, 2)),
    "group_norm groups": (fn.group_norm, 2, (2, 4)),
    "repeat times": (lambda n: fn.repeat(fn.tanh(), n), 2, (2, 3)),
    "spectral_norm iterations": (lambda n: fn.spectral_norm(fn.dense(2), iterations=n), 2, (2, 3)),
}
OPTIONS = REALS | WHOLES
NUMBERS = {
    **{name: [np.float64, np.float16, jnp.float32] for name in REALS},
    **{name: [np.int64, np.uint16, jnp.int32] for name in WHOLES},
}


def shaped(shape, dtype):
    if isinstance(shape, list):
        return tuple(shaped(each, dtype) for each in shape)
    if isinstance(shape, int):
        return jax.ShapeDtypeStruct((shape,), jnp.int32)
    return jax.ShapeDtypeStruct(shape, dtype)


def traced(layer, shape, dtype):
    """What init, fwd and bwd compute, as a text; and the dtypes of params, state, y, dparams and dx."""
    x = shaped(shape, dtype)

    def run(params, state, x):
        y, state, residuals = layer.fwd(params, state, x, KEY)
        return y, state, layer.bwd(params, residuals, y)

    start = jax.make_jaxpr(lambda key, x: layer.init(key, x), return_shape=True)
    first, (params, state) = start(KEY, x)
    second, (y, after, (dparams, dx)) = jax.make_jaxpr(run, return_shape=True)(params, state, x)
    texts = [str(first), str(second), str(jax.make_jaxpr(layer.apply)(params, state, x))]
    dtypes = [jax.tree.map(lambda leaf: str(leaf.dtype), tree) for tree in (params, state, y, after, dparams, dx)]
    return texts, dtypes


@pytest.mark.parametrize("x64", [False, True], ids=["32 bits", "64 bits"])
@pytest.mark.parametrize("option", OPTIONS)
def test_a_number_is_taken_as_pythons_whoever_made_it(option, x64):
    make, value, shape = OPTIONS[option]
    with jax.enable_x64(x64):
        for dtype in ("float64", "float32", "bfloat16") if x64 else ("float32", "float16"):
            texts, dtypes = traced(make(value), shape, dtype)
            params, state, y, after, dparams, dx = dtypes
            assert (params, state) == (dparams, after)
            assert set(jax.tree.leaves(dx)) == {dtype}
            assert y == (str(sum_dtype(jnp.dtype(dtype))) if isinstance(shape, list) else dtype)
            for kind in NUMBERS[option]:
                assert traced(make(kind(value)), shape, dtype) == (texts, dtypes), kind


@pytest.mark.parametrize("option", REALS)
@pytest.mark.parametrize("value", [float("inf"), float("nan"), 1e39, 10**400], ids=["inf", "nan", "1e39", "10^400"])
def test_a_number_that_float32_does_not_hold_is_refused(option, value):
    with pytest.raises(fn.InputError):
        REALS[option][0](value)


POSITIVE = "eps", "temperature", "delta", "margin", "elu alpha", "celu alpha", " b", "max_phase", "base"


@pytest.mark.parametrize("option", [option for option in REALS if option.endswith(POSITIVE)])
@pytest.mark.parametrize("value", [0, -1, 1e-40])
def test_a_number_that_is_to_be_positive_is_so_in_float32_too(option, value):
    with pytest.raises(fn.InputError):
        REALS[option][0](value)


@pytest.mark.parametrize("option", WHOLES)
@pytest.mark.parametrize("value", [np.array([1, 2]), 2.5, True], ids=["array", "float", "boolean"])
def test_what_is_no_whole_number_is_refused(option, value):
    with pytest.raises(fn.InputError):
        WHOLES[option][0](value)


def test_rotary_takes_a_base_of_any_kind(standard_promotion):
    x = normal(0, jax.ShapeDtypeStruct((1, 3, 4), jnp.bfloat16))
    wanted = fn.rotary(x, jnp.arange(3)[None], 16.0)
    for kind in (np.float64, np.float32, np.int64, jnp.float32):
        got = fn.rotary(x, jnp.arange(3)[None], kind(16))
        assert got.dtype == jnp.bfloat16
        np.testing.assert_array_equal(got, wanted)


@pytest.mark.parametrize("option", REALS)
@pytest.mark.parametrize("value", ["0.5", 1j, True, np.ones((1, 1))], ids=["text", "complex", "boolean", "array"])
def test_what_is_no_number_is_refused(option, value):
    with pytest.raises(fn.InputError):
        REALS[option][0](value)


def test_the_sizes_of_a_table_may_be_of_any_kind():
    ids = jnp.zeros((1, 3), jnp.int32)
    for kind in NUMBERS["dense features"]:
        assert fn.embedding(kind(5), kind(2)).init(KEY, ids)[0]["embedding"].shape == (5, 2)


def test_every_option_that_is_a_number_is_in_the_tables():
    """By the constructors' own signatures: an option that is annotated as a float."""
    found = set()
    for name in fn.__all__:
        make = getattr(fn, name)
        if inspect.isfunction(make) and make.__module__.startswith("funcnet"):
            options = inspect.signature(make).parameters.values()
            found |= {f"{name} {option.name}" for option in options if "float" in str(option.annotation).split(" | ")}
            found |= {f"{name} {option.name}" for option in options if option.annotation is float}
    listed = {option for option in found if "class_weights" in option} | {"rotary base"}
    assert found - listed <= set(REALS) | {"transformer_block attention_rate"}


NEEDED = {  # what a constructor with flags wants beside them
    **dict.fromkeys(["dense", "bilinear", "depthwise_conv", "rnn", "gru", "lstm", "residual_block"], (3,)),
    **dict.fromkeys(["conv", "conv_transpose", "separable_conv", "mlp"], (3, 3)),
    **dict.fromkeys(["batch_norm", "gelu", "geglu", "ctc"], ()),
    "avg_pool": (2,),
    "from_function": (lambda params, x: x,),
    "attention": (2,),
    "transformer_block": (4, 2),
    "stateless": ("mine", None, None, None),
    "linear_cross_entropy": (5,),
}
NO_CONSTRUCTORS = {"check_layer", "check_vjp", "fit", "train_step"}
FLAGS = {
    f"{name} {option.name}": lambda flag, name=name, option=option: getattr(fn, name)(
        *NEEDED[name], **{option.name: flag}
    )
    for name in sorted({*fn.__all__} - NO_CONSTRUCTORS)
    if inspect.isfunction(getattr(fn, name))
    for option in inspect.signature(getattr(fn, name)).parameters.values()
    if isinstance(option.default, bool) or (name, option.name) == ("residual_block", "project")
}


@pytest.mark.parametrize("given", ["relu", 1, 0.0, np.True_], ids=repr)
@pytest.mark.parametrize("make", FLAGS.values(), ids=FLAGS)
def test_a_flag_is_true_or_false(make, given):
    with pytest.raises(fn.InputError, match="True or False"):
        make(given)
    for flag in (True, False):
        make(flag)


def test_options_that_a_slip_could_reach_go_by_name():
    for make in (
        lambda: fn.dense(8, "relu"),
        lambda: fn.attention(2, True),
        lambda: fn.batch_norm(0.9),
        lambda: fn.gelu(True),
        lambda: fn.conv(3, 3, 1, "SAME", 2),
        lambda: fn.cross_entropy(0.1),
        lambda: fn.layer_norm(1e-5),
    ):
        with pytest.raises(TypeError, match="positional argument"):
            make()
