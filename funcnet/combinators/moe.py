"""A sparse mixture of experts: each position goes to the few experts that a router chooses for it.

For a position x [D], with the router's kernel R [D, E] and the experts f_e, E layers of one kind:

    z = x R        p = softmax(z)        e_1, .., e_K: the K largest of p
    g_k = p[e_k] for K = 1, else p[e_k] / sum_j p[e_j]        y = sum_k g_k f[e_k](x)

The positions of one example are routed among themselves, so that no example depends on another one. Each expert has C
slots for an example of T positions,

    C = min(T, ceil(capacity_factor K T / E))

and takes the first C of the positions that chose it, all first choices before the second ones. A choice beyond them is
dropped: it adds nothing to y. A position whose choices are all dropped has y = 0, so a mixture stands inside `skip`.

Backward, where a slot s of expert e holds a position t that it has as the choice k, and y_s is the expert's output:

    dy_s = g_k dy_t        dg_k = dy_t . y_s        dx_t = dz R^T + sum_s dx_s        dR = sum_t x_t (x) dz_t
    dp[e_k] = dg_k for K = 1, else (dg_k - sum_j dg_j g_j) / sum_j p[e_j]        dz = p (dp - sum_e dp_e p_e)

What is chosen and what is dropped is piecewise constant in x and R and has no gradient.

The totals of an example, which a side input `router` collects over all mixtures of a model (`router_totals`):

    balance   E sum_e c_e P_e, c_e the share of the K T choices that fell on e, P_e the mean of p[e]: dp_e += E c_e / T
    z         the mean of lse^2, lse = log sum_e exp z_e, small where the logits are: dz += 2 lse p / T
    dropped   the number of choices that were dropped

Residuals: x [B, T, D], what the experts keep of their slots, y_s [B, E C, F], the logits, and the choices' numbers.
Numerics: the router computes in float32 for half precision; `mixed` does not round its kernel.
Source: Shazeer et al. 2017, arXiv:1701.06538; Lepikhin et al. 2020 (GShard), arXiv:2006.16668, with examples as groups;
balance: Fedus, Zoph and Shazeer 2021 (Switch), arXiv:2101.03961; z: Zoph et al. 2022 (ST-MoE), arXiv:2202.08906.
"""

import math
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal import expect
from funcnet._internal.defaults import LECUN_NORMAL, Initializer
from funcnet._internal.errors import InputError, at, by, describe
from funcnet._internal.numerics import pick, sum_dtype
from funcnet.combinators.routing import RouterTotals, balance_and_z, dlogits, gates, route, scattered
from funcnet.combinators.sides import alone, passing
from funcnet.gradients.common_factors import Outer
from funcnet.gradients.contraction import total
from funcnet.layer import Layer, a_layer, child, output
from funcnet.structure import Composed, constructor

Tree = Any


class MoeResiduals(NamedTuple):
    """Residuals of `moe`.

    Attributes:
        x: [B, .., D], or the dict of it and the sides, with None as `router`.
        logits: [B, T, E].
        chosen: [B, T, K], the experts.
        slots: [B, T, K], the slot of each choice, e C + its place among those of expert e; E C where it is dropped.
        holds: [B, E C], the position in each slot; T where it is empty.
        outputs: [B, E C, F], the experts' outputs.
        experts: the experts' residuals, stacked.
    """

    x: Tree
    logits: Array
    chosen: Array
    slots: Array
    holds: Array
    outputs: Array
    experts: Tree


class Mixture(Composed):
    """A sparse mixture of experts."""


