"""Parameters in other people's files and names: safetensors, and the state dicts of PyTorch's modules.

A parameter's name in a safetensors file is its path, `encoder/dense/kernel`. In a state dict it is the layer's path
with dots, a turn of a `repeat` its number, and PyTorch's field: `encoder.0.dense.weight`.

    dense, conv                       kernel [*window, C, F]       weight [F, C, *window]
                                      bias                         bias
    embedding, position_embedding     embedding                    weight
    layer_norm, group_norm,           scale, bias                  weight, bias
    instance_norm, rms_norm
    batch_norm                        scale, bias                  weight, bias
      its state                       mean, var                    running_mean, running_var
    prelu                             slope                        weight
    rnn, lstm, gru                    kernel [D, nH]               weight_ih_l0 [nH, D]
                                      recurrent_kernel [H, nH]     weight_hh_l0 [nH, H]
                                      bias, recurrent_bias         bias_ih_l0, bias_hh_l0
    bidirectional                     backward's                   .._l0_reverse

Gates are in the same order, i f g o and r z n. PyTorch adds two biases in every gate: the first holds their sum, the
second zeros, but for a gru's n, where only the second one is inside the reset. A batch norm's `num_batches_tracked`,
which PyTorch reads for momentum=None alone, is 0 on the way there, and left aside on the way back.
"""

import os
import re
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcnet import expect
from funcnet.arithmetic import wide
from funcnet.expect import InputError, describe, is_array
from funcnet.layer import Layer, a_layer
from funcnet.tie import Tied
from funcnet.transform import Frozen

Tree = Any
Arrays = dict[str, np.ndarray]


# safetensors


@expect.by("save_params")
def save_params(params: Tree, path: str | os.PathLike) -> None:
    """Write params, or any pytree of arrays, to a safetensors file; it appears whole, or the old one stays.

    Needs the extra `safetensors`.

    Raises:
        InputError: for leaves that are no arrays of numbers, and for names with a "/", which would not be told apart.
    """
    content = _safetensors().numpy.save(_by_path(params))
    folder = Path(path).absolute().parent
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".saving-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


@expect.by("load_params")
def load_params(path: str | os.PathLike, like: Tree) -> Tree:
    """Read what `save_params` has written, as a tree like `like`: params, or `jax.eval_shape(model.init, key, x)[0]`.

    Needs the extra `safetensors`.

    Raises:
        InputError: if the file is none of that kind, or names, shapes or dtypes are not those of `like`.
    """
    package, content = _safetensors(), Path(path).read_bytes()
    try:
        arrays = {name: _decoded(**view) for name, view in package.deserialize(content)}
    except (package.SafetensorError, KeyError) as error:
        raise InputError("a safetensors file", f"{path}: {error}", "write it with save_params") from error
    _require_same(arrays, {name: expect.shapes(leaf) for name, leaf in _named(like)}, "load params for the same model")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name, _ in _named(like)])


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        remedy = 'install the extra: python -m pip install "funcnet[safetensors]"'
        raise InputError("the package safetensors", "an environment without it", remedy) from error
    return safetensors


# By the format's codes. Its own reader for NumPy knows no bfloat16.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES |= {f"{code}{n}": f"{kind}{n}" for code, kind in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}


def _decoded(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, jnp.dtype(_DTYPES[dtype])).reshape(shape)


def _by_path(tree: Tree) -> Arrays:
    for name, leaf in _named(tree):
        if not is_array(leaf) or str(leaf.dtype) not in _DTYPES.values():
            wanted = f"arrays of the dtypes {', '.join(sorted(_DTYPES.values()))}"
            raise InputError(wanted, f"{describe(leaf)} at {name}", "leave keys and other objects out")
    return {name: np.array(leaf, order="C") for name, leaf in _named(tree)}


def _named(tree: Tree) -> Iterator[tuple[str, Any]]:
    """Leaves with their paths as one text."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        if bad := [name for name in names if "/" in name]:
            raise InputError('names without "/"', repr(bad[0]), "rename the layer")
        yield "/".join(names), leaf


def _require_same(given: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuse other names, shapes or dtypes than the wanted ones, all of them at once."""
    missing, superfluous = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    other = [name for name in wanted if name in given and describe(given[name]) != describe(wanted[name])]
    complaints = [f"{name} missing" for name in missing] + [f"{name} superfluous" for name in superfluous]
    complaints += [f"{name}: {describe(given[name])}" for name in other]
    if complaints:
        expected = [f"{name}: {describe(wanted[name])}" for name in [*missing, *other]] or [f"{len(wanted)} arrays"]
        raise InputError(", ".join(expected), ", ".join(complaints), remedy)


