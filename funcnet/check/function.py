"""A JAX function as a subject of the checker, refused with an explanation where it cannot be one."""

import inspect
import re
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, describe
from funcnet.check.judge import as_float64
from funcnet.check.plain import Plain, is_inexact, trace
from funcnet.check.report import said
from funcnet.check.spec import drawn
from funcnet.check.subject import Subject
from funcnet.layer import Layer

Tree = Any
CALLBACKS = {"Debug", "IO"}  # effects of callbacks that JAX may call in any order


def function(f: Callable, args: tuple, reference: Callable | None, x64: bool, seed: int) -> Subject:
    """f at the arguments `args`, in which specs are replaced by arrays that are drawn.

    Raises:
        InputError: if f cannot be checked there.
    """
    if isinstance(f, Layer):
        raise InputError("a function", f"the layer {f.name}", "pass it to check_layer, or differentiable(layer) here")
    if not callable(f):
        raise InputError("a function", describe(f), "pass the function itself, not its result")
    mode = x64 or jax.config.read("jax_enable_x64")
    args = jax.tree.map(lambda leaf: _placed(leaf, x64, mode), drawn(args, seed))
    with jax.enable_x64(mode):
        program = _program(f, args)
        plain = program if reference is None else _reference(reference, args, program)
        _differentiable(f, args, program)

    def pull(args):
        return jax.vjp(f, *args)

    name = getattr(f, "__name__", type(f).__name__)
    roots = tuple(f"[{i}]" for i in range(len(args)))
    return Subject(name, args, roots, pull, plain, mode, raw=_raw(f), notes=_notes(program, plain, reference))


def _placed(leaf: Any, x64: bool, mode: bool) -> Any:
    """A leaf as f is given it, in JAX's 64-bit `mode` or not; cast to 64 bits for the option x64."""
    if x64 and is_inexact(leaf):
        return as_float64(leaf)
    if not mode and is_inexact(leaf) and jnp.finfo(leaf.dtype).bits == 64:
        remedy = "pass x64=True, or cast them to float32: JAX would do so silently"
        raise InputError("arguments of at most 32 bits outside JAX's 64-bit mode", describe(leaf), remedy)
    return leaf if isinstance(leaf, jax.Array) else np.asarray(leaf)


def _program(f: Callable, args: tuple) -> Plain:
    """The program of f; refused if there is none, or nothing in it to differentiate."""
    name = getattr(f, "__name__", type(f).__name__)
    try:
        inspect.signature(f).bind(*args)
    except TypeError as error:
        raise InputError(f"arguments that {name} takes", f"{len(args)} arguments: {error}", "give it its own") from None
    except ValueError:  # it has no signature to be read
        pass
    if not any(is_inexact(leaf) for leaf in jax.tree.leaves(args)):
        remedy = "pass floating arguments, such as 'f32[8]': integers have no gradient"
        raise InputError("at least one floating argument", describe(args), remedy)
    try:
        first, second = (trace(lambda *a: f(*a), *args) for _ in range(2))
    except InputError:
        raise
    except Exception as error:
        remedy = "call it once with these arguments under jax.jit; use jax.numpy, jax.lax.cond and jax.lax.scan inside"
        raise InputError(f"a function that JAX can trace, {name}", said(error), remedy) from error
    effects = sorted({str(effect) for effect in getattr(first.jaxpr, "effects", ())} - CALLBACKS)
    if effects:
        remedy = "take writes to refs, and callbacks in a fixed order, out"
        raise InputError(f"{name} without side effects", ", ".join(effects), remedy)
    if not _alike(first, second):
        received = f"{name} gives another program each time it is traced"
        raise InputError(
            "a pure function of its arguments", received, "pass what it draws, counts or reads as an argument"
        )
    outputs = first.jaxpr.out_avals
    if not any(jnp.issubdtype(aval.dtype, jnp.inexact) for aval in outputs):
        shown = ", ".join(str(aval) for aval in outputs) or "nothing"
        raise InputError(f"at least one floating output of {name}", shown, "return floats; integers have no gradient")
    return first


