"""Trees of arrays in another dtype."""

from typing import Any

import jax

from funcnet._internal.expect import is_floating
from funcnet._internal.numerics import wider

Tree = Any


def cast(tree: Tree, dtype: Any, kept: tuple[str, ...] = (), at: str = "") -> Tree:
    """`tree` with its floating arrays in `dtype`; integers, booleans and keys as they are.

    Arrays at or below the paths `kept` stay as they are where they are wider; `at` is the path of the tree itself.
    """

    def one(path, leaf):
        if not is_floating(leaf):
            return leaf
        below = any(f"{at}{names_in(path)}".startswith(f"{each}/") for each in kept)
        return leaf if below and wider(leaf.dtype, dtype) else leaf.astype(dtype)

    return jax.tree_util.tree_map_with_path(one, tree)


def names_in(path: tuple[Any, ...]) -> str:
    """The dict keys in one of JAX's key paths, each followed by a "/"."""
    return "".join(f"{entry.key}/" for entry in path if isinstance(entry, jax.tree_util.DictKey))
