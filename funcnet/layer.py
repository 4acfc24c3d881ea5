"""The one abstraction: a layer is a record of four pure functions, its backward pass written by hand."""

import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Generic, Literal, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.numerics import sum_dtype
from funcnet.gradients.contraction import Contraction, a_contraction, total
from funcnet.structure import Call, Structure, tree

Tree = Any
Params = TypeVar("Params")
State = TypeVar("State")
Residuals = TypeVar("Residuals")


@dataclass(frozen=True, eq=False, repr=False)
class Layer(Generic[Params, State, Residuals]):
    """A layer: how to make its parameters, apply it, run it for training, and pull a cotangent back through it.

        init   (key, x)                               -> (params, state)
        apply  (params, state, x)                     -> y                      evaluation
        fwd    (params, state, x, key)                -> (y, state, residuals)  training
        bwd    (params, residuals, dy, contract)      -> (dparams, dx)          the VJP, by hand

    `init` takes an array or a `jax.ShapeDtypeStruct`, batch axis first, and reads the input sizes and the dtype of the
    parameters from it. `key` is a `jax.random.key`, or None where nothing is drawn. Params are dicts of arrays nested
    by layer name (`{}` without parameters), state is `()` without state. `dy` is the cotangent of `y`; an integer
    input has the cotangent None. `contract` decides what is computed of a parameter's gradient (`funcnet.gradients`).

    The laws; `fn.check_layer` enforces all but the fifth, which is `serial`'s own:

    1. `bwd` is the VJP of `fwd`'s first output.
    2. `apply` equals that output where there is no state and nothing is drawn.
    3. `dparams`, `dx` and the new state match `params`, `x` and `state` in structure, shape and dtype.
    4. `bwd` is linear in `dy`.
    5. Nesting `serial` changes nothing but names.
    6. Residuals are arrays, hold only what depends on the input, and do not depend on `dy`.

    All four are plain JAX, so forward mode through `bwd` gives Hessian-vector products.

    Attributes:
        name: the layer's kind; `serial` uses it as the layer's name among its params.
        made: the record of the layers that a combinator made it from (`funcnet.structure`); None for a single layer.
        call: the constructor call that made it, for `repr`; None if no `fn.constructor` made it.
        unrounded: names of those of its own params that may have a wider dtype than x, and that `mixed` therefore does
            not round to the dtype it computes in: an exponential of them, for example, magnifies the rounding error.
        reads: the side inputs that it takes beside x, in a dict {"x": x, name: side} (`funcnet.combinators.sides`).
        writes: those of them that it returns anew beside its output, in such a dict, for the layers behind it.
        passes: whether it takes whatever dict it is given, and returns one with all sides, as combinators do.
        positionwise: whether y at a position of x [B, T, ..] depends on x there alone. Only such layers, and those that
            read `segments`, take an input with that side, several sequences in one row; experts of `moe` have to.
    """

    name: str
    init: Callable[[Array, Any], tuple[Params, State]]
    apply: Callable[[Params, State, Any], Any]
    fwd: Callable[[Params, State, Any, Array | None], tuple[Any, State, Residuals]]
    bwd: Callable[..., tuple[Any, Any]]
    made: Structure | None = None
    call: Call | None = None
    unrounded: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    writes: tuple[str, ...] = ()
    passes: bool = False
    positionwise: bool = False

    def __post_init__(self) -> None:
        for what in ("unrounded", "reads", "writes"):
            names = getattr(self, what)
            if not isinstance(names, tuple) or not all(isinstance(name, str) for name in names):
                raise InputError(f"{what} as a tuple of names", repr(names), 'write ("name",), with the comma')
        if self.made is not None and not isinstance(self.made, Structure):
            raise InputError(
                "made as fn.Composed(parts, again) or fn.Wrapped(inner, again)", describe(self.made), "use one"
            )
        if self.made is not None and self.made.functions is None:
            object.__setattr__(self, "made", replace(self.made, functions=self._functions))

    def __repr__(self) -> str:
        return "\n".join(tree(self))

    @property
    def _functions(self) -> tuple[Callable, ...]:
        return self.init, self.apply, self.fwd, self.bwd

    @property
    def structure(self) -> Structure | None:
        """`made`, or None once `replace` has changed fwd or bwd: the record then no longer describes the layer."""
        made = self.made
        fits = made is not None and all(map(operator.is_, made.functions or (), self._functions))
        return made if fits else None

    @property
    def parts(self) -> Mapping[str, "Layer"]:
        """The layers it is made of, by name, for tables and traces; {} for a single layer.

        A combinator's params and state are dicts over these names, but for `freeze`, which keeps both in its state.
        """
        return self.made.parts if self.made else {}

    @property
    def rebuild(self) -> Callable[[Mapping[str, "Layer"]], "Layer"] | None:
        """parts -> the same combinator of other parts of the same names; None where that cannot be made."""
        again = self.structure.rebuild if self.structure else None
        return again and (lambda parts: replace(again(parts), name=self.name, call=self.call))


