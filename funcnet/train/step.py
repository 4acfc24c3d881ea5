"""The training step: one backward pass and one optimizer update, jitted, with its state donated.

    g = sum_i a_i dl_i/dw        w <- w + update(g)

With `accumulate=n` the batch is processed in n micro-batches whose gradients are added in float32 or wider. The
coefficients a are those of the whole batch, so the sum is the whole batch's gradient whatever the micro-batches hold.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, at, describe
from funcnet._internal.expect import is_array
from funcnet._internal.numerics import sum_dtype
from funcnet._internal.sharding import scan
from funcnet.gradients.contraction import total
from funcnet.train.batch import Batch, Pair, check_batch, no_shapes
from funcnet.train.objective import Objective, Pass, an_objective, averages, entered, forward, run
from funcnet.train.weights import weighted

Tree = Any
Metrics = dict[str, Array]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that training carries: a pytree, to be saved, restored and passed on as it is.

    Attributes:
        params: {"model": .., "loss": ..}, the model's parameters and the loss's, which are {} for most losses.
        state: {"model": .., "loss": ..}, such as running statistics.
        opt_state: the optimizer's state.
        key: the `jax.random.key` that every step derives its own from, as fold_in(key, step).
        step: how many updates were made, int32.
    """

    params: Tree
    state: Tree
    opt_state: Tree
    key: Array
    step: Array


@dataclass(frozen=True, eq=False)
class TrainStep:
    """A jitted training step: (train_state, batch, weights=None) -> (train_state, metrics); see `train_step`.

    Attributes:
        compiled: the jitted function ((params, state, opt_state, step), key, batch, weights) -> (those four, metrics),
            with the four donated. It does not return the key, since wrapping a returned key again costs microseconds.
    """

    compiled: jax.stages.Wrapped

    def __call__(
        self, train_state: TrainState, batch: Batch, weights: Array | None = None
    ) -> tuple[TrainState, Metrics]:
        for leaf in jax.tree.leaves((batch, weights)):
            if isinstance(leaf, np.ndarray):
                expect.native_order(leaf)  # a compiled program reads the bytes as they are in memory
        try:
            moved, metrics = self.compiled(_moving(train_state), train_state.key, batch, weights)
        except (RuntimeError, ValueError):
            expect.not_donated(train_state)
            raise
        except TypeError:
            no_shapes(batch, weights)
            check_batch(batch)  # refuses arrays that JAX cannot read
            with at("weights"):
                expect.shapes(weights)
            raise
        params, state, opt_state, step = moved
        return TrainState(params, state, opt_state, train_state.key, step), metrics

    def lower(self, train_state: TrainState, batch: Batch, weights: Array | None = None) -> jax.stages.Lowered:
        """The program for such arguments, for its text, cost and memory: `.compile().memory_analysis()`."""
        return self.compiled.lower(_moving(train_state), train_state.key, batch, weights)


def _moving(train_state: TrainState) -> tuple[Tree, Tree, Tree, Array]:
    a_train_state(train_state)
    return train_state.params, train_state.state, train_state.opt_state, train_state.step


def init_train_state(
    objective: Objective, optimizer: optax.GradientTransformation, key: Array, batch: Batch
) -> TrainState:
    """A fresh `TrainState` for batches like this one.

    Args:
        objective: from `fn.objective`.
        optimizer: any optax gradient transformation.
        key: a `jax.random.key`; it is split in two: one key draws the parameters, the other is kept for training.
        batch: (inputs, targets), with or without weights. Shapes and dtypes alone decide what is made; values are
            looked at to refuse a label out of range.

    Raises:
        InputError: for a key, inputs or targets that do not fit, with the path of the layer that they do not fit.
    """
    a_pair(objective, optimizer)
    init_key, train_key = jax.random.split(expect.key(key))
    # Donated buffers must belong to the train state alone, and no two leaves may share one.
    params, state = jax.tree.map(_copy, objective.init(init_key, batch))
    opt_state = jax.tree.map(_copy, optimizer.init(params))
    return TrainState(params, state, opt_state, train_key, jnp.zeros((), jnp.int32))


