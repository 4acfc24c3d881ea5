"""The order of features behind a flatten, when PyTorch has the channels first and funcnet has them last.

An example [*spatial, C] of ours is [C, *spatial] in PyTorch, with N positions. A flatten of both gives

    ours[n C + c] = theirs[c N + n]         so that theirs[p] = ours[order[p]],  order = arange(N C).reshape(N, C).T

and every array with an entry for each of these features has its entries in that order in PyTorch: the rows of a dense
kernel, and all arrays of a norm or a prelu. So layer and module are the same function if and only if these are
permuted. The features that a dense layer makes are in the same order in both again.

Where a module has its channels follows from the layer that made the axes, for a module that permutes axes only where
the next layer needs it:

    first     behind a convolution, and behind a pool, a norm of channels or a prelu whose input was not `last`
    last      behind a recurrent layer, attention or an embedding, and behind a dense layer or layer norm whose input
              was not `first`
    viewed    last behind a reshape of features, where a convolution would want PyTorch's view to be [C, *spatial]
    any       wherever the input has them, as long as no layer has determined it
    moved     channels were moved for a layer that has them elsewhere, and may have been moved back; or the positions
              were made by a function of which nothing is known but that it keeps the number of channels
    unknown   such a function made the features too

Where an order matters and cannot be determined, the conversion is refused: behind a flatten of `any` and `moved`, for
features that are `unknown`, and for features in another order in PyTorch that are added to others in our order, or
split into groups, gates or pieces.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import jax
import numpy as np

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, by
from funcnet.combinators.hooks import observe
from funcnet.combinators.parallel import Branch, Parallel
from funcnet.combinators.repeat import Repeat
from funcnet.combinators.reversible import Reversible
from funcnet.combinators.serial import Serial
from funcnet.combinators.skip import Shortcut, Skip
from funcnet.interop.safetensors import as_loaded
from funcnet.interop.torch.kinds import is_left_out, kind_of
from funcnet.layer import Layer
from funcnet.structure import Transparent, Wrapped

Tree = Any
Path = tuple[str, ...]
Orders = dict[str, np.ndarray]

_CONVOLUTIONS = ("conv", "depthwise_conv", "conv_transpose")
_OF_CHANNELS = (
    *("max_pool", "avg_pool", "global_max_pool", "global_avg_pool"),
    *("batch_norm", "group_norm", "instance_norm", "prelu"),
)
_OF_SEQUENCES = ("embedding", "attention", "rnn", "gru", "lstm", "lru", "bidirectional", "stacked", "bilinear")
_OF_FEATURES = ("dense", "layer_norm", "rms_norm", "position_embedding", "sinusoidal_positions")
_BY_FEATURE = {  # the arrays with an entry for each feature along their last axis, by PyTorch's names
    "dense": ("weight",),
    "batch_norm": ("weight", "bias", "running_mean", "running_var"),
    "layer_norm": ("weight", "bias"),
    "rms_norm": ("weight",),
    "prelu": ("weight",),
}
_IN_ANY_ORDER = (
    *("identity", "relu", "relu6", "leaky_relu", "elu", "celu", "selu", "gelu", "silu", "mish", "softplus"),
    *("squareplus", "softsign", "sigmoid", "log_sigmoid", "tanh", "hard_tanh", "hard_sigmoid", "hard_silu"),
    *("dropout", "spatial_dropout", "drop_path", "softmax", "log_softmax", "l2_normalize"),
)
_OF_PIECES = ("glu", "swiglu", "geglu", "maxout")  # pieces of the last axis, which must be in our order
_RESHAPES = ("flatten", "reshape")
_JOINS = ("add", "concat")
_KNOWN = (*_CONVOLUTIONS, *_OF_CHANNELS, *_OF_SEQUENCES, *_OF_FEATURES, *_IN_ANY_ORDER, *_OF_PIECES, *_JOINS)


@dataclass(frozen=True)
class Axes:
    """Where the module has an array's channels, and the order of its last axis, where that is not ours."""

    channels: str
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """What was found out about a module.

    Attributes:
        orders: by an array's name the order of its last axis: theirs[.., p] = ours[.., order[p]] in PyTorch's layout.
        output: the `Axes` of the model's output.
        channels: where the module has those of the input: "first", "last", or "any" where no layer determines it.
    """

    orders: Orders
    output: Tree
    channels: str


def reordering(layer: Layer) -> str:
    """The name of a layer inside that could turn positions into features; "" if there is none."""
    if isinstance(layer.structure, Wrapped):
        return reordering(layer.structure.inner)
    if layer.parts:
        return next(filter(None, map(reordering, layer.parts.values())), "")
    return "" if kind_of(layer) in _KNOWN else layer.name


