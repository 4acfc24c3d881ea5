"""The losses that keep a mixture's experts busy alike, added to the loss of a model that counts them.

    l = loss(prediction, target) + a balance + b z        d balance = a sum_t dl_t        d z = b sum_t dl_t

The totals of an example (`fn.RouterTotals`, a side input that the model's mixtures wrote) are added to each value of
its loss, one an example or one a position: so in the mean an example's totals weigh as much as its values that count,
and those of an example whose targets are all ignored weigh nothing.
"""

from dataclasses import replace
from typing import Any

import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet.combinators.routing import RouterTotals
from funcnet.combinators.sides import has_sides, unheard
from funcnet.gradients.contraction import total
from funcnet.layer import a_layer
from funcnet.losses.loss import Loss, a_pair, as_loss
from funcnet.structure import Wrapped, constructor


@constructor
def router_losses(loss: Any, *, balance: float = 0.01, z: float = 0.001) -> Loss:
    """The loss of a prediction {"x": prediction, "router": totals}, with the routers' two losses added.

    Its metrics are the loss's own, of x, and the totals of an example: router_balance, router_z and dropped, which
    are sums over all mixtures of the model. Params, state and residuals are the loss's own. For a model

        serial(embedding(V, D), router_totals(), repeat(block_with_a_moe, 12), dense(V))

    which has no `select` at its end.

    Args:
        loss: a loss, such as `fn.cross_entropy()`.
        balance: a, the weight of the load-balancing loss, which is 1 for each mixture whose experts are chosen equally.
        z: b, the weight of the mean squared log of the routers' partition functions.

    Raises:
        InputError: for weights that are negative, and for a prediction without the totals.
    """
    loss = as_loss(a_layer(loss))
    remedy = "give 0 to leave it out"
    balance, z = expect.not_negative(balance, "balance", remedy), expect.not_negative(z, "z", remedy)

    def of_x(prediction: Any) -> Any:
        if not has_sides(prediction) or not isinstance(prediction.get("router"), RouterTotals):
            remedy = "put fn.router_totals() into the model, in front of its mixtures, and no fn.select() behind them"
            raise InputError("a prediction {x, router} with the routers' totals", describe(prediction), remedy)
        return prediction["x"]

    def added(values: Array, prediction: Any) -> Array:
        totals = prediction["router"]
        return values + _like(values, balance * totals.balance + z * totals.z)

    @by("router_losses")
    def init(key, pair):
        a_pair(pair)
        return loss.init(key, (of_x(pair[0]), pair[1]))

    @by("router_losses")
    def apply(params, state, pair):
        a_pair(pair)
        return added(loss.apply(params, state, (of_x(pair[0]), pair[1])), pair[0])

    @by("router_losses")
    def fwd(params, state, pair, key):
        a_pair(pair)
        values, state, residuals = loss.fwd(params, state, (of_x(pair[0]), pair[1]), key)
        sides = {name: side for name, side in pair[0].items() if name != "x"}
        return added(values, pair[0]), state, (residuals, unheard(sides))

    @by("router_losses")
    def bwd(params, residuals, dy, contract=total):
        residuals, sides = residuals
        dparams, (dx, dtarget) = loss.bwd(params, residuals, dy, contract)
        each = jnp.sum(jnp.asarray(dy).reshape(dy.shape[0], -1), axis=1)
        zeros = sides["router"]
        own = RouterTotals((balance * each).astype(zeros.balance.dtype), (z * each).astype(zeros.z.dtype), None)
        return dparams, ({**sides, "x": dx, "router": own}, dtarget)

    @by("router_losses")
    def check(prediction, target):
        loss.check(of_x(prediction), target)

    def of_totals(name):
        return lambda prediction, target: _like(loss.counted(target), getattr(prediction["router"], name))

    metrics = {name: _of_x(metric) for name, metric in loss.metrics.items()}
    metrics |= {"router_balance": of_totals("balance"), "router_z": of_totals("z"), "dropped": of_totals("dropped")}
    made = Wrapped(loss, lambda other: router_losses(other, balance=balance, z=z))
    whole = replace(loss, name="router_losses", init=init, apply=apply, fwd=fwd, bwd=bwd, made=made)
    return replace(whole, check=check, metrics=metrics, ahead=None)


def _of_x(metric: Any) -> Any:
    return lambda prediction, target: metric(prediction["x"], target)


def _like(values: Array, totals: Array) -> Array:
    """One number an example [B] in the place of each of its values [B, ..], in their dtype where they are floating."""
    high = values.dtype if expect.is_floating(values) else jnp.result_type(float)
    return jnp.broadcast_to(totals.astype(high).reshape(-1, *(1,) * (values.ndim - 1)), values.shape)
