"""Arrays described in a few letters, such as "f32[8,16]" or "i32[8]<100", and drawn from a seed.

dtype[sizes]    f64 f32 f16 bf16, c64 c128, i8 .. i64, u8 .. u64, bool: normal numbers, or True and False
[n,m]           a letter stands for a size from 1 to 7, drawn from the seed; the same letter for the same size
<high  >low     integers need `<high`, and start at 0; floating numbers are drawn between both, or beyond one
sorted          ascending along the last axis: "i32[8]<100 sorted"
key             a random key
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, describe
from funcnet._internal.expect import is_array, is_floating

Tree = Any
DTYPES = {
    "bf16": "bfloat16",
    "bool": "bool",
    **{f"f{bits}": f"float{bits}" for bits in (16, 32, 64)},
    **{f"c{bits}": f"complex{bits}" for bits in (64, 128)},
    **{
        f"{letter}{bits}": f"{kind}{bits}" for letter, kind in (("i", "int"), ("u", "uint")) for bits in (8, 16, 32, 64)
    },
}
SHORT = {long: short for short, long in DTYPES.items()}
SIZE = r"\s*(?:[0-9]+|[A-Za-z]+)\s*"
BOUND = r"\s*([<>])\s*([-+]?(?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)?)\s*"
FORM = re.compile(
    rf"(?P<dtype>\w+?)\s*\[(?P<sizes>{SIZE}(?:,{SIZE})*|\s*)\](?P<bounds>(?:{BOUND})*)(?P<sorted> sorted)?"
)


@dataclass(frozen=True)
class Spec:
    """An array to be drawn: dtype, sizes (a letter is drawn too), bounds of its values or None, whether they ascend."""

    dtype: str
    sizes: tuple[int | str, ...]
    low: float | None = None
    high: float | None = None
    ascending: bool = False

    def __str__(self) -> str:
        if self.dtype == "key":
            return "key"
        text = f"{SHORT.get(self.dtype, self.dtype)}[{','.join(map(str, self.sizes))}]"
        low = "" if self.low is None else f">{self.low:g}"
        return text + low + ("" if self.high is None else f"<{self.high:g}") + " sorted" * self.ascending

    def draw(self, rng: np.random.Generator) -> Any:
        """Values that fit the spec."""
        values = self._unordered(rng)
        return np.sort(values, axis=-1) if self.ascending else values

    def _unordered(self, rng: np.random.Generator) -> Any:
        shape = tuple(int(size) for size in self.sizes)
        if self.dtype == "key":
            return jax.random.key(int(rng.integers(2**31)))
        if self.dtype == "bool":
            return rng.random(shape) < 0.5
        if jnp.issubdtype(self.dtype, jnp.integer):
            return rng.integers(int(self.low or 0), int(self.high or 0), shape).astype(self.dtype)
        values = rng.standard_normal(shape)
        if jnp.issubdtype(self.dtype, jnp.complexfloating):
            values = values + 1j * rng.standard_normal(shape)
        elif self.low is not None and self.high is not None:
            values = rng.uniform(self.low, self.high, shape)
        elif self.low is not None:
            values = self.low + np.abs(values)
        elif self.high is not None:
            values = self.high - np.abs(values)
        return np.asarray(values).astype(jnp.dtype(self.dtype))


def parse(text: str) -> Spec:
    """The array that a text describes.

    Raises:
        InputError: if it cannot be read.
    """
    if text.strip() == "key":
        return Spec("key", ())
    found = FORM.fullmatch(text.strip())
    dtype = found and DTYPES.get(found["dtype"], found["dtype"] if found["dtype"] in SHORT else None)
    if not found or not dtype:
        wanted = 'an array like "f32[8,16]", "i32[8]<100", "f32[n]>0" or "key"'
        remedy = f"write the dtype as one of {', '.join(DTYPES)}, and each size as a number or a letter"
        raise InputError(wanted, repr(text), remedy)
    named = [size.strip() for size in found["sizes"].split(",") if size.strip()]
    sizes = tuple(int(size) if size.isdigit() else size for size in named)
    bounds = re.findall(BOUND, found["bounds"])
    low, high = ([float(number) for sign, number in bounds if sign == side] for side in "><")
    if len(low) > 1 or len(high) > 1:
        raise InputError("one lower and one upper bound", repr(text), "leave the others out")
    spec = Spec(dtype, sizes, *(low or [None]), *(high or [None]), ascending=bool(found["sorted"]))
    _bounded(spec, text)
    ordered = any(jnp.issubdtype(spec.dtype, kind) for kind in (jnp.floating, jnp.integer))
    if spec.ascending and not (ordered and sizes):
        raise InputError("integers or floating numbers along an axis, to be sorted", repr(text), "leave sorted out")
    return spec


def _bounded(spec: Spec, text: str) -> None:
    """Refuse bounds that values of the spec's dtype cannot have."""
    bounds = [bound for bound in (spec.low, spec.high) if bound is not None]
    if jnp.issubdtype(spec.dtype, jnp.floating):
        most = float(jnp.finfo(spec.dtype).max)
        if any(abs(bound) > most for bound in bounds):
            raise InputError(f"bounds within {spec.dtype}, to {most:.4g}", repr(text), "take a wider dtype")
    elif jnp.issubdtype(spec.dtype, jnp.integer):
        if spec.high is None or spec.high <= (spec.low or 0):
            remedy = "say which integers are valid"
            raise InputError('an upper bound for integers, as in "i32[8]<100"', repr(text), remedy)
        info = jnp.iinfo(spec.dtype)
        if not all(bound.is_integer() for bound in bounds) or min(bounds) < info.min or spec.high > info.max + 1:
            wanted = f"whole bounds within {spec.dtype}, {info.min} to {info.max}"
            raise InputError(wanted, repr(text), "write them without a fraction, or take a wider dtype")
    elif bounds:
        raise InputError(f"{spec.dtype} without bounds", repr(text), "leave them out")
    if spec.low is not None and spec.high is not None and spec.low >= spec.high:
        raise InputError("a lower bound below the upper one", repr(text), "turn them round")