def found_of(layer: Layer, params: Tree, state: Tree, x: Tree, channels: str | None) -> Found:
    """How the module lays out the arrays that pass through a layer, for an input like x.

    Args:
        layer, params, state: the layer; of params and state shapes and dtypes will do.
        x: shapes and dtypes of an input.
        channels: where the module has those of x, "first" or "last"; None where the first layer determines it.
    """
    shapes, firsts = _shapes(layer, params, state, x), []
    orders: Orders = {}

    def walk(layer: Layer, given: Tree, path: Path, at: Path) -> Tree:
        """The axes of the output; `at` is the path without the turns of a `repeat`."""
        part = lambda name, given: _at(name, walk, layer.parts[name], given, (*path, name), (*at, name))
        match layer.structure:
            case Repeat(inner=inner, times=times):
                return reduce(lambda h, i: walk(inner, h, (*path, str(i)), at), range(times), given)
            case Skip(inner=inner):
                return _sum(given, walk(inner, given, path, at))
            case Shortcut():
                return _sum(part("shortcut", given), part("main", given))
            case Serial():
                return reduce(lambda h, name: part(name, h), layer.parts, given)
            case Branch():
                return tuple(part(name, given) for name in layer.parts)
            case Parallel():
                return tuple(part(name, each) for name, each in zip(layer.parts, given, strict=True))
            case Reversible():
                return _reversible(given, part)
            case Transparent(inner=inner):
                return walk(inner, given, path, at)
        if layer.parts and reordering(layer):
            remedy = "convert the layers one by one, or take serial, skip and branch"
            raise InputError("a flatten or reshape inside of layers in a row", f"one inside of {layer.name}", remedy)
        with by(layer.name):
            return leaf(kind_of(layer), given, *shapes[at], path)

    def leaf(kind: str, given: Tree, x: Tree, y: Tree, path: Path) -> Tree:
        if kind == "add" and isinstance(given, tuple):
            return reduce(_sum, given)
        if kind == "concat" and isinstance(given, tuple):
            return _concat(given, x, y)
        if not isinstance(given, Axes):
            for axes in jax.tree.leaves(given):
                _require_order(axes)
            plain = all(axes.channels in ("last", "viewed") for axes in jax.tree.leaves(given))
            made = "last" if kind in _OF_SEQUENCES else "viewed" if plain else "unknown"
            return jax.tree.map(lambda y: Axes(made), y)
        if given.channels == "any" and x.ndim > 2 and kind in (*_CONVOLUTIONS, *_OF_CHANNELS):
            firsts.append(kind)
        if kind in _IN_ANY_ORDER:
            return given
        if kind in _RESHAPES:
            return _reshaped(given, x.shape, y.shape)
        if given.order is not None and kind in _BY_FEATURE:
            orders.update({".".join((*path, name)): given.order for name in _BY_FEATURE[kind]})
            return Axes("last") if kind == "dense" else given
        _require_order(given)
        return jax.tree.map(lambda y: _after(kind, given, x.shape, y.shape), y)

    output = walk(layer, jax.tree.map(lambda leaf: Axes(channels or "any"), x), (), ())
    return Found(orders, output, channels or ("first" if firsts else "any"))


def stated(layer: Layer, state: Tree, x: Tree) -> Tree:
    """The state as the layer wants it; where it holds no arrays, it may have been left out."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.eval_shape(layer.init, key, as_loaded(x))[1] if is_left_out(state) else state


def _shapes(layer: Layer, params: Tree, state: Tree, x: Tree) -> dict[Path, tuple[Tree, Tree]]:
    """Input and output of each layer, as shapes, by path."""
    seen = {}

    def see(path, part, params, x, out):
        seen[path] = x, out[0]

    key = jax.eval_shape(lambda: jax.random.key(0))
    jax.eval_shape(observe(layer, see).fwd, params, state, x, key)
    return {path: expect.shapes(both) for path, both in seen.items()}


def _after(kind: str, given: Axes, x: tuple[int, ...], y: tuple[int, ...]) -> Axes:
    """The axes of a layer's output, for input features that are in our order."""
    channels = given.channels
    if kind not in _KNOWN:
        if len(x) < 3 or channels in ("last", "viewed"):  # the same array in both, and so in the function
            return Axes("viewed" if len(y) > 2 else "last")
        if x == y and channels == "any":
            return given
        return Axes("unknown" if x[-1] != y[-1] else "moved" if len(y) > 2 else "last")
    if channels == "viewed" and kind in (*_CONVOLUTIONS, *_OF_CHANNELS) and not _one_order(x):
        received = f"positions {list(x[1:-1])} by a reshape of features, of which PyTorch would make others"
        remedy = "let a convolution make the positions, or convert the layers before the reshape by hand"
        raise InputError("positions that are PyTorch's too", received, remedy)
    if len(y) < 3 or kind in _OF_SEQUENCES:
        return Axes("last")
    if kind in _CONVOLUTIONS:
        return Axes("first")
    if kind in _OF_PIECES or channels == "moved":
        return given
    own, other = ("first", "last") if kind in _OF_CHANNELS else ("last", "first")
    return Axes("moved" if channels == other else own)


