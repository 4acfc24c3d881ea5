"""What kind of module a layer is, and the refusal of those that PyTorch does not have."""

from collections.abc import Mapping
from typing import Any

import jax

from funcnet import expect
from funcnet.expect import InputError, describe
from funcnet.layer import Layer
from funcnet.pytorch.modules import FIELDS, RECURRENT, STATE, WHOLE, Field

Tree = Any

_RUNS = [((kind, False),) for kind in RECURRENT] + [((kind, False), (kind, True)) for kind in RECURRENT]
TRANSPARENT = ("named", "remat", "mixed", "freeze", "tied")  # around a layer that is the same module without them


def require_convertible(layer: Layer) -> None:
    """Refuse layers whose params would fit a module of PyTorch's that is another one."""
    kind = kind_of(layer)
    if layer.made and layer.combinator and layer.made.inner:
        require_convertible(layer.made.inner)
    elif kind in (*RECURRENT, "bidirectional"):
        if runs_of(layer) not in _RUNS:
            wanted = "recurrent layers forward, or bidirectional ones of one kind, forward and then in reverse"
            received = f"{layer.name}: " + ", ".join(kind + " in reverse" * reverse for kind, reverse in runs_of(layer))
            remedy = "convert its recurrent layers one by one, made without reverse, and turn the sequences there"
            raise InputError(wanted, received, remedy)
    elif kind == "attention" and _option(layer, "rotary"):
        remedy = "convert one without rotary, whose params are the same, and turn queries and keys there"
        raise InputError("attention without rotary positions", "attention(.., rotary=True)", remedy)
    elif levelled(layer) and len(set(map(runs_of, layer.parts.values()))) > 1:
        received = ", ".join(part.name for part in layer.parts.values())
        raise InputError("a stack of one kind of recurrent layers", received, "convert its layers one by one")
    else:
        for name, part in layer.parts.items():
            with expect.at(name):
                require_convertible(part)


def kind_of(layer: Layer) -> str:
    """What made the layer, which can have any name, where that is said."""
    return layer.made.combinator if layer.made else layer.name


def _option(layer: Layer, name: str) -> bool:
    return bool(layer.made and layer.made.options.get(name))


def runs_of(layer: Layer) -> tuple[tuple[str, bool], ...]:
    """The kind of a layer and whether it runs in reverse; of a bidirectional one that of both."""
    while layer.made and layer.combinator in TRANSPARENT:
        layer = layer.made.inner
    if kind_of(layer) == "bidirectional":
        return tuple(run for part in layer.parts.values() for run in runs_of(part))
    return ((kind_of(layer), _option(layer, "reverse")),)


def levelled(layer: Layer) -> bool:
    """Whether it is a stack of recurrent layers alone, in one direction or both, which is one module there."""
    runs = [run for part in layer.parts.values() for run in runs_of(part)]
    return kind_of(layer) == "stacked" and all(kind in RECURRENT for kind, _ in runs)


def known(layer: Layer) -> tuple[dict[str, Field], dict[str, str]]:
    """The fields of its params and of its state, none where the layer is not in the tables."""
    return FIELDS.get(kind_of(layer), {}), STATE.get(kind_of(layer), {})


def require_names(layer: Layer, params: Tree, state: Tree) -> None:
    """Refuse params and state that are not those of such a layer, and other kinds of layers that have some."""
    (fields, of_state), kind = known(layer), kind_of(layer)
    names = WHOLE[kind].names if kind in WHOLE else fields
    if not names and jax.tree.leaves((params, state)):
        received = f"{layer.name}{f' by {kind}' * (kind != layer.name)} {describe(params)}"
        remedy = "convert this layer by hand: its params are a dict of arrays"
        raise InputError(f"layers among {', '.join([*FIELDS, *WHOLE])}", received, remedy)
    needed = {name for name in names if name not in fields or not fields[name].optional}
    state = {} if is_left_out(state) else state
    for what, tree, least, most in (("params", params, needed, names), ("state", state, set(of_state), of_state)):
        if not isinstance(tree, Mapping) or not least <= set(tree) <= set(most):
            wanted = f"{what} of {kind}: {', '.join(most) or 'an empty dict'}"
            raise InputError(wanted, describe(tree), f"pass the {what} that this model's init returned")


def is_left_out(state: Tree) -> bool:
    return isinstance(state, (tuple, Mapping)) and not state