def a_layer(given: Any) -> Layer:
    """`given` if it is a layer."""
    if isinstance(given, (list, tuple)):
        raise InputError("a layer", f"a {type(given).__name__}", "pass layers one by one: serial(*layers)")
    if not isinstance(given, Layer):
        name = getattr(given, "__name__", "")
        if getattr(given, "__module__", "").startswith("funcnet."):
            remedy = f"call its constructor: {name}(..), not {name}"
        elif callable(given):
            remedy = f"take funcnet's own, such as fn.relu(), or fn.from_function(lambda params, x: {name or 'f'}(x))"
        else:
            remedy = "make one, such as dense(8) or relu()"
        raise InputError("a layer", f"{describe(given)} {name}".strip(), remedy)
    return given


def stateless(
    name: str,
    init: Callable[[Array, Any], Params],
    fwd: Callable[[Params, Any], tuple[Any, Residuals]],
    bwd: Callable[[Params, Residuals, Any, Contraction], tuple[Any, Any]],
    *,
    reads: tuple[str, ...] = (),
    writes: tuple[str, ...] = (),
    positionwise: bool = False,
) -> Layer[Params, tuple[()], Residuals]:
    """A layer without state or randomness: `init(key, x) -> params`, `fwd(params, x) -> (y, residuals)`, `bwd`.

    `reads`, `writes` and `positionwise` are as for `Layer`.
    """
    expect.flags(positionwise=positionwise)

    def init_with_state(key, x):
        with by(name):
            return init(key, x), ()

    def with_state(params, state, x, key):
        with by(name):
            out = fwd(params, jax.tree.map(_as_jax, x))
            if not isinstance(out, tuple) or len(out) != 2:
                raise InputError("fwd(params, x) -> (y, residuals)", describe(out), "return what bwd needs beside y")
        return out[0], state, out[1]

    def apply(params, state, x):
        return with_state(params, state, x, None)[0]

    def pullback(params, residuals, dy, contract=total):
        with by(name):
            return bwd(params, residuals, dy, a_contraction(contract))

    functions = init_with_state, apply, with_state, pullback
    return Layer(name, *functions, reads=reads, writes=writes, positionwise=positionwise)


def _as_jax(leaf: Any) -> Array:
    """`leaf` as a JAX array; refuses NumPy integers too large for JAX, which would wrap them around."""
    if expect.is_array(leaf) and isinstance(leaf, (np.ndarray, np.generic)) and leaf.dtype.kind in "iu":
        held = jnp.iinfo(expect.dtype(leaf))
        if int(np.min(leaf, initial=0)) < held.min or int(np.max(leaf, initial=0)) > held.max:
            raise InputError(f"integers that fit {held.dtype}", describe(leaf), "map them to smaller ones")
    return jnp.asarray(leaf)


def no_params(key: Array | None, x: Any) -> dict[str, Array]:
    """The `init` of a layer that has no parameters."""
    return {}


def elementwise(
    name: str, f: Callable[[Array], Array], df: Callable[[Array], Array], saves: Literal["input", "output"] = "input"
) -> Layer[dict, tuple[()], Array]:
    """y = f(x), element by element, with dx = dy * df(saved); f and df are given half precision in float32.

    Args:
        name: the layer's.
        f: plain JAX, differentiable in both modes; at a kink JAX's derivative of it must be the one that df gives.
        df: the derivative of f as a function of what is saved.
        saves: "input" if df takes x, "output" if it takes y. Prefer the output: the next layer usually saves it anyway,
            so it takes no memory of its own. But y is rounded to x's dtype: where df is a difference, such as 1 - y^2,
            half precision leaves it too few digits.
    """

    def fwd(params, x):
        expect.float_array(x)
        y = f(x.astype(sum_dtype(x.dtype))).astype(x.dtype)
        return y, x if saves == "input" else y

    def bwd(params, saved, dy, contract):
        dy = expect.cotangent(dy, saved.shape, saved.dtype)
        high = sum_dtype(dy.dtype)
        return {}, (dy.astype(high) * df(saved.astype(high))).astype(dy.dtype)

    return stateless(name, no_params, fwd, bwd, positionwise=True)


def output(layer: Layer, params: Tree, state: Tree, x: Any) -> Any:
    """Shapes and dtypes of `layer`'s output, without computing it."""
    return jax.eval_shape(layer.apply, params, state, x)


def unrounded(layer: Layer) -> tuple[str, ...]:
    """Paths of the params that may have a wider dtype than their layer's x: its own and those of its parts."""
    of_parts = (f"{name}/{path}" for name, part in layer.parts.items() for path in unrounded(part))
    return (*layer.unrounded, *of_parts)


def child(key: Array | None, i: int) -> Any:
    """The key of child i; None where nothing is drawn."""
    return None if key is None else jax.random.fold_in(expect.key(key), i)
