"""What a function expects of its input.

Shapes and dtypes are known while JAX traces, so these checks cost nothing in a compiled step.
"""

import operator
from collections.abc import Collection, Mapping
from numbers import Real
from typing import Any

import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, describe, has_shape_and_dtype
from funcnet._internal.numerics import wider

Tree = Any
SMALLEST, LARGEST = float(jnp.finfo(jnp.float32).tiny), float(jnp.finfo(jnp.float32).max)


def is_array(x: Any) -> bool:
    """Whether `x` is an array that JAX can read: NumPy's, JAX's, a tracer or a `jax.ShapeDtypeStruct`.

    Raises:
        InputError: for another library's, such as a PyTorch tensor, whose dtype is not NumPy's.
    """
    if not has_shape_and_dtype(x):
        return False
    if not isinstance(x.dtype, np.dtype) and not isinstance(x, (jax.Array, jax.ShapeDtypeStruct)):
        remedy = "convert it with x.numpy(); a tensor on a GPU, or with a gradient, with x.detach().cpu().numpy()"
        raise InputError("an array of NumPy or JAX", describe(x), remedy)
    return True


def native_order(x: Any) -> None:
    """Refuse an array, as read from some files, in another byte order than this machine's: JAX may misread it."""
    if isinstance(x.dtype, np.dtype) and not x.dtype.isnative:
        remedy = 'convert it with x.astype(x.dtype.newbyteorder("="))'
        raise InputError("an array in this machine's order of bytes", describe(x), remedy)


def is_floating(x: Any) -> bool:
    return is_array(x) and jnp.issubdtype(x.dtype, jnp.floating)


def is_concrete(x: Any) -> bool:
    """Whether the values of `x` can be read: an array outside every transformation, not a tracer."""
    return is_array(x) and not isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))


def not_donated(tree: Tree) -> None:
    """Refuse a train state, or a part of one, whose arrays were donated to an earlier step."""
    if any(isinstance(leaf, jax.Array) and is_concrete(leaf) and leaf.is_deleted() for leaf in jax.tree.leaves(tree)):
        remedy = "go on with the train state that the last step returned; a step donates the one it is given"
        raise InputError("a train state that was not used yet", "one whose arrays are deleted", remedy)


def float_array(x: Any, *, rank: int = 1, features: int | None = None) -> None:
    """Refuse what is not a floating array of at least `rank` axes with `features` entries on the last."""
    wanted = "a floating-point array" + (f" of at least {rank} axes" if rank > 1 else "")
    if features is not None:
        wanted += f" with {features} features on its last axis"
    if not is_floating(x):
        received = f"a list of {len(x)}" if isinstance(x, list) else describe(x)
        remedy = "convert it first, for instance with jnp.asarray(x, jnp.float32)"
        if isinstance(x, Mapping) and "x" in x:
            remedy = "end a model whose input has sides with fn.select(), which gives x alone"
        raise InputError(wanted, received, remedy)
    native_order(x)
    if x.ndim < rank or x.ndim == 0:
        raise InputError(wanted, describe(x), "add the missing axes; the batch axis comes first")
    if 0 in x.shape:
        raise InputError(wanted + " that is not empty", describe(x), "leave the empty batch out")
    if features is not None and x.shape[-1] != features:
        raise InputError(wanted, describe(x), "give the input that the layer was initialised for, or call init again")


def count(value: Any, what: str) -> int:
    """`value` if it is a positive whole number."""
    if not is_whole(value) or int(value) < 1:
        raise InputError(f"{what} as a positive whole number", repr(value), "give one from 1, such as 4, not 4.0")
    return int(value)


def first_of(what: str, bad: np.ndarray, values: np.ndarray) -> str:
    """The first of the entries that are bad, and how many more there are, for an error."""
    where, more = tuple(int(i) for i in np.argwhere(bad)[0]), int(bad.sum()) - 1
    return f"{what} {values[where]} at index {where}" + (f", and {more} more" if more else "")


def flags(**given: Any) -> None:
    """Refuse flags that are neither True nor False, such as a "relu" that was passed in a flag's position."""
    for name, value in given.items():
        if not isinstance(value, bool):
            raise InputError(f"{name} as True or False", repr(value), f"write {name}=True or {name}=False")


def is_whole(value: Any) -> bool:
    """Whether `value` is a whole number, Python's, NumPy's or JAX's, and no boolean."""
    try:
        operator.index(value)
    except TypeError:
        return False
    return not isinstance(value, bool)


