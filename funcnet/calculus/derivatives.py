"""The derivatives of a first lecture, as objects one can call, and the chain rule evaluated at a point.

    f: R -> R               derivative(f)(x)           df/dx           a number
    f: R^n -> R             gradient(f)(x)             df/dx_j         [n]
    f: R^n -> R^m           jacobian(f)(x)             df_i/dx_j       [m, n]
    F: R^mxn -> R^pxq       matrix_derivative(F)(X)    dF_pq/dX_ij     [m, n, p, q]: one p x q block an entry of X

Each takes one floating array to one floating array, a Python float being a number, and works under `jit` and `vmap`:
what it refuses, it refuses by shape and dtype. `chain` multiplies the local Jacobians of a composition in both orders.

At a concrete point `derivative` and `chain` refuse a function that has no derivative there
(`funcnet.calculus.nonsmooth`). Traced points (`jit`, `vmap`, `grad`) are not checked; nor are `gradient` and
`jacobian`, since the check takes 8 n evaluations of f.

Source: Magnus and Neudecker 2019, "Matrix Differential Calculus", 3rd edition; the order of accumulation: Griewank and
Walther 2008, "Evaluating Derivatives", section 3.2.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import reduce
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.expect import is_floating
from funcnet._internal.tables import tabulated
from funcnet.calculus.nonsmooth import refuse_kinks

Function = Callable[[Any], Any]

_OBJECTS = ("number", "vector", "matrix")
_RIGHT = {
    (0, 0): "fn.derivative(f)",
    (0, 1): "fn.jacobian(lambda x: f(x[0])), at a vector of one entry,",
    (0, 2): "fn.matrix_derivative(lambda X: f(X[0, 0])), at a 1 x 1 matrix,",
    (1, 0): "fn.gradient(f)",
    (1, 1): "fn.jacobian(f)",
    (1, 2): "fn.matrix_derivative(lambda X: f(X[:, 0])), at a matrix of one column,",
    (2, 0): "fn.matrix_derivative(lambda X: f(X).reshape(1, 1))",
    (2, 1): "fn.matrix_derivative(lambda X: f(X)[:, None])",
    (2, 2): "fn.matrix_derivative(f)",
}


def derivative(f: Function) -> Callable[[Any], Array]:
    """x -> f'(x) for f: R -> R, in forward mode.

    Raises:
        InputError: if the point or the value is no floating number; at a concrete point where f has no derivative.
    """

    def rule(x: Array, _: Any) -> Array:
        y, slope = jax.jvp(f, (x,), (jnp.ones_like(x),))
        refuse_kinks(f, x, y, slope, _name(f, "f"))
        return slope

    return _object("derivative", f, (0, 0), rule)


def gradient(f: Function) -> Callable[[Any], Array]:
    """x [n] -> df/dx [n] for f: R^n -> R, in reverse mode: one sweep, whatever n is.

    Raises:
        InputError: if the point is no floating vector, or the value no floating number.
    """
    return _object("gradient", f, (1, 0), lambda x, y: jax.grad(f)(x))


def jacobian(f: Function) -> Callable[[Any], Array]:
    """x [n] -> J [m, n] for f: R^n -> R^m, J[i, j] = df_i / dx_j; forward mode for n < m, else reverse.

    Raises:
        InputError: if the point or the value is no floating vector.
    """
    return _object("jacobian", f, (1, 1), lambda x, y: _jacobian(f, x, y))


def matrix_derivative(F: Function, layout: str = "input_first") -> Callable[[Any], Array]:
    """X [m, n] -> D [m, n, p, q] for F: R^mxn -> R^pxq: the block D[i, j] is dF/dX_ij, a matrix like F's value.

    For F(W) = W @ W and W = [[w11, w12], [w21, w22]], the block of w11 is

        dF/dw11 = [[2 w11, w12],
                   [w21,   0  ]]

    Args:
        F: the function; forward mode where the point has fewer entries than the value, else reverse.
        layout: "input_first", or "output_first" for [p, q, m, n], which is what `jax.jacobian` gives.

    Raises:
        InputError: if the layout is another, or the point or the value is no floating matrix.
    """
    if layout not in ("input_first", "output_first"):
        raise InputError('layout "input_first" or "output_first"', repr(layout), "leave it out for input_first")
    axes = (2, 3, 0, 1) if layout == "input_first" else (0, 1, 2, 3)
    return _object("matrix_derivative", F, (2, 2), lambda x, y: jnp.transpose(_jacobian(F, x, y), axes))


def _object(name: str, f: Function, ranks: tuple[int, int], rule: Callable[[Array, Any], Array]) -> Callable:
    """x -> rule(x, y), y the shape and dtype of f(x), for a point and a value of these ranks."""

    @by(name)
    def at(x: Any) -> Array:
        x = _point(x)
        return rule(x, _value(f, x, ranks, name))

    if not callable(f):
        raise InputError(f"a function for {name}", describe(f), "give a function of one array")
    at.__name__ = f"{name} of {_name(f, 'f')}"
    return at


@jax.tree_util.register_dataclass
@dataclass(frozen=True, eq=False)
class ChainRule:
    """The chain rule at a point: y = f_n(.. f_1(x)), dy/dx = J_n .. J_1. `print` it.

    Attributes:
        values: x and the value of each function.
        jacobians: J_i [m_i, n_i] of each function at its input; a number counts as a vector of one entry.
        reverse: dy/dx [m_n, n_1], multiplied from the value's side, ((J_n J_n-1) ..) J_1, as backpropagation does.
        forward: dy/dx [m_n, n_1], multiplied from the point's side, J_n (.. (J_2 J_1)); equal but for rounding.
        names: of the functions.
    """

    values: tuple[Array, ...]
    jacobians: tuple[Array, ...]
    reverse: Array
    forward: Array
    names: tuple[str, ...] = field(metadata={"static": True})

    @property
    def reverse_multiplications(self) -> int:
        """m_n times the entries of all Jacobians but J_n: each of them multiplies a running product of m_n rows."""
        return sum(self._spent()[0])

    @property
    def forward_multiplications(self) -> int:
        """n_1 times the entries of all Jacobians but J_1: each of them multiplies a running product of n_1 columns."""
        return sum(self._spent()[1])

    def _spent(self) -> tuple[list[int], list[int]]:
        """Multiplications at each factor in reverse and in forward order; the first factor of an order costs none."""
        shapes = [jacobian.shape[-2:] for jacobian in self.jacobians]  # under vmap a batch axis stands in front
        (rows, _), (_, columns) = shapes[-1], shapes[0]
        return [rows * m * n for m, n in shapes[:-1]] + [0], [0] + [columns * m * n for m, n in shapes[1:]]

    def __str__(self) -> str:
        spent = [map(str, order) for order in self._spent()]
        links = zip(self.names, map(_shape, self.values[1:]), map(_shape, self.jacobians), *spent, strict=True)
        total = ("total", "", "", str(self.reverse_multiplications), str(self.forward_multiplications))
        head = ("function", "value", "Jacobian", "reverse", "forward")
        *table, last = tabulated(head, [("x", _shape(self.values[0]), "", "", ""), *links, total], right=(3, 4))
        return "\n".join([*table, table[1], last, self._verdict()])

    def _verdict(self) -> str:
        (m, n), reverse, forward = self.reverse.shape[-2:], self.reverse_multiplications, self.forward_multiplications
        winner = "Reverse is cheaper" if reverse < forward else "Forward is cheaper"
        return (
            f"{winner if reverse != forward else 'Both orders cost the same'}: "
            f"{m} (entries of the value) x {reverse // m} (of all Jacobians but the last) = {reverse}, "
            f"against\n{n} (entries of the point) x {forward // n} (of all but the first) = {forward}."
        )


def chain(*functions: Function) -> Callable[[Any], ChainRule]:
    """x -> the chain rule at x, for functions in the order they are applied: chain(jnp.abs, jnp.sin) is sin(|x|).

    Each takes a number or a vector to a number or a vector. Their local Jacobians are formed as `jacobian` does.

    Raises:
        InputError: if there is no function; if the point or a value is no floating number or vector; at a concrete
            point, if a function has no derivative where the chain meets it.
    """
    if not functions:
        raise InputError("at least one function", "none", "give them in the order of application: chain(f1, f2)")
    names = tuple(_name(f, f"f{i}") for i, f in enumerate(functions, 1))

    @by("chain")
    def rule_at(x: Any) -> ChainRule:
        values, jacobians = [_link(_point(x), "the point")], []
        for i, (f, name) in enumerate(zip(functions, names, strict=True), 1):
            x, who = values[-1], f"function {i} of {len(functions)} ({name})"
            shape = _link(jax.eval_shape(f, x), f"the value of {who}")
            y, local = jnp.asarray(f(x)), _jacobian(f, x, shape)
            refuse_kinks(f, x, y, local, who)
            values.append(y)
            jacobians.append(local.reshape(shape.size, x.size))
        reverse = reduce(_times, reversed(jacobians))
        forward = reduce(lambda product, local: _times(local, product), jacobians)
        return ChainRule(tuple(values), tuple(jacobians), reverse, forward, names)

    return rule_at


def _times(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision="highest")


def _jacobian(f: Function, x: Array, y: Any) -> Array:
    """[*y.shape, *x.shape], from the side with fewer entries: a column or a row of it costs one evaluation."""
    return (jax.jacfwd if x.size < y.size else jax.jacrev)(f)(x)


def _name(f: Function, otherwise: str) -> str:
    name = getattr(f, "__name__", "<")
    return otherwise if name.startswith("<") else name


def _shape(x: Any) -> str:
    return str(list(x.shape))


# What the objects take


def _point(x: Any) -> Array:
    """x as a JAX array; refuse what is not a floating array with entries, or a Python float."""
    if not isinstance(x, float) and not (isinstance(x, (Array, np.ndarray, np.generic)) and is_floating(x)):
        remedy = "give one array, for instance jnp.asarray(x, jnp.float32)"
        raise InputError("a point that is one floating-point array or a Python float", describe(x), remedy)
    x = jnp.asarray(x)
    if x.size == 0:
        raise InputError("a point that is not empty", describe(x), "give an array with at least one entry")
    return x


def _floating(y: Any, what: str) -> Any:
    if not is_floating(y) or 0 in y.shape:
        remedy = "let the function return one array of floats with at least one entry"
        raise InputError(f"{what} as one floating-point array that is not empty", describe(y), remedy)
    return y


def _link(y: Any, what: str) -> Any:
    """`y` if it is a number or a vector."""
    if _floating(y, what).ndim > 1:
        remedy = "flatten matrices: lambda x: f(x.reshape(m, n)).reshape(-1)"
        raise InputError(f"{what} as a number or a vector", describe(y), remedy)
    return y


def _value(f: Function, x: Array, ranks: tuple[int, int], what: str) -> Any:
    """The shape and dtype of f(x); refuse a point or a value of other `ranks`, and name the object that is right."""
    wanted = f"for {what}, a function of a {_OBJECTS[ranks[0]]} with a {_OBJECTS[ranks[1]]} as its value"
    try:
        y = _floating(jax.eval_shape(f, x), "the value")
    except Exception as error:
        if x.ndim == ranks[0]:
            raise
        # f is not made for this point either, so nothing is known of its value
        raise InputError(wanted, f"the point {describe(x)}", f"give a {_OBJECTS[ranks[0]]} as the point") from error
    found = (x.ndim, y.ndim)
    if found != ranks:
        remedy = "use jax.jacobian(f), which takes arrays of any rank"
        if found in _RIGHT:
            kind = f"a function of a {_OBJECTS[x.ndim]} with a {_OBJECTS[y.ndim]} as its value"
            remedy = f"use {_RIGHT[found]} for {kind}"
        raise InputError(wanted, f"a function of {describe(x)} with the value {describe(y)}", remedy)
    return y
