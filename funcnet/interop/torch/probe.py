"""A PyTorch module and a layer with its parameters, side by side on one input.

Both are run in evaluation mode and in float64, where rounding hides nothing: an eps of 1e-5 in place of 1e-6 changes
outputs by some 1e-6 of their size, as much as rounding does in a deep model in float32. So the two may differ by 1e-6
of the largest output, which is above the rounding of a module that computes some of its steps in float32 in any case.
"""

import copy
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_concrete, is_floating
from funcnet.combinators.mixed import Mixed
from funcnet.interop.safetensors import require_arrays
from funcnet.interop.torch.axes import Found
from funcnet.interop.torch.tensors import as_array
from funcnet.layer import Layer
from funcnet.structure import Composed, Wrapped

Tree = Any
Path = tuple[str, ...]

ALLOWED = 1e-6
_UNCOMPARED = "pass module.state_dict() to load without comparing"


def is_module(given: Any) -> bool:
    """Whether it is a `torch.nn.Module`; where PyTorch is not imported nothing is."""
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(given, torch.nn.Module)


def require_values(x: Tree) -> None:
    """Refuse an x that is no input for which outputs can be compared."""
    wanted, remedy = "an input with values as x, to compare the module's outputs", f"pass one, or {_UNCOMPARED}"
    if not jax.tree.leaves(x):
        raise InputError(wanted, describe(x), remedy)
    require_arrays(x, wanted, is_concrete, f"{remedy}; an array of NumPy or JAX, the channels last")


def require_equal(
    layer: Layer, params: Tree, state: Tree, x: Tree, module: Any, found: Found, modules: Mapping[Path, str]
) -> None:
    """Refuse a module whose outputs for x are not the layer's; `modules` maps paths of layers to submodules' names."""
    ours, inside = _ours(layer, params, state, x, modules)
    theirs, theirs_inside = _theirs(module, x, found.channels, set(modules.values()))
    theirs = theirs[:1] if len(ours) == 1 else theirs
    if len(ours) != len(theirs) or not all(map(_fitting, ours, theirs)):
        shapes = lambda arrays: ", ".join(str(list(array.shape)) for array in arrays)
        remedy = f"compare the layers' options with the module's, or {_UNCOMPARED}"
        raise InputError(f"outputs like the layer's, {shapes(ours)}", f"the module's, {shapes(theirs)}", remedy)
    if not any(np.any(array[np.isfinite(array)]) for array in theirs):
        received = "a module whose outputs are all 0 or not finite"
        raise InputError("outputs to compare", received, f"give another x, or {_UNCOMPARED}")
    orders = [axes.order for axes in jax.tree.leaves(found.output)]
    ours = [y if order is None else y[..., order] for y, order in zip(ours, orders, strict=True)]
    error = max(map(_error, ours, theirs))
    if not error <= ALLOWED:
        places = [(path, modules[path]) for path in inside if path and modules[path] in theirs_inside]
        others = [place for place in places if not _error(inside[place[0]], theirs_inside[place[1]]) <= ALLOWED]
        where = f"; the first layer to differ is {'/'.join(others[0][0])}, there {others[0][1]}" if others else ""
        wanted = f"outputs like the module's, to {ALLOWED} of their largest"
        remedy = "compare paddings, eps, activations and the order of the layers with the module's"
        raise InputError(wanted, f"outputs that differ by {error:.2g} of their largest{where}", remedy)


def _fitting(ours: np.ndarray, theirs: np.ndarray) -> list[np.ndarray]:
    """The module's output as it is, and with its channels moved from first to last, where these have our shape."""
    both = [theirs, np.moveaxis(theirs, 1, -1)] if theirs.ndim > 2 else [theirs]
    return [each for each in both if each.shape == ours.shape]