def _reshaped(given: Axes, x: tuple[int, ...], y: tuple[int, ...]) -> Axes:
    if x == y or x[-1] == y[-1]:
        return given if len(x) > 2 or len(y) < 3 else Axes("viewed", given.order)
    _require_order(given)
    if _one_order(x) or given.channels in ("last", "viewed"):
        return Axes("viewed" if len(y) > 2 else "last")
    if given.channels == "any":
        remedy = 'say where the module has the channels of x: channels="first" or channels="last"'
        raise InputError("a flatten of channels whose place is known", f"one of the input, {list(x[1:])}", remedy)
    if given.channels == "first" and len(y) == 2:
        features = np.arange(prod(x[1:])).reshape(-1, x[-1])
        return Axes("last", features.T.reshape(-1))
    if given.channels == "first":
        received = f"a reshape of {list(x[1:])} to {list(y[1:])}"
        remedy = f"let it keep the {x[-1]} channels, or convert the layers behind it by hand"
        raise InputError("a flatten, or a reshape of positions alone, behind a convolution", received, remedy)
    received = f"{list(x[1:])} of layers that have the channels first and of others, or of a function of one's own"
    remedy = "pool the positions first, or convert the layers behind it by hand"
    raise InputError("a flatten of channels whose place is known", received, remedy)


def _one_order(shape: tuple[int, ...]) -> bool:
    """Whether the flattened entries are in the same order with the channels first and with the channels last."""
    return len(shape) < 3 or shape[-1] == 1 or prod(shape[1:-1]) == 1


def _sum(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(_joined, a, b)


def _joined(a: Axes, b: Axes) -> Axes:
    """The axes of two arrays that are added, or joined along another axis than the last."""
    if (a.order is None) != (b.order is None) or not np.array_equal(_listed(a), _listed(b)):
        _require_order(a)
        _require_order(b)
    both = {a.channels, b.channels} - {"any"} or {"any"}
    if both == {"last", "viewed"}:
        both = {"last"}
    mixed = "unknown" if "unknown" in both else "moved"
    return Axes(both.pop() if len(both) == 1 else mixed, a.order)


def _listed(axes: Axes) -> Any:
    return () if axes.order is None else axes.order


def _concat(given: tuple[Axes, ...], x: tuple[Any, ...], y: Any) -> Axes:
    if all(axes.order is None for axes in given) or any(each.shape[:-1] != y.shape[:-1] for each in x):
        return reduce(_joined, given)
    orders, begin = [], 0
    for axes, each in zip(given, x, strict=True):
        size = each.shape[-1]
        orders.append(begin + (np.arange(size) if axes.order is None else axes.order))
        begin += size
    channels = reduce(_joined, [Axes(axes.channels) for axes in given]).channels
    return Axes(channels, np.concatenate(orders))


def _reversible(given: Tree, part: Callable[[str, Tree], Tree]) -> Tree:
    """y1 = x1 + f(x2), y2 = x2 + g(y1), of a pair or of halves."""
    if isinstance(given, Axes):
        _require_order(given)
    x1, x2 = given if isinstance(given, tuple) else (given, given)
    y1 = _sum(x1, part("f", x2))
    y2 = _sum(x2, part("g", y1))
    return (y1, y2) if isinstance(given, tuple) else _sum(y1, y2)


def _at(name: str, walk: Callable, *args: Any) -> Tree:
    with at(name):
        return walk(*args)


def _require_order(axes: Axes) -> None:
    """Refuse features that the module has in another order than ours."""
    if axes.order is not None or axes.channels == "unknown":
        made = "a function of one's own" if axes.order is None else "a flatten of positions"
        remedy = "pool the positions first, put a dense layer behind the flatten, or convert this layer by hand"
        raise InputError("features that PyTorch has in the same order", f"those of {made}", remedy)
