"""Several sequences in one row of a batch, each an example of its own.

A row of x [B, T, ..] holds up to S sequences one behind the other, and the side input `segments` [B, T] numbers them: 1
at each position of the first one, 2 at the second one's, .., and 0 at what pads the row. Layers that read the segments
keep them apart, others look at each position alone (`Layer.positionwise`), so that

    y[b, t] = f(the sequence at t)[t - its start]        0 where the segment is 0

and the gradient of a parameter is the sum over sequences. What a contraction is told of single examples it is told of
sequences: the rows of a factor's arrays, [B, T, ..], are sorted by the sequence that they are of, [B S, L, ..], zero
beyond its end. A factor is linear in dy, so what is zero there adds nothing.

Residuals: the model's, and the segments.
Source: Krell et al. 2021, "Efficient sequence packing without cross-contamination", arXiv:2107.02027.
"""

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.numerics import pick
from funcnet._internal.sharding import regrouped
from funcnet.combinators.sides import alone, has_sides, passing
from funcnet.gradients.common_factors import Gather, Sum
from funcnet.gradients.contraction import total
from funcnet.gradients.factor import Blocks, Factor, Mapped, Mixing, Pulled, Stacked
from funcnet.layer import Layer, a_layer
from funcnet.layers.positions import positions_in
from funcnet.structure import Transparent, constructor

Tree = Any
UNTOLD = (Mixing, Blocks, Pulled)  # factors whose rows cannot be told apart


class PackedResiduals(NamedTuple):
    """Residuals of `packed`: the model's own, and the segments [B, T]."""

    residuals: Tree
    segments: Array


@dataclass(frozen=True, eq=False, kw_only=True)
class Packed(Transparent):
    """A layer whose examples are sequences, up to `segments` of them in a row."""

    segments: int


@constructor
def packed(layer: Layer, segments: int, *, longest: int | None = None) -> Layer:
    """The same layer for rows of several sequences, each of which counts as an example.

    The input is a dict of x, [B, T, D] or integers [B, T], and `segments`, integers [B, T]: 1 for the positions of a
    row's first sequence, 2 for those of its second one, .., 0 for what pads the row; a number may be left out. The
    output at position t is that of its sequence alone, and 0 where the segment is 0. Attention, `position_embedding`
    and `sinusoidal_positions` read the segments; layers that mix positions and do not read them are refused. `dropout`
    draws as for any row.

    To a contraction that is about examples, sequence s of row b is example b S + s - 1: `fn.per_example` is [B S, ..],
    zero for sequences that are not there. So are those of the layer's parameters; those of a loss are of rows.

    Args:
        layer: maps [B, T, ..] to [B, T, ..].
        segments: S, the most sequences in a row.
        longest: L, the most positions of a sequence; T by default. Quantities of single sequences take memory for S L
            positions a row.

    Raises:
        InputError: for an input without segments, numbers above S or below 0, numbers that do not ascend along a row
            or come back after they have ended, and segments longer than L; under `jit`, where they cannot be read, the
            output there is NaN, and so are the gradients of that row. NaN in one sequence is in all of its row where
            there is attention: 0 times NaN is NaN.
    """
    a_layer(layer)
    segments = expect.count(segments, "segments")
    longest = None if longest is None else expect.count(longest, "longest")
    inside = passing(layer)

    @by("packed")
    def numbers(inputs: Any) -> Any:
        if not has_sides(inputs) or "segments" not in inputs:
            remedy = 'write {"x": x, "segments": segments}'
            raise InputError("a dict of x and segments", describe(inputs), remedy)
        given = inputs["segments"]
        leaves = jax.tree.leaves(expect.shapes(inputs["x"]))
        if not leaves or leaves[0].ndim < 2:
            raise InputError("x [B, T, ..]", describe(inputs["x"]), "give rows of positions")
        for leaf in leaves:
            if expect.is_floating(leaf) and leaf.ndim < 3:
                remedy = "give positions an axis of features, x[..., None]: layers look along the last axis"
                raise InputError("x [B, T, ..] with an axis of features", describe(leaf), remedy)
        x = leaves[0]
        expect.segments(given, *x.shape[:2])
        if not expect.is_concrete(given):
            return given
        with jax.ensure_compile_time_eval():
            fits = np.asarray(_fit(given, segments, longest))
        if not fits.all():
            wanted = f"segments that ascend from 1 to {segments}, each at most {longest or x.shape[1]} long, or 0"
            row = int(np.argmin(fits.all(axis=1)))
            received = f"row {row}: {np.asarray(given)[row].tolist()}"
            raise InputError(wanted, received, "sort each row by its sequences, what pads it last")
        return given

    def masked(y: Any, ids: Array) -> Any:
        def one(leaf: Array) -> Array:
            if leaf.shape[:2] != ids.shape:
                wanted = f"an output with the positions {list(ids.shape)} in front"
                raise InputError(wanted, describe(leaf), "let packed end in front of what joins positions")
            wide = lambda a: a.reshape(*a.shape, *(1,) * (leaf.ndim - 2))
            counting = jnp.where(wide(ids > 0), leaf, jnp.zeros_like(leaf))
            if expect.is_concrete(ids):  # and so has been looked at
                return counting
            return jnp.where(wide(_fit(ids, segments, longest)), counting, jnp.full_like(leaf, jnp.nan))

        return {**y, "x": jax.tree.map(one, y["x"])} if has_sides(y) else jax.tree.map(one, y)

    def init(key, inputs):
        numbers(inputs)
        with alone("packed"):
            return inside.init(key, inputs)

    def apply(params, state, inputs):
        ids = jnp.asarray(numbers(inputs))
        with alone("packed"):
            return masked(inside.apply(params, state, inputs), ids)

    def fwd(params, state, inputs, key):
        ids = jnp.asarray(numbers(inputs))
        with alone("packed"):
            y, state, residuals = inside.fwd(params, state, inputs, key)
        return masked(y, ids), state, PackedResiduals(residuals, ids)

    def bwd(params, saved, dy, contract=total):
        ids = saved.segments
        fits = True if expect.is_concrete(ids) else jnp.all(_fit(ids, segments, longest), axis=1)

        def heard(leaf):
            """dy where there are sequences; NaN in a row whose segments do not fit, of which no share is right."""
            wide = lambda a: jnp.reshape(a, (*jnp.shape(a), *(1,) * (leaf.ndim - jnp.ndim(a))))
            return jnp.where(wide(fits), jnp.where(wide(ids > 0), leaf, 0), jnp.nan)

        silent = jax.tree.map(heard, dy["x"] if has_sides(dy) else dy)
        dy = {**dy, "x": silent} if has_sides(dy) else silent
        if contract.reads == "sum":
            return inside.bwd(params, saved.residuals, dy, contract)
        holds = _holds(ids, segments, longest or ids.shape[1])
        apart = contract.after(lambda factor, param: (_by_sequence(factor, ids, holds), param))
        return inside.bwd(params, saved.residuals, dy, apart)

    made = Packed(layer, lambda layer: packed(layer, segments, longest=longest), segments=segments)
    return replace(layer, init=init, apply=apply, fwd=fwd, bwd=bwd, made=made, passes=True)


