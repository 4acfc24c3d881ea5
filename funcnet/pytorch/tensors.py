"""Tensors by name: as arrays, and under other names."""

import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from funcnet.expect import InputError, describe
from funcnet.saved import Arrays

COUNTER = "num_batches_tracked"  # of a batch norm


def arrays_of(tensors: Mapping[str, Any]) -> Arrays:
    """Tensors by name as arrays, without counters."""
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise InputError("tensors by name, in a dict", describe(tensors), "pass module.state_dict()")
    return {name: as_array(value) for name, value in tensors.items() if name.split(".")[-1] != COUNTER}


def as_array(tensor: Any) -> np.ndarray:
    """A tensor as an array, or what is one already; bfloat16, for which PyTorch has no array, by float32."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def renamed_by(arrays: Mapping[str, Any], names: Mapping[str, str] | None) -> dict[str, str]:
    """By our name the one that `names` makes of it."""
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
    """Where `name` begins with the parts of `begin`, of which "*" is any."""
    return re.match(re.escape(begin).replace(r"\*", "([^.]+)") + r"(?=\.|$)", name)


def _filled(other: str, found: re.Match) -> str:
    """`other` with what the stars were in place of its own, in order."""
    stars = iter(found.groups())
    return "".join(next(stars, "*") if part == "*" else part for part in re.split(r"(\*)", other))
