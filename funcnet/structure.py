"""How a layer is made: by which call, and from which other layers.

A combinator describes what it is made of in a record, `Layer.made`, of one of two kinds:

    Composed(parts, again)    of layers by name; params and state are dicts over the names
    Wrapped(inner, again)     of one layer, whose parts are used as its own, as in `skip` and `repeat`

`again` makes the same combinator from other layers. So code that walks through models, such as `summary`, `explain` and
`mixed(keep=..)`, does not need to know combinators by name. Code that does treat one specially matches on its record:
`Serial`, `Skip`, `Repeat` and the others are defined next to their functions in `funcnet.combinators`.

`constructor` records the call that made a layer, for `repr`: a model is shown as a tree, one layer per line.
"""

import functools
import inspect
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ParamSpec, TypeVar

import numpy as np

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_array, is_concrete

P = ParamSpec("P")
L = TypeVar("L")
WIDEST = 60  # the most characters that a repr shows of an option


@dataclass(frozen=True, eq=False, kw_only=True)
class _Made:
    """The fields that both kinds of record have.

    Attributes:
        direct: whether the combinator calls each layer once, on whole arrays, and with the contraction that it is
            given, as `serial` does and `repeat` does not. Its layers can then be replaced by others that record what
            passes through them.
        undo: for a reversible layer, its backward pass from the output (`funcnet.combinators.reversible`).
        functions: the four of the layer that the record describes; the layer fills them in itself.
    """

    direct: bool = True
    undo: Callable[..., tuple[Any, Any, Any]] | None = None
    functions: tuple[Callable, ...] | None = None


@dataclass(frozen=True, eq=False)
class Composed(_Made):
    """A combinator of layers by name, whose params and state are dicts over these names (and others of its own).

    Attributes:
        parts: the layers.
        again: layers of the same names -> the same combinator of them.
        direct: whether it calls each layer once, on whole arrays, and with the contraction that it is given, as
            `serial` does. Otherwise say False, as `repeat` does: its layers are then not looked at one by one.
    """

    parts: Mapping[str, Any]
    again: Callable[[Mapping[str, Any]], Any]

    @property
    def rebuild(self) -> Callable[[Mapping[str, Any]], Any]:
        """parts -> the same combinator of other parts of the same names."""
        return self.again


@dataclass(frozen=True, eq=False)
class Wrapped(_Made):
    """A combinator of one layer, whose parts it has as its own.

    Attributes:
        inner: the layer.
        again: another layer -> the same combinator of it.
        direct: as for `Composed`.
    """

    inner: Any
    again: Callable[[Any], Any]

    @property
    def parts(self) -> Mapping[str, Any]:
        """The parts of the layer inside."""
        return self.inner.parts

    @property
    def rebuild(self) -> Callable[[Mapping[str, Any]], Any] | None:
        """parts -> the same combinator of other parts of the same names; None where the layer inside has none."""
        inner, again = self.inner.rebuild, self.again
        return None if inner is None else lambda parts: again(inner(parts))


class Transparent(Wrapped):
    """A layer that is the same in another way: by another name, in other dtypes, with less kept."""


Structure = Composed | Wrapped


@dataclass(frozen=True, eq=False, repr=False)
class Call:
    """The call that made a layer, without what was left at its default: `dense(8, use_bias=False)`.

    Attributes:
        name: the constructor's.
        args: the required arguments that are not layers.
        options: the other arguments that are not layers.
        layers: the arguments that are layers.
        ours: whether the constructor is funcnet's own.
        inner: the call noted before, by a constructor that this one called.
    """

    name: str
    args: tuple[Any, ...] = ()
    options: Mapping[str, Any] = field(default_factory=dict)
    layers: tuple[Any, ...] = ()
    ours: bool = False
    inner: "Call | None" = None

    def __repr__(self) -> str:
        given = [_shown(each) for each in self.args]
        given += [f"{name}={_shown(value)}" for name, value in self.options.items()]
        return f"{self.name}({', '.join(given)})"


def constructor(make: Callable[P, L]) -> Callable[P, L]:
    """Let the layers that a function returns note how it was called (`Layer.call`), which their `repr` shows."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def making(*args: P.args, **kwargs: P.kwargs) -> L:
        layer: Any = make(*args, **kwargs)
        if not _is_layer(layer):
            raise InputError(f"a layer from the constructor {make.__name__}", describe(layer), "return one")
        call = _call(make.__name__, signature, args, kwargs)
        return replace(layer, call=replace(call, ours=make.__module__.startswith("funcnet."), inner=layer.call))

    return making


def own_call(layer: Any) -> Call | None:
    """The call of funcnet's constructor that made a layer, whatever a user's own constructor notes on top."""
    call = layer.call
    while call is not None and not call.ours:
        call = call.inner
    return call


def _call(name: str, signature: inspect.Signature, args: Any, kwargs: Any) -> Call:
    given, required = {}, []
    for key, value in signature.bind(*args, **kwargs).arguments.items():
        parameter = signature.parameters[key]
        match parameter.kind:
            case parameter.VAR_KEYWORD:
                given |= value
            case parameter.VAR_POSITIONAL:
                given |= {f"*{i}": each for i, each in enumerate(value)}
                required += [f"*{i}" for i in range(len(value))]
            case _ if not _same(value, parameter.default):
                given[key] = value
                required += [key] * (parameter.default is parameter.empty)
    layers = {key: value for key, value in given.items() if _is_layer(value)}
    args = tuple(given[key] for key in required if key not in layers)
    options = {key: value for key, value in given.items() if key not in layers and key not in required}
    return Call(name, args, options, tuple(layers.values()))


def _is_layer(value: Any) -> bool:
    return hasattr(value, "unrounded")


def _same(value: Any, default: Any) -> bool:
    if isinstance(value, tuple) and isinstance(default, tuple):
        return len(value) == len(default) and all(map(_same, value, default))
    plain = isinstance(value, (bool, int, float, str)) and type(value) is type(default)
    return value is default or (plain and value == default)


def _shown(value: Any) -> str:
    if is_array(value):
        return f"{value}" if value.ndim == 0 and is_concrete(value) else describe(value)
    if isinstance(value, np.dtype):
        return value.name
    if callable(value) and (" at 0x" in repr(value) or isinstance(value, type)):
        return getattr(value, "__name__", type(value).__name__)
    text = " ".join(repr(value).split())
    return text if len(text) <= WIDEST else f"{text[: WIDEST - 2]}.."


def tree(layer: Any, name: str = "", indent: int = 0) -> Iterator[str]:
    """The lines of a layer's `repr`: its call, and below it, indented, the lines of its layers."""
    call, made = layer.call, layer.structure
    match made:
        case Wrapped():
            inside = [("", made.inner)]
        case Composed():
            inside = list(made.parts.items())
        case _:
            inside = [("", each) for each in call.layers] if call else []
    heading = repr(call) if call else layer.name
    kind = call.name if call else layer.name
    label = f"{name}: " if name and re.sub(r"_\d+$", "", name) != kind else ""
    yield "  " * indent + label + (heading.removesuffix("()") if inside else heading)
    for part_name, part in inside:
        yield from tree(part, part_name, indent + 1)
