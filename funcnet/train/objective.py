"""The objective: a model followed by its loss, and the one backward pass through both.

    y = f(x; w)        l_i = loss(y_i, t_i)        L = sum_i a_i l_i

dL/dl = a, so the coefficients a are the cotangent that the loss's `bwd` receives, and what that returns for y is the
cotangent that the model's `bwd` receives. A batch is (inputs, targets), or (inputs, targets, weights) with a weight
w_i >= 0 for each value of the loss, 1 where there are none. Then L is the weighted mean over the values that count,
and so is every metric:

    a_i = w_i c_i / sum_j w_j m_j        c_i = 1 if l_i counts, else 0        m_i = c_i, or the loss's own mass

Only ratios of the weights matter. Where no value counts, or all weights are 0, a = 0: loss and gradients are 0.

Params, state and gradients are dicts {"model": .., "loss": ..}, the loss's {} and () for most losses: it is
`fn.linear_cross_entropy` that has parameters. Since a is known before the forward pass, a loss may make both of its
passes in one (`Loss.ahead`).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, describe
from funcnet._internal.expect import is_array, is_floating
from funcnet.gradients.contraction import Contraction, a_contraction, total
from funcnet.layer import Layer, a_layer
from funcnet.losses.loss import Loss, as_loss
from funcnet.structure import Composed, tree
from funcnet.train.batch import Batch, Pair, check_batch, no_shapes
from funcnet.train.weights import weighed, weighted

Tree = Any
PARTS = ("model", "loss")
LAST = 2**32 - 1  # folded into the key for the loss, as `serial` folds in i for its layer i
OWN_NAMES = frozenset(("loss", "weight", "step", "grad_norm", "update_norm", "skipped"))  # of a record's own numbers


@dataclass(frozen=True, eq=False, repr=False)
class Objective:
    """A model, its loss, and metrics by name: (prediction, target) -> one number for each value of the loss."""

    model: Layer
    loss: Loss
    metrics: Mapping[str, Callable[[Any, Any], Array]]

    def __repr__(self) -> str:
        return "\n".join(["objective", *tree(self.model, "model", 1), *tree(self.loss, "loss", 1)])

    def init(self, key: Array, batch: Batch) -> tuple[Tree, Tree]:
        """Fresh params and state, {"model": .., "loss": ..} each, for batches like this one.

        The model's are those of `model.init(key, ..)`. Weights in the batch change nothing.
        """
        inputs, targets, _ = check_batch(batch)
        params, state = self.model.init(key, inputs)
        prediction = jax.eval_shape(self.model.apply, params, state, inputs)
        with at(self.loss.name):
            self.loss.check(prediction, targets)
            own = self.loss.init(jax.random.fold_in(key, LAST), (prediction, expect.shapes(targets)))
        return {"model": params, "loss": own[0]}, {"model": state, "loss": own[1]}


def objective(model: Layer, loss: Layer, metrics: Mapping[str, Callable[[Any, Any], Array]] | None = None) -> Objective:
    """What training minimises: `loss` of the predictions of `model`.

    Args:
        model: a layer from inputs to predictions.
        loss: a layer over (prediction, target) with one value an example, such as `fn.cross_entropy()`. It may have
            parameters and state of its own.
        metrics: replaces the loss's own (accuracy for the cross-entropies); {} for none.

    Raises:
        InputError: for a model or loss that is no layer, a metric that is no function, and a metric whose name a
            training step needs itself.
    """
    a_layer(model)
    loss = as_loss(a_layer(loss))
    metrics = loss.metrics if metrics is None else metrics
    if not isinstance(metrics, Mapping) or not all(map(callable, metrics.values())):
        remedy = 'give functions of a batch, such as {"error": lambda prediction, target: ..}'
        raise InputError("metrics as functions by their names", describe(metrics), remedy)
    metrics = dict(metrics)
    if taken := OWN_NAMES & metrics.keys():
        raise InputError(f"metrics not called {sorted(OWN_NAMES)}", f"{sorted(taken)}", "rename them")
    return Objective(model, loss, metrics)


def an_objective(given: Any) -> None:
    """Refuse what is not an objective."""
    if not isinstance(given, Objective):
        raise InputError("an objective", describe(given), "make one: fn.objective(model, loss)")


class Pass(NamedTuple):
    """What one forward and backward pass gives: weighted sums over the batch, the new state, the gradients."""

    sums: dict[str, Array]
    state: Tree
    grads: Tree


def entered(objective: Objective, batch: Batch, coefficients: Any = None) -> tuple[Pair, Array]:
    """A batch as its pair (inputs, targets) and the coefficients a of the values: those given, or those of its mean.

    Where no value has any weight, it is a mean over nothing: all coefficients are 0.
    """
    no_shapes(batch, coefficients)
    inputs, targets, weights = check_batch(batch)
    if coefficients is None:
        counting, each, _ = weighed(objective.loss, targets, weights)
        divisor = jnp.sum(each)
        return (inputs, targets), counting / jnp.where(divisor == 0, jnp.inf, divisor)
    if weights is not None:
        remedy = "give one: the argument for the coefficients of a sum, the batch for relative weights of a mean"
        raise InputError("weights in the batch or as an argument", "both", remedy)
    counted = objective.loss.counted(targets)
    with at("weights"):
        given = _numbers(coefficients)
    if given is None or given.shape != counted.shape or not is_floating(given):
        wanted = f"floating weights {list(counted.shape)}, one for each value of the loss"
        received = describe(coefficients if given is None else given)
        raise InputError(wanted, received, "give one weight for each value of the loss")
    return (inputs, targets), given


def _numbers(given: Any) -> Array | None:
    """An array, or a list of numbers, as JAX's array; None for what is neither."""
    if not all(is_array(leaf) or isinstance(leaf, Real) for leaf in jax.tree.leaves(given)):
        return None
    try:
        return jnp.asarray(given)
    except (TypeError, ValueError):
        return None


