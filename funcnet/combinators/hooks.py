"""Look inside a model while it runs: every layer's input, output, state and residuals."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

from funcnet.layer import Layer

Tree = Any
Path = tuple[str, ...]
See = Callable[[Path, Layer, Tree, Any, tuple], None]


def observe(layer: Layer, see: See, path: Path = ()) -> Layer:
    """The same layer, which calls `see(path, layer, params, x, (y, state, residuals))` after each `fwd` inside it.

    Under `jax.eval_shape` or `jax.jit` what `see` receives are tracers: shapes and dtypes without values.
    """
    whole = layer
    if layer.rebuild:
        whole = layer.rebuild({name: observe(part, see, (*path, name)) for name, part in layer.parts.items()})

    def fwd(params, state, x, key):
        out = whole.fwd(params, state, x, key)
        see(path, layer, params, x, out)
        return out

    made = replace(whole.structure, functions=None) if whole.structure else None
    return replace(whole, fwd=fwd, made=made)


def paths(layer: Layer, path: Path = ()) -> Iterator[Path]:
    """The paths of a layer and all its parts, each before its own parts."""
    yield path
    for name, part in layer.parts.items():
        yield from paths(part, (*path, name))
