"""The PyTorch module that each kind of layer corresponds to: the names and layouts of its arrays."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp

from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import sum_dtype

RECURRENT = ("rnn", "lstm", "gru")
_PROJECTED = ("query", "key", "value")  # of attention, in one array there


class Field(NamedTuple):
    """One of our arrays in PyTorch: its name, the conversion there and back, and whether a layer may be without it."""

    name: str
    there: Callable[[Any], Any] = lambda a: a
    back: Callable[[Any], Any] = lambda a: a
    optional: bool = False


class Whole(NamedTuple):
    """Params that are not one array each there: their names, params -> arrays, (params, name -> array) -> params."""

    names: tuple[str, ...]
    there: Callable[[Mapping[str, Any]], dict[str, Any]]
    back: Callable[[Mapping[str, Any], Callable[[str], Any]], dict[str, Any]]


def _features_first(kernel: Any) -> Any:
    """[*window, C, F] -> [F, C, *window]."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def _features_last(weight: Any) -> Any:
    return jnp.moveaxis(weight, (0, 1), (-1, -2))


def _channels_first(kernel: Any) -> Any:
    """[*window, C, F] -> [C, F, *window], the window reversed."""
    return jnp.moveaxis(jnp.flip(kernel, range(kernel.ndim - 2)), (-2, -1), (0, 1))


def _channels_last(weight: Any) -> Any:
    kernel = jnp.moveaxis(weight, (0, 1), (-2, -1))
    return jnp.flip(kernel, range(kernel.ndim - 2))


def _recurrent_there(params: Mapping[str, Any]) -> dict[str, Any]:
    bias = params["bias"]
    second = jnp.zeros_like(bias)
    if "recurrent_bias" in params:
        second = second.at[-params["recurrent_bias"].shape[0] :].set(params["recurrent_bias"])
    return {
        "weight_ih_l0": params["kernel"].T,
        "weight_hh_l0": params["recurrent_kernel"].T,
        "bias_ih_l0": bias,
        "bias_hh_l0": second,
    }


def _recurrent_back(params: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    first, second = get("bias_ih_l0"), get("bias_hh_l0")
    new = {"kernel": get("weight_ih_l0").T, "recurrent_kernel": get("weight_hh_l0").T}
    if "recurrent_bias" in params:
        features = params["recurrent_bias"].shape[0]
        new["recurrent_bias"] = second[-features:]
        second = second.at[-features:].set(0)
    high = sum_dtype(first.dtype)
    return new | {"bias": (first.astype(high) + second.astype(high)).astype(first.dtype)}


def _attention_there(params: Mapping[str, Any]) -> dict[str, Any]:
    names = [set(params[name]) if isinstance(params[name], Mapping) else None for name in params]
    if names not in ([{"kernel"}] * 4, [{"kernel", "bias"}] * 4):
        wanted = "a kernel in each of query, key, value and out, and a bias in all or none"
        raise InputError(wanted, describe(params), "pass the params that init returned")
    kernels = [params[name]["kernel"] for name in (*_PROJECTED, "out")]
    if len({kernel.shape for kernel in kernels}) > 1 or kernels[0].shape[0] != kernels[0].shape[1]:
        wanted = "attention with kernels [D, D] alone, as PyTorch's MultiheadAttention has them"
        raise InputError(wanted, describe(params), "convert other sizes, contexts and shared keys by hand")
    arrays = {"in_proj_weight": jnp.concatenate([kernel.T for kernel in kernels[:3]])}
    if "bias" in params["out"]:
        arrays |= {"in_proj_bias": jnp.concatenate([params[name]["bias"] for name in _PROJECTED])}
        arrays |= {"out_proj.bias": params["out"]["bias"]}
    return arrays | {"out_proj.weight": kernels[3].T}


def _attention_back(params: Mapping[str, Any], get: Callable[[str], Any]) -> dict[str, Any]:
    use_bias = "bias" in params["out"]
    kernels = [*jnp.split(get("in_proj_weight"), 3), get("out_proj.weight")]
    biases = [*jnp.split(get("in_proj_bias"), 3), get("out_proj.bias")] if use_bias else [None] * 4
    each = zip((*_PROJECTED, "out"), kernels, biases, strict=True)
    return {name: {"kernel": kernel.T} | ({"bias": bias} if use_bias else {}) for name, kernel, bias in each}


_BIAS = Field("bias", optional=True)
_WEIGHTED = {"kernel": Field("weight", _features_first, _features_last), "bias": _BIAS}
_SPREADING = {"kernel": Field("weight", _channels_first, _channels_last), "bias": _BIAS}
_TABLE = {"embedding": Field("weight")}
_SCALED = {"scale": Field("weight"), "bias": Field("bias")}
FIELDS: dict[str, dict[str, Field]] = {
    "dense": _WEIGHTED,
    "conv": _WEIGHTED,
    "depthwise_conv": _WEIGHTED,
    "conv_transpose": _SPREADING,
    "embedding": _TABLE,
    "position_embedding": _TABLE,
    "layer_norm": _SCALED,
    "rms_norm": {"scale": Field("weight")},
    "group_norm": _SCALED,
    "instance_norm": _SCALED,
    "batch_norm": {"scale": Field("weight", optional=True), "bias": _BIAS},
    "prelu": {"slope": Field("weight")},
}
STATE: dict[str, dict[str, str]] = {"batch_norm": {"mean": "running_mean", "var": "running_var"}}
_RUNNING = Whole(("kernel", "recurrent_kernel", "bias"), _recurrent_there, _recurrent_back)
WHOLE = {
    "rnn": _RUNNING,
    "lstm": _RUNNING,
    "gru": _RUNNING._replace(names=(*_RUNNING.names, "recurrent_bias")),
    "attention": Whole((*_PROJECTED, "out"), _attention_there, _attention_back),
}
