"""The derivatives worked by hand against automatic ones, and differences in NumPy."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from funcnet.calculus.derivatives import matrix_derivative
from funcnet.calculus.worked_examples import WORKED

RNG = np.random.default_rng(0)
near = partial(np.testing.assert_allclose, rtol=1e-10, atol=1e-10)

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


@pytest.mark.parametrize("worked", WORKED, ids=lambda w: w.name)
def test_a_derivative_changes_with_a_curved_function_s_point_alone(worked, x64):
    """Of a linear map it is the same everywhere, of all others it is not."""
    a, b = (worked.derivative(RNG.normal(size=worked.shape) + 3 * np.eye(*worked.shape)) for _ in range(2))
    assert np.array_equal(a, b) == (worked.name == "linear map")
