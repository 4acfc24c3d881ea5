"""Parameters in the names and layouts of PyTorch's modules: their state dicts.

A parameter's name there is the layer's path with dots, where a turn of a `repeat` is its number, and then PyTorch's
name of the field: `encoder.0.dense.weight`.

    dense, conv, depthwise_conv       kernel [*window, C, F]       weight [F, C, *window]
                                      bias                         bias
    conv_transpose                    kernel [*window, C, F]       weight [C, F, *window], each window reversed
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

Gates are in the same order, i f g o and r z n. PyTorch adds two biases in every gate: the first is given their sum and
the second zeros, except in a gru's n, where only the second one is inside the reset. A batch norm's
`num_batches_tracked`, which PyTorch reads only for momentum=None, is set to 0 on the way there and ignored on the way
back.

Behind a flatten of positions the features are in another order there: `funcnet.interop.torch.axes` says which.

PyTorch has no recurrent layer that only runs in reverse, no bidirectional one except of one kind, forward and then in
reverse, no stack of several kinds or sizes, and no rotary attention. These are refused, though their params would fit.
"""

import re
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, by, describe
from funcnet.combinators.freeze import Freeze, Frozen
from funcnet.combinators.recurrent import Bidirectional
from funcnet.combinators.repeat import Repeat
from funcnet.combinators.tied import Tied
from funcnet.interop.safetensors import Arrays, as_loaded, named_leaves, native, require_arrays, require_same
from funcnet.interop.torch.axes import Found, found_of, reordering, stated
from funcnet.interop.torch.kinds import is_left_out, kind_of, known, levelled, require_convertible, require_names
from funcnet.interop.torch.modules import WHOLE
from funcnet.interop.torch.probe import is_module, require_equal, require_values
from funcnet.interop.torch.tensors import COUNTER, arrays_of, renamed_by
from funcnet.layer import Layer, a_layer
from funcnet.structure import Wrapped

Tree = Any

_REVERSE = "_reverse"


@by("to_torch")
def to_torch(
    layer: Layer,
    params: Tree,
    state: Tree = (),
    names: Mapping[str, str] | None = None,
    *,
    x: Tree = None,
    channels: str | None = None,
) -> Arrays:
    """The state dict of the PyTorch module that a layer is, as NumPy arrays; the module's docstring says how.

        module.load_state_dict({name: torch.from_numpy(array) for name, array in to_torch(layer, params).items()})

    The arrays are copies, each contiguous in C order, as functions that write files expect. `torch.from_numpy` does not
    know bfloat16: give it array.astype("float32"), which holds the same values. `load_state_dict` converts to the
    module's dtypes.

    Args:
        layer: made of layers that PyTorch has too. A layer is known by its kind and the names of its params.
        params, state: the layer's; the state can be left out where it holds no arrays.
        names: names in PyTorch by ours, where they differ: {"dense": "0", "blocks.*.dense": "encoder.layers.*.linear"}.
            A name of ours is the beginning of a path with dots, or all of it; of those that fit, the longest match is
            taken. A "*" is any one part of the path, such as a number, and the same part in PyTorch's name. A copy that
            is `tied` has a name too.
        x: an input, or its shape and dtype. It is needed where a `flatten`, a `reshape` or a layer of one's own could
            turn positions into features: for a dense layer behind a flatten of [*spatial, C], the columns of PyTorch's
            weight are in the order of [C, *spatial], and so are the arrays of a norm in between.
        channels: where the module has the channels of x, "first" or "last"; for a flatten with no layer before it that
            determines this.

    Raises:
        InputError: for a layer with params that PyTorch does not have, for params or a state that are not the layer's,
            for names that fit no array, or give two arrays one name, and for features in an order that cannot be
            determined.
    """
    require_convertible(a_layer(layer))
    for what, tree in {"params": params, "state": state}.items():
        require_arrays(tree, f"arrays with values as {what}", expect.is_concrete)
    params, state = jax.tree.map(native, (params, state))
    with jax.enable_x64(True):  # else NumPy's float64 would be float32 on the way
        arrays = {name: native(array) for name, array in _there(layer, params, state, ()).items()}
    for name, order in _found(layer, params, state, x, channels).orders.items():
        arrays[name] = arrays[name][..., order]
    renamed = renamed_by(arrays, names)
    counted = [name.removesuffix("running_mean") for name in renamed.values() if name.endswith("running_mean")]
    counters = {name + COUNTER: np.zeros((), np.int64) for name in counted}
    return {renamed[name]: native(array) for name, array in arrays.items()} | counters