def both(params: Tree, state: Tree) -> None:
    """Refuse params or state that are not dicts of the model's and the loss's."""
    for what, given, none in (("params", params, "{}"), ("state", state, "()")):
        if not isinstance(given, Mapping) or given.keys() != set(PARTS):
            received = f"a dict of {list(given)}" if isinstance(given, Mapping) else describe(given)
            remedy = f'take what objective.init returns, or write {{"model": {what}, "loss": {none}}}'
            raise InputError(f"{what} {{model, loss}} of an objective", received, remedy)


def forward(objective: Objective, params: Tree, state: Tree, pair: Pair, key: Array | None):
    """The training forward pass: (prediction, values of the loss, new state, residuals of model and loss)."""
    both(params, state)
    inputs, targets = pair
    prediction, model_state, residuals = objective.model.fwd(params["model"], state["model"], inputs, key)
    with at(objective.loss.name):
        x = prediction, targets
        values, loss_state, loss_residuals = objective.loss.fwd(params["loss"], state["loss"], x, loss_key(key))
    return prediction, values, {"model": model_state, "loss": loss_state}, (residuals, loss_residuals)


def predicted(objective: Objective, params: Tree, state: Tree, pair: Pair) -> tuple[Any, Array]:
    """The prediction and the values of the loss, by `apply`."""
    both(params, state)
    inputs, targets = pair
    prediction = objective.model.apply(params["model"], state["model"], inputs)
    with at(objective.loss.name):
        return prediction, objective.loss.apply(params["loss"], state["loss"], (prediction, targets))


def as_layer(objective: Objective) -> Layer:
    """Model and loss as one layer from a batch to the values of the loss; weights in the batch change nothing."""

    def apply(params, state, batch):
        return predicted(objective, params, state, batch[:2])[1]

    def fwd(params, state, batch, key):
        return forward(objective, params, state, batch[:2], key)[1:]

    def bwd(params, residuals, dy, contract=total):
        dloss, (dprediction, dtargets) = objective.loss.bwd(params["loss"], residuals[1], dy, contract)
        dmodel, dinputs = objective.model.bwd(params["model"], residuals[0], dprediction, contract)
        return {"model": dmodel, "loss": dloss}, (dinputs, dtargets)

    parts = {"model": objective.model, "loss": objective.loss}
    again = lambda parts: as_layer(replace(objective, **parts))
    return Layer("objective", objective.init, apply, fwd, bwd, Composed(parts, again))


def loss_key(key: Array | None) -> Array | None:
    return None if key is None else jax.random.fold_in(key, LAST)


class Start(NamedTuple):
    """Where a backward pass starts: sums over the batch, the new state, the model's residuals and output cotangent.

    `dloss` is what the contraction made of the gradients of the loss's own parameters.
    """

    sums: dict[str, Array]
    state: Tree
    residuals: Tree
    dprediction: Tree
    dloss: Tree


