"""The one abstraction: a layer is a record of four pure functions, its backward pass written by hand."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from funcnet import expect
from funcnet.arithmetic import wide
from funcnet.expect import InputError, describe
from funcnet.factors import Contraction, total

Tree = Any
Params = TypeVar("Params")
State = TypeVar("State")
Residuals = TypeVar("Residuals")


@dataclass(frozen=True, eq=False)
class Layer(Generic[Params, State, Residuals]):
    """A layer: how to make its parameters, apply it, run it for training, and pull a cotangent back through it.

        init   (key, x)                               -> (params, state)
        apply  (params, state, x)                     -> y                      evaluation
        fwd    (params, state, x, key)                -> (y, state, residuals)  training
        bwd    (params, residuals, dy, contract)      -> (dparams, dx)          the VJP, by hand

    `init` takes an array or a `jax.ShapeDtypeStruct`, batch axis first, and reads input sizes and the dtype of the
    parameters off it. `key` is a `jax.random.key`, or None where nothing is drawn. Params are dicts of arrays nested
    by layer name (`{}` without parameters), state is `()` without state. `dy` is the cotangent of `y`; an integer
    input has the cotangent None. `contract` says what becomes of a parameter's gradient (`funcnet.factors`).

    The laws; `fn.check_layer` enforces all but the fifth, which is `serial`'s own:

    1. `bwd` is the VJP of `fwd`'s first output.
    2. `apply` equals that output where there is no state and nothing is drawn.
    3. `dparams`, `dx` and the new state match `params`, `x` and `state` in structure, shape and dtype.
    4. `bwd` is linear in `dy`.
    5. Nesting `serial` changes nothing but names.
    6. Residuals are arrays, hold only what depends on the input, and do not depend on `dy`.

    All four are plain JAX, so forward mode through `bwd` gives Hessian-vector products.

    Attributes:
        name: the layer's kind; `serial` names it so among its parameters.
        parts: sub-layers by name, for tables and traces; params and state of a layer with parts are dicts over them,
            but for `freeze`, which has both in its state.
        rebuild: the same combinator over other parts of the same names; None for a layer without parts.
        made: by which combinator, and of what; None for most layers not made of others.
        unrounded: names of those of its own params that may be of a wider dtype than x, and that `mixed` therefore
            does not round to the dtype it computes in: an exponential, for one, makes of their rounding a larger one.
    """

    name: str
    init: Callable[[Array, Any], tuple[Params, State]]
    apply: Callable[[Params, State, Any], Any]
    fwd: Callable[[Params, State, Any, Array | None], tuple[Any, State, Residuals]]
    bwd: Callable[..., tuple[Any, Any]]
    parts: Mapping[str, "Layer"] = field(default_factory=dict)
    rebuild: Callable[[Mapping[str, "Layer"]], "Layer"] | None = None
    made: "Made | None" = None
    unrounded: tuple[str, ...] = ()

    @property
    def combinator(self) -> str:
        """What made this layer, such as "serial"; "" where that is not said, and after `replace` of fwd or bwd."""
        made = self.made
        return made.combinator if made and made.fwd is self.fwd and made.bwd is self.bwd else ""


class Undone(NamedTuple):
    """Residuals of a reversible layer: its output, and what else it was called with beside params and input."""

    kept: Any
    y: Any


Undo = Callable[[Any, Undone, Any, Contraction], tuple[Any, Any, Any]]


@dataclass(frozen=True, eq=False)
class Made:
    """How a layer was made, for what walks through a model on a way of its own, such as `layerwise_step`.

    Attributes:
        combinator: its name, or the constructor's.
        fwd, bwd: those that it gave the layer.
        inner: the one layer that a transparent combinator, such as "skip", is made of.
        wrap: the same transparent combinator around another layer.
        undo: of a reversible layer, (params, residuals, dy, contract) -> (dparams, x, dx); its residuals are `Undone`.
        options: those that another library's module may lack, and that params do not show: {"reverse": True}.
    """

    combinator: str
    fwd: Callable
    bwd: Callable
    inner: Any = None
    wrap: Any = None
    undo: Undo | None = None
    options: Mapping[str, Any] = field(default_factory=dict)


def a_layer(given: Any) -> Layer:
    """`given` if it is a layer."""
    if isinstance(given, (list, tuple)):
        raise InputError("a layer", f"a {type(given).__name__}", "pass layers one by one: serial(*layers)")
    if not isinstance(given, Layer):
        name = getattr(given, "__name__", "")
        remedy = f"call its constructor: {name}(..), not {name}" if name else "make one, such as dense(8) or relu()"
        raise InputError("a layer", f"{describe(given)} {name}".strip(), remedy)
    return given


def stateless(
    name: str,
    init: Callable[[Array, Any], Params],
    fwd: Callable[[Params, Any], tuple[Any, Residuals]],
    bwd: Callable[[Params, Residuals, Any, Contraction], tuple[Any, Any]],
) -> Layer[Params, tuple[()], Residuals]:
    """A layer without state or randomness: `init(key, x) -> params`, `fwd(params, x) -> (y, residuals)`, `bwd`."""

    def init_with_state(key, x):
        with expect.by(name):
            return init(key, x), ()

    def with_state(params, state, x, key):
        with expect.by(name):
            y, residuals = fwd(params, jax.tree.map(_as_jax, x))
        return y, state, residuals

    def apply(params, state, x):
        return with_state(params, state, x, None)[0]

    def pullback(params, residuals, dy, contract=total):
        with expect.by(name):
            return bwd(params, residuals, dy, contract)

    return Layer(name, init_with_state, apply, with_state, pullback)


def _as_jax(leaf: Any) -> Array:
    """NumPy's integers may be too large for JAX, which would wrap them around."""
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
        f: plain JAX, differentiable in both modes; at a kink its own derivative must be the one that df gives.
        df: the derivative of f as a function of what is saved.
        saves: "input" if df wants x, "output" if it wants y. Prefer the output: the next layer mostly saves it anyway,
            so it takes no memory of its own. It is rounded to x's dtype: where df takes a difference, as 1 - y^2, half
            precision keeps too few of its digits.
    """

    def fwd(params, x):
        expect.float_array(x)
        y = f(x.astype(wide(x.dtype))).astype(x.dtype)
        return y, x if saves == "input" else y

    def bwd(params, saved, dy, contract):
        dy = expect.cotangent(dy, saved.shape, saved.dtype)
        high = wide(dy.dtype)
        return {}, (dy.astype(high) * df(saved.astype(high))).astype(dy.dtype)

    return stateless(name, no_params, fwd, bwd)


def output(layer: Layer, params: Tree, state: Tree, x: Any) -> Any:
    """Shapes and dtypes of `layer`'s output, without computing it."""
    return jax.eval_shape(layer.apply, params, state, x)


