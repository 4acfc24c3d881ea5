"""Parameters in the names and layouts of PyTorch's modules: their state dicts.

A parameter's name there is the layer's path with dots, a turn of a `repeat` its number, and PyTorch's field:
`encoder.0.dense.weight`.

    dense, conv, depthwise_conv       kernel [*window, C, F]       weight [F, C, *window]
                                      bias                         bias
    conv_transpose                    kernel [*window, C, F]       weight [C, F, *window], each window turned round
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
    stacked                           layer i's                    .._li
    attention                         query, key, value: kernel    in_proj_weight [3D, D]
                                      [D, D], bias [D]             in_proj_bias [3D]
                                      out: kernel, bias            out_proj.weight, out_proj.bias

Gates are in the same order, i f g o and r z n. PyTorch adds two biases in every gate: the first holds their sum, the
second zeros, but for a gru's n, where only the second one is inside the reset. A batch norm's `num_batches_tracked`,
which PyTorch reads for momentum=None alone, is 0 on the way there, and left aside on the way back.

PyTorch has no recurrent layer that runs in reverse alone, no bidirectional one but of one kind, forward and then in
reverse, no stack of several kinds or sizes, and no rotary attention. These are refused, though their params would fit.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from funcnet import expect
from funcnet.arithmetic import wide
from funcnet.expect import InputError, describe
from funcnet.layer import Layer, a_layer
from funcnet.saved import Arrays, named_leaves, require_arrays, require_same
from funcnet.tie import Tied
from funcnet.transform import Frozen

Tree = Any


class Field(NamedTuple):
    """A field of ours as PyTorch has it: its name there, how to lay it out, there and back, and if some have none."""

    name: str
    there: Callable[[Any], Any] = lambda a: a
    back: Callable[[Any], Any] = lambda a: a
    optional: bool = False


class Whole(NamedTuple):
    """Params that are no array for an array there: their names, params -> arrays, (params, name -> array) -> params."""

    names: tuple[str, ...]
    there: Callable[[Mapping[str, Any]], dict[str, Any]]
    back: Callable[[Mapping[str, Any], Callable[[str], Any]], dict[str, Any]]


def _features_first(kernel: Any) -> Any:
    """[*window, C, F] -> [F, C, *window]."""
    return jnp.moveaxis(kernel, (-1, -2), (0, 1))


def _features_last(weight: Any) -> Any:
    return jnp.moveaxis(weight, (0, 1), (-1, -2))


def _channels_first(kernel: Any) -> Any:
    """[*window, C, F] -> [C, F, *window], the window turned round."""
    return jnp.moveaxis(jnp.flip(kernel, range(kernel.ndim - 2)), (-2, -1), (0, 1))


def _channels_last(weight: Any) -> Any:
    kernel = jnp.moveaxis(weight, (0, 1), (-2, -1))
    return jnp.flip(kernel, range(kernel.ndim - 2))


_BIAS = Field("bias", optional=True)
_WEIGHTED = {"kernel": Field("weight", _features_first, _features_last), "bias": _BIAS}
_SPREADING = {"kernel": Field("weight", _channels_first, _channels_last), "bias": _BIAS}
_TABLE = {"embedding": Field("weight")}
_SCALED = {"scale": Field("weight"), "bias": Field("bias")}
_FIELDS: dict[str, dict[str, Field]] = {
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
_STATE: dict[str, dict[str, str]] = {"batch_norm": {"mean": "running_mean", "var": "running_var"}}
_RECURRENT = ("rnn", "lstm", "gru")
_RUNS = [((kind, False),) for kind in _RECURRENT] + [((kind, False), (kind, True)) for kind in _RECURRENT]
_TRANSPARENT = ("named", "remat", "mixed", "freeze", "tied")  # around a layer that is the same module without them
_PROJECTED = ("query", "key", "value")  # of attention, one array there
_REVERSE = "_reverse"
_COUNTER = "num_batches_tracked"  # of a batch norm


@expect.by("to_torch")
def to_torch(layer: Layer, params: Tree, state: Tree = (), names: Mapping[str, str] | None = None) -> Arrays:
    """The state dict of the PyTorch module that a layer is, as NumPy arrays; the module's docstring says how.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(layer, params).items()})

    The arrays are copies. `torch.from_numpy` knows no bfloat16: give it array.astype("float32"), which holds the same
    values. `load_state_dict` converts to the dtypes of the module.

    Args:
        layer: made of layers that PyTorch has too. A layer is known by its kind and the names of its params.
        params, state: the layer's; the state can be left out where it holds no arrays.
        names: what other modules are called: {"dense": "0", "blocks.*.dense": "encoder.layers.*.linear"}. A name is the
            beginning of a path with dots, or all of it; of those that fit the longest one is taken, and "*" is any
            part, such as a number, and the same in the other name. A copy that is `tied` has a name too.

    Raises:
        InputError: for a layer with params that is none of PyTorch's, for params or a state that are not the layer's,
            and for names that nothing has, or two have.
    """
    _check(a_layer(layer))
    for what, tree in {"params": params, "state": state}.items():
        require_arrays(tree, f"arrays with values as {what}", expect.is_concrete)
    arrays = _there(layer, params, state, ())
    renamed = _renamed(arrays, names)
    counted = [name.removesuffix("running_mean") for name in renamed.values() if name.endswith("running_mean")]
    counters = {name + _COUNTER: np.zeros((), np.int64) for name in counted}
    return {renamed[name]: np.array(array) for name, array in arrays.items()} | counters


@expect.by("from_torch")
def from_torch(
    layer: Layer, tensors: Mapping[str, Any], params: Tree, state: Tree = (), names: Mapping[str, str] | None = None
) -> tuple[Tree, Tree]:
    """(params, state) of a layer, of the state dict of a PyTorch module; nothing is changed in what is given.

    Args:
        layer: as in `to_torch`.
        tensors: by name, also parameters; arrays do as well.
        params, state: what init returned, or their shapes and dtypes (`jax.eval_shape(layer.init, key, x)`).
        names: as in `to_torch`.

    Raises:
        InputError: if a tensor is missing or superfluous, or its shape or dtype is not that of its parameter; and where
            `to_torch` refuses.
    """
    _check(a_layer(layer))
    for what, tree in {"params": params, "state": state}.items():
        require_arrays(tree, f"arrays as {what}")
    wanted = jax.eval_shape(lambda params, state: _there(layer, params, state, ()), params, state)
    renamed = _renamed(wanted, names)
    given = _arrays(tensors)
    shapes = {renamed[name]: leaf for name, leaf in wanted.items()}
    require_same(given, shapes, "load it into the module's twin; convert dtypes and leave other tensors out first")
    arrays = {name: jnp.array(given[other]) for name, other in renamed.items()}
    return _back(layer, params, state, (), arrays)


def _check(layer: Layer) -> None:
    """Refuse layers whose params would fit a module of PyTorch's that is another one."""
    kind = _kind(layer)
    if layer.made and layer.combinator and layer.made.inner:
        _check(layer.made.inner)
    elif kind in (*_RECURRENT, "bidirectional"):
        if _runs(layer) not in _RUNS:
            wanted = "recurrent layers forward, or bidirectional ones of one kind, forward and then in reverse"
            received = f"{layer.name}: " + ", ".join(kind + " in reverse" * reverse for kind, reverse in _runs(layer))
            remedy = "convert its recurrent layers one by one, made without reverse, and turn the sequences there"
            raise InputError(wanted, received, remedy)
    elif kind == "attention" and _option(layer, "rotary"):
        remedy = "convert one without rotary, whose params are the same, and turn queries and keys there"
        raise InputError("attention without rotary positions", "attention(.., rotary=True)", remedy)
    elif _levelled(layer) and len(set(map(_runs, layer.parts.values()))) > 1:
        received = ", ".join(part.name for part in layer.parts.values())
        raise InputError("a stack of one kind of recurrent layers", received, "convert its layers one by one")
    else:
        for name, part in layer.parts.items():
            with expect.at(name):
                _check(part)


