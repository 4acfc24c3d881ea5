"""The lecture's training step as written: each layer is updated as soon as its gradient exists, which is then dropped.

    for each layer, from the last to the first:
        dparams, dy = layer.bwd(params, residuals, dy)
        params = params + update(dparams)

This backward walk is one compiled program. A `repeat` in it becomes a loop that overwrites the stacked parameters and
the stacked optimizer state one layer at a time, so the loop holds one layer's gradient, and compiles once for them all.
"""

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array, lax

from funcnet._internal.barrier import after
from funcnet._internal.errors import at, by
from funcnet._internal.sharding import lasting
from funcnet.combinators.named import Named
from funcnet.combinators.remat import Remat, rerun
from funcnet.combinators.repeat import Repeat, distinct
from funcnet.combinators.reversible import undoing
from funcnet.combinators.serial import Serial
from funcnet.combinators.sides import passing
from funcnet.combinators.skip import Skip, pulled
from funcnet.layer import Layer
from funcnet.structure import Structure
from funcnet.train import elementwise
from funcnet.train.elementwise import HOLE, require_elementwise
from funcnet.train.objective import Objective, Start, averages, both, entered, start
from funcnet.train.step import TrainState, TrainStep, a_pair, its_optimizer, jitted

Tree = Any
Update = Callable[[Tree, list[Tree], Tree], tuple[Tree, list[Tree]]]
Updated = tuple[Tree, list[Tree], Any]  # params, optimizer state like the params, dx


def layerwise_step(objective: Objective, optimizer: optax.GradientTransformation) -> TrainStep:
    """A jitted function (train_state, batch, weights=None) -> (train_state, metrics) that updates layers going back.

    It computes the same parameters as `fn.train_step(objective, optimizer)`, up to rounding, and the same metrics
    except the norms, which need the whole gradient; it donates its train state likewise. The backward walk enters
    `serial`, `skip`, `repeat`, `remat` and `named`. Every other layer, even one made by `mixed` or `parallel`, is one
    step of the walk, and so are each turn of a `repeat` and a loss with parameters of its own; a stack of reversible
    layers is one step as a whole.

    Args:
        objective: from `fn.objective`.
        optimizer: an optax chain that updates every number independently.

    Raises:
        InputError: when first called, for an optimizer that needs the whole gradient, such as clipping by a global
            norm, or a whole array, such as LAMB: applied layer by layer it would be another algorithm. Also for a batch
            that does not fit, or a train state of another optimizer.
    """
    a_pair(objective, optimizer)
    optimizer = optax.with_extra_args_support(optimizer)

    def step(train_state, batch, weights):
        its_optimizer(optimizer, train_state)
        pair, weights = entered(objective, batch, weights)
        params, key = train_state.params, jax.random.fold_in(train_state.key, train_state.step)
        with by("layerwise_step"):
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
    both(params, params)
    loss = [(partial(_at, "loss"), False)] if jax.tree.leaves(params["loss"]) else []
    return [*_places(objective.model, partial(_at, "model")), *loss]


def _back(objective: Objective, params: Tree, like_params: list[Tree], begun: Start, update: Update) -> tuple:
    """The walk through the loss, if it has parameters, and the model: (params, optimizer state like the params)."""
    of = lambda name: [_at(name, tree) for tree in like_params]
    loss, loss_like = params["loss"], of("loss")
    if jax.tree.leaves(loss):
        loss, loss_like = update(begun.dloss, loss_like, loss)
    rest = begun.residuals, begun.dprediction, update
    model, model_like, _ = _walk(objective.model, params["model"], of("model"), *rest)
    each = zip(like_params, model_like, loss_like, strict=True)
    like_params = [{"model": a, "loss": b} if isinstance(tree, Mapping) else tree for tree, a, b in each]
    return {"model": model, "loss": loss}, like_params


def _walk(layer: Layer, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    """`layer.bwd`, with each gradient consumed by its update where it arises."""
    match _walked(layer):
        case Serial() as made:
            return _serial(made, params, like_params, residuals, dy, update)
        case Named(inner=inner):
            return _walk(inner, params, like_params, residuals, dy, update)
        case Skip(inner=inner):
            params, like_params, dx = _walk(inner, params, like_params, residuals, dy, update)
            return params, like_params, pulled(dy, dx)
        case Remat(inner=inner):
            return _walk(inner, params, like_params, rerun(inner, params, residuals, dy), dy, update)
        case Repeat() as made:
            return _repeat(made, params, like_params, residuals, dy, update)
    grads, dx = passing(layer).bwd(params, residuals, dy)
    return *update(grads, like_params, params), dx


def _walked(layer: Layer) -> Structure | None:
    """The structure that the walk enters; None for a layer that is one step of it, as all reversible ones are."""
    return None if undoing(layer) else layer.structure


def _serial(made: Serial, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    params, like_params = dict(params), [dict(tree) if isinstance(tree, Mapping) else tree for tree in like_params]
    for name, part in reversed(list(made.parts.items())):
        inside = [_at(name, tree) for tree in like_params]
        with at(name):
            params[name], inside, dy = _walk(part, params[name], inside, residuals[name], dy, update)
        for tree, new in zip(like_params, inside, strict=True):
            if isinstance(tree, dict):
                tree[name] = new
    return params, like_params, dy


def _repeat(made: Repeat, params: Tree, like_params: list[Tree], residuals: Tree, dy: Any, update: Update) -> Updated:
    """A loop over the layers, from the last to the first, which overwrites the stacked trees in place.

    XLA writes into a stacked array in place only where it sees that every read of the old values comes first. So the
    index to write at is made to depend on those reads, and the optimizer state is read again at an index of its own;
    the second update is the same as the first and costs one more read of the gradient. Otherwise the whole stacks would
    be copied in every turn (jaxlib 0.10.2 and 0.12).
    """
    inner, times, residuals = passing(made.inner), made.times, distinct(residuals)

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
    """For each step of the walk, how to find its part of a tree like the params, and whether it is a `repeat`."""
    match _walked(layer):
        case Serial(parts=parts):
            for name, part in parts.items():
                yield from _places(part, lambda tree, name=name: _at(name, find(tree)))
        case Skip(inner=inner) | Remat(inner=inner) | Named(inner=inner):
            yield from _places(inner, find)
        case made:
            yield find, isinstance(made, Repeat)


def _at(name: str, tree: Tree) -> Tree:
    """The part `name` of a tree like the params; what is no dict is an optimizer's mark for the whole branch."""
    return tree[name] if isinstance(tree, Mapping) else tree
