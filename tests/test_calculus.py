"""The lecture's derivatives against jax.jacobian, closed forms and differences in NumPy; kinks found, curvature not."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

import funcnet as fn
from funcnet.calculus import chain, derivative, gradient, jacobian, matrix_derivative
from funcnet.expect import InputError
from funcnet.worked import WORKED

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


# Worked examples

CONSTANTS = (
    np.array([[1, -2, 0.5], [0, 3, -1]]),
    np.array([[2, 1, 0, -1], [-0.5, 4, 1.5, 1]]),
)
IN_NUMPY = {
    "square": lambda x: x @ x,
    "linear map": lambda x: CONSTANTS[0] @ x @ CONSTANTS[1],
    "Gram matrix": lambda x: x.T @ x,
    "inverse": np.linalg.inv,
    "determinant": lambda x: np.linalg.det(x).reshape(1, 1),
    "trace of a power": lambda x: np.trace(x @ x @ x).reshape(1, 1),
    "softmax of the rows": lambda x: scipy.special.softmax(x, axis=1),
}


def differences(f, x, h=1e-6):
    """dF/dX [m, n, p, q] by central differences."""
    step = lambda i, j: h * np.outer(np.eye(len(x))[i], np.eye(x.shape[1])[j])
    m, n = x.shape
    return np.array([[(f(x + step(i, j)) - f(x - step(i, j))) / (2 * h) for j in range(n)] for i in range(m)])


@pytest.mark.parametrize("worked", WORKED, ids=lambda w: w.name)
def test_worked_derivatives_against_autodiff_and_differences(worked, x64):
    for _ in range(3):
        x = RNG.normal(size=worked.shape) + 3 * np.eye(*worked.shape)
        near(worked.function(x), IN_NUMPY[worked.name](x))
        by_hand = worked.derivative(x)
        near(by_hand, matrix_derivative(worked.function)(x))
        near(by_hand, jax.jit(worked.derivative)(x))
        np.testing.assert_allclose(by_hand, differences(IN_NUMPY[worked.name], x), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("worked", WORKED, ids=lambda w: w.name)
def test_worked_derivatives_are_by_hand_and_keep_the_dtype(worked):
    x = jnp.float32(RNG.normal(size=worked.shape) + 3 * np.eye(*worked.shape))
    assert worked.derivative(x).dtype == worked.function(x).dtype == jnp.float32
    assert worked.derivative(x).shape == worked.shape + worked.function(x).shape
    assert all(isinstance(text, str) and text for text in (worked.name, worked.formula, worked.source))


def test_the_table_has_every_example_once():
    assert [worked.name for worked in WORKED] == list(IN_NUMPY)


def test_the_square_of_a_two_by_two_matrix_entry_by_entry(x64):
    w11, w12, w21, w22 = 2.0, 3.0, 5.0, 7.0
    x = jnp.array([[w11, w12], [w21, w22]])
    d = matrix_derivative(lambda w: w @ w)(x)
    by_hand = next(worked for worked in WORKED if worked.name == "square").derivative(x)
    wanted = [
        [[[2 * w11, w12], [w21, 0]], [[w21, w11 + w22], [0, w21]]],
        [[[w12, 0], [w11 + w22, w12]], [[0, w12], [w21, 2 * w22]]],
    ]
    near(d, wanted)
    near(by_hand, wanted)


def test_the_determinant_has_its_cofactors_as_derivative_where_the_product_has_none(x64):
    """At [[1, 2], [2, 4]] they are [[4, -2], [-2, 1]], the limit of a formula that is not finite itself."""
    determinant = next(worked for worked in WORKED if worked.name == "determinant")
    singular = jnp.array([[1.0, 2.0], [2.0, 4.0]])
    assert not np.isfinite(determinant.derivative(singular)).all()
    almost = determinant.derivative(singular + 1e-7 * jnp.eye(2))[..., 0, 0]
    np.testing.assert_allclose(almost, [[4, -2], [-2, 1]], atol=1e-5)


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


# Kinks, jumps and infinite slopes


def step(x):
    return jnp.where(x >= 0, jnp.ones_like(x), 0)


def safe_sqrt(x):
    """Its automatic derivative at 0 is 0, and the slope from the right is infinite."""
    return jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1)), 0)


BROKEN = [
    (jnp.abs, 0.0, "at 0: slope -1 from the left, 1 from the right"),
    (jax.nn.relu, 0.0, "slope 0 from the left, 1 from the right"),
    (lambda x: jnp.maximum(x, 1 - x), 0.5, "at 0.5: slope -1 from the left, 1 from the right"),
    (lambda x: jnp.abs(x - 3) + 1000, 3.0, "at 3: slope -1 from the left, 1 from the right"),
    (lambda x: jnp.abs(x - 1e-4), 1e-4, "slope -1 from the left, 1 from the right"),
    (lambda x: 1e-6 * jnp.abs(x), 0.0, "slope -1e-06 from the left, 1e-06 from the right"),
    (lambda x: jnp.exp(x) + 0.01 * jnp.abs(x), 0.0, "slope 0.99 from the left, 1.01 from the right"),
    (partial(jax.nn.leaky_relu, negative_slope=0.99), 0.0, "slope 0.99 from the left, 1 from the right"),
    (jnp.floor, 2.0, "slope inf from the left, 0 from the right"),
    (step, 0.0, "slope inf from the left, 0 from the right"),
    (jnp.sign, 0.0, "slope inf from the left, inf from the right"),
    (jnp.sqrt, 0.0, "slope undefined from the left, inf from the right"),
    (safe_sqrt, 0.0, "slope 0 from the left, inf from the right"),
    (jnp.cbrt, 0.0, "slope inf from the left, inf from the right"),
    (jnp.log, 0.0, "at 0: slope"),
    (jnp.arcsin, 1.0, "at 1: slope inf from the left, undefined from the right"),
    (lambda x: 1 / x, 0.0, "at 0: slope"),
    (lambda x: x**1.5, 0.0, "slope undefined from the left"),
    (jnp.exp, float("inf"), "at inf: slope"),
    (jnp.exp, float("nan"), "at nan: slope"),
    (lambda x: jnp.exp(-1 / x**2), 0.0, "slope 0 from the left, 0 from the right, but nan by automatic"),
]


@pytest.mark.parametrize(("f", "x", "message"), BROKEN)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_points_without_a_derivative_are_refused_with_both_slopes(f, x, message, wide):
    with jax.enable_x64(wide):
        for rule in (derivative(f), chain(f), chain(lambda x: 1.0 * x, f, jnp.sin)):
            with pytest.raises(InputError, match=message) as error:
                rule(x)
            assert "one finite slope" in error.value.expected
            assert error.value.remedy.startswith("move the point, or put a smooth function in place")


@pytest.mark.parametrize(
    ("f", "x", "message"),
    [
        (
            jnp.abs,
            [1.0, 0.0],
            r"\(abs\) at \[1, 0\], coordinate 1, entry 1 of its value: slope -1 from the left, 1 from",
        ),
        (jnp.linalg.norm, [0.0, 0.0], r"\(norm\) at \[0, 0\], coordinate 0: slope -1 from the left, 1 from the right"),
        (jnp.sqrt, [1.0, 0.0], r"at \[1, 0\], coordinate 1, entry 1 of its value: slope undefined .* inf"),
        (jnp.max, [2.0, 1.0, 2.0], r"coordinate 0: slope 0 from the left, 1 from the right"),
        (lambda x: jnp.abs(x[0] - x[1]), [0.3, 0.3], "coordinate 0: slope -1 from the left, 1 from the right"),
        (jax.nn.relu, [0.0, 1e-9], "coordinate 0, entry 0 of its value: slope 0 from the left, 1 from the right"),
        (jax.nn.relu, [1e-3, 1e4, 0.0], "coordinate 2, entry 2"),
        (step, [0.0, 3.0], "coordinate 0, entry 0"),
        (jnp.abs, [0.0, *range(1, 10)], r"at \[0, 1, 2, 3, 4, 5, 6, 7, \.\.\.\], coordinate 0"),
    ],
)
def test_a_kink_in_one_coordinate_is_found(f, x, message):
    with pytest.raises(InputError, match=message):
        chain(f)(np.float32(x))


def test_the_error_names_the_link_and_the_value_that_it_met():
    with pytest.raises(InputError, match=r"function 2 of 3 \(abs\) at 0: slope -1 from the left, 1 from the right"):
        chain(lambda x: x - 2, jnp.abs, jnp.sin)(2.0)
    with pytest.raises(InputError, match=r"function 1 of 2 \(f1\)"):
        chain(lambda x: jnp.maximum(x, 0), jnp.sin)(0.0)


def test_a_smooth_function_whose_automatic_derivative_is_not_finite_is_refused():
    """1e20 has a cube in float64 and none in float32; in a branch not taken reverse mode makes NaN of 0 * inf."""
    with pytest.raises(InputError, match=r"slope 3e\+40 from the left, 3e\+40 from the right, but inf by automatic"):
        chain(lambda x: x**3)(1e20)
    masked = lambda x: jnp.where(x[0] > 1, x / (x[0] + 1), x)
    with pytest.raises(InputError, match="slope 1 from the left, 1 from the right, but nan by automatic"):
        chain(masked)(np.float32([-1.0, 0.0]))


def sharp(x):
    return jnp.sin(1e4 * x)


SMOOTH = {
    "exp": (jnp.exp, [30.0, -30.0, 88.0, 0.0, 1e-20]),
    "reciprocal": (lambda x: 1 / x, [1e-6, -1e-6, 1e-12, 1e4]),
    "fast sine": (lambda x: jnp.sin(100 * x), [0.0, 1.0, 30.0, -300.0, np.pi / 200]),
    "faster sine": (sharp, [0.0, 0.1, 1.0, np.pi / 2e4]),
    "cube": (lambda x: x**3, [0.0, 1e-3, 1e6]),
    "tanh": (jnp.tanh, [0.0, 1e-8, 5.0, 20.0, 1e3]),
    "steep tanh": (lambda x: jnp.tanh(1e5 * x), [0.0, 1e-5, 1.0]),
    "x|x|": (lambda x: x * jnp.abs(x), [0.0, -1.0, 1e-12]),
    "|x|^3/2": (lambda x: jnp.abs(x) ** 1.5, [0.0, 1e-6]),
    "root": (jnp.sqrt, [1e-6, 1e-12, 1e-30, 1e6]),
    "log": (jnp.log, [1e-6, 1e-30, 1.0]),
    "root near its edge": (lambda x: jnp.sqrt(x + 1e-6), [0.0, 1e-9]),
    "smoothed |x|": (lambda x: jnp.sqrt(x * x + 1e-12), [0.0, 1e-6, -1e-5]),
    "relu": (jax.nn.relu, [1e-30, -1e-30, 1e-6, -3.0, 1e6]),
    "relu of a difference": (
        lambda x: jax.nn.relu(x - 1),
        [1.000001, 0.999999, 1 + 2**-23, 1 + 2**-22, 1 + 2**-21, 1 + 2**-19, 1 - 2**-23, 0.0],
    ),
    "gelu": (jax.nn.gelu, [0.0, -8.0, 1e-4, 40.0]),
    "softplus": (jax.nn.softplus, [0.0, -30.0, 30.0, -80.0]),
    "careless softplus": (lambda x: jnp.log(1 + jnp.exp(x)), [-30.0, -36.0, -20.0, 0.0, 30.0]),
    "cancelling": (lambda x: (x + 1e6) - 1e6, [0.1, 1.0, 3.3]),
    "one": (lambda x: jnp.sin(x) ** 2 + jnp.cos(x) ** 2, [0.0, 0.7, 3.0, 100.0]),
    "nothing": (lambda x: jnp.sin(x) ** 2 + jnp.cos(x) ** 2 - 1, [0.1, 0.7, 3.0, 10.0]),
    "constant": (lambda x: x * 0 + 3.0, [0.0, 1.0]),
    "small sine on a large number": (lambda x: 1e6 + jnp.sin(x), [0.0, 1.0]),
    "wall": (lambda x: jnp.exp(-1 / x**2), [0.05, 0.3, 1.0]),
}


@pytest.mark.parametrize("name", SMOOTH)
@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_smooth_functions_raise_no_alarm(name, wide):
    f, points = SMOOTH[name]
    with jax.enable_x64(wide):
        for x in points:
            slope, wanted = derivative(f)(x), jax.grad(f)(jnp.asarray(x))
            np.testing.assert_allclose(slope, wanted, rtol=1e-6, atol=1e-9)
            np.testing.assert_allclose(chain(f)(x).reverse, wanted.reshape(1, 1), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize(
    ("f", "x"),
    [
        (jax.nn.logsumexp, [0.0, 0.0, 0.0]),
        (jax.nn.logsumexp, [100.0, 0.0, -100.0]),
        (jax.nn.softmax, [0.0, 1.0, -30.0, 60.0]),
        (jax.nn.softmax, [1e-8, 0.0, 1e8]),
        (jnp.linalg.norm, [0.0, 1e-9]),
        (jnp.linalg.norm, [1e-6, 1.0, 0.0]),
        (jnp.max, [1.0, 2.0, 1.9999]),
        (lambda x: x - jnp.mean(x), [3.0, 3.0, 3.0]),
        (lambda x: jnp.mean(x - jnp.mean(x)), [0.1, 0.7, 5.3]),
        (lambda x: jnp.sum(jax.nn.softmax(x)), [0.3, 0.2, 7.0]),
        (jnp.prod, [0.0, 3.0, 1e6]),
        (jnp.sort, [3.0, 1.0, 2.0]),
    ],
)
def test_smooth_functions_of_vectors_raise_no_alarm(f, x):
    x = np.float32(x)
    rule = chain(f)(x)
    np.testing.assert_allclose(rule.reverse, jax.jacobian(f)(x).reshape(rule.reverse.shape), rtol=1e-6)


SMOOTH_EVERYWHERE = [
    jnp.sin, jnp.tanh, jnp.exp, jnp.arctan, jax.nn.gelu, jax.nn.silu, jax.nn.softplus, jax.nn.sigmoid,
    jax.scipy.special.erf, jnp.sinc, jnp.arcsinh, lambda x: 1 / (1 + 25 * x**2),
    lambda x: x * jnp.log1p(x**2), jax.nn.log_softmax,
]  # fmt: skip


@pytest.mark.parametrize("f", SMOOTH_EVERYWHERE)
@pytest.mark.parametrize("scale", [0.01, 1, 10])
def test_smooth_functions_at_many_points_raise_no_alarm(f, scale):
    chain(f)(np.float32(scale * np.append(RNG.normal(size=60), 0)))


def test_kinks_at_many_points_are_all_found():
    kinks = np.float32(RNG.normal(size=20) * 10.0 ** RNG.integers(-3, 4, size=20))
    for at in kinks:
        with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
            derivative(lambda x, at=at: jnp.abs(x - jnp.asarray(at, x.dtype)))(at)


def test_a_kink_that_only_rounding_hides_is_found():
    """0.6 - x and x are the same number in float32 at 0.3, where the slope would be the silent average, 0."""
    f = lambda x: jnp.maximum(x, 0.6 - x)
    assert jax.grad(f)(0.3) == 0
    with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
        derivative(f)(0.3)


def test_traced_points_are_not_checked():
    assert jax.jit(derivative(jax.nn.relu))(0.0) == 0
    assert jax.jit(lambda: derivative(jax.nn.relu)(0.0))() == 0
    assert jax.vmap(derivative(jax.nn.relu))(jnp.zeros(2)).tolist() == [0, 0]
    assert jax.jit(chain(jnp.sin, jax.nn.relu))(0.0).reverse == 0
    assert jax.vmap(chain(jax.nn.relu))(jnp.zeros(2)).reverse.shape == (2, 1, 1)
    assert jax.grad(lambda a: derivative(lambda x: a * jax.nn.relu(x))(0.0))(1.0) == 0
    assert jax.grad(lambda a: chain(lambda x: a * jax.nn.relu(x))(0.0).reverse[0, 0])(1.0) == 0


def test_a_second_derivative_is_checked_too():
    with pytest.raises(InputError, match="slope -2 from the left, 2 from the right"):
        derivative(derivative(lambda x: x * jnp.abs(x)))(0.0)


def test_arrays_in_float32_and_layers_may_be_links(x64):
    """A layer takes only the dtype of its parameters, so it is checked in that one."""
    layer, x = fn.dense(3), jnp.ones(2, jnp.float32)
    params, state = layer.init(jax.random.key(0), x[None])
    dense = lambda x: layer.apply(params, state, x[None])[0]
    weights = jnp.ones((4, 3), jnp.float32)
    near(chain(dense, jnp.tanh, lambda x: weights @ x)(x).jacobians[0], params["kernel"].T)
    for x in np.float32(RNG.normal(size=(10, 2))):
        chain(dense, jnp.tanh, lambda x: jnp.sin(weights @ x))(x)
    one = jnp.float32(1)  # widened, since float32 could not tell this kink from its rounding
    with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
        derivative(lambda x: one * jnp.abs(x - 3) + 1000)(jnp.float32(3))
    with pytest.raises(InputError, match=r"\(f2\).* slope 0 from the left, 1 from the right"):
        chain(dense, lambda x: fn.relu().apply({}, (), x))(jnp.zeros(2, jnp.float32))
    with pytest.raises(
        InputError, match=r"\(f1\) at \[0, 0\], coordinate 0, entry 0 of its value: slope .* from the left"
    ):
        chain(lambda x: jax.nn.relu(dense(x)))(jnp.zeros(2, jnp.float32))


def test_half_precision(standard_promotion):
    for dtype in (jnp.float16, jnp.bfloat16):
        result = chain(jnp.sin, jnp.exp)(jnp.asarray([0.5, 0.0], dtype))
        assert result.reverse.dtype == dtype
        with pytest.raises(InputError, match="slope -1 from the left, 1 from the right"):
            derivative(jnp.abs)(jnp.asarray(0, dtype))


@pytest.mark.parametrize("seed", [0, 6, 26])
def test_a_wide_smooth_function_has_no_kink_by_chance(seed):
    with jax.enable_x64(True):
        weights = np.random.default_rng(seed).normal(size=(100, 200)) / 200**0.5
        assert chain(lambda x: jnp.tanh(weights @ x))(jnp.ones(200)).reverse.shape == (100, 200)
