"""Tensors by name: as arrays, and under other names."""

import re
import sys
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, at, describe
from funcnet.interop.safetensors import Arrays

COUNTER = "num_batches_tracked"  # of a batch norm


def arrays_of(tensors: Mapping[str, Any]) -> Arrays:
    """Tensors by name as arrays, without counters."""
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise InputError("tensors by name, in a dict", describe(tensors), "pass module.state_dict()")
    arrays = {}
    for name, tensor in tensors.items():
        with at(name):
            if isinstance(tensor, Mapping):
                remedy = f"pass tensors[{name!r}] where that is the module's state dict"
                raise InputError("tensors by name", "a dict by this name", remedy)
            arrays[name] = as_array(tensor)
            if arrays[name].dtype == object:
                raise InputError("a tensor or an array", describe(tensor), "leave it out")
    return {name: array for name, array in arrays.items() if name.split(".")[-1] != COUNTER}


def as_array(tensor: Any) -> np.ndarray:
    """A tensor, or what is an array already, as an array; a sparse tensor with its zeros, which is the same tensor."""
    if not hasattr(tensor, "detach"):
        array = np.asarray(tensor)
        return np.asarray(array, array.dtype.newbyteorder("="))
    for is_one, received, remedy in _WITHOUT_ARRAY:
        if is_one(tensor):
            raise InputError("a tensor that is one array with values", received, remedy)
    try:
        tensor = tensor.detach().cpu().resolve_conj().resolve_neg()
        return _numpy(tensor if str(tensor.layout) == "torch.strided" else tensor.to_dense())
    except (NotImplementedError, RuntimeError, TypeError, ValueError) as error:
        received = f"{type(tensor).__name__}: {str(error).splitlines()[0]}"
        raise InputError("a tensor that is one array with values", received, "make it a plain tensor first") from error


_WITHOUT_ARRAY = (
    (lambda t: t.is_nested, "a nested tensor", "pass the tensors in it one by one"),
    (lambda t: t.is_quantized, "a quantized tensor", "pass tensor.dequantize(), of the module's own precision"),
    (lambda t: t.is_meta, "a meta tensor", "load the module's values first: on the device meta it has shapes alone"),
)


def _numpy(tensor: Any) -> np.ndarray:
    """The tensor in NumPy, by its bits for dtypes that only NumPy with JAX has: bfloat16 and floats of eight bits."""
    name = str(tensor.dtype).removeprefix("torch.")
    if name == "bfloat16" or name.startswith("float8"):
        bits = {1: "uint8", 2: "int16"}[tensor.element_size()]
        return tensor.contiguous().view(getattr(sys.modules["torch"], bits)).numpy().view(jnp.dtype(name))
    return tensor.numpy()


def renamed_by(arrays: Mapping[str, Any], names: Mapping[str, str] | None) -> dict[str, str]:
    """By our name of each array, the name that `names` makes of it."""
    names = {} if names is None else names
    if not isinstance(names, Mapping) or not all(isinstance(name, str) for pair in names.items() for name in pair):
        raise InputError("names as a dict of texts", describe(names), 'write {"dense": "0"}')
    renamed, used = {}, set()
    for name in arrays:
        fitting = {begin: found for begin in names if (found := _begins(name, begin))}
        used |= fitting.keys()
        begin = max(fitting, key=lambda begin: fitting[begin].end(), default="")
        renamed[name] = _filled(names[begin], fitting[begin]) + name[fitting[begin].end() :] if fitting else name
    if unused := sorted(set(names) - used):
        raise InputError(f"names among {sorted(arrays)}", f"{unused}", "write paths with dots, as in that list")
    if len(set(renamed.values())) < len(renamed):
        raise InputError("a name for each array", f"{sorted(renamed.values())}", "give different names")
    return renamed


def _begins(name: str, begin: str) -> re.Match | None:
    """The match if `name` begins with the parts of `begin`, of which "*" matches any one."""
    return re.match(re.escape(begin).replace(r"\*", "([^.]+)") + r"(?=\.|$)", name)


def _filled(other: str, found: re.Match) -> str:
    """`other` with its stars replaced, in order, by what the stars in the match stood for."""
    stars = iter(found.groups())
    return "".join(next(stars, "*") if part == "*" else part for part in re.split(r"(\*)", other))