def sequences(x: Any, features: int | None = None, what: str = "x") -> None:
    """Refuse what is not a floating array [B, T, D], with D `features`."""
    float_array(x, rank=3, features=features)
    if x.ndim != 3:
        remedy = "reshape it to one batch axis, one time axis and one of features"
        raise InputError(f"{what} as sequences [B, T, D]", describe(x), remedy)


def fraction(value: Any, what: str, remedy: str) -> float:
    """`value` if it is a number of at least 0 and less than 1."""
    if _is_real(value) and 0 <= value < 1:
        return float(value)
    raise InputError(f"a {what} of at least 0 and less than 1", f"{what}={value!r}", remedy)


def number(value: Any, what: str) -> float:
    """`value`, finite in float32, as a Python float: one of NumPy or JAX would promote other operands to its dtype."""
    if not _is_real(value):
        received = describe(value) if is_array(value) else repr(value)
        raise InputError(f"{what} as a real number that can be read", f"{what}={received}", "give one, such as 0.5")
    try:
        given = float(value)
    except OverflowError:  # a whole number of hundreds of digits
        given = float("inf")
    if not abs(given) <= LARGEST:
        raise InputError(f"{what} as a number that is finite in float32", f"{what}={given}", "give one, such as 0.5")
    return given


def positive(value: Any, what: str, remedy: str) -> float:
    """`value` if it is a positive number also in float32."""
    given = number(value, what)
    if given < SMALLEST:
        raise InputError(f"a positive {what}, in float32 too", f"{what}={given}", remedy)
    return given


def not_negative(value: Any, what: str, remedy: str) -> float:
    """`value` if it is a number of at least 0."""
    given = number(value, what)
    if given < 0:
        raise InputError(f"a {what} that is not negative", f"{what}={given}", remedy)
    return given


def weights(given: Any, what: str) -> np.ndarray:
    """`given`, a list or array of finite numbers of which none is negative, as float64 [C]; readable, not traced."""
    wanted = f"{what} as numbers [C] that can be read, not traced; none negative, all in the range of float32"
    remedy = "give one number for each of C, such as [1, 2.5]"
    try:
        weights = np.asarray(given)
    except (TypeError, ValueError) as error:
        raise InputError(wanted, describe(given), remedy) from error
    real = jnp.issubdtype(weights.dtype, jnp.integer) or jnp.issubdtype(weights.dtype, jnp.floating)
    if not real or weights.ndim != 1 or weights.size == 0:
        raise InputError(wanted, describe(weights), remedy)
    weights = weights.astype(np.float64)
    if bad := np.flatnonzero(~((weights >= 0) & (weights <= LARGEST))).tolist():
        raise InputError(wanted, f"{weights[bad[0]]} at index {bad[0]}", "give 0 for no weight")
    return weights


def _is_real(value: Any) -> bool:
    """Whether `value` is a real number, Python's, NumPy's or JAX's, and no boolean."""
    scalar = is_concrete(value) and value.shape == () and jnp.issubdtype(value.dtype, jnp.number)
    return not isinstance(value, bool) and (isinstance(value, Real) or scalar) and not jnp.iscomplexobj(value)


def floating_dtype(given: Any) -> Any:
    """`given`, a dtype or the name of one, as a floating dtype."""
    try:
        found = None if given is None else jnp.dtype(given)  # NumPy reads None as float64
    except TypeError:
        found = None
    if found is None or not jnp.issubdtype(found, jnp.floating):
        raise InputError("a floating dtype", repr(given), "name one, such as float64, float32, bfloat16 or float16")
    return found


def key(key: Any) -> jax.Array:
    """`key` if it is a `jax.random.key`."""
    if key is None:
        remedy = "pass one, such as jax.random.key(0); to evaluate use apply, which draws nothing"
        raise InputError("a random key", "None", remedy)
    if not is_array(key) or not jnp.issubdtype(key.dtype, jax.dtypes.prng_key) or key.shape != ():
        raise InputError("a random key", describe(key), "make one with jax.random.key(0)")
    return key


def lengths(given: Any, examples: int, steps: int) -> None:
    """Refuse lengths that are not one number of valid steps for each example."""
    wanted = f"lengths as integers from 0 to {steps}, one for each of {examples} examples"
    if not is_array(given) or given.shape != (examples,) or not jnp.issubdtype(given.dtype, jnp.integer):
        raise InputError(wanted, describe(given), "convert them, for instance with jnp.asarray(lengths, jnp.int32)")
    if is_concrete(given):
        low, high = np.min(np.asarray(given)), np.max(np.asarray(given))  # not traced inside a loop
        if low < 0 or high > steps:
            raise InputError(wanted, f"lengths from {low} to {high}", "count the valid positions of each example")