@constructor
def moe(
    expert: Layer,
    experts: int,
    *,
    top_k: int = 1,
    capacity_factor: float | None = 1.25,
    kernel_init: Initializer = LECUN_NORMAL,
) -> Layer[dict, Any, MoeResiduals]:
    """A sparse mixture of experts: each position of x [B, .., D] goes to `top_k` of them, chosen by a router.

    Params are {"router": {"kernel"}, "experts"}: the router's kernel [D, E], and the experts' params, stacked [E, ..],
    as is their state. Of a side input `lengths`, integers [B], the positions beyond an example's length are not routed
    and have y = 0; T is then the length. A side input `router` has the totals added (`router_totals`).

    Args:
        expert: maps [B, C, D] to [B, C, F] of layers that look at each position alone (`Layer.positionwise`), such as
            `fn.mlp(4 * D, D)`. A slot that is empty is a row of zeros, whose output is not used.
        experts: E, how many.
        top_k: K, how many each position goes to: 1 as in Switch, 2 as in GShard.
        capacity_factor: the slots of an expert, as a multiple of those that are used where all experts have equally
            many positions; None for as many as there are positions, so that nothing is dropped.
        kernel_init: of the router, as in `jax.nn.initializers`.

    Raises:
        InputError: for more choices than experts, an expert that mixes positions or does not keep the shape [B, C, ..],
            and x without a feature axis or of another dtype than the params.
    """
    a_layer(expert)
    experts, top_k = expect.count(experts, "experts"), expect.count(top_k, "top_k")
    if top_k > experts:
        raise InputError("top_k of at most the number of experts", f"{top_k} of {experts}", "choose fewer")
    if capacity_factor is not None:
        capacity_factor = expect.positive(capacity_factor, "capacity_factor", "use the default, 1.25, or None")
    inside = passing(expert)

    def capacities(steps: int) -> np.ndarray:
        """The slots of an expert for an example of each length from 0 to `steps`."""
        lengths = np.arange(steps + 1)
        if capacity_factor is None:
            return lengths
        wanted = np.round(capacity_factor * top_k * lengths / experts, 9)  # 1.1 * 2 * 100 / 4 is a little above 55
        return np.minimum(lengths, np.maximum(np.ceil(wanted), 1)).astype(int)

    def in_slots(x: Any) -> jax.ShapeDtypeStruct:
        """The shape of an expert's input."""
        return jax.ShapeDtypeStruct((x.shape[0], int(capacities(_steps(x))[-1]), x.shape[-1]), expect.dtype(x))

    def by_expert(slots: Array) -> Array:
        """[B, E C, n] as [E, B, C, n]."""
        return jnp.moveaxis(slots.reshape(slots.shape[0], experts, slots.shape[1] // experts, slots.shape[-1]), 1, 0)

    def by_example(slots: Array) -> Array:
        """[E, B, C, n] as [B, E C, n]."""
        return jnp.moveaxis(slots, 0, 1).reshape(slots.shape[1], experts * slots.shape[2], slots.shape[-1])

    def keys(key: Array | None) -> Any:
        key = child(key, 1)
        return None if key is None else jax.vmap(lambda i: jax.random.fold_in(key, i))(jnp.arange(experts))

    @by("moe")
    def init(key, inputs):
        x = _parts(inputs)["x"]
        slots = in_slots(x)
        router = {"kernel": kernel_init(child(key, 0), (x.shape[-1], experts), expect.dtype(x))}
        with at("experts"), alone("moe"):
            params, state = jax.vmap(lambda key: inside.init(key, slots))(keys(expect.key(key)))
            first_params, first_state = jax.tree.map(lambda leaf: leaf[0], (params, state))
            y = output(inside, first_params, first_state, slots)
            if not expect.is_floating(y) or y.shape[:-1] != slots.shape[:-1]:
                wanted = f"an expert's output [{slots.shape[0]}, {slots.shape[1]}, F] for {describe(slots)}"
                raise InputError(wanted, describe(y), "let it map each row to a row, such as fn.mlp(64, 16)")
        return {"router": router, "experts": params}, {"experts": state}

    def run(params: dict, state: dict, inputs: Tree, experts_of: Any) -> tuple[Any, Any, MoeResiduals]:
        """y or the dict of it and the totals, the experts' new state, residuals; `experts_of` runs the experts."""
        parts = _parts(inputs)
        x = jnp.asarray(parts["x"])
        expect.keys(state, ("experts",), "state")
        expect.stacked(state["experts"], experts, "state", "experts")
        kernel = _kernel(params, x, experts)
        high, lengths = sum_dtype(x.dtype), parts.get("lengths")
        rows = x.reshape(x.shape[0], _steps(x), x.shape[-1])
        logits = rows.astype(high) @ kernel.astype(high)
        routes = route(logits, lengths, top_k, capacities(rows.shape[1]))
        with at("experts"), alone("moe"):
            outputs, state, saved = experts_of(by_expert(pick(rows, routes.holds)))
        outputs = by_example(outputs)
        weights, _ = gates(jax.nn.softmax(logits), routes.chosen)
        y = jnp.einsum("btk,btkf->btf", weights, pick(outputs, routes.slots).astype(high)).astype(outputs.dtype)
        y = y.reshape(*x.shape[:-1], outputs.shape[-1])
        kept = x
        if isinstance(inputs, dict):
            kept = {name: None if name == "router" else jnp.asarray(part) for name, part in inputs.items()}
        residuals = MoeResiduals(kept, logits, routes.chosen, routes.slots, routes.holds, outputs, saved)
        if "router" not in parts:
            return y, state, residuals
        sums = parts["router"]
        own = RouterTotals(*balance_and_z(logits, routes.chosen, lengths), routes.dropped)
        return {"x": y, "router": jax.tree.map(lambda a, b: a + b.astype(a.dtype), sums, own)}, state, residuals

    @by("moe")
    def apply(params, state, inputs):
        def experts_of(given):
            return jax.vmap(inside.apply)(params["experts"], state["experts"], given), None, None

        return run(params, state, inputs, experts_of)[0]

    @by("moe")
    def fwd(params, state, inputs, key):
        def experts_of(given):
            own = keys(key)
            axes = 0, 0, 0, None if own is None else 0
            return jax.vmap(inside.fwd, axes)(params["experts"], state["experts"], given, own)

        y, new_state, residuals = run(params, state, inputs, experts_of)
        return y, {"experts": new_state}, residuals

    @by("moe")
    def bwd(params, residuals, dy, contract=total):
        inputs, logits, chosen, slots, holds, outputs, saved = residuals
        parts = inputs if isinstance(inputs, dict) else {"x": inputs}
        x, lengths = parts["x"], parts.get("lengths")
        kernel, high = _kernel(params, x, experts), logits.dtype
        dy, dtotals = _cotangents(dy) if "router" in parts else (dy, None)
        dy = expect.cotangent(dy, (*x.shape[:-1], outputs.shape[-1]), outputs.dtype)
        dy = dy.reshape(*logits.shape[:2], outputs.shape[-1]).astype(high)

        held, (weights, _) = pick(dy, holds), gates(jax.nn.softmax(logits), chosen)
        dslots = (held * scattered(weights, slots, holds.shape[1])[..., None]).astype(outputs.dtype)
        one = lambda p, r, dy: inside.bwd(p, r, dy, contract.of_one_layer)
        with at("experts"):
            answers, dgiven = jax.vmap(one)(params["experts"], saved, by_expert(dslots))
            dexperts = contract.stack(params["experts"], answers)

        dz = dlogits(logits, pick(jnp.sum(held * outputs.astype(high), axis=-1), slots), dtotals, chosen, lengths)
        dkernel = contract(Outer(x.reshape(*logits.shape[:2], x.shape[-1]), dz), kernel)
        dx = dz @ kernel.astype(high).T + jnp.sum(pick(by_example(dgiven), slots).astype(high), axis=2)
        dx = dx.astype(x.dtype).reshape(x.shape)
        dparams = {"router": {"kernel": dkernel}, "experts": dexperts}
        if not isinstance(inputs, dict):
            return dparams, dx
        return dparams, {**dict.fromkeys(inputs), **({"router": dtotals} if "router" in parts else {}), "x": dx}

    def again(parts):
        options = {"top_k": top_k, "capacity_factor": capacity_factor, "kernel_init": kernel_init}
        return moe(parts["experts"], experts, **options)

    made = Mixture({"experts": expert}, again, direct=False)
    whole = Layer("moe", init, apply, fwd, bwd, made, reads=("lengths", "router"), writes=("router",))
    return replace(whole, unrounded=("router/kernel",))


def _steps(x: Any) -> int:
    """T, the number of positions of an example."""
    return math.prod(x.shape[1:-1])


def _parts(inputs: Tree) -> dict[str, Any]:
    """An input as a dict of x and what it has of lengths and router; refused where they do not fit together."""
    parts = dict(inputs) if isinstance(inputs, dict) else {"x": inputs}
    if "x" not in parts or parts.keys() - {"x", "lengths", "router"}:
        wanted = "an array [B, .., D], or a dict of it as x with, where wanted, lengths and router"
        raise InputError(wanted, describe(inputs), 'write {"x": x, "lengths": lengths}')
    x = parts["x"]
    expect.float_array(x, rank=2)
    if "lengths" in parts:
        expect.sequences(x)
        expect.lengths(parts["lengths"], *x.shape[:2])
    totals = parts.get("router")
    if "router" in parts and not (isinstance(totals, RouterTotals) and jnp.shape(totals.balance) == x.shape[:1]):
        wanted = f"router as fn.RouterTotals of {x.shape[0]} examples"
        raise InputError(wanted, describe(totals), "put fn.router_totals() in front of the model")
    return parts


def _cotangents(dy: Any) -> tuple[Any, RouterTotals]:
    """Those of y and of the totals."""
    if not isinstance(dy, dict) or dy.keys() != {"x", "router"} or not isinstance(dy["router"], RouterTotals):
        remedy = "give bwd a dict like fwd's output"
        raise InputError("a dict with the cotangents of x and router, fn.RouterTotals", describe(dy), remedy)
    return dy["x"], dy["router"]


def _kernel(params: dict, x: Any, experts: int) -> Array:
    expect.keys(params, ("router", "experts"), "params")
    expect.stacked(params["experts"], experts, "params", "experts")
    with at("router"):
        shapes = {"kernel": (x.shape[-1], experts)}
        expect.fields(params["router"], x.dtype, shapes, may_be_wider=("kernel",))
    return params["router"]["kernel"]