def specs(tree: Tree) -> Tree:
    """A tree with a `Spec` for every text and `jax.ShapeDtypeStruct` in it; arrays stay as they are."""
    return jax.tree.map(_spec, tree)


def _spec(leaf: Any) -> Any:
    if isinstance(leaf, Spec):
        return leaf
    if isinstance(leaf, str):
        return parse(leaf)
    if isinstance(leaf, (bool, int, float, complex)):
        remedy = "pass jnp.asarray(value, dtype), or bind it: lambda x: f(x, value)"
        raise InputError("arrays", f"the number {leaf}", remedy)
    if not is_array(leaf):
        raise InputError(
            "an array, a jax.ShapeDtypeStruct, or a text such as 'f32[8,16]'", describe(leaf), "convert it"
        )
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return leaf
    if not is_floating(leaf) and not jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        remedy = 'write "i32[8]<100", or pass an array: which integers are valid is for you to say'
        raise InputError("values for an integer input", describe(leaf), remedy)
    return Spec(str(leaf.dtype), tuple(leaf.shape))


def settled(tree: Tree, seed: int) -> Tree:
    """The tree with a size for every letter, drawn from the seed.

    Raises:
        InputError: if the seed is not a whole number, 0 or larger.
    """
    if isinstance(seed, bool) or not hasattr(seed, "__index__") or seed < 0:
        raise InputError("a seed, a whole number from 0", repr(seed), "leave it out for 0")
    found = [leaf for leaf in jax.tree.leaves(tree) if isinstance(leaf, Spec)]
    letters = sorted({size for leaf in found for size in leaf.sizes if isinstance(size, str)})
    sizes = dict(zip(letters, np.random.default_rng([seed, 2]).integers(1, 8, len(letters)).tolist(), strict=True))
    return resized(tree, sizes)


def resized(tree: Tree, sizes: Mapping[Any, int]) -> Tree:
    """The tree with every size (or letter) that `sizes` names replaced by another; arrays are cut."""

    def one(leaf):
        if isinstance(leaf, Spec):
            return replace(leaf, sizes=tuple(sizes.get(size, size) for size in leaf.sizes))
        return (
            leaf[tuple(slice(sizes.get(size, size)) for size in leaf.shape)] if sizes.keys() & {*leaf.shape} else leaf
        )

    return jax.tree.map(one, tree)


def drawn(tree: Tree, seed: int) -> Tree:
    """The tree with values for every `Spec`."""
    rng = np.random.default_rng([seed, 0])
    return jax.tree.map(lambda leaf: leaf.draw(rng) if isinstance(leaf, Spec) else leaf, tree)


def sizes_of(tree: Tree) -> list[int]:
    """The distinct sizes above 1 in a tree, the largest first."""
    shapes = [leaf.sizes if isinstance(leaf, Spec) else leaf.shape for leaf in jax.tree.leaves(tree)]
    return sorted({int(size) for shape in shapes for size in shape if int(size) > 1}, reverse=True)
