"""Routing of positions to experts: who goes where, by which weight, and the losses that keep the experts busy alike.

Pure functions of the router's logits [B, T, E], for `moe`, whose docstring has the formulas.
"""

from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet.layer import Layer, no_params, stateless
from funcnet.structure import constructor


class RouterTotals(NamedTuple):
    """The side input `router`: the losses of all routers of a model, summed, a number for each example.

    Attributes:
        balance: [B], the load-balancing losses, 1 for each mixture where all experts are chosen equally often.
        z: [B], the means of the squared logarithms of the routers' partition functions.
        dropped: [B], int32, how many choices were dropped.
    """

    balance: Any
    z: Any
    dropped: Any


class Routes(NamedTuple):
    """Where the positions of each example go; the fields as in `MoeResiduals`, and dropped as in `RouterTotals`."""

    chosen: Array
    slots: Array
    holds: Array
    dropped: Array


@constructor
def router_totals() -> Layer[dict, tuple[()], Any]:
    """x -> {"x": x, "router": RouterTotals of zeros}: in front of a model, it lets the mixtures in it count.

    x may also be a dict of x and sides. A mixture in front of it is not counted. `fn.router_losses` takes the totals
    behind the model.
    """

    def fwd(params, inputs):
        sides = dict(inputs) if isinstance(inputs, dict) else {"x": inputs}
        if "x" not in sides or "router" in sides:
            wanted = "an array, or a dict of x and sides without router"
            raise InputError(wanted, describe(inputs), "put it in front of the model, once")
        examples = jax.tree.leaves(expect.shapes(sides["x"]))[0].shape[0]
        zeros = jnp.zeros((examples,), jnp.result_type(float))
        names = dict.fromkeys(inputs) if isinstance(inputs, dict) else None
        return {**sides, "router": RouterTotals(zeros, zeros, jnp.zeros((examples,), jnp.int32))}, names

    def bwd(params, names, dy, contract):
        return {}, dy["x"] if names is None else {name: dy[name] for name in names}

    return replace(stateless("router_totals", no_params, fwd, bwd, positionwise=True), passes=True)


def route(logits: Array, lengths: Array | None, top_k: int, capacities: np.ndarray) -> Routes:
    """The choices of each position, and the slots that they get; `capacities` of an expert, for each length."""
    examples, steps, experts = logits.shape
    chosen = lax.top_k(logits, top_k)[1]
    first = jnp.swapaxes(chosen, 1, 2).reshape(examples, top_k * steps)  # all first choices, then all second ones
    valid = jnp.tile(_valid(lengths, steps), (1, top_k))
    ones = jnp.where(valid[..., None], jax.nn.one_hot(first, experts, dtype=jnp.int32), 0)
    place = jnp.take_along_axis(jnp.cumsum(ones, axis=1), first[..., None], axis=2)[..., 0] - 1
    most = int(capacities[-1])
    own = most if lengths is None else jnp.asarray(capacities, jnp.int32)[lengths][:, None]
    kept = valid & (place < own)
    slots = jnp.where(kept, first * most + place, experts * most)
    position = jnp.broadcast_to(jnp.tile(jnp.arange(steps, dtype=jnp.int32), top_k), slots.shape)
    empty = jnp.full((experts * most,), steps, jnp.int32)
    holds = jax.vmap(lambda slots, position: empty.at[slots].set(position, mode="drop"))(slots, position)
    dropped = jnp.sum(valid & ~kept, axis=1, dtype=jnp.int32)
    return Routes(chosen, jnp.swapaxes(slots.reshape(examples, top_k, steps), 1, 2), holds, dropped)


def gates(p: Array, chosen: Array) -> tuple[Array, Array]:
    """The gates [B, T, K] of the choices, and the sum of their probabilities [B, T, 1], 1 for a single choice."""
    own = jnp.take_along_axis(p, chosen, axis=-1)
    mass = jnp.sum(own, axis=-1, keepdims=True) if chosen.shape[-1] > 1 else jnp.ones_like(own)
    return own / mass, mass


def balance_and_z(logits: Array, chosen: Array, lengths: Array | None) -> tuple[Array, Array]:
    """The two losses of each example."""
    valid, share, count = _shares(logits, chosen, lengths)
    p = jnp.where(valid, jax.nn.softmax(logits), 0.0)
    balance = logits.shape[-1] * jnp.sum(share * jnp.sum(p, axis=1) / count, axis=-1)
    lse = jnp.where(valid[..., 0], jax.nn.logsumexp(logits, axis=-1), 0.0)
    return balance, jnp.sum(jnp.square(lse), axis=1) / count[:, 0]


def dlogits(logits: Array, dgates: Array, dtotals: RouterTotals | None, chosen: Array, lengths: Array | None) -> Array:
    """The cotangent of the logits, from those of the gates [B, T, K] and of the two losses."""
    p = jax.nn.softmax(logits)
    valid, share, count = _shares(logits, chosen, lengths)
    if chosen.shape[-1] > 1:
        weights, mass = gates(p, chosen)
        dgates = (dgates - jnp.sum(dgates * weights, axis=-1, keepdims=True)) / mass
    dp = jnp.sum(jax.nn.one_hot(chosen, p.shape[-1], dtype=p.dtype) * dgates[..., None], axis=2)
    wide = lambda d: d.astype(p.dtype)[:, None, None]
    if dtotals is not None:
        dp = dp + wide(dtotals.balance) * p.shape[-1] * (share / count)[:, None]
    for _ in range(2):  # the second removes the error of the first
        dp = dp - jnp.sum(dp * p, axis=-1, keepdims=True)
    dlogits = p * dp
    if dtotals is not None:
        lse = jax.nn.logsumexp(logits, axis=-1, keepdims=True)
        dlogits = dlogits + wide(dtotals.z) * 2 * lse * p / count[:, None]
    return jnp.where(valid, dlogits, 0.0)


def _shares(logits: Array, chosen: Array, lengths: Array | None) -> tuple[Array, Array, Array]:
    """Which positions count [B, T, 1], the share of each expert in their choices [B, E], and their number [B, 1]."""
    valid = _valid(lengths, logits.shape[1])[..., None]
    count = jnp.maximum(jnp.sum(valid, axis=1, dtype=logits.dtype), 1)
    chosen = jnp.where(valid[..., None], jax.nn.one_hot(chosen, logits.shape[-1], dtype=logits.dtype), 0.0)
    return valid, jnp.sum(chosen, axis=(1, 2)) / (count * chosen.shape[2]), count


def _valid(lengths: Array | None, steps: int) -> Array:
    """Which positions are in front of the lengths: [B, T], or [1, T] where there are none."""
    if lengths is None:
        return jnp.ones((1, steps), bool)
    return jnp.arange(steps, dtype=jnp.int32)[None] < lengths[:, None].astype(jnp.int32)


def scattered(gates: Array, slots: Array, count: int) -> Array:
    """The gate of each slot [B, count], 0 where it is empty."""
    one = lambda gates, slots: jnp.zeros((count,), gates.dtype).at[slots.ravel()].set(gates.ravel(), mode="drop")
    return jax.vmap(one)(gates, slots)