def _kind(layer: Layer) -> str:
    """What made the layer, which can have any name, where that is said."""
    return layer.made.combinator if layer.made else layer.name


def _option(layer: Layer, name: str) -> bool:
    return bool(layer.made and layer.made.options.get(name))


def _runs(layer: Layer) -> tuple[tuple[str, bool], ...]:
    """The kind of a layer and whether it runs in reverse; of a bidirectional one that of both."""
    while layer.made and layer.combinator in _TRANSPARENT:
        layer = layer.made.inner
    if _kind(layer) == "bidirectional":
        return tuple(run for part in layer.parts.values() for run in _runs(part))
    return ((_kind(layer), _option(layer, "reverse")),)


def _levelled(layer: Layer) -> bool:
    """Whether it is a stack of recurrent layers alone, in one direction or both, which is one module there."""
    runs = [run for part in layer.parts.values() for run in _runs(part)]
    return _kind(layer) == "stacked" and all(kind in _RECURRENT for kind, _ in runs)


def _arrays(tensors: Mapping[str, Any]) -> Arrays:
    """Tensors by name as arrays, without counters."""
    if not isinstance(tensors, Mapping) or not all(isinstance(name, str) for name in tensors):
        raise InputError("tensors by name, in a dict", describe(tensors), "pass module.state_dict()")
    return {name: as_array(value) for name, value in tensors.items() if name.split(".")[-1] != _COUNTER}