# PyTorch


class Field(NamedTuple):
    """A field of ours as PyTorch has it: its name there, and how to lay it out, there and back."""

    name: str
    there: Callable[[Any], Any] = lambda a: a
    back: Callable[[Any], Any] = lambda a: a


def _features_first(kernel: Any) -> Any:
    """[*window, C, F] -> [F, C, *window]."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def _features_last(weight: Any) -> Any:
    return jnp.moveaxis(weight, (0, 1), (-1, -2))


_WEIGHTED = {"kernel": Field("weight", _features_first, _features_last), "bias": Field("bias")}
_TABLE = {"embedding": Field("weight")}
_SCALED = {"scale": Field("weight"), "bias": Field("bias")}
_FIELDS: dict[str, dict[str, Field]] = {
    "dense": _WEIGHTED,
    "conv": _WEIGHTED,
    "embedding": _TABLE,
    "position_embedding": _TABLE,
    "layer_norm": _SCALED,
    "rms_norm": _SCALED,
    "group_norm": _SCALED,
    "instance_norm": _SCALED,
    "batch_norm": _SCALED,
    "prelu": {"slope": Field("weight")},
}
_STATE: dict[str, dict[str, str]] = {"batch_norm": {"mean": "running_mean", "var": "running_var"}}
_RECURRENT = ("rnn", "lstm", "gru")
_REVERSE = "_reverse"
_COUNTER = "num_batches_tracked"  # of a batch norm


@expect.by("to_torch")
def to_torch(layer: Layer, params: Tree, state: Tree = (), names: Mapping[str, str] | None = None) -> Arrays:
    """The state dict of the PyTorch module that a layer is, as NumPy arrays; the module's docstring says how.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(layer, params).items()})

    Args:
        layer: made of layers that PyTorch has too.
        params, state: the layer's.
        names: what other modules are called: {"dense": "0", "blocks.*.dense": "encoder.layers.*.linear"}. A name is the
            beginning of a path with dots, or all of it; of those that fit the longest one is taken, and "*" is any
            part, such as a number, and the same in the other name. A copy that is `tied` has a name too.

    Raises:
        InputError: for a layer with params that is none of PyTorch's, and for names that nothing has, or two have.
    """
    arrays = _there(a_layer(layer), params, state, ())
    renamed = _renamed(arrays, names or {})
    counted = [name.removesuffix("running_mean") for name in renamed.values() if name.endswith("running_mean")]
    counters = {name + _COUNTER: np.zeros((), np.int64) for name in counted}
    return {renamed[name]: np.asarray(array) for name, array in arrays.items()} | counters


@expect.by("from_torch")
def from_torch(
    layer: Layer, tensors: Mapping[str, Any], params: Tree, state: Tree = (), names: Mapping[str, str] | None = None
) -> tuple[Tree, Tree]:
    """(params, state) of a layer, of the state dict of a PyTorch module; nothing is changed in what is given.

    Args:
        layer: as in `to_torch`.
        tensors: by name, on the CPU; arrays do as well.
        params, state: what init returned, or their shapes and dtypes (`jax.eval_shape(layer.init, key, x)`).
        names: as in `to_torch`.

    Raises:
        InputError: if a tensor is missing or superfluous, or its shape or dtype is not that of its parameter; and where
            `to_torch` refuses.
    """
    wanted = jax.eval_shape(lambda params, state: _there(a_layer(layer), params, state, ()), params, state)
    renamed = _renamed(wanted, names or {})
    given = {name: np.asarray(value) for name, value in tensors.items() if name.split(".")[-1] != _COUNTER}
    shapes = {renamed[name]: leaf for name, leaf in wanted.items()}
    _require_same(given, shapes, "load it into the module's twin; convert dtypes and leave other tensors out first")
    arrays = {name: jnp.asarray(given[other]) for name, other in renamed.items()}
    return _back(layer, params, state, (), arrays)


def _renamed(arrays: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, str]:
    """By our name the one that `names` makes of it."""
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


def _there(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a layer in PyTorch's layout, by our names."""
    made = layer.made if layer.combinator else None
    match layer.combinator:
        case "repeat" if made:
            turns = [_turn(i, params, state) for i in range(_turns(params, state))]
            return _joined(_there(made.inner, p, s, (*path, str(i))) for i, (p, s) in enumerate(turns))
        case "freeze" if made:
            return _there(made.inner, state.params, state.state, path)
        case "tied" if isinstance(made, Tied):
            return _there(made.inner, made.whole(params), state, path)
    if made and made.inner:
        return _there(made.inner, params, state, path)
    if layer.parts:
        parts = {name: _there(*each) for name, each in _inside(layer, params, state, path).items()}
        if layer.name == "bidirectional":
            parts["backward"] = {name + _REVERSE: array for name, array in parts["backward"].items()}
        return _joined(parts.values())
    if layer.name in _RECURRENT:
        return _at(path, _recurrent_there(params))
    fields, of_state = _known(layer, params, state)
    arrays = {fields[name].name: fields[name].there(value) for name, value in params.items()}
    return _at(path, arrays | {of_state[name]: value for name, value in dict(state).items()})