def _fit(ids: Any, segments: int, longest: int | None) -> Array:
    """Whether each position's segment is 0, or goes on, or begins with a larger number; and is not too long."""
    ids = jnp.asarray(ids).astype(jnp.int32)
    before = jnp.concatenate([jnp.zeros_like(ids[:, :1]), ids[:, :-1]], axis=1)
    goes_on = (ids == before) | (ids > lax.cummax(before, axis=1))
    short = positions_in(ids, ids.shape[1]) < (longest or ids.shape[1])
    return (ids == 0) | ((ids > 0) & (ids <= segments) & goes_on & short)


def _holds(ids: Array, segments: int, longest: int) -> Array:
    """The position of each place of each sequence, [B, S, L]; T where there is none."""
    steps = ids.shape[1]
    place = (ids.astype(jnp.int32) - 1) * longest + positions_in(ids, steps)
    place = jnp.where(ids > 0, place, segments * longest)
    none, each = jnp.full((segments * longest,), steps, jnp.int32), jnp.arange(steps, dtype=jnp.int32)
    holds = jax.vmap(lambda place: none.at[place].set(each, mode="drop"))(place)
    return holds.reshape(-1, segments, longest)


def _by_sequence(factor: Factor, ids: Array, holds: Array) -> Factor:
    """The same factor, of sequences [B S, L, ..] in the place of rows [B, T, ..]."""
    again = lambda factor: _by_sequence(factor, ids, holds)
    match factor:
        case Stacked():
            return replace(factor, factor=jax.vmap(again)(factor.factor))
        case Mapped():
            return replace(factor, factor=again(factor.factor))
        case Sum():
            return replace(factor, factors=tuple(map(again, factor.factors)))
    apart = all(leaf.shape[:2] == ids.shape for leaf in jax.tree.leaves(factor))
    if isinstance(factor, UNTOLD) or not apart:
        wanted = f"a factor of arrays with the positions {list(ids.shape)} in front, to tell its sequences apart"
        raise InputError(wanted, f"a {type(factor).__name__}", "use total, or a layer that has its own rule")

    def sequences(leaf: Array) -> Array:
        count, longest = holds.shape[1:]
        return regrouped(pick(leaf, holds), (ids.shape[0] * count, longest, *leaf.shape[2:]))

    if isinstance(factor, Gather):  # no row of the table is touched where there is no position
        own = jnp.where(sequences(ids) > 0, sequences(factor.ids), factor.size)
        return Gather(own, sequences(factor.dy), factor.size)
    return jax.tree.map(sequences, factor)