def start(
    objective: Objective,
    params: Tree,
    state: Tree,
    pair: Pair,
    key: Array | None,
    weights: Array,
    contract: Contraction = total,
) -> Start:
    """The forward pass and the loss's backward pass, the loss and the metrics summed with `weights`."""
    both(params, state)
    inputs, targets = pair
    loss = objective.loss
    if loss.at_once is not None and contract is total:
        prediction, model_state, residuals = objective.model.fwd(params["model"], state["model"], inputs, key)
        with at(loss.name):
            values, (dloss, (dprediction, _)) = loss.at_once(params["loss"], (prediction, targets), weights)
        sums = weighted_sums(objective, prediction, targets, values, weights)
        return Start(sums, {"model": model_state, "loss": state["loss"]}, residuals, dprediction, dloss)
    prediction, values, new_state, (residuals, loss_residuals) = forward(objective, params, state, pair, key)
    sums = weighted_sums(objective, prediction, targets, values, weights)  # refuses what bwd would not understand
    with at(loss.name):
        dloss, (dprediction, _) = loss.bwd(params["loss"], loss_residuals, weights.astype(values.dtype), contract)
    return Start(sums, new_state, residuals, dprediction, dloss)


def weighted_sums(
    objective: Objective, prediction: Any, target: Any, values: Array, weights: Array
) -> dict[str, Array]:
    """Sums of the loss's values and of the metrics, and the `weight` that the metrics are to be divided by.

    A value that does not count (`Loss.counted`) has no weight in a metric.
    """
    counted, weights = objective.loss.counted(target), weights.astype(values.dtype)
    if values.shape != counted.shape:
        remedy = "let the loss's `counted` have the shape of its values, one an example"
        raise InputError(f"values of the loss {list(counted.shape)}", describe(values), remedy)
    counting = weights * counted.astype(weights.dtype)
    sums = {"loss": weighted(weights, values), "weight": jnp.sum(counting)}
    for name, metric in objective.metrics.items():
        value = jnp.asarray(metric(prediction, target))
        if value.shape != values.shape:
            remedy = "return one number for each value of the loss; they are averaged as the loss is"
            raise InputError(f"the metric {name!r} of shape {list(values.shape)}", describe(value), remedy)
        sums[name] = weighted(counting, value.astype(values.dtype))
    return sums


def run(
    objective: Objective,
    params: Tree,
    state: Tree,
    pair: Pair,
    key: Array | None,
    weights: Array,
    contract: Contraction,
) -> Pass:
    """One pass forward and one back, the loss and the metrics summed with `weights`."""
    begun = start(objective, params, state, pair, key, weights, contract)
    grads, _ = objective.model.bwd(params["model"], begun.residuals, begun.dprediction, contract)
    return Pass(begun.sums, begun.state, {"model": grads, "loss": begun.dloss})


def averages(sums: dict[str, Array]) -> dict[str, Array]:
    """What a step reports: the loss as it is minimised, and the means of the metrics."""
    weight = jnp.where(sums["weight"] == 0, 1.0, sums["weight"])
    means = {name: value / weight for name, value in sums.items() if name not in ("loss", "weight")}
    return {"loss": sums["loss"]} | means


def value_and_grad(objective: Objective) -> Callable[..., tuple[tuple[Array, Tree], Tree]]:
    """The loss and its gradients by the hand-written backward pass.

    Returns a function (params, state, batch, key, *, weights=None, contract=fn.total) -> ((loss, state), grads):

        params, state: {"model": .., "loss": ..} each, as `objective.init` makes them, and so are the gradients.
        batch: (inputs, targets), their first axes equal: the loss is the mean over all values that count. Or (inputs,
            targets, weights), with weights as floats or booleans, not negative, one for each value of the loss: the
            loss is the weighted mean over the values that count, divided by the sum of the weights times `Loss.mass`.
            Only the ratios of the weights matter; if all are zero, the loss is 0.
        key: a `jax.random.key`, or None for a model that draws nothing.
        weights: coefficients for a sum in place of a mean, floats of any sign, one for each value: the loss is then
            sum(weights * values). With weights of 1 and `per_example`, each example's gradient is that of its own loss.
        contract: what becomes of each parameter's gradient: `fn.total`, `fn.per_example`, `fn.squared_norm`, `fn.keep`.

    It is plain JAX: jit it, vmap it, and differentiate it for Hessian-vector products. The values in the batch are not
    checked: NaN in the data makes the loss NaN, and so does a negative weight in the batch. `fn.fit` and `fn.evaluate`
    refuse them.
    """

    def with_grads(params, state, batch, key=None, *, weights=None, contract=total):
        expect.not_donated((params, state))
        pair, coefficients = entered(objective, batch, weights)
        result = run(objective, params, state, pair, key, coefficients, a_contraction(contract))
        return (result.sums["loss"], result.state), result.grads

    return with_grads
