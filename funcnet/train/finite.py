"""Which numbers must stay finite, and where the first one that is not finite came from."""

from typing import Any

import jax
import numpy as np
import optax
from jax import Array

from funcnet._internal.expect import is_concrete, is_floating
from funcnet.combinators.hooks import observe
from funcnet.train.batch import Batch
from funcnet.train.objective import Objective
from funcnet.train.step import TrainState, one_move

Tree = Any
Record = dict[str, float]
WATCHED = ("loss", "grad_norm", "update_norm")  # what must stay finite, beside the state


class NotFiniteError(FloatingPointError):
    """A loss, gradient, update or state that is not finite: in which step, layer and leaf."""


def changed(before: Tree, after: Tree) -> list[Array]:
    """The floating leaves of a new state, less those that were passed on as they are, such as frozen params."""
    pairs = zip(jax.tree.leaves(before), jax.tree.leaves(after), strict=True)
    return [new for old, new in pairs if new is not old and is_floating(new)]


def not_finite(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    accumulate: int,
    train_state: TrainState,
    batch: Batch,
    step: int,
    row: Record,
) -> NotFiniteError:
    """The error for a step that is not finite; the step is run once more to name the first such layer and leaves."""
    params, state = train_state.params, train_state.state
    passed, updates, _ = jax.jit(one_move(objective, optimizer, accumulate))(train_state, batch)
    facts = [f"step {step}: " + ", ".join(f"{name} {row[name]}" for name in WATCHED)]
    for what, tree in (("parameters", params), ("state", state)):
        if leaves := _bad_leaves(tree):
            facts.append(f"{what} not finite before this step: {', '.join(leaves)}")
    key = jax.random.fold_in(train_state.key, train_state.step)
    if layer := _first_bad_layer(objective, params, state, batch, key):
        facts.append(f"the first layer with an output that is not finite: {layer}")
    if leaves := _bad_leaves(passed.grads):
        facts.append(f"gradient leaves not finite: {', '.join(leaves)}")
    elif not np.isfinite(row["grad_norm"]):
        facts.append(
            f"all entries of the gradients are finite, their norm overflows; the largest is {_largest(passed.grads)}"
        )
    elif not np.isfinite(row["loss"]):
        facts.append("the gradients are finite, the loss is not")
    elif leaves := _bad_leaves(updates):
        facts.append(f"loss and gradients are finite, the optimizer's update is not: {', '.join(leaves)}")
    elif not np.isfinite(row["update_norm"]):
        facts.append(f"all entries of the update are finite, their norm overflows; the largest is {_largest(updates)}")
    if leaves := _bad_leaves(passed.state):
        facts.append(f"state leaves not finite: {', '.join(leaves)}")
        facts.append(f"the layers of these: {', '.join(_owners(objective, passed.state))}")
    remedy = "a smaller learning rate, gradient clipping, or inputs of a smaller scale are the usual remedies"
    return NotFiniteError("\n  ".join([*facts, remedy]))


def _bad(tree: Tree) -> list[tuple]:
    """The paths of the leaves that are not finite."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return [path for path, leaf in with_path if is_floating(leaf) and not np.isfinite(np.asarray(leaf)).all()]


def _bad_leaves(tree: Tree) -> list[str]:
    return [jax.tree_util.keystr(path) for path in _bad(tree)]


def _owners(objective: Objective, state: Tree) -> list[str]:
    """The layers with a state that is not finite, as paths like `block/batch_norm`."""
    found = []
    for path in _bad(state):
        layer, names = getattr(objective, path[0].key), []
        for name in (getattr(entry, "key", "") for entry in path[1:]):
            if name in layer.parts:
                layer = layer.parts[name]
                names.append(name)
        found.append("/".join(names) or layer.name)
    return list(dict.fromkeys(found))


def _largest(tree: Tree) -> str:
    """The largest magnitude, and the path of its leaf."""
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    sizes = {jax.tree_util.keystr(path): float(np.max(np.abs(np.asarray(leaf)), initial=0)) for path, leaf in with_path}
    path = max(sizes, key=lambda path: sizes[path])
    return f"{sizes[path]:.3g} at {path}"


def _first_bad_layer(objective: Objective, params: Tree, state: Tree, batch: Batch, key: Array) -> str | None:
    """The path of the first layer, in the order they run, whose output is not finite; a `repeat` counts as one."""
    found: list[str] = []

    def see(path, layer, params, x, out):
        leaves = [leaf for leaf in jax.tree.leaves(out[0]) if is_floating(leaf) and is_concrete(leaf)]
        if any(not np.isfinite(np.asarray(leaf)).all() for leaf in leaves):
            found.append("/".join(path) or layer.name)

    observe(objective.model, see).fwd(params["model"], state["model"], batch[0], key)
    return found[0] if found else None