def _alike(a: Plain, b: Plain) -> bool:
    if _text(a) != _text(b):
        return False
    pairs = zip(a.jaxpr.consts, b.jaxpr.consts, strict=True)
    return all(
        x is y or (is_inexact(x) and np.array_equal(x, y, equal_nan=True)) or not is_inexact(x) for x, y in pairs
    )


def _text(program: Plain) -> str:
    """The program's text, without the addresses of Python's functions in it, which a callback may make anew."""
    return re.sub(r" at 0x[0-9a-f]+", "", str(program.jaxpr))


def _reference(reference: Callable, args: tuple, program: Plain) -> Plain:
    plain = _program(reference, args)
    ours, theirs = ([(a.shape, a.dtype) for a in p.jaxpr.out_avals] for p in (program, plain))
    structure, wanted = (jax.tree.structure(p.shape) for p in (plain, program))
    if structure != wanted or ours != theirs:
        received = f"{theirs} in {structure} for {ours} in {wanted}"
        raise InputError("a reference with the outputs of the function", received, "return the same tree of arrays")
    return plain


def _differentiable(f: Callable, args: tuple, program: Plain) -> None:
    """Refuse a function without custom rules that reverse mode cannot go through."""
    if program.rules:
        return

    def everything(*args):
        y, pullback = jax.vjp(f, *args)
        ones = lambda leaf: jnp.ones_like(leaf) if is_inexact(leaf) else np.zeros(leaf.shape, jax.dtypes.float0)
        return [g for g in jax.tree.leaves(pullback(jax.tree.map(ones, y))) if is_inexact(g)]

    try:
        jax.eval_shape(everything, *args)
    except Exception as error:
        remedy = "give it a jax.custom_vjp, or use jax.lax.scan for a while loop; then check it again"
        raise InputError("a function that JAX can differentiate", said(error), remedy) from error


def _raw(f: Any) -> Callable | None:
    """The rule of a bare `jax.custom_vjp`, to see what it returns before JAX drops, casts or refuses it."""
    if not isinstance(f, jax.custom_vjp) or getattr(f, "nondiff_argnums", None) or getattr(f, "bwd", None) is None:
        return None
    forward, backward = cast(Callable, f.fwd), cast(Callable, f.bwd)

    def raw(args):
        y, residuals = forward(*args)
        return y, lambda dy: tupled(args, backward(residuals, dy))

    def tupled(args, grads):
        if not isinstance(grads, tuple) or len(grads) != len(args):
            received = f"{type(grads).__name__} of {len(grads)}" if hasattr(grads, "__len__") else describe(grads)
            wanted = f"a tuple of {len(args)} cotangents, one an argument"
            raise TypeError(f"bwd is to return {wanted}, and returned a {received}")
        return tuple(_zeros(arg) if grad is None else grad for arg, grad in zip(args, grads, strict=True))

    return raw


def _zeros(arg: Tree) -> Tree:
    """The cotangents that None stands for."""
    return jax.tree.map(lambda leaf: jnp.zeros_like(leaf) if is_inexact(leaf) else None, arg)


def _notes(program: Plain, plain: Plain, reference: Callable | None) -> tuple[str, ...]:
    rules = ", ".join(f"{name} ({count}x)" if count > 1 else name for name, count in program.rules.items())
    notes = [f"custom rules: {rules}" if rules else "no custom rule inside: autodiff is compared with itself"]
    if reference is not None:
        notes = [*notes[: bool(rules)], "autodiff is that of the reference given"]
    elif program.stuck:
        stuck = ", ".join(sorted(program.stuck))
        notes.append(f"a rule inside {stuck} cannot be replaced: autodiff uses it there; give a reference")
    if program.stops:
        notes.append("stop_gradient inside: the numerical oracle sees through it, autodiff does not")
    return tuple(notes)