def as_array(tensor: Any) -> np.ndarray:
    """A tensor as an array, or what is one already; bfloat16, for which PyTorch has no array, by float32."""
    if not hasattr(tensor, "detach"):
        return np.asarray(tensor)
    tensor = tensor.detach().cpu()
    if str(tensor.dtype) == "torch.bfloat16":
        return tensor.float().numpy().astype(jnp.bfloat16)
    return tensor.numpy()


def _renamed(arrays: Mapping[str, Any], names: Mapping[str, str] | None) -> dict[str, str]:
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


def _there(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a layer in PyTorch's layout, by our names."""
    made = layer.made if layer.combinator else None
    match layer.combinator:
        case "repeat" if made:
            turns = [_turn(i, params, state) for i in range(_turns(params, state))]
            return _joined(_there(made.inner, p, s, (*path, str(i))) for i, (p, s) in enumerate(turns))
        case "freeze" if made:
            frozen = _frozen(params, state)
            return _there(made.inner, frozen.params, frozen.state, path)
        case "tied" if isinstance(made, Tied):
            return _there(made.inner, made.whole(params), state, path)
    if made and made.inner:
        return _there(made.inner, params, state, path)
    if layer.parts:
        parts = {}
        for name, each in _inside(layer, params, state, path).items():
            with expect.at(name):
                parts[name] = _there(*each)
        if _kind(layer) == "bidirectional":
            parts["backward"] = {name + _REVERSE: array for name, array in parts["backward"].items()}
        if _levelled(layer):
            parts = _levels(parts)
        return _joined(parts.values())
    _check_names(layer, params, state)
    if whole := _WHOLE.get(_kind(layer)):
        return _at(path, whole.there(params))
    fields, of_state = _known(layer)
    arrays = {fields[name].name: fields[name].there(value) for name, value in params.items()}
    return _at(path, arrays | {of_state[name]: value for name, value in dict(state).items()})


def _back(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...], arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """(params, state) of the arrays, in the structure of those given."""
    made = layer.made if layer.combinator else None
    match layer.combinator:
        case "repeat" if made:
            own, own_state = jax.eval_shape(partial(_turn, 0), params, state)
            count = range(_turns(params, state))
            turns = [_back(made.inner, own, own_state, (*path, str(i)), arrays) for i in count]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)
        case "freeze" if made:
            return params, Frozen(*_back(made.inner, state.params, state.state, path, arrays))
        case "tied" if isinstance(made, Tied):
            return _back_tied(made, params, state, path, arrays)
    if made and made.inner:
        return _back(made.inner, params, state, path, arrays)
    if layer.parts:
        both = {}
        for i, (name, (part, own, own_state, inside)) in enumerate(_inside(layer, params, state, path).items()):
            given = arrays
            if _kind(layer) == "bidirectional" and name == "backward":
                given = {n.removesuffix(_REVERSE): a for n, a in arrays.items() if n.endswith(_REVERSE)}
            if _levelled(layer):
                given = _relevelled(arrays, i, 0)
            both[name] = _back(part, own, own_state, inside, given)
        new_state = {name: new for name, (_, new) in both.items()}
        return {name: new for name, (new, _) in both.items()}, new_state if state else state
    get = lambda name: arrays[".".join((*path, name))]
    if whole := _WHOLE.get(_kind(layer)):
        return whole.back(params, get), state
    fields, of_state = _known(layer)
    new = {name: fields[name].back(get(fields[name].name)) for name in params}
    return new, {name: get(of_state[name]) for name in state} if state else state


def _back_tied(
    made: Tied, params: Tree, state: Tree, path: tuple[str, ...], arrays: Mapping[str, Any]
) -> tuple[Any, Any]:
    whole, state = _back(made.inner, jax.eval_shape(made.whole, params), state, path, arrays)
    params = made.apart(whole)
    equal = jax.tree.map(lambda a, b: bool(jnp.array_equal(a, b, equal_nan=True)), whole, made.whole(params))
    if not all(jax.tree.leaves(equal)):
        different = [name for name, same in named_leaves(equal) if not same]
        remedy = "load it into a model that is not tied"
        raise InputError("equal values for what is tied", f"others for {', '.join(different)}", remedy)
    return params, state


