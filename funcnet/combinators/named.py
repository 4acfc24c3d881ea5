"""Another name for a layer."""

from dataclasses import replace
from typing import Any

from funcnet._internal.errors import InputError
from funcnet.layer import Layer, a_layer
from funcnet.structure import Transparent, constructor

Tree = Any


class Named(Transparent):
    """A layer under another name."""


@constructor
def named(name: str, layer: Layer) -> Layer:
    """The same layer under another name, which it has among the params of `serial`, in tables and in errors.

    serial(dense(8), named("middle", relu()), dense(3)) names one layer where it stands; serial's own keywords name only
    the last ones.

    Raises:
        InputError: for a name that is no text, is empty or has a "/", which separates the names of a path.
    """
    a_layer(layer)
    if not isinstance(name, str) or not name or "/" in name:
        raise InputError('a name without "/"', repr(name), 'write named("encoder", layer)')
    return replace(layer, name=name, made=Named(layer, lambda other: named(name, other)))