def around(
    inner: Layer, whole: Layer, wrap: Callable[[Layer], Layer], combinator: str, undo: Undo | None = None
) -> Layer:
    """`whole`, a combinator of the one layer `inner`, transparent to its parts; `wrap` makes it of another layer."""
    rebuild = inner.rebuild
    again = None if rebuild is None else lambda parts: wrap(rebuild(parts))
    return replace(whole, rebuild=again, made=Made(combinator, whole.fwd, whole.bwd, inner, wrap, undo))


def undoing(layer: Layer) -> Undo | None:
    """For a reversible layer: its `bwd`, which says its input too. None for others."""
    if layer.made and layer.combinator == "named":
        return undoing(layer.made.inner)
    return layer.made.undo if layer.made and layer.combinator else None


def unrounded(layer: Layer) -> tuple[str, ...]:
    """Paths of the params that may be wider than their layer's x: its own and those of its parts."""
    of_parts = (f"{name}/{path}" for name, part in layer.parts.items() for path in unrounded(part))
    return (*layer.unrounded, *of_parts)


def without_x(undo: Undo) -> Callable[..., tuple[Any, Any]]:
    """The `bwd` of a reversible layer."""

    def bwd(params, residuals, dy, contract=total):
        dparams, _, dx = undo(params, residuals, dy, contract)
        return dparams, dx

    return bwd


def child(key: Array | None, i: int) -> Any:
    """The key of child i; None where nothing is drawn."""
    return None if key is None else jax.random.fold_in(expect.key(key), i)
