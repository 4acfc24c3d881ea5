"""The lecture's step as it is written: each layer is updated as soon as its gradient exists, which is then dropped.

    for each layer, from the last to the first:
        dparams, dy = layer.bwd(params, residuals, dy)
        params = params + update(dparams)

The walk back is one compiled program. Through a `repeat` it is a loop that overwrites the stacked parameters and the
stacked optimizer state one layer at a time, so the loop holds one layer's gradient, and compiles once for all layers.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from funcnet import expect
from funcnet.arithmetic import lasting
from funcnet.combine import distinct
from funcnet.expect import InputError, at
from funcnet.layer import Layer, undoing
from funcnet.order import after
from funcnet.train import elementwise
from funcnet.train.elementwise import HOLE, require_elementwise
from funcnet.train.objective import Objective, Start, averages, entered, is_both, join, start
from funcnet.train.step import TrainState, TrainStep, a_pair, its_optimizer, jitted
from funcnet.transform import rerun

Tree = Any
Update = Callable[[Tree, list[Tree], Tree], tuple[Tree, list[Tree]]]
Updated = tuple[Tree, list[Tree], Any]  # params, optimizer state like the params, dx


def layerwise_step(objective: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
    """A jitted function (train_state, batch, weights=None) -> (train_state, metrics) that updates layers going back.

    It gives the parameters of `fn.train_step(objective, optimizer)`, to rounding, and its metrics except the norms,
    which need the whole gradient; it donates its train state likewise. The walk goes through `serial`, `skip`,
    `repeat`, `remat` and `named`. Every other layer, also one made by `mixed` or `parallel`, is one step of it, and so
    is each turn of a `repeat`, and a loss with parameters of its own; a stack of reversible layers is one as a whole.

    Args:
        objective: from `fn.objective`.
        optimizer: an optax chain that treats every number by itself.

    Raises:
        InputError: when first called, for an optimizer that needs the whole gradient, such as clipping by a global
            norm, or a whole array, such as LAMB: applied layer by layer it would be another algorithm. And for a batch
            that does not fit, or a train state of another optimizer.
    """
    a_pair(objective, optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(train_state, batch, weights):
        its_optimizer(optimizer, train_state)
        pair, weights = entered(objective, batch, weights)
        params, key = train_state.params, jax.random.fold_in(train_state.key, train_state.step)
        with expect.by("layerwise_step"):
            require_elementwise(optimizer, params, train_state.opt_state, _steps(objective, params))
        begun = start(objective, params, train_state.state, pair, key, weights)
        shared, like_params = elementwise.split(optimizer, train_state.opt_state)

        def update(grads, like_params, params):
            state = elementwise.join(shared, like_params)
            updates, state = optimizer.update(grads, state, params, value=begun.sums["loss"], grad=grads)
            return optax.apply_updates(params, updates), elementwise.split(optimizer, state).like_params

        nothing = elementwise.join(shared, [HOLE] * len(like_params))
        _, counted = optimizer.update(HOLE, nothing, HOLE, value=begun.sums["loss"], grad=HOLE)
        params, like_params = _back(objective, params, like_params, begun, update)
        opt_state = elementwise.join(elementwise.split(optimizer, counted).shared, like_params)
        metrics = averages(begun.sums)
        return TrainState(params, begun.state, opt_state, train_state.key, train_state.step + 1), metrics

    return jitted(step)


def _steps(objective: Objective, params: Tree) -> list[tuple[Callable, bool]]:
    """`_places` of the model, and of a loss with parameters."""
    if not is_both(params):
        return list(_places(objective.model))
    return [*_places(objective.model, partial(_at, "model")), (partial(_at, "loss"), False)]


def _back(objective: Objective, params: Tree, like_params: list[Tree], begun: Start, update: Update) -> tuple:
    """The walk through the loss, if it has parameters, and the model: (params, optimizer state like the params)."""
    rest = begun.residuals, begun.dprediction, update
    if not is_both(params):
        return _walk(objective.model, params, like_params, *rest)[:2]
    of = lambda name: [_at(name, tree) for tree in like_params]
    loss, loss_like = update(begun.dloss, of("loss"), params["loss"])
    model, model_like, _ = _walk(objective.model, params["model"], of("model"), *rest)
    both = zip(like_params, model_like, loss_like, strict=True)
    like_params = [join(params, *new) if isinstance(tree, Mapping) else tree for tree, *new in both]
    return join(params, model, loss), like_params


def _walk(layer: Layer, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    """`layer.bwd` with each gradient used up where it arises."""
    match _walked(layer):
        case "named":
            return _walk(_inner(layer), params, like_params, residuals, dy, update)
        case "serial":
            return _serial(layer, params, like_params, residuals, dy, update)
        case "skip":
            params, like_params, dx = _walk(_inner(layer), params, like_params, residuals, dy, update)
            return params, like_params, dy + dx
        case "remat":
            residuals = rerun(_inner(layer), params, residuals, dy)
            return _walk(_inner(layer), params, like_params, residuals, dy, update)
        case "repeat":
            return _repeat(_inner(layer), params, like_params, residuals, dy, update)
    grads, dx = layer.bwd(params, residuals, dy)
    return *update(grads, like_params, params), dx


def _walked(layer: Layer) -> str:
    """The combinator that the walk goes through; "" for a layer that is one step of it, as all reversible ones are."""
    return "" if undoing(layer) else layer.combinator


def _serial(layer: Layer, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    params, like_params = dict(params), [dict(tree) if isinstance(tree, Mapping) else tree for tree in like_params]
    for name, part in reversed(list(layer.parts.items())):
        inside = [_at(name, tree) for tree in like_params]
        with at(name):
            params[name], inside, dy = _walk(part, params[name], inside, residuals[name], dy, update)
        for tree, new in zip(like_params, inside, strict=True):
            if isinstance(tree, dict):
                tree[name] = new
    return params, like_params, dy


def _repeat(inner: Layer, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    """A loop over the layers, from the last to the first, which overwrites the stacked trees in place.

    XLA writes into a stacked array in place only where it sees that all reading of the old values comes first. So the
    place to write at is computed after the reading, and the optimizer state is read anew at its own place; the second
    update is the same as the first and costs one more reading of the gradient. Otherwise all of it would be copied, in
    every turn (jaxlib 0.10.2 and 0.12).
    """
    residuals = distinct(residuals)
    leaves = jax.tree.leaves((params, residuals))
    if not leaves:
        raise InputError("a repeat of a layer with parameters or residuals", "neither", "use train_step for this model")
    times = leaves[0].shape[0]

    def turn(k, carry):
        params, like_params, dy = carry
        i = times - 1 - k
        old = _read(params, i)
        grads, dx = inner.bwd(old, _read(residuals, i).tree(), dy)
        here = after(dx, i)
        new, _ = update(grads, _read(like_params, i), _read(params, here))
        params = _write(params, new, here)
        here = after(params, i)
        _, new_like = update(grads, _read(like_params, here), old)
        return params, _write(like_params, new_like, here), dx

    carry = lasting(partial(turn, jnp.int32(0)), (params, like_params, dy))
    return lax.fori_loop(0, times, turn, carry)


def _read(stacked: Tree, i: Any) -> Tree:
    """Entry i >= 0 along the first axis of each leaf."""
    read = partial(lax.dynamic_slice, allow_negative_indices=False)
    return jax.tree.map(lambda leaf: read(leaf, _corner(leaf, i), (1, *leaf.shape[1:]))[0], stacked)


def _write(stacked: Tree, entry: Tree, i: Any) -> Tree:
    write = partial(lax.dynamic_update_slice, allow_negative_indices=False)
    return jax.tree.map(lambda leaf, new: write(leaf, new[None], _corner(leaf, i)), stacked, entry)


def _corner(leaf: Array, i: Any) -> tuple:
    return i, *(jnp.zeros((), i.dtype) for _ in leaf.shape[1:])


def _places(layer: Layer, find: Callable[[Tree], Tree] = lambda tree: tree) -> Iterator[tuple[Callable, bool]]:
    """The steps of the walk: how to find each one's part of a tree like the params, and whether it is a `repeat`."""
    match _walked(layer):
        case "serial":
            for name, part in layer.parts.items():
                yield from _places(part, lambda tree, name=name: _at(name, find(tree)))
        case "skip" | "remat" | "named":
            yield from _places(_inner(layer), find)
        case combinator:
            yield find, combinator == "repeat"


def _at(name: str, tree: Tree) -> Tree:
    """The part of a tree like the params; an optimizer may mark a whole branch by something that is no dict."""
    return tree[name] if isinstance(tree, Mapping) else tree


def _inner(layer: Layer) -> Layer:
    assert layer.made is not None
    return layer.made.inner
