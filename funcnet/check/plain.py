"""A function without its custom rules, and its float64 shadow, made from its jaxpr.

Both are found by evaluating the program equation by equation. `jax.custom_vjp` and `jax.custom_jvp` calls are replaced
by their primal, at any depth: under jit, scan, while, cond, remat and each other. The shadow computes every floating
array in float64, whatever the program casts to in between, so that the derivative of a bfloat16 function can be taken
numerically.

What a program computes from bits (`bitcast_convert_type`, in random numbers) is evaluated as written and then widened.
So are primitives with programs of their own that are not known here, such as a Pallas kernel, and callbacks into
Python, which are called with the dtypes that they are written for. Prints and callbacks for debugging are left out.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from funcnet._internal.expect import is_array

INLINE = {"jit", "pjit", "closed_call", "core_call", "remat2", "checkpoint", "eval_jaxpr"}
RULES = {"custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr", "call_hi_primitive"}
LOOPS = {"scan", "while", "cond", "reduce", "custom_linear_solve"} | {
    "scatter" + kind for kind in ("", "-add", "-mul", "-min", "-max")
}
AS_WRITTEN = {"bitcast_convert_type", "nextafter", "random_gamma", "pure_callback", "io_callback"}
MUTE = {"debug_callback", "debug_print"}


@dataclass
class Plain:
    """The program of a function, traced once.

    Attributes:
        jaxpr: the program, closed.
        shape: the output, as `jax.ShapeDtypeStruct`s.
        rules: each custom rule in it, such as "custom_vjp relu", with the number of its calls.
        stuck: primitives that hold custom rules that cannot be replaced.
        stops: whether it stops gradients.
        narrow: whether a part of it can be computed in its own dtypes only.
    """

    jaxpr: Any
    shape: Any
    rules: dict[str, int] = field(default_factory=dict)
    stuck: set[str] = field(default_factory=set)
    stops: bool = False
    narrow: bool = False

    def __post_init__(self) -> None:
        names, opaque = _survey(self.jaxpr, self.rules, self.stuck, "")
        self.stops = "stop_gradient" in names
        self.narrow = opaque

    @property
    def coarse(self) -> bool:
        """Whether it computes in less than float64 anywhere."""
        return _coarse(self.jaxpr)

    def __call__(self, *leaves: Any, double: bool) -> Any:
        """The output for the flattened arguments; in float64 if `double`, else in the dtypes of the program."""
        given = [_widened(leaf) for leaf in leaves] if double else leaves
        return jax.tree.unflatten(jax.tree.structure(self.shape), _evaluate(self.jaxpr, given, double))


def trace(f: Callable, *args: Any) -> Plain:
    """The program of f at arguments like `args`."""
    return Plain(*jax.make_jaxpr(f, return_shape=True)(*args))


def reduction_length(jaxpr: Any) -> int:
    """The largest number of terms that one sum in the program adds up; the length of a `scan` multiplies its body's."""
    longest = 1
    for eqn in _open(jaxpr)[0].eqns:
        terms = max((reduction_length(sub) for sub in _programs(eqn)), default=1)
        if eqn.primitive.name == "scan":
            terms *= max(eqn.params["length"], 1)
        if eqn.primitive.name == "dot_general":
            ((contracted, _), _) = eqn.params["dimension_numbers"]
            for axis in contracted:
                terms *= eqn.invars[0].aval.shape[axis]
        elif eqn.primitive.name in ("reduce_sum", "cumsum", "conv_general_dilated", "reduce_window_sum"):
            size, out = eqn.invars[0].aval.size, eqn.outvars[0].aval.size
            terms = size // max(out, 1) if eqn.primitive.name == "reduce_sum" else _window(eqn)
        longest = max(longest, terms)
    return longest


def _window(eqn: Any) -> int:
    if eqn.primitive.name == "conv_general_dilated":
        kernel = eqn.invars[1].aval
        return kernel.size // max(kernel.shape[eqn.params["dimension_numbers"].rhs_spec[0]], 1)
    return max(eqn.invars[0].aval.shape, default=1)


