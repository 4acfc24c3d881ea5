"""Optimizers as formulas: equal for equal updates, refused where an update mixes numbers, and states taken apart."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from funcnet._internal.errors import InputError
from funcnet.train.elementwise import HOLE, Formulas, join, require_elementwise, split

pytestmark = pytest.mark.usefixtures("standard_promotion")

PARAMS = {"deep": {"w": jnp.ones((3, 2, 2)), "b": jnp.ones((3, 2))}, "head": {"w": jnp.ones((2, 5))}}
PARTS = [(lambda tree: tree["deep"], True), (lambda tree: tree["head"], False)]


def required(optimizer, parts=PARTS, params=PARAMS):
    optimizer = optax.with_extra_args_support(optimizer)
    require_elementwise(optimizer, params, optimizer.init(params), parts)


def mapped(f):
    """An optimizer without a state that puts each gradient through f."""
    return optax.stateless(lambda grads, params: jax.tree.map(f, grads))


# Formulas


def formulas(*functions):
    """The number and `own` of each function's outputs, of one parameter [2, 3] and one shared number."""
    table, p, s = Formulas(), jnp.ones((2, 3)), jnp.float32(2)
    names = table.names(p, "param", own=True), table.names(s, "shared", own=False)
    return [table.of(f, (p, s), names) for f in functions]


def test_equal_formulas_have_equal_numbers_and_others_do_not():
    one, same, scaled, turned, other = formulas(
        lambda p, s: p * s + 1,
        lambda p, s: jax.jit(lambda q: q * s)(p) + 1,
        lambda p, s: p * s + 2,
        lambda p, s: s * p + 1,
        lambda p, s: p * s - 1,
    )
    assert one == same
    assert len({one, scaled, turned, other}) == 4
    assert one.own


def test_what_no_parameter_goes_into_may_be_any_operation():
    shared, mixed = formulas(lambda p, s: jnp.sum(jnp.arange(4.0) * s), lambda p, s: p * jnp.sum(jnp.arange(4.0) * s))
    assert not shared.own
    assert mixed.own


def test_dtypes_and_constants_are_part_of_a_formula():
    half, whole, first, second = formulas(
        lambda p, s: p.astype(jnp.bfloat16),
        lambda p, s: p.astype(jnp.float16),
        lambda p, s: p * np.float32([1, 2, 3])[None],
        lambda p, s: p * np.float32([1, 2, 4])[None],
    )
    assert half != whole
    assert first != second


def test_the_same_formula_of_a_part_is_the_same():
    table = Formulas()
    name = table.names(jnp.ones(1), "param", own=True)
    of = lambda shape: table.of(lambda p: jnp.sqrt(p * p) + jnp.ones_like(p) * 2.0, (jnp.ones(shape),), (name,))
    assert of((2, 3)) == of((3,)) == of(())


MIXING = {
    "reduce_sum": lambda p, s: p / jnp.sum(p),
    "reduce_max": lambda p, s: p - jnp.max(p),
    "sort": lambda p, s: jnp.sort(p),
    "cumsum": lambda p, s: jnp.cumsum(p, 0),
    "transpose": lambda p, s: p.T,
    "dot_general": lambda p, s: p @ jnp.ones((3, 3)),
    "slice": lambda p, s: p[:1],
    "rev": lambda p, s: p[::-1],
    "reshape": lambda p, s: p.reshape(6),
    "concatenate": lambda p, s: jnp.concatenate([p, p]),
    "while": lambda p, s: jax.lax.while_loop(lambda q: jnp.sum(q) < 0, lambda q: q + 1, p),
}


@pytest.mark.parametrize("operation", MIXING)
def test_an_operation_that_mixes_numbers_is_named(operation):
    with pytest.raises(InputError, match=f"one that applies {operation} to a whole"):
        formulas(MIXING[operation])


def test_a_number_may_be_spread_over_an_array_only_if_it_is_shared():
    (spread,) = formulas(lambda p, s: p * jnp.broadcast_to(s, (2, 3)))
    assert spread.own
    table = Formulas()
    name = table.names(jnp.float32(1), "param", own=True)
    with pytest.raises(InputError, match="one that applies broadcast_in_dim"):
        table.of(lambda p: jnp.broadcast_to(p, (2, 3)), (jnp.float32(1),), (name,))


# Optimizers


@pytest.mark.parametrize(
    "optimizer",
    [optax.sgd(0.1, momentum=0.9), optax.adamw(1e-3), optax.chain(optax.clip(0.1), optax.rmsprop(1e-3)), mapped(abs)],
    ids=["sgd", "adamw", "clipped by value", "abs"],
)
def test_an_optimizer_of_single_numbers_passes(optimizer):
    required(optimizer)


OTHERS = {
    "a norm": (optax.clip_by_global_norm(1.0), "reduce_sum"),
    "a reduction of one's own": (
        mapped(lambda u: u / jax.lax.reduce(u * u, np.float32(0), lambda a, b: a + b, tuple(range(u.ndim)))),
        "reduce",
    ),
    "a size": (mapped(lambda u: u / u.size), "in another way than in the whole"),
    "an axis": (mapped(lambda u: u * u.ndim), "in another way than in the whole"),
    "the number of leaves": (
        optax.stateless(lambda g, p: jax.tree.map(lambda u: u / len(jax.tree.leaves(g)), g)),
        "in another way than in the whole",
    ),
    "a leaf by name": (
        optax.stateless(lambda g, p: g | {"head": jax.tree.map(lambda u: 2 * u, g["head"])}),
        "cannot be applied to a part",
    ),
    "a count of its own for shared numbers": (optax.add_noise(0.1, 0.5, key=0), "in another way than in the whole"),
    "factors of a state": (optax.scale_by_factored_rms(), ""),
    "a state without factors": (optax.scale_by_factored_rms(factored=False), ""),
}


@pytest.mark.parametrize("name", OTHERS)
def test_an_optimizer_that_treats_a_part_otherwise_is_refused(name):
    optimizer, received = OTHERS[name]
    with pytest.raises(InputError, match="treats every number by itself") as error:
        required(optimizer)
    assert received in error.value.received
    assert "fn.train_step" in error.value.remedy


def test_layers_must_have_an_axis_of_one_length():
    for bad in (jnp.ones((4, 2)), jnp.float32(1)):
        with pytest.raises(InputError, match="in another way"):
            required(optax.sgd(0.1), params=PARAMS | {"deep": {"w": jnp.ones((3, 2)), "b": bad}})


# States


def test_a_state_is_split_into_what_is_shared_and_trees_like_the_params_and_joined_again():
    optimizer = optax.chain(optax.adam(1e-3), optax.trace(0.9))
    state = optimizer.init(PARAMS)
    shared, like_params = split(optimizer, state)
    assert len(like_params) == 3  # two moments and a trace
    assert all(jax.tree.structure(tree) == jax.tree.structure(PARAMS) for tree in like_params)
    assert [leaf.shape for leaf in jax.tree.leaves(shared)] == [()]  # the count; holes have no leaves
    numbered = [jax.tree.map(lambda leaf, i=i: jnp.full_like(leaf, i), PARAMS) for i in range(3)]
    joined = join(shared, numbered)
    assert jax.tree.structure(joined) == jax.tree.structure(state)
    moments, trace = joined[0][0], joined[1].trace
    assert [tree["head"]["w"][0, 0] for tree in (moments.mu, moments.nu, trace)] == [0, 1, 2]
    jax.tree.map(np.testing.assert_array_equal, join(shared, like_params), state)
    assert jax.tree.leaves(HOLE) == []
