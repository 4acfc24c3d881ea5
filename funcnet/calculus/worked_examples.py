"""Matrix derivatives in closed form, by hand: the table that the tests and the lecture's page share.

Source: Petersen and Pedersen 2012, "The Matrix Cookbook"; Magnus and Neudecker 2019, "Matrix Differential Calculus",
3rd edition.
"""

from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array


@dataclass(frozen=True, eq=False)
class Worked:
    """A matrix function and its derivative by hand, in the layout "input_first".

    Attributes:
        name: what the function is.
        formula: dF/dX_ij; E_ij is the matrix, shaped like X, with 1 at (i, j) and 0 elsewhere.
        function: X [m, n] -> F [p, q].
        derivative: X [m, n] -> dF/dX [m, n, p, q].
        source: where the formula stands, or what it follows from.
        shape: of an X to try it at; almost every X of this shape will do.
    """

    name: str
    formula: str
    function: Callable[[Array], Array]
    derivative: Callable[[Array], Array]
    source: str
    shape: tuple[int, int]


_A = lambda X: jnp.array([[1.0, -2.0, 0.5], [0.0, 3.0, -1.0]], X.dtype)
_B = lambda X: jnp.array([[2.0, 1.0, 0.0, -1.0], [-0.5, 4.0, 1.5, 1.0]], X.dtype)
_K = 3


def _eye(X: Array, axis: int = 0) -> Array:
    return jnp.eye(X.shape[axis], dtype=X.dtype)


def _block(left: Array, right: Array) -> Array:
    """L E_ij R, the derivative of L X R: [i, j, p, q] = L_pi R_jq."""
    return jnp.einsum("pi,jq->ijpq", left, right)


def _gram(X: Array) -> Array:
    return jnp.einsum("jp,iq->ijpq", _eye(X, 1), X) + jnp.einsum("ip,jq->ijpq", X, _eye(X, 1))


def _determinant(X: Array) -> Array:
    """For an invertible X. At a singular X the derivative exists too: the cofactor of X_ij is a polynomial, which this
    product equals elsewhere; there the product is 0 times infinity."""
    return (jnp.linalg.det(X) * jnp.linalg.inv(X).T)[..., None, None]


def _softmax(X: Array) -> Array:
    s = jax.nn.softmax(X, axis=1)
    slope = jnp.einsum("iq,jq->ijq", s, _eye(X, 1)) - jnp.einsum("iq,ij->ijq", s, s)
    return jnp.einsum("ip,ijq->ijpq", _eye(X), slope)  # row p depends on row p alone


_square = lambda X: _block(_eye(X), X) + _block(X, _eye(X))
_linear = lambda X: _block(_A(X), _B(X))
_inverse = lambda X: -_block(jnp.linalg.inv(X), jnp.linalg.inv(X))
_power_trace = lambda X: (_K * jnp.linalg.matrix_power(X, _K - 1).T)[..., None, None]

_det = lambda X: jnp.linalg.det(X).reshape(1, 1)
_trace = lambda X: jnp.trace(jnp.linalg.matrix_power(X, _K)).reshape(1, 1)
_rows = lambda X: jax.nn.softmax(X, axis=1)

_COOKBOOK, _MAGNUS = "The Matrix Cookbook 2012", "Magnus and Neudecker 2019"

# fmt: off
WORKED = (
    Worked("square", "d(X^2)/dX_ij = E_ij X + X E_ij",
           lambda X: X @ X, _square, f"{_MAGNUS}", (3, 3)),
    Worked("linear map", "d(A X B)/dX_ij = A E_ij B",
           lambda X: _A(X) @ X @ _B(X), _linear, f"{_COOKBOOK}, equations (73) and (74)", (3, 2)),
    Worked("Gram matrix", "d(X^T X)/dX_ij = E_ij^T X + X^T E_ij",
           lambda X: X.T @ X, _gram, f"{_COOKBOOK}, section 2.4.2", (4, 3)),
    Worked("inverse", "d(X^-1)/dX_ij = -X^-1 E_ij X^-1",
           jnp.linalg.inv, _inverse, f"{_COOKBOOK}, equation (60)", (3, 3)),
    Worked("determinant", "d det(X)/dX_ij = det(X) (X^-1)_ji, the cofactor of X_ij",
           _det, _determinant, f"{_COOKBOOK}, section 2.1; {_MAGNUS}", (3, 3)),
    Worked("trace of a power", f"d trace(X^k)/dX_ij = k (X^(k-1))_ji, here with k = {_K}",
           _trace, _power_trace, f"{_COOKBOOK}, section 2.5", (3, 3)),
    Worked("softmax of the rows", "dS_pq/dX_ij = [p = i] S_iq ([q = j] - S_ij)",
           _rows, _softmax, "the quotient rule; Bridle 1990", (2, 4)),
)
# fmt: on
