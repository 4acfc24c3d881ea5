"""Which numbers must stay finite, and where the first one came from that did not."""

from typing import Any

import jax
import numpy as np
from jax import Array

from funcnet.expect import is_concrete, is_floating
from funcnet.observe import observe
from funcnet.train.objective import Batch, Objective, split, value_and_grad
from funcnet.train.step import TrainState

Tree = Any
Record = dict[str, float]
WATCHED = ("loss", "grad_norm", "update_norm")  # what must stay finite


class NotFiniteError(FloatingPointError):
    """A loss, gradient or update that is not finite: in which step, layer and leaf."""


def is_finite(row: Record) -> bool:
    return bool(np.isfinite([row[name] for name in WATCHED]).all())


def not_finite(objective: Objective, train_state: TrainState, batch: Batch, step: int, row: Record) -> NotFiniteError:
    """The error for a step whose loss or gradient is not finite, with the first layer and the leaves that are not."""
    params, state = train_state.params, train_state.state
    key = jax.random.fold_in(train_state.key, train_state.step)
    _, grads = jax.jit(value_and_grad(objective))(params, state, batch, key)
    facts = [f"step {step}: " + ", ".join(f"{name} {row[name]}" for name in WATCHED)]
    if leaves := _bad_leaves(params):
        facts.append(f"parameters not finite before this step: {', '.join(leaves)}")
    if layer := _first_bad_layer(objective, params, state, batch, key):
        facts.append(f"the first layer with an output that is not finite: {layer}")
    if leaves := _bad_leaves(grads):
        facts.append(f"gradient leaves not finite: {', '.join(leaves)}")
    elif not np.isfinite(row["grad_norm"]):
        facts.append(f"the gradients are finite; the largest is {_largest(grads)}, whose square overflows")
    elif not np.isfinite(row["loss"]):
        facts.append("the gradients are finite, the loss is not")
    else:
        facts.append("loss and gradients are finite, but the update that the optimizer makes of them is not")
    remedy = "a smaller learning rate, gradient clipping, or inputs of a smaller scale are the usual remedies"
    return NotFiniteError("\n  ".join([*facts, remedy]))


def _bad_leaves(tree: Tree) -> list[str]:
    with_path = jax.tree_util.tree_leaves_with_path(tree)
    return [jax.tree_util.keystr(path) for path, leaf in with_path if not np.isfinite(np.asarray(leaf)).all()]


def _largest(grads: Tree) -> str:
    """The leaf with the largest gradient, and that."""
    with_path = jax.tree_util.tree_leaves_with_path(grads)
    sizes = {jax.tree_util.keystr(path): float(np.max(np.abs(np.asarray(leaf)))) for path, leaf in with_path}
    path = max(sizes, key=lambda path: sizes[path])
    return f"{sizes[path]:.3g} at {path}"


def _first_bad_layer(objective: Objective, params: Tree, state: Tree, batch: Batch, key: Array) -> str | None:
    """The path of the first layer, in the order they run, whose output is not finite; a `repeat` counts as one."""
    found: list[str] = []

    def see(path, layer, params, x, out):
        leaves = [leaf for leaf in jax.tree.leaves(out[0]) if is_floating(leaf) and is_concrete(leaf)]
        if any(not np.isfinite(np.asarray(leaf)).all() for leaf in leaves):
            found.append("/".join(path) or layer.name)

    own, states = split(params, state)
    observe(objective.model, see).fwd(own.model, states.model, batch[0], key)
    return found[0] if found else None
