"""Embeddings: rows of a table looked up by ids.

    y[b, t] = table[ids[b, t]]

Backward:

    dtable[v] = sum_bt [ids[b, t] = v] dy[b, t]        the factor Gather(ids, dy); dids is None

and 0 for a padding row, which is looked up as a constant.

Residuals: ids.
Numerics: gradients are summed in float32 for half precision.
Source: Gehring et al. 2017, arXiv:1705.03122.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax
from jax.nn import initializers

from funcnet._internal import expect
from funcnet._internal.defaults import Default, Initializer
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import whole
from funcnet._internal.sharding import sharded_as
from funcnet.gradients.common_factors import Gather
from funcnet.layer import Layer, stateless
from funcnet.structure import constructor

_UNIT_ROWS = Default(
    initializers.variance_scaling(1.0, "fan_in", "normal", out_axis=0),
    'variance_scaling(1.0, "fan_in", "normal", out_axis=0)',
)


@constructor
def embedding(
    vocab: int,
    features: int,
    *,
    embedding_init: Initializer = _UNIT_ROWS,
    dtype: Any = jnp.float32,
    padding_id: int | None = None,
) -> Layer[dict[str, Array], tuple[()], Array]:
    """The rows [.., D] of a table for integer ids [..], any rank and any integer dtype; params embedding [V, D].

    With `fn.rows` as the contraction the gradient is its touched rows alone (`fn.Rows`).

    Args:
        vocab: V, the number of rows.
        features: D, the size of a row.
        embedding_init: as in `jax.nn.initializers`. The default draws rows of length 1 or so: std = sqrt(1 / D).
        dtype: of the table; it cannot be read from the ids.
        padding_id: an id whose row starts as zeros and, being a constant here, has no gradient, as PyTorch's
            `padding_idx`. Where the table is a head's kernel too (`fn.tied`), its row has the head's gradient.

    Raises:
        InputError: if padding_id is no id, x is not of integers, or one of them is not in [0, V). Under `jit`,
            where they cannot be read, the row of an id out of range is NaN, and its cotangent is dropped.
    """
    shape = expect.count(vocab, "vocab"), expect.count(features, "features")
    pads = _padding(padding_id, shape[0])

    def init(key: Array, x: Any) -> dict[str, Array]:
        _ids(x, shape[0])
        table = embedding_init(expect.key(key), shape, dtype)
        return {"embedding": table if pads is None else table.at[pads].set(0)}

    def fwd(params: dict[str, Array], x: Array) -> tuple[Array, Array]:
        _ids(x, shape[0])
        _table(params, shape)
        ids = whole(x)
        y = rows_of(params["embedding"], ids)
        return y if pads is None else jnp.where((ids == pads)[..., None], lax.stop_gradient(y), y), ids

    def bwd(params, ids, dy, contract):
        table = _table(params, shape)
        dy = expect.cotangent(dy, (*ids.shape, shape[1]), table.dtype)
        learning = ids if pads is None else jnp.where(ids == pads, shape[0], ids)  # an id out of range adds nothing
        return {"embedding": contract(Gather(learning, dy, shape[0]), table)}, None

    return stateless("embedding", init, fwd, bwd, positionwise=True)


def rows_of(table: Array, ids: Array) -> Array:
    """table[ids], NaN for an id out of range; a lookup by sharded ids must name the result's sharding: that of ids."""
    return (
        jnp.asarray(table)
        .at[ids]
        .get(mode="fill", fill_value=jnp.nan, wrap_negative_indices=False, out_sharding=sharded_as(ids, ids.ndim))
    )


def _ids(x: Any, vocab: int) -> None:
    """Refuse what is not integers and, where they can be read, an id out of range."""
    if not expect.is_array(x) or not jnp.issubdtype(x.dtype, jnp.integer):
        raise InputError("integer ids", describe(x), "convert them, for instance with jnp.asarray(x, jnp.int32)")
    if not expect.is_concrete(x):
        return
    ids = np.asarray(x)
    if (bad := (ids < 0) | (ids >= vocab)).any():
        remedy = "correct the ids, or ask for a larger vocab"
        raise InputError(f"ids from 0 to {vocab - 1}", expect.first_of("id", bad, ids), remedy)


def _padding(padding_id: Any, vocab: int) -> int | None:
    """`padding_id` if it is an id, or None."""
    if padding_id is None:
        return None
    if not expect.is_whole(padding_id) or not 0 <= int(padding_id) < vocab:
        remedy = "give the id that pads; counted from the end, as PyTorch takes it, -1 is vocab - 1"
        raise InputError(f"a padding_id from 0 to {vocab - 1}, or None", repr(padding_id), remedy)
    return int(padding_id)


def _table(params: Any, shape: tuple[int, int]) -> Array:
    """The table among the parameters, of any floating dtype."""
    given: Any = params.get("embedding") if isinstance(params, dict) else None
    expect.fields(params, given.dtype if expect.is_floating(given) else jnp.dtype(jnp.float32), {"embedding": shape})
    return params["embedding"]
