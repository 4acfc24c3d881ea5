"""A batch: (inputs, targets), or (inputs, targets, weights)."""

from collections.abc import Iterable
from typing import Any

import jax

from funcnet._internal.errors import InputError, at, describe
from funcnet._internal.expect import is_array, native_order

Pair = tuple[Any, Any]  # (inputs, targets)
Batch = Pair | tuple[Any, Any, Any]  # (inputs, targets, weights)


def check_batch(batch: Any) -> tuple[Any, Any, Any]:
    """(inputs, targets, weights or None) of arrays with the same, positive number of examples."""
    if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
        wanted = "a batch (inputs, targets) or (inputs, targets, weights)"
        raise InputError(wanted, describe(batch), "pair the inputs with their targets")
    parts = dict(zip(("inputs", "targets", "weights"), batch, strict=False))
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    for path, leaf in leaves:
        with at(path[0].key):
            fits = is_array(leaf) and leaf.ndim > 0
        if not fits:
            received = f"{describe(leaf)} at {jax.tree_util.keystr(path)}"
            raise InputError(
                "arrays with the batch axis first",
                received,
                "give arrays, not lists or numbers: (np.asarray(inputs), np.asarray(targets))",
            )
        with at(path[0].key):
            native_order(leaf)
    sizes = {jax.tree_util.keystr(path): leaf.shape[0] for path, leaf in leaves}
    if len(set(sizes.values())) != 1 or 0 in sizes.values():
        received = ", ".join(f"{n} in {path}" for path, n in sizes.items()) or "none"
        raise InputError(
            "as many inputs as targets, at least one", received, "cut the batch along its first axis alike"
        )
    weights = parts.get("weights")
    if weights is not None and not is_array(weights):
        raise InputError("weights in the batch as one array", describe(weights), "give one for each value of the loss")
    return batch[0], batch[1], weights


def no_shapes(*trees: Any) -> None:
    """Refuse shapes in place of arrays, where values are needed."""
    if shapes := [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.ShapeDtypeStruct)]:
        remedy = "give the data, or trace the call with jax.eval_shape"
        raise InputError("a batch of arrays", f"only the shape of one: {describe(shapes[0])}", remedy)


def walkable(batches: Any, what: str) -> Iterable[Batch]:
    if not isinstance(batches, Iterable):
        remedy = "give a list or an iterator of (inputs, targets)"
        raise InputError(f"{what} to walk through", describe(batches), remedy)
    return batches


def nothing_counts() -> InputError:
    return InputError("at least one target that counts", "none that does", "look at the labels and weights")