def _back(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...], arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """(params, state) of the arrays, in the structure of those given."""
    made = layer.made if layer.combinator else None
    match layer.combinator:
        case "repeat" if made:
            like = jax.eval_shape(partial(_turn, 0), params, state) if _turns(params, state) else (params, state)
            count = range(_turns(params, state))
            turns = [_back(made.inner, like[0], like[1], (*path, str(i)), arrays) for i in count]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns) if turns else like
        case "freeze" if made:
            return params, Frozen(*_back(made.inner, state.params, state.state, path, arrays))
        case "tied" if isinstance(made, Tied):
            return _back_tied(made, params, state, path, arrays)
    if made and made.inner:
        return _back(made.inner, params, state, path, arrays)
    if layer.parts:
        both = {}
        for name, (part, own, own_state, inside) in _inside(layer, params, state, path).items():
            backward = layer.name == "bidirectional" and name == "backward"
            cut = {n.removesuffix(_REVERSE): a for n, a in arrays.items() if n.endswith(_REVERSE)}
            both[name] = _back(part, own, own_state, inside, cut if backward else arrays)
        new_state = {name: new for name, (_, new) in both.items()}
        return {name: new for name, (new, _) in both.items()}, new_state if isinstance(state, Mapping) else state
    get = lambda name: arrays[".".join((*path, name))]
    if layer.name in _RECURRENT:
        return _recurrent_back(params, get), state
    fields, of_state = _known(layer, params, state)
    new = {name: fields[name].back(get(fields[name].name)) for name in params}
    return new, {name: get(of_state[name]) for name in state} if state else state


def _back_tied(
    made: Tied, params: Tree, state: Tree, path: tuple[str, ...], arrays: Mapping[str, Any]
) -> tuple[Any, Any]:
    whole, state = _back(made.inner, jax.eval_shape(made.whole, params), state, path, arrays)
    params = made.apart(whole)
    equal = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b, equal_nan=True)), whole, made.whole(params))
    if not all(jax.tree.leaves(equal)):
        different = [name for name, same in _named(equal) if not same]
        remedy = "load it into a model that is not tied"
        raise InputError("equal values for what is tied", f"others for {', '.join(different)}", remedy)
    return params, state


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: array for part in parts for name, array in part.items()}


def _at(path: tuple[str, ...], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join((*path, name)): array for name, array in arrays.items()}


def _turns(params: Tree, state: Tree) -> int:
    """How often a `repeat` repeats; 0 where it has nothing to show it by, and nothing to convert."""
    return next((leaf.shape[0] for leaf in jax.tree.leaves((params, state))), 0)


def _turn(i: int, params: Tree, state: Tree) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[i], (params, state))


def _inside(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The arguments of the walk for each part."""
    expect.named(params, layer.parts, "params")
    states = state if isinstance(state, Mapping) else {}
    shared = layer.name == "bidirectional"
    paths = {name: path if shared else (*path, name) for name in layer.parts}
    return {name: (part, params[name], states.get(name, ()), paths[name]) for name, part in layer.parts.items()}


def _known(layer: Layer, params: Tree, state: Tree) -> tuple[dict[str, Field], dict[str, str]]:
    fields, of_state = _FIELDS.get(layer.name, {}), _STATE.get(layer.name, {})
    if not set(params) <= set(fields) or not set(dict(state)) <= set(of_state):
        remedy = "convert this layer by hand: its params are a dict of arrays"
        raise InputError(
            f"layers among {', '.join([*_FIELDS, *_RECURRENT])}", f"{layer.name} {describe(params)}", remedy
        )
    return fields, of_state


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
    high = wide(first.dtype)
    return new | {"bias": (first.astype(high) + second.astype(high)).astype(first.dtype)}