def _open(jaxpr: Any) -> tuple[Any, Sequence[Any]]:
    return getattr(jaxpr, "jaxpr", jaxpr), getattr(jaxpr, "consts", ())


def _programs(eqn: Any) -> list[Any]:
    """The programs among an equation's parameters."""
    if "_prim" in eqn.params:
        return [_expanded(eqn)]
    found = []
    for value in eqn.params.values():
        found += [v for v in (value if isinstance(value, (tuple, list)) else [value]) if hasattr(v, "eqns")]
    return found


def _expanded(eqn: Any) -> Any:
    """The program of a primitive that is an object with rules of its own (`jax.experimental.hijax`): what a custom rule
    becomes under jax_custom_vjp3, and a checkpoint under jax_remat3."""
    primitive = eqn.params["_prim"]
    flat = lambda *leaves: jax.tree.leaves(primitive.expand(*jax.tree.unflatten(primitive.in_tree, leaves)))
    return jax.make_jaxpr(flat)(*(_shape(var.aval, False) for var in eqn.invars))


def _coarse(jaxpr: Any) -> bool:
    eqns = _open(jaxpr)[0].eqns
    dtypes = [var.aval.dtype for eqn in eqns for var in eqn.outvars if hasattr(var.aval, "dtype")]
    small = any(jnp.issubdtype(d, jnp.inexact) and jnp.finfo(d).bits < 64 for d in dtypes)
    return small or any(_coarse(sub) for eqn in eqns for sub in _programs(eqn))


def _survey(jaxpr: Any, rules: dict[str, int], stuck: set[str], blocked: str) -> tuple[set[str], bool]:
    """Count custom rules, and name the primitives in which they are out of reach.

    Returns the names of all primitives, and whether any is evaluated as written.
    """
    names, opaque = set(), False
    for eqn in _open(jaxpr)[0].eqns:
        name = eqn.primitive.name
        names.add(name)
        if name in RULES:
            kind = name.removeprefix("call_hi_primitive").removesuffix("_jaxpr").removesuffix("_call")
            label = f"{kind} {_name(eqn)}".strip()
            rules[label] = rules.get(label, 0) + 1
            if blocked:
                stuck.add(blocked)
        reached = name in INLINE | RULES | LOOPS
        opaque |= name in AS_WRITTEN and any(jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in eqn.invars)
        for sub in _programs(eqn):
            inside, narrow = _survey(sub, rules, stuck, blocked or ("" if reached else name))
            names |= inside
            opaque |= narrow or not reached
    return names, opaque


def _name(eqn: Any) -> str:
    """The name of the function that carries the rule."""
    if "_prim" in eqn.params:
        return type(eqn.params["_prim"]).__name__
    info = getattr(_open(eqn.params.get("call_jaxpr") or eqn.params["fun_jaxpr"])[0], "debug_info", None)
    return getattr(info, "func_name", "") or ""


def _evaluate(jaxpr: Any, args: Sequence[Any], double: bool) -> list[Any]:
    program, consts = _open(jaxpr)
    values: dict[Any, Any] = {}

    def read(atom):
        return (_widened(atom.val) if double else atom.val) if isinstance(atom, jex.Literal) else values[atom]

    values.update(zip(program.constvars, map(_widened, consts) if double else consts, strict=True))
    values.update(zip(program.invars, args, strict=True))
    for eqn in program.eqns:
        out = _equation(eqn, [read(atom) for atom in eqn.invars], double)
        values.update(zip(eqn.outvars, out, strict=True))
    return [read(atom) for atom in program.outvars]


