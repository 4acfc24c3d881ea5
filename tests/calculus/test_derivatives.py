"""The lecture's derivatives against jax.jacobian, closed forms and differences; the chain rule in both orders."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from funcnet._internal.errors import InputError
from funcnet.calculus.derivatives import chain, derivative, gradient, jacobian, matrix_derivative

RNG = np.random.default_rng(0)
near = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)
A = RNG.normal(size=(5, 3))
V = RNG.normal(size=3)
W = RNG.normal(size=(3, 3)) + 2 * np.eye(3)


def matrix(rows):
    """A function of vectors, with as many entries in its value as there are rows."""
    return lambda x: jnp.sin(jnp.asarray(A[:rows], x.dtype) @ x)


# The four objects

ONE = {
    "number": (derivative, lambda x: x * jnp.sin(x), np.float64(0.7)),
    "vector to number": (gradient, lambda x: jnp.sum(jnp.exp(x) * jnp.sin(x)), V),
    "wide": (jacobian, matrix(2), V),
    "tall": (jacobian, matrix(5), V),
    "square": (jacobian, matrix(3), V),
    "matrix": (matrix_derivative, lambda x: jnp.cos(x @ x), W),
    "tall matrix": (matrix_derivative, lambda x: jnp.cos(x.T @ x), A),
    "small matrix": (matrix_derivative, lambda x: x @ x.T, A[:, :1]),
    "constant": (jacobian, lambda x: jnp.ones(4, x.dtype), V),
}


@pytest.mark.parametrize("name", ONE)
def test_the_four_objects_are_those_of_jax_also_under_jit_and_vmap(name, x64):
    make, f, x = ONE[name]
    wanted = lambda x: (lambda d: jnp.transpose(d, (2, 3, 0, 1)) if d.ndim == 4 else d)(jax.jacobian(f)(x))
    near(make(f)(x), wanted(x))
    near(jax.jit(make(f))(x), wanted(x))
    batch = np.stack([x, x + 0.3, -x])
    near(jax.vmap(make(f))(batch), np.stack([wanted(x) for x in batch]))


def test_closed_forms(x64):
    near(derivative(lambda x: x**3)(2.0), 12.0)
    near(gradient(lambda x: x @ x)(V), 2 * V)
    near(jacobian(lambda x: jnp.asarray(A) @ x)(V), A)
    s = scipy.special.softmax(V)
    near(jacobian(jax.nn.softmax)(V), np.diag(s) - np.outer(s, s))
    near(matrix_derivative(lambda x: x.T)(A)[4, 1], np.eye(3)[[1]].T * np.eye(5)[4])


def test_a_python_float_is_a_number():
    slope = derivative(jnp.sin)(0.0)
    assert (slope.shape, slope.dtype, float(slope)) == ((), jnp.float32, 1.0)
    assert chain(jnp.sin)(0.0).reverse == 1.0


def test_derivatives_nest(x64):
    near(derivative(derivative(jnp.sin))(0.4), -np.sin(0.4))
    near(jacobian(gradient(lambda x: jnp.sum(x**3)))(V), np.diag(6 * V))
    near(jax.grad(lambda a: derivative(lambda x: a * x**2)(3.0))(2.0), 6.0)


def test_the_layout_of_a_matrix_derivative(x64):
    f, x = (lambda x: jnp.sin(x[:2] @ x.T)), A
    inputs, outputs = matrix_derivative(f)(x), matrix_derivative(f, layout="output_first")(x)
    assert (inputs.shape, outputs.shape) == ((5, 3, 2, 5), (2, 5, 5, 3))
    near(outputs, jax.jacobian(f)(x))
    near(inputs, np.transpose(outputs, (2, 3, 0, 1)))


@pytest.mark.parametrize(("n", "m", "dearer"), [(2, 5, jax.jacrev), (1, 4, jax.jacrev), (3, 2, jax.jacfwd)])
def test_a_jacobian_takes_the_side_with_fewer_entries(n, m, dearer):
    f, x = (lambda x: jnp.sin(jnp.asarray(A[:m, :n], x.dtype) @ x)), jnp.ones(n)
    basis = f"[{max(n, m)},{max(n, m)}]"  # one direction for each entry of the larger side
    assert basis in str(jax.make_jaxpr(dearer(f))(x))
    assert basis not in str(jax.make_jaxpr(jacobian(f))(x))
    assert basis not in str(jax.make_jaxpr(lambda x: chain(f)(x).reverse)(x))


def only_reverse(f):
    rule = jax.custom_vjp(f)
    rule.defvjp(lambda x: jax.vjp(f, x), lambda pull, dy: pull(dy))
    return rule


@pytest.mark.parametrize(
    ("make", "f", "x", "forward"),
    [
        (jacobian, jnp.sin, np.ones(3), False),
        (jacobian, lambda x: jnp.sin(x[:1]), np.ones(3), False),
        (jacobian, lambda x: jnp.concatenate([x, x]), np.ones(3), True),
        (matrix_derivative, lambda x: x.T @ x, np.ones((3, 2)), False),
        (matrix_derivative, lambda x: x.T @ x, np.ones((2, 3)), True),
        (gradient, lambda x: jnp.sum(x * x), np.ones(1), False),
        (derivative, jnp.sin, np.ones(()), True),
    ],
)
def test_the_mode_shows_in_which_rule_is_asked_for(make, f, x, forward):
    if forward:
        with pytest.raises(TypeError, match="forward-mode"):
            make(only_reverse(f))(np.float32(x))
    else:
        make(only_reverse(f))(np.float32(x))


OBJECTS = ("number", "vector", "matrix")
MAKERS = {(0, 0): derivative, (1, 0): gradient, (1, 1): jacobian, (2, 2): matrix_derivative}
POINTS = (jnp.float32(0.5), jnp.ones(3), jnp.ones((2, 3)), jnp.ones((1, 2, 3)))
VALUES = (jnp.sum, lambda x: jnp.full(2, jnp.sum(x)), lambda x: jnp.full((2, 2), jnp.sum(x)))
RIGHT = [
    ["derivative(f)", "jacobian(lambda x: f(x[0]))", "matrix_derivative(lambda X: f(X[0, 0]))"],
    ["gradient(f)", "jacobian(f)", "matrix_derivative(lambda X: f(X[:, 0]))"],
    ["matrix_derivative(lambda X: f(X).reshape(1, 1))", "matrix_derivative(lambda X: f(X)[:, None])",
     "matrix_derivative(f)"],
]  # fmt: skip


@pytest.mark.parametrize("ranks", MAKERS)
@pytest.mark.parametrize("m", range(3))
@pytest.mark.parametrize("n", range(3))
def test_each_refuses_another_rank_and_names_the_right_object(ranks, n, m):
    make, f, x = MAKERS[ranks], VALUES[m], POINTS[n]
    if ranks == (n, m):
        assert make(f)(x).shape == (*x.shape, *f(x).shape) or make is jacobian
        return
    for transform in (lambda g: g, jax.jit):
        with pytest.raises(InputError) as error:
            transform(make(f))(x)
        assert error.value.expected.endswith(f"a {OBJECTS[ranks[0]]} with a {OBJECTS[ranks[1]]} as its value")
        assert error.value.remedy.startswith(f"use fn.{RIGHT[n][m]}")
        assert error.value.remedy.endswith(f"for a function of a {OBJECTS[n]} with a {OBJECTS[m]} as its value")


def test_the_remedies_work(x64):
    x, y = np.float64(0.5), np.array([0.5, 2.0])
    curve, surface = (lambda t: jnp.stack([t, t**2])), (lambda t: jnp.outer(jnp.stack([t, t**2]), jnp.ones(3)))
    near(jacobian(lambda x: curve(x[0]))(x[None]), [[1], [1]])
    near(matrix_derivative(lambda X: surface(X[0, 0]))(x[None, None])[0, 0], np.ones((2, 3)))
    outer = lambda x: jnp.outer(x, x)
    near(matrix_derivative(lambda X: outer(X[:, 0]))(y[:, None])[0, 0], [[1, 2], [2, 0]])
    near(matrix_derivative(lambda X: jnp.trace(X).reshape(1, 1))(W)[..., 0, 0], np.eye(3))
    near(matrix_derivative(lambda X: jnp.diag(X)[:, None])(W)[1, 1, :, 0], [0, 1, 0])


@pytest.mark.parametrize("make", MAKERS.values())
def test_higher_ranks_are_sent_to_jax(make):
    with pytest.raises(InputError, match=r"use jax\.jacobian\(f\), which takes arrays of any rank"):
        make(jnp.sum)(POINTS[3])


def test_a_function_that_cannot_take_the_point_still_blames_the_point():
    with pytest.raises(InputError, match="give a vector as the point"):
        gradient(lambda x: x @ x)(2.0)
    with pytest.raises(TypeError):  # here the point is right, and the function is not
        gradient(lambda x: x @ jnp.ones(7))(jnp.ones(3))


@pytest.mark.parametrize("make", [*MAKERS.values(), chain])
@pytest.mark.parametrize(
    ("x", "message"),
    [
        (1, "one floating-point array"),
        (jnp.ones((2, 2), int), "one floating-point array"),
        (True, "one floating-point array"),
        (1j, "one floating-point array"),
        (jnp.ones(2, jnp.complex64), "one floating-point array"),
        ([1.0, 2.0], "one floating-point array"),
        ({"w": jnp.ones(2)}, r"received  \{w: float32\[2\]\}"),
        (None, "one floating-point array"),
        (jax.ShapeDtypeStruct((2,), jnp.float32), "one floating-point array"),
        (jnp.ones(0), "not empty"),
        (jnp.ones((0, 3)), "not empty"),
    ],
)
def test_points_that_are_no_point(make, x, message):
    with pytest.raises(InputError, match=message):
        make(jnp.sum)(x)


AT = [0.5, POINTS[1], POINTS[1], POINTS[2]]


@pytest.mark.parametrize(("make", "x"), [*zip(MAKERS.values(), AT, strict=True)])
@pytest.mark.parametrize("value", [(1.0, 2.0), 3, None, True, 1j, {"y": 1.0}, jnp.zeros(0), jnp.zeros((0, 3))], ids=str)
def test_values_that_are_no_value(make, x, value):
    with pytest.raises(InputError, match="the value as one floating-point array that is not empty"):
        make(lambda x: value)(x)


@pytest.mark.parametrize("layout", ["numerator", None, "Input_first"])
def test_an_unknown_layout_is_refused_at_once(layout):
    with pytest.raises(InputError, match='"input_first" or "output_first"'):
        matrix_derivative(jnp.sin, layout)


# The chain rule


def affine(x):
    return jnp.asarray(A, x.dtype) @ x


def square(x):
    return x * x


LINKS = {
    "numbers": ((jnp.exp, jnp.sin, square), np.float64(0.3)),
    "a scalar loss": ((affine, jnp.tanh, square, jnp.sum), V),
    "a scalar input": ((lambda x: x * jnp.asarray(V, x.dtype), affine, jnp.sin), np.float64(0.3)),
    "there and back": ((affine, jnp.sum, jnp.sin, lambda x: jnp.stack([x, x**2]), jnp.cos), V),
    "one": ((jax.nn.softmax,), V),
}


@pytest.mark.parametrize("name", LINKS)
@pytest.mark.parametrize("transform", [lambda f: f, jax.jit], ids=["plain", "jit"])
def test_a_chain_has_every_value_and_jacobian_and_both_products(name, transform, x64):
    functions, x = LINKS[name]
    result = transform(chain(*functions))(x)
    wanted, whole = [jnp.asarray(x)], lambda x: result_of(functions, x)
    for f, local in zip(functions, result.jacobians, strict=True):
        y = f(wanted[-1])
        near(local, jax.jacobian(f)(wanted[-1]).reshape(y.size, -1))
        wanted.append(y)
    assert [v.shape for v in result.values] == [w.shape for w in wanted]
    for got, value in zip(result.values, wanted, strict=True):
        near(got, value)
    for product in (result.reverse, result.forward):
        near(product, jax.jacobian(whole)(x).reshape(wanted[-1].size, -1))


def result_of(functions, x):
    for f in functions:
        x = f(x)
    return x


def test_a_chain_applies_in_the_order_given_as_serial_does(x64):
    result = chain(jnp.abs, jnp.sin)(-2.0)
    near(result.values, [-2, 2, np.sin(2)])
    near(result.reverse, [[-np.cos(2)]])


def test_a_chain_under_vmap_is_one_chain_an_example(x64):
    rule, batch = chain(affine, jnp.tanh, jnp.sum), RNG.normal(size=(4, 3))
    many = jax.vmap(rule)(batch)
    for i, x in enumerate(batch):
        jax.tree.map(near, jax.tree.map(lambda leaf, i=i: leaf[i], many), rule(x))
    assert many.reverse_multiplications == rule(batch[0]).reverse_multiplications
    assert str(many).splitlines()[-1] == str(rule(batch[0])).splitlines()[-1]


def products_of(f, x):
    """The shapes of all matrix products of f at x, in their order."""
    jaxpr = jax.make_jaxpr(f)(x).jaxpr
    return [tuple(v.aval.shape for v in e.invars) for e in jaxpr.eqns if e.primitive.name == "dot_general"]


def test_both_orders_are_really_multiplied_and_counted():
    """3 -> 5 -> 5 -> 1 by functions without matrix products of their own, so that only those of the chain remain."""
    widen, x = (lambda x: jnp.concatenate([x, x[:2]])), jnp.ones(3)
    result = chain(widen, jnp.sin, jnp.sum)(x)
    reverse = [((1, 5), (5, 5)), ((1, 5), (5, 3))]
    forward = [((5, 5), (5, 3)), ((1, 5), (5, 3))]
    assert products_of(lambda x: chain(widen, jnp.sin, jnp.sum)(x).reverse, x) == reverse + forward
    count = lambda products: sum(a * b * c for (a, b), (_, c) in products)
    assert result.reverse_multiplications == count(reverse) == 40
    assert result.forward_multiplications == count(forward) == 90


def test_multiplications_are_known_where_values_are_not():
    seen = []

    @jax.jit
    def f(x):
        result = chain(affine, jnp.tanh, jnp.sum)(x)
        seen.append((result.reverse_multiplications, result.forward_multiplications))
        return result

    result = f(jnp.ones(3))
    assert seen == [(40, 90)] == [(result.reverse_multiplications, result.forward_multiplications)]
    assert all(type(n) is int for n in seen[0])


def test_a_scalar_loss_favours_reverse_and_a_scalar_input_forward():
    line = lambda x: x * jnp.ones(4)
    loss, curve = chain(affine, jnp.tanh, square, jnp.sum)(jnp.ones(3)), chain(line, jnp.tanh, jnp.sin)(0.5)
    assert loss.reverse_multiplications < loss.forward_multiplications
    assert curve.reverse_multiplications > curve.forward_multiplications


def test_it_prints_a_table():
    assert str(chain(affine, lambda x: x * x, jnp.sum)(jnp.ones(3))) == (
        "function  value  Jacobian  reverse  forward\n"
        "--------  -----  --------  -------  -------\n"
        "x         [3]\n"
        "affine    [5]    [5, 3]         15        0\n"
        "f2        [5]    [5, 5]         25       75\n"
        "sum       []     [1, 5]          0       15\n"
        "--------  -----  --------  -------  -------\n"
        "total                           40       90\n"
        "Reverse is cheaper: 1 (entries of the value) x 40 (of all Jacobians but the last) = 40, against\n"
        "3 (entries of the point) x 30 (of all but the first) = 90."
    )
    assert "Forward is cheaper: " in str(chain(lambda x: x * jnp.ones(4), jnp.tanh, jnp.sin)(0.5))
    assert "Both orders cost the same: " in str(chain(jnp.sin, jnp.sin)(0.5))
    assert str(chain(partial(jnp.power, 2.0))(0.5)).splitlines()[3].startswith("f1 ")


def greater(x):
    return x > 0


def test_chains_that_are_none():
    with pytest.raises(InputError, match="at least one function"):
        chain()
    with pytest.raises(InputError, match="the point as a number or a vector"):
        chain(jnp.sum)(jnp.ones((2, 2)))
    with pytest.raises(InputError, match=r"the value of function 2 of 3 \(f2\) as a number or a vector"):
        chain(jnp.sin, lambda x: jnp.outer(x, x), jnp.sum)(jnp.ones(2))
    with pytest.raises(InputError, match=r"the value of function 1 of 1 \(f1\) as one floating-point array"):
        chain(lambda x: (x, x))(jnp.ones(2))
    with pytest.raises(InputError, match=r"the value of function 1 of 1 \(greater\) as one floating-point array"):
        chain(greater)(jnp.ones(2))