def _error(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest difference over the largest value; equal infinities and NaNs do not differ, other shapes do."""
    largest = np.max(np.abs(theirs), initial=0.0, where=np.isfinite(theirs)) or 1.0

    def difference(other: np.ndarray) -> float:
        same = (ours == other) | (np.isnan(ours) & np.isnan(other))
        return float(np.max(np.abs(np.where(same, 0.0, ours) - np.where(same, 0.0, other)), initial=0.0))

    return min(map(difference, _fitting(ours, theirs)), default=np.inf) / float(largest)


def _ours(
    layer: Layer, params: Tree, state: Tree, x: Tree, wanted: Mapping[Path, str]
) -> tuple[list[np.ndarray], dict[Path, np.ndarray]]:
    """The outputs of the layer, and by path those of the parts that are wanted, in the order in which they run."""
    inside = {}

    def see(path: Path, y: Tree) -> None:
        if path in wanted:
            inside[path] = np.asarray(jax.tree.leaves(y)[0])

    with jax.enable_x64(True):
        double = lambda leaf: jnp.asarray(leaf, jnp.float64 if is_floating(leaf) else None)
        y = _seen(without_mixed(layer), see).apply(*jax.tree.map(double, (params, state, x)))
    return [np.asarray(each) for each in jax.tree.leaves(y)], inside


def _theirs(module: Any, x: Tree, channels: str, wanted: set[str]) -> tuple[list[np.ndarray], dict[str, np.ndarray]]:
    """The same for a copy of the module, whose parts go by name."""
    torch = sys.modules["torch"]
    inside: dict[str, np.ndarray] = {}

    def keep(name: str) -> Callable:
        def hook(module, args, y):
            inside.setdefault(name, _arrays(y)[0])

        return hook

    given = jax.tree.map(lambda leaf: _tensor(torch, leaf, channels), x)
    try:
        with torch.no_grad(), torch.random.fork_rng():
            twin = copy.deepcopy(module).cpu().double().eval()
            for name, part in twin.named_modules():
                if name in wanted:
                    part.register_forward_hook(keep(name))
            args = given if isinstance(given, tuple) else () if isinstance(given, dict) else (given,)
            return _arrays(twin(*args, **given if isinstance(given, dict) else {})), inside
    except Exception as error:
        received = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
        raise InputError("a module that takes x, in float64", received, f"give another x, or {_UNCOMPARED}") from error


def _arrays(out: Any) -> list[np.ndarray]:
    """Copies of the tensors that a module returns, since the next module may write into them."""
    return [np.array(as_array(tensor), np.float64) for tensor in _tensors(out)]


def _tensors(out: Any) -> Iterator[Any]:
    if isinstance(out, (tuple, list, Mapping)):
        for each in out.values() if isinstance(out, Mapping) else out:
            yield from _tensors(each)
    elif out is not None:
        yield out


def _tensor(torch: Any, leaf: Any, channels: str) -> Any:
    """The leaf as a tensor: integers in 64 bits, which PyTorch wants ids to have."""
    if not is_floating(leaf):
        return torch.from_numpy(np.array(leaf, bool if leaf.dtype == bool else np.int64))
    array = np.asarray(leaf).astype(np.float64)
    moved = np.moveaxis(array, -1, 1) if channels == "first" and array.ndim > 2 else array
    return torch.from_numpy(np.array(moved, order="C"))


def without_mixed(layer: Layer) -> Layer:
    """The layer without `mixed`, so that it computes in the dtype that it is given."""
    match layer.structure:
        case Mixed(inner=inner):
            return without_mixed(inner)
        case Wrapped(inner=inner, again=again):
            return again(without_mixed(inner))
        case Composed(parts=parts, again=again):
            return again({name: without_mixed(part) for name, part in parts.items()})
    return layer


def _seen(layer: Layer, see: Callable[[Path, Tree], None], path: Path = ()) -> Layer:
    """The layer, which in evaluation calls `see(path, y)` after each of its parts."""
    whole = layer
    if layer.rebuild:
        whole = layer.rebuild({name: _seen(part, see, (*path, name)) for name, part in layer.parts.items()})

    def apply(params, state, x):
        y = whole.apply(params, state, x)
        see(path, y)
        return y

    return replace(whole, apply=apply)
