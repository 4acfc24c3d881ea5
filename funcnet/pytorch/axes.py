"""What a flatten makes of channels that PyTorch has first and funcnet last.

An example [*spatial, C] of ours is [C, *spatial] there, with N positions. A flatten of both gives

    ours[n C + c] = theirs[c N + n]         so that theirs[p] = ours[order[p]],  order = arange(N C).reshape(N, C).T

and whatever has a number for each of these features has them in that order there: of a dense kernel the rows, of a norm
and a prelu all arrays. So the two are the same function if and only if these are permuted. A dense layer's own features
are in one order again.

Where a module has its channels is told by the layer that made the axes, for a module that permutes axes only where the
next layer needs it:

    first     behind a convolution, and behind a pool, a norm of channels or a prelu on what was not last
    last      behind a recurrent layer, attention or an embedding, and behind a dense layer or layer norm on what was
              not first
    viewed    last behind a reshape of features, where a convolution would want PyTorch's view to be [C, *spatial]
    any       what the input has, before a layer had its way
    moved     channels were moved for a layer that has them elsewhere, and may have been moved back; or a function that
              nothing is known of, but that it keeps the number of channels, made the positions
    unknown   such a function made the features too

Where an order matters and cannot be told, the conversion is refused: behind a flatten of `any` and `moved`, for
features that are `unknown`, and for those in another order there that are added to others in ours, or cut into groups,
gates or pieces.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import reduce
from math import prod
from typing import Any

import jax
import numpy as np

from funcnet import expect
from funcnet.expect import InputError
from funcnet.layer import Layer
from funcnet.observe import observe
from funcnet.pytorch.kinds import TRANSPARENT, is_left_out, kind_of
from funcnet.saved import as_loaded

Tree = Any
Path = tuple[str, ...]
Orders = dict[str, np.ndarray]

_CONVOLUTIONS = ("conv", "depthwise_conv", "conv_transpose")
_OF_CHANNELS = (
    *("max_pool", "avg_pool", "global_max_pool", "global_avg_pool"),
    *("batch_norm", "group_norm", "instance_norm", "prelu"),
)
_OF_SEQUENCES = ("embedding", "attention", "rnn", "gru", "lstm", "lru", "bidirectional", "stacked")
_OF_FEATURES = ("dense", "layer_norm", "rms_norm", "position_embedding", "sinusoidal_positions")
_BY_FEATURE = {  # what has a number for each feature on its last axis, by PyTorch's names
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
_OF_PIECES = ("glu", "swiglu", "geglu", "maxout")  # in order along the last axis, so in no other
_RESHAPES = ("flatten", "reshape")
_JOINS = ("add", "concat")
_KNOWN = (*_CONVOLUTIONS, *_OF_CHANNELS, *_OF_SEQUENCES, *_OF_FEATURES, *_IN_ANY_ORDER, *_OF_PIECES, *_JOINS)


@dataclass(frozen=True)
class Axes:
    """Where the module has an array's channels, and in which order the last axis, where that is not ours."""

    channels: str
    order: np.ndarray | None = None


@dataclass(frozen=True)
class Found:
    """What was found of a module.

    Attributes:
        orders: of arrays by name, that of their last axis: theirs[.., p] = ours[.., order[p]] once they are laid out.
        output: the `Axes` of the model's output.
        channels: where the module has those of the input: "first", "last", or "any" where no layer tells.
    """

    orders: Orders
    output: Tree
    channels: str


def reordering(layer: Layer) -> str:
    """The name of a layer that could make features of positions; "" without one."""
    inner = layer.made.inner if layer.combinator and layer.made else None
    if inner:
        return reordering(inner)
    if layer.parts:
        return next(filter(None, map(reordering, layer.parts.values())), "")
    return "" if kind_of(layer) in _KNOWN else layer.name


def found_of(layer: Layer, params: Tree, state: Tree, x: Tree, channels: str | None, names: Iterable[str]) -> Found:
    """How the module has what runs through a layer for an input like x.

    Args:
        layer, params, state: or the shapes and dtypes of the latter.
        x: shapes and dtypes of an input.
        channels: where the module has those of x, "first" or "last"; None where the first layer tells.
        names: of the layer's arrays, with the numbers of the turns of a `repeat`.
    """
    shapes, firsts = _shapes(layer, params, state, x), []
    orders: Orders = {}

    def turns(path: Path) -> int:
        begin = ".".join((*path, ""))
        return max(1, len({name.removeprefix(begin).split(".")[0] for name in names if name.startswith(begin)}))

    def walk(layer: Layer, given: Tree, path: Path, at: Path) -> Tree:
        """The axes of the output; `at` is the path without turns."""
        made = layer.made if layer.combinator else None
        part = lambda name, given: _at(name, walk, layer.parts[name], given, (*path, name), (*at, name))
        match layer.combinator:
            case "repeat" if made:
                return reduce(lambda h, i: walk(made.inner, h, (*path, str(i)), at), range(turns(path)), given)
            case "skip" if made:
                return _sum(given, walk(made.inner, given, path, at))
            case "skip_shortcut":
                return _sum(part("shortcut", given), part("main", given))
            case "serial":
                return reduce(lambda h, name: part(name, h), layer.parts, given)
            case "branch":
                return tuple(part(name, given) for name in layer.parts)
            case "parallel":
                return tuple(part(name, each) for name, each in zip(layer.parts, given, strict=True))
            case "reversible":
                return _reversible(given, part)
        if made and layer.combinator in TRANSPARENT:
            return walk(made.inner, given, path, at)
        if layer.parts and reordering(layer):
            remedy = "convert the layers one by one, or take serial, skip and branch"
            raise InputError("a flatten or reshape inside of layers in a row", f"one inside of {layer.name}", remedy)
        with expect.by(layer.name):
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
    """A state that may have been left out, where it holds no arrays, as the layer wants it."""
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
    """The axes behind a layer on features that are in order."""
    channels = given.channels
    if kind not in _KNOWN:
        if len(x) < 3 or channels in ("last", "viewed"):  # the very same array, so that of the function too
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
    """Whether an array has the same entries in a row with its channels first and last."""
    return len(shape) < 3 or shape[-1] == 1 or prod(shape[1:-1]) == 1


def _sum(a: Tree, b: Tree) -> Tree:
    return jax.tree.map(_joined, a, b)


def _joined(a: Axes, b: Axes) -> Axes:
    """Of two arrays that are added, or joined along another axis than the last."""
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
    with expect.at(name):
        return walk(*args)


def _require_order(axes: Axes) -> None:
    """Refuse features that the module does not have in the order that we have them in."""
    if axes.order is not None or axes.channels == "unknown":
        made = "a function of one's own" if axes.order is None else "a flatten of positions"
        remedy = "pool the positions first, put a dense layer behind the flatten, or convert this layer by hand"
        raise InputError("features that PyTorch has in the same order", f"those of {made}", remedy)