@by("from_torch")
def from_torch(
    layer: Layer,
    tensors: Any,
    params: Tree,
    state: Tree = (),
    names: Mapping[str, str] | None = None,
    *,
    x: Tree = None,
    channels: str | None = None,
) -> tuple[Tree, Tree]:
    """(params, state) of a layer, from a PyTorch module or its state dict; nothing is changed in what is given.

    With a module and an input x, the module's outputs are compared with the layer's, both in evaluation mode and in
    float64 (without `mixed`), and a difference is refused: `load_state_dict` and shapes cannot reveal another padding,
    eps or activation, or layers in another order. A state dict computes nothing: with one you have to compare the
    options yourself.

    Args:
        layer: as in `to_torch`.
        tensors: a `torch.nn.Module`, or a dict of tensors, parameters or arrays by name. A copy of the module is run,
            so that its mode, buffers and PyTorch's random numbers stay as they are. A tuple x is passed to it as
            several arguments, a dict by keyword. If it returns a tuple and the layer an array, the first element
            counts; its channels may be first or last.
        params, state: what init returned, or their shapes and dtypes (`jax.eval_shape(layer.init, key, x)`).
        names: as in `to_torch`.
        x: as in `to_torch`; for a module, an input with values in our layout, with the channels last.
        channels: as in `to_torch`; where x has positions, "first" also passes it to the module with the channels first.
            By default that is done where the first layer that determines it is a convolution, a pool or a norm of
            channels.

    Raises:
        InputError: if a tensor is missing or superfluous, or its shape or dtype is not that of its parameter; where
            `to_torch` refuses; and if a module's outputs differ from the layer's by more than 1e-6 of their largest
            value.
    """
    require_convertible(a_layer(layer))
    for what, tree in {"params": params, "state": state}.items():
        require_arrays(tree, f"arrays as {what}")
    module = tensors if is_module(tensors) else None
    if module is not None:
        require_values(x)
    params, state = as_loaded((params, state))
    wanted = jax.eval_shape(lambda params, state: _there(layer, params, state, ()), params, state)
    found = _found(layer, params, state, x, channels)
    renamed = renamed_by(wanted, names)
    given = arrays_of(tensors if module is None else module.state_dict())
    shapes = {renamed[name]: leaf for name, leaf in wanted.items()}
    require_same(given, shapes, "load it into the module's twin; convert dtypes and leave other tensors out first")
    arrays = {name: jnp.array(given[other]) for name, other in renamed.items()}
    for name, order in found.orders.items():
        arrays[name] = arrays[name][..., np.argsort(order)]
    new, new_state = _back(layer, params, state, (), arrays)
    if module is not None:
        in_order = {name: other for name, other in renamed.items() if name not in found.orders}
        modules = {tuple(name.split(".")[:-1]): other.rpartition(".")[0] for name, other in in_order.items()}
        require_equal(layer, new, stated(layer, new_state, x), x, module, found, modules)
    return new, new_state


def _found(layer: Layer, params: Tree, state: Tree, x: Tree, channels: str | None) -> Found:
    """What the input x tells about the module's axes; without x, nothing, provided that no layer needs it."""
    if channels not in (None, "first", "last"):
        raise InputError('channels="first" or "last"', repr(channels), "say where the module has the channels of x")
    if x is not None:
        remedy = "pass an array of NumPy or JAX, the channels last, or a jax.ShapeDtypeStruct"
        require_arrays(x, "arrays as x, or their shapes and dtypes", remedy=remedy)
        params, state, x = as_loaded((params, stated(layer, state, x), x))
        return found_of(layer, params, state, x, channels)
    if name := reordering(layer):
        remedy = "pass an input or its shape: x=jax.ShapeDtypeStruct((1, 28, 28, 1), jnp.float32)"
        raise InputError("an input as x", f"none, for a model with {name}, whose features PyTorch orders", remedy)
    return Found({}, None, "any")


def _there(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, Any]:
    """The arrays of a layer in PyTorch's layout, by our names."""
    match layer.structure:
        case Repeat(inner=inner, times=times):
            _require_stacked(times, params, state)
            turns = [_turn(i, params, state) for i in range(times)]
            return _joined(_there(inner, p, s, (*path, str(i))) for i, (p, s) in enumerate(turns))
        case Freeze(inner=inner):
            frozen = _frozen(params, state)
            return _there(inner, frozen.params, frozen.state, path)
        case Tied(inner=inner, whole=whole):
            return _there(inner, whole(params), state, path)
        case Wrapped(inner=inner):
            return _there(inner, params, state, path)
    if layer.parts:
        parts = {}
        for name, each in _inside(layer, params, state, path).items():
            with at(name):
                parts[name] = _there(*each)
        if isinstance(layer.structure, Bidirectional):
            parts["backward"] = {name + _REVERSE: array for name, array in parts["backward"].items()}
        if levelled(layer):
            parts = _levels(parts)
        return _joined(parts.values())
    require_names(layer, params, state)
    if whole := WHOLE.get(kind_of(layer)):
        return _at(path, whole.there(params))
    fields, of_state = known(layer)
    arrays = {fields[name].name: fields[name].there(value) for name, value in params.items()}
    return _at(path, arrays | {of_state[name]: value for name, value in dict(state).items()})