def _copy(leaf: Any) -> Any:
    return jnp.array(leaf, leaf.dtype) if is_array(leaf) else leaf


def train_step(
    objective: Objective,
    optimizer: optax.GradientTransformation,
    *,
    accumulate: int = 1,
    steps: int | None = None,
    norms: bool = True,
) -> TrainStep:
    """A jitted function (train_state, batch, weights=None) -> (train_state, metrics) that donates its train state.

    Of the state that was passed in only the key can be used again. Metrics are scalars by name: `loss`, the objective's
    own such as `accuracy`, `grad_norm` and `update_norm`. A batch is (inputs, targets) for the mean loss, or (inputs,
    targets, weights) for the weighted mean; the argument `weights` holds the coefficients of a sum in place of a mean
    (`fn.value_and_grad`). Values in the batch are not read before the step: a label out of range or a negative weight
    makes the loss NaN. Nor are the step's results checked, such as running statistics that overflow. `fn.fit` checks
    both. `train_step(..).lower(train_state, batch)` gives the program.

    Args:
        objective: from `fn.objective`.
        optimizer: any optax gradient transformation over the params themselves (`optax.lookahead` wants a pair of
            them). Those that take them, such as L-BFGS, get value, grad and value_fn (of the whole batch, not in
            micro-batches).
        accumulate: the number n of micro-batches to divide the batch into; it must divide the batch size. The i-th
            holds every n-th example from the i-th on. The state passes from each micro-batch to the next, and each
            draws from its own key.
        steps: None for one step per call, or k for k steps per call under one `lax.scan`: then every array of the
            batch, and `weights`, have a leading axis of size k, and so have the metrics.
        norms: whether to compute the two norms, which read every gradient and update once more.

    Raises:
        InputError: when first called, for a batch that does not fit the model, the loss or these options, and for a
            train state of another optimizer.
    """
    a_pair(objective, optimizer)
    step = one_step(objective, optimizer, accumulate, norms)
    if steps is None:
        return jitted(step)
    return jitted(partial(scan_steps, step, expect.count(steps, "steps")))


def a_pair(objective: Any, optimizer: Any) -> None:
    """Refuse what is not an objective and an optimizer."""
    an_objective(objective)
    if not hasattr(optimizer, "init") or not hasattr(optimizer, "update"):
        raise InputError("an optax optimizer", describe(optimizer), "call its constructor: optax.adam(1e-3)")


def a_train_state(given: Any) -> None:
    """Refuse what is not a train state."""
    if not isinstance(given, TrainState):
        remedy = "make one: fn.init_train_state(objective, optimizer, key, batch)"
        raise InputError("a train state", describe(given), remedy)


def its_optimizer(optimizer: optax.GradientTransformation, train_state: TrainState) -> None:
    """Refuse the train state of another optimizer."""
    wanted, received = jax.eval_shape(optimizer.init, train_state.params), train_state.opt_state
    if jax.tree.structure(received) != jax.tree.structure(wanted):
        names = [_states(wanted), _states(received)]
        names[1] += ", for other params" if names[0] == names[1] else ""
        remedy = "make the train state with the same optimizer: fn.init_train_state(objective, optimizer, key, batch)"
        raise InputError(f"an opt_state of this optimizer for these params: {names[0]}", names[1], remedy)


def _states(opt_state: Any) -> str:
    """The names of the states that an optimizer's state consists of."""
    inside = type(opt_state) in (tuple, list)
    return f"({', '.join(map(_states, opt_state))})" if inside else type(opt_state).__name__


def jitted(step: Callable[[TrainState, Batch, Array | None], tuple[TrainState, Metrics]]) -> TrainStep:
    """The step as a compiled function, with all of its train state but the key donated."""

    def call(moving, key, batch, weights):
        params, state, opt_state, count = moving
        train_state, metrics = step(TrainState(params, state, opt_state, key, count), batch, weights)
        return _moving(train_state), metrics

    return TrainStep(jax.jit(call, donate_argnums=0))


