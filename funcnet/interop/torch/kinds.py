"""What kind of module a layer is, and the refusal of those that PyTorch does not have."""

from collections.abc import Mapping
from typing import Any

import jax

from funcnet._internal.errors import InputError, at, describe
from funcnet.combinators.recurrent import Bidirectional, StackedLayers
from funcnet.combinators.repeat import Repeat
from funcnet.interop.torch.modules import FIELDS, RECURRENT, STATE, WHOLE, Field
from funcnet.layer import Layer
from funcnet.structure import Transparent, Wrapped, own_call

Tree = Any

_RUNS = [((kind, False),) for kind in RECURRENT] + [((kind, False), (kind, True)) for kind in RECURRENT]


def require_convertible(layer: Layer) -> None:
    """Refuse layers whose params would fit a module of PyTorch's that computes something else."""
    kind = kind_of(layer)
    made = layer.structure
    if isinstance(made, Wrapped) and not made.direct and not isinstance(made, Repeat):
        received = f"{layer.name}, a combinator that does not call its layer directly"
        raise InputError("combinators that PyTorch's modules stand for", received, "convert the layer inside by hand")
    if isinstance(made, Wrapped):
        require_convertible(made.inner)
    elif kind in RECURRENT or isinstance(made, Bidirectional):
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
            with at(name):
                require_convertible(part)


def kind_of(layer: Layer) -> str:
    """The name of the layer's constructor where that is known, else the layer's own, which can be any."""
    call = own_call(layer)
    return call.name if call else layer.name


def _option(layer: Layer, name: str) -> bool:
    call = own_call(layer)
    return bool(call and call.options.get(name))


def runs_of(layer: Layer) -> tuple[tuple[str, bool], ...]:
    """The kind of a layer and whether it runs in reverse; for a bidirectional layer, those of both its parts."""
    while isinstance(layer.structure, Transparent):
        layer = layer.structure.inner
    if isinstance(layer.structure, Bidirectional):
        return tuple(run for part in layer.parts.values() for run in runs_of(part))
    return ((kind_of(layer), _option(layer, "reverse")),)


def levelled(layer: Layer) -> bool:
    """Whether it is a stack of recurrent layers alone, in one direction or both, which is one module there."""
    runs = [run for part in layer.parts.values() for run in runs_of(part)]
    return isinstance(layer.structure, StackedLayers) and all(kind in RECURRENT for kind, _ in runs)


def known(layer: Layer) -> tuple[dict[str, Field], dict[str, str]]:
    """The fields of its params and of its state, none where the layer is not in the tables."""
    return FIELDS.get(kind_of(layer), {}), STATE.get(kind_of(layer), {})


def require_names(layer: Layer, params: Tree, state: Tree) -> None:
    """Refuse params and state that do not fit the layer's kind, and any params or state of a kind not in the tables."""
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