def _back(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...], arrays: Mapping[str, Any]) -> tuple[Any, Any]:
    """(params, state) from the arrays, in the structure of the params and state given."""
    match layer.structure:
        case Repeat(inner=inner, times=times):
            _require_stacked(times, params, state)
            own, own_state = jax.eval_shape(partial(_turn, 0), params, state)
            turns = [_back(inner, own, own_state, (*path, str(i)), arrays) for i in range(times)]
            return jax.tree.map(lambda *leaves: jnp.stack(leaves), *turns)
        case Freeze(inner=inner):
            return params, Frozen(*_back(inner, state.params, state.state, path, arrays))
        case Tied() as made:
            return _back_tied(made, params, state, path, arrays)
        case Wrapped(inner=inner):
            return _back(inner, params, state, path, arrays)
    if layer.parts:
        both = {}
        for i, (name, (part, own, own_state, inside)) in enumerate(_inside(layer, params, state, path).items()):
            given = arrays
            if isinstance(layer.structure, Bidirectional) and name == "backward":
                given = {n.removesuffix(_REVERSE): a for n, a in arrays.items() if n.endswith(_REVERSE)}
            if levelled(layer):
                given = _relevelled(arrays, i, 0)
            both[name] = _back(part, own, own_state, inside, given)
        new_state = {name: new for name, (_, new) in both.items()}
        return {name: new for name, (new, _) in both.items()}, new_state if state else state
    get = lambda name: arrays[".".join((*path, name))]
    if whole := WHOLE.get(kind_of(layer)):
        return whole.back(params, get), state
    fields, of_state = known(layer)
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


def _require_stacked(times: int, params: Tree, state: Tree) -> None:
    if any(leaf.shape[:1] != (times,) for leaf in jax.tree.leaves((params, state))):
        remedy = "pass the params and state that this model's init returned"
        raise InputError(f"arrays stacked along a first axis of {times} layers", describe((params, state)), remedy)


def _turn(i: int, params: Tree, state: Tree) -> tuple[Any, Any]:
    return jax.tree.map(lambda leaf: leaf[i], (params, state))


def _inside(layer: Layer, params: Tree, state: Tree, path: tuple[str, ...]) -> dict[str, tuple[Any, ...]]:
    """For each part, the arguments with which `_there` and `_back` go on."""
    expect.keys(params, layer.parts, "params")
    states = dict.fromkeys(layer.parts, ()) if is_left_out(state) else state
    expect.keys(states, layer.parts, "state")
    shared = isinstance(layer.structure, Bidirectional) or levelled(
        layer
    )  # one module there, which names its parts by suffixes
    paths = {name: path if shared else (*path, name) for name in layer.parts}
    return {name: (part, params[name], states[name], paths[name]) for name, part in layer.parts.items()}


def _frozen(params: Tree, state: Tree) -> Frozen:
    """The params and state of what is frozen."""
    if jax.tree.leaves(params) or not isinstance(state, Frozen):
        received = f"params {describe(params)}, state {describe(state)}"
        raise InputError("params {} and a state Frozen(params, state)", received, "pass the state that init returned")
    return state


def _levels(parts: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The arrays of the layers of a stack, each named for its level."""
    sizes = {array.shape for arrays in parts.values() for name, array in arrays.items() if "weight_hh_l0" in name}
    if len(sizes) > 1:
        received = " and ".join(str(width) for _, width in sorted(sizes))
        raise InputError("a stack of recurrent layers of one size", received, "convert its layers one by one")
    return {name: _relevelled(arrays, 0, i) for i, (name, arrays) in enumerate(parts.items())}


def _relevelled(arrays: Mapping[str, Any], old: int, new: int) -> dict[str, Any]:
    """The arrays of the layer that is number `old` of a stack, under the names that they have as number `new`."""
    level = re.compile(rf"_l{old}(?=$|{_REVERSE}$)")
    return {level.sub(f"_l{new}", name): array for name, array in arrays.items() if level.search(name)}