def scan_steps(step: Any, steps: int, carry: Tree, batch: Batch, weights: Array | None) -> tuple[Tree, Tree]:
    """`step` over batches stacked along a first axis of `steps`."""
    for leaf in jax.tree.leaves((batch, weights)):
        if jnp.shape(leaf)[:1] != (steps,):
            remedy = f"stack {steps} batches, or ask for as many steps as there are"
            raise InputError(f"a first axis of {steps} steps in front of the batch axis", describe(leaf), remedy)
    return scan(lambda carry, each: step(carry, *each), carry, (batch, weights))


def one_step(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int, norms: bool
) -> Callable[[TrainState, Batch, Array | None], tuple[TrainState, Metrics]]:
    """The step as a plain function."""
    moved = one_move(objective, optimizer, accumulate)

    def step(train_state, batch, weights=None):
        move = moved(train_state, batch, weights)
        metrics = averages(move.passed.sums)
        if norms:
            metrics |= {"grad_norm": _norm(move.passed.grads), "update_norm": _norm(move.updates)}
        params = optax.apply_updates(train_state.params, move.updates)
        after = TrainState(params, move.passed.state, move.opt_state, train_state.key, train_state.step + 1)
        return after, metrics

    return step


class Move(NamedTuple):
    """What a step is made of: its pass forward and back, and what the optimizer makes of the gradients."""

    passed: Pass
    updates: Tree
    opt_state: Tree


def one_move(
    objective: Objective, optimizer: optax.GradientTransformation, accumulate: int
) -> Callable[[TrainState, Batch, Array | None], Move]:
    """The step up to its update, which is not added to the params yet."""
    accumulate = expect.count(accumulate, "accumulate")
    optimizer = optax.with_extra_args_support(optimizer)

    def move(train_state, batch, weights=None):
        its_optimizer(optimizer, train_state)
        pair, weights = entered(objective, batch, weights)
        params, key = train_state.params, jax.random.fold_in(train_state.key, train_state.step)
        passed = _accumulated(objective, accumulate, params, train_state.state, pair, key, weights)

        def value_fn(params):
            values = forward(objective, params, train_state.state, pair, key)[1]
            return weighted(weights, values)

        updates, opt_state = optimizer.update(
            passed.grads, train_state.opt_state, params, value=passed.sums["loss"], grad=passed.grads, value_fn=value_fn
        )
        return Move(passed, updates, opt_state)

    return move


def _accumulated(objective, accumulate, params, state, pair: Pair, key, weights):
    """`run` over the whole batch, in `accumulate` micro-batches."""
    if accumulate == 1:
        return run(objective, params, state, pair, key, weights, total)
    examples = weights.shape[0]
    if examples % accumulate:
        remedy = "choose a divisor of the batch size"
        raise InputError(f"a batch size that {accumulate} micro-batches divide", f"{examples} examples", remedy)

    def split(leaf):  # every accumulate-th example, so that a batch that is sharded over a mesh stays so
        return jnp.moveaxis(leaf.reshape(examples // accumulate, accumulate, *leaf.shape[1:]), 1, 0)

    def body(carry, micro):
        state, so_far = carry
        i, pair, weights = micro
        passed = run(objective, params, state, pair, jax.random.fold_in(key, i), weights, total)
        added = jax.tree.map(lambda a, g: a + g.astype(a.dtype), so_far, passed.grads)
        return (passed.state, added), passed.sums

    zeros = jax.tree.map(lambda p: jnp.zeros_like(p, sum_dtype(p.dtype)), params)
    micros = (jnp.arange(accumulate), *jax.tree.map(split, (pair, weights)))
    (state, grads), parts = scan(body, (state, zeros), micros)
    sums = jax.tree.map(lambda part: jnp.sum(part, axis=0), parts)
    return Pass(sums, state, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params))


def _norm(tree: Tree) -> Array:
    """The Euclidean norm over all leaves, in float32 or wider."""
    return jnp.sqrt(sum(jnp.sum(jnp.square(leaf.astype(sum_dtype(leaf.dtype)))) for leaf in jax.tree.leaves(tree)))