def _joined(parts: Iterable[dict[str, Any]]) -> dict[str, Any]:
    return {name: array for part in parts for name, array in part.items()}


def _at(path: tuple[str, ...], arrays: Mapping[str, Any]) -> dict[str, Any]:
    return {".".join((*path, name)): array for name, array in arrays.items()}


def _turns(params: Tree, state: Tree) -> int:
    """How often a `repeat` repeats; 1 where it has nothing to show it by, and nothing to convert."""
    times = {leaf.shape[:1] for leaf in jax.tree.leaves((params, state))}
    if len(times) > 1 or () in times:
        remedy = "pass the params and state that this model's init returned"
        raise InputError("arrays stacked along first axes of one size", describe((params, state)), remedy)
    return times.pop()[0] if times else 1


def _turn(i: int, params: Tree, state: Tree) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[i], (params, state))


def _inside(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """The arguments of the walk for each part."""
    expect.named(params, layer.parts, "params")
    states = dict.fromkeys(layer.parts, ()) if _is_left_out(state) else state
    expect.named(states, layer.parts, "state")
    shared = _kind(layer) == "bidirectional" or _levelled(layer)  # one module there, which tells its parts by suffixes
    paths = {name: path if shared else (*path, name) for name in layer.parts}
    return {name: (part, params[name], states[name], paths[name]) for name, part in layer.parts.items()}


def _is_left_out(state: Tree) -> bool:
    return isinstance(state, (tuple, Mapping)) and not state


def _frozen(params: Tree, state: Tree) -> Frozen:
    """The params and state of what is frozen."""
    if jax.tree.leaves(params) or not isinstance(state, Frozen):
        received = f"params {describe(params)}, state {describe(state)}"
        raise InputError("params {} and a state Frozen(params, state)", received, "pass the state that init returned")
    return state


def _known(layer: Layer) -> tuple[dict[str, Field], dict[str, str]]:
    return _FIELDS.get(_kind(layer), {}), _STATE.get(_kind(layer), {})


def _check_names(layer: Layer, params: Tree, state: Tree) -> None:
    """Refuse params and state that are not those of such a layer, and other kinds of layers that have some."""
    (fields, of_state), kind = _known(layer), _kind(layer)
    names = _WHOLE[kind].names if kind in _WHOLE else fields
    if not names and jax.tree.leaves((params, state)):
        received = f"{layer.name}{f' by {kind}' * (kind != layer.name)} {describe(params)}"
        remedy = "convert this layer by hand: its params are a dict of arrays"
        raise InputError(f"layers among {', '.join([*_FIELDS, *_WHOLE])}", received, remedy)
    needed = {name for name in names if name not in fields or not fields[name].optional}
    state = {} if _is_left_out(state) else state
    for what, tree, least, most in (("params", params, needed, names), ("state", state, set(of_state), of_state)):
        if not isinstance(tree, Mapping) or not least <= set(tree) <= set(most):
            wanted = f"{what} of {kind}: {', '.join(most) or 'an empty dict'}"
            raise InputError(wanted, describe(tree), f"pass the {what} that this model's init returned")


def _levels(parts: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arrays of the layers of a stack, each under the names of its level."""
    sizes = {array.shape for arrays in parts.values() for name, array in arrays.items() if "weight_hh_l0" in name}
    if len(sizes) > 1:
        received = " and ".join(str(width) for _, width in sorted(sizes))
        raise InputError("a stack of recurrent layers of one size", received, "convert its layers one by one")
    return {name: _relevelled(arrays, 0, i) for i, (name, arrays) in enumerate(parts.items())}


def _relevelled(arrays: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The arrays of the layer that is number `old` of a stack, under the names that they have as number `new`."""
    level = re.compile(rf"_l{old}(?=$|{_REVERSE}$)")
    return {level.sub(f"_l{new}", name): array for name, array in arrays.items() if level.search(name)}


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


_RUNNING = Whole(("kernel", "recurrent_kernel", "bias"), _recurrent_there, _recurrent_back)
_WHOLE = {
    "rnn": _RUNNING,
    "lstm": _RUNNING,
    "gru": _RUNNING._replace(names=(*_RUNNING.names, "recurrent_bias")),
    "attention": Whole((*_PROJECTED, "out"), _attention_there, _attention_back),
}