def segments(given: Any, examples: int, steps: int) -> None:
    """Refuse segments that are not one integer for each position."""
    if not is_array(given) or given.shape != (examples, steps) or not jnp.issubdtype(given.dtype, jnp.integer):
        wanted = f"segments as integers [{examples}, {steps}], one for each position"
        raise InputError(wanted, describe(given), "number the sequences of a row 1, 2, .., and what pads it 0")
    if isinstance(given, np.ndarray) and given.size and int(given.max()) > np.iinfo(np.int32).max:
        raise InputError("segments that fit int32", f"{given.max()}", "number the sequences of a row 1, 2, ..")


def dtype(x: Any) -> Any:
    """The dtype that `x` has as a JAX array: NumPy's float64 is float32 unless JAX's 64-bit mode is on."""
    return jax.dtypes.canonicalize_dtype(x.dtype)


def same(x: Tree, y: Tree) -> bool:
    """Whether x and y have the same structure, shapes and, as JAX arrays, dtypes."""
    return describe(shapes(x)) == describe(shapes(y))


def shapes(tree: Tree) -> Tree:
    """Shapes and dtypes of the arrays of a tree, as JAX will have them."""
    return jax.tree.map(_shape, tree)


def _shape(leaf: Any) -> Any:
    if not is_array(leaf):
        raise InputError("arrays", describe(leaf), "convert it, for instance with jnp.asarray(x, jnp.float32)")
    numeric = jnp.issubdtype(leaf.dtype, jnp.number)
    return jax.ShapeDtypeStruct(leaf.shape, dtype(leaf) if numeric else leaf.dtype)


def fields(params: Tree, dtype: Any, shapes: Mapping[str, tuple[int, ...]], may_be_wider: Collection[str] = ()) -> None:
    """Refuse parameters other than a dict of arrays with exactly these shapes and this dtype; some may be wider."""
    wanted = "parameters {" + ", ".join(f"{k}: {dtype}[{', '.join(map(str, s))}]" for k, s in shapes.items()) + "}"
    if not isinstance(params, Mapping) or params.keys() != shapes.keys():
        raise InputError(wanted, describe(params), _own(params, "params", "layer"))
    if any(not is_array(params[name]) or params[name].shape != shape for name, shape in shapes.items()):
        raise InputError(wanted, describe(params), "pass the parameters that this layer's init returned for such input")
    fits = lambda name, p: p.dtype == dtype or (name in may_be_wider and is_floating(p) and wider(p.dtype, dtype))
    if not all(fits(name, params[name]) for name in shapes):
        remedy = "convert the input or the parameters; for half-precision compute wrap the layer in mixed(...)"
        raise InputError(wanted, describe(params), remedy)


def size(params: Tree, name: str) -> int | None:
    """The input size that `params[name]` was made for, or None where the parameters have no such array."""
    v: Any = params.get(name) if isinstance(params, Mapping) else None
    return v.shape[0] if is_array(v) and v.ndim else None


def keys(tree: Tree, names: Any, what: str) -> None:
    """Refuse a `tree` that is not a dict with exactly `names` as its keys."""
    if not isinstance(tree, Mapping) or set(tree) != set(names):
        received = f"keys {list(tree)}" if isinstance(tree, Mapping) else describe(tree)
        raise InputError(f"{what} for the layers {list(names)}", received, _own(tree, what, "model"))


def stacked(tree: Tree, count: int, what: str, kind: str = "layers") -> None:
    """Refuse params or state that are not stacked along a first axis of `count` layers (or what `kind` calls them)."""
    if any(jnp.shape(leaf)[:1] != (count,) for leaf in jax.tree.leaves(tree)):
        wanted = f"{what} stacked along a first axis of {count} {kind}"
        raise InputError(wanted, describe(tree), f"pass the {what} that this model's init returned")


def _own(tree: Tree, what: str, whose: str) -> str:
    """The remedy for params or state that are another layer's."""
    if isinstance(tree, Mapping) and set(tree) == {"model", "loss"}:
        return f'pass {what}["model"]: these are an objective\'s'
    return f"pass the {what} that this {whose}'s init returned"


def cotangent(dy: Any, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    """`dy` as a JAX array; refuse one that does not have its output's shape and dtype."""
    dy = jnp.asarray(dy) if is_array(dy) else dy
    if not is_array(dy) or dy.shape != tuple(shape) or dy.dtype != dtype:
        wanted = f"a cotangent like the output, {dtype}[{', '.join(map(str, shape))}]"
        raise InputError(wanted, describe(dy), "give bwd a dy of the shape and dtype that fwd returned")
    return dy