def _equation(eqn: Any, args: list[Any], double: bool) -> Sequence[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in MUTE:
        return []
    if name in INLINE | RULES:
        (inner,) = _programs(eqn)
        return _evaluate(inner, args, double)
    if name in LOOPS:
        params = {key: _replaced(value, double) for key, value in params.items()}
    elif double and name == "reduce_precision":
        return args
    elif double and (name in AS_WRITTEN or _programs(eqn)):
        return [_widened(value) for value in _bind(eqn, params, map(_narrowed, args, eqn.invars))]
    if double:
        params = {key: None if key == "precision" else _wide_dtype(value) for key, value in params.items()}
        if eqn.outvars and not any(is_inexact(v) for v in args) and name not in ("iota", "convert_element_type"):
            return [_widened(value) for value in _bind(eqn, eqn.params, args)]
    return _bind(eqn, params, args)


def _bind(eqn: Any, params: dict, args: Any) -> Sequence[Any]:
    out = eqn.primitive.bind(*args, **eqn.primitive.get_bind_params(params))
    return out if eqn.primitive.multiple_results else [out]


def _replaced(value: Any, double: bool) -> Any:
    """A program among the parameters of a loop, without its rules."""
    if isinstance(value, tuple) and any(hasattr(v, "eqns") for v in value):
        inside = [_replaced(v, double) for v in value]
        return type(value)(*inside) if hasattr(value, "_fields") else tuple(inside)
    if not hasattr(value, "eqns"):
        return value
    shapes = [_shape(var.aval, double) for var in _open(value)[0].invars]
    closed = jax.make_jaxpr(lambda *args: _evaluate(value, args, double))(*shapes)
    return closed if isinstance(value, jex.ClosedJaxpr) else closed.jaxpr


def _shape(aval: Any, double: bool) -> jax.ShapeDtypeStruct:
    dtype = _wide_dtype(aval.dtype) if double else aval.dtype
    return jax.ShapeDtypeStruct(aval.shape, dtype, weak_type=aval.weak_type and not double)


def is_inexact(value: Any) -> bool:
    """Whether it is an array of floating or complex numbers: whether it has a derivative."""
    return is_array(value) and jnp.issubdtype(value.dtype, jnp.inexact)


def _wide_dtype(value: Any) -> Any:
    """float64 for a floating dtype, complex128 for a complex one; anything else as it is."""
    if not isinstance(value, (jnp.dtype, type)):
        return value
    if jnp.issubdtype(value, jnp.complexfloating):
        return jnp.dtype("complex128")
    return jnp.dtype("float64") if jnp.issubdtype(value, jnp.floating) else value


def _widened(value: Any) -> Any:
    value = jnp.asarray(value) if not is_array(value) else value
    return jnp.asarray(value, _wide_dtype(jnp.dtype(value.dtype))) if is_inexact(value) else value


def _narrowed(value: Any, var: Any) -> Any:
    return jnp.asarray(value, var.aval.dtype) if is_inexact(value) else value


@dataclass(frozen=True)
class Program:
    """A jaxpr that can be asked which outputs depend on an input."""

    jaxpr: Any

    def reached(self, inputs: Any) -> set[int]:
        """The positions of the outputs that depend on the inputs at these positions."""
        return _reached(self.jaxpr, set(inputs))


def jaxpr_of(f: Callable, *args: Any) -> Program:
    """The program of f at arguments like `args`."""
    return Program(jax.make_jaxpr(f)(*args))


def _reached(jaxpr: Any, inputs: set[int]) -> set[int]:
    program = _open(jaxpr)[0]
    known = {var for i, var in enumerate(program.invars) if i in inputs}
    for eqn in program.eqns:
        places = {i for i, atom in enumerate(eqn.invars) if not isinstance(atom, jex.Literal) and atom in known}
        subs = _programs(eqn)
        if eqn.primitive.name in INLINE and len(subs) == 1:
            known |= {eqn.outvars[i] for i in _reached(subs[0], places)}
        elif places:
            known |= set(eqn.outvars)
    return {i for i, var in enumerate(program.outvars) if not isinstance(var, jex.Literal) and var in known}
