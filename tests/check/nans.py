"""Which operations of a program make a NaN, also one that is overwritten later, as `jax.debug_nans` would stop at.

The program is run once, compiled, with one more output for every operation: whether there is a NaN in what it gives.
That is stricter than `jax.debug_nans`, which does not look inside of what is compiled, and much faster. A constant may
be NaN, for what is out of range; what depends on an input may not.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core

from funcnet.check.subject import quickly

INNER = ("jaxpr", "call_jaxpr", "fun_jaxpr")


@dataclass
class Watch:
    """Flags, and what each is about: an operation's name and the line that asked for it."""

    flags: list[Any] = field(default_factory=list)
    names: list[str] = field(default_factory=list)

    def look(self, equation: Any, values: list[Any]) -> None:
        for value in values:
            if jnp.issubdtype(jnp.result_type(value), jnp.inexact):
                self.flags.append(jnp.any(jnp.isnan(value)))
                frames = [str(frame) for frame in equation.source_info.traceback.frames if "/funcnet/" in str(frame)]
                self.names.append(f"{equation.primitive.name} at {frames[0] if frames else 'unknown'}")


def run(jaxpr: Any, consts: Any, args: list[Any], varies: list[bool], watch: Watch) -> tuple[list[Any], list[bool]]:
    """The program's outputs, and whether each depends on an input."""
    env: dict[Any, tuple[Any, bool]] = {}
    read = lambda atom: (atom.val, False) if isinstance(atom, core.Literal) else env[atom]
    env |= {var: (value, False) for var, value in zip(jaxpr.constvars, consts, strict=True)}
    env |= {var: pair for var, *pair in zip(jaxpr.invars, args, varies, strict=True)}
    for equation in jaxpr.eqns:
        values, moving = map(list, zip(*map(read, equation.invars), strict=True)) if equation.invars else ([], [])
        inner = next((equation.params[name] for name in INNER if name in equation.params), None)
        if equation.primitive.name == "scan":
            outputs, depends = scanned(equation, values, moving, watch)
        elif inner is not None and equation.primitive.name not in ("while", "cond"):
            closed = inner if isinstance(inner, core.ClosedJaxpr) else core.ClosedJaxpr(inner, ())
            outputs, depends = run(closed.jaxpr, closed.consts, values, moving, watch)
        else:
            bound = equation.primitive.bind(*values, **equation.primitive.get_bind_params(equation.params))
            outputs = bound if equation.primitive.multiple_results else [bound]
            depends = [any(moving)] * len(outputs)
            if any(moving):
                watch.look(equation, outputs)
        env |= {var: pair for var, *pair in zip(equation.outvars, outputs, depends, strict=True)}
    outputs, depends = zip(*map(read, jaxpr.outvars), strict=True) if jaxpr.outvars else ((), ())
    return list(outputs), list(depends)


def scanned(equation: Any, values: list[Any], moving: list[bool], watch: Watch) -> tuple[list[Any], list[bool]]:
    """A scan, in which every turn says what it has seen."""
    params, closed = equation.params, equation.params["jaxpr"]
    of_one_rank = lambda outer, inner: sum(a.aval.ndim == b.aval.ndim for a, b in zip(outer, inner, strict=True))
    carry = of_one_rank(equation.invars, closed.jaxpr.invars)  # what it goes over has an axis more outside
    carried = of_one_rank(equation.outvars, closed.jaxpr.outvars)
    consts = carry - carried
    inside = Watch()

    def body(state, each):
        inside.flags, inside.names = [], []
        depends = moving[:consts] + [True] * (len(closed.jaxpr.invars) - consts)
        outputs, _ = run(closed.jaxpr, closed.consts, [*values[:consts], *state, *each], depends, inside)
        return outputs[:carried], (outputs[carried:], inside.flags)

    state, (stacked, flags) = jax.lax.scan(
        body, values[consts:carry], values[carry:], length=params["length"], reverse=params["reverse"]
    )
    watch.flags += [jnp.any(flag) for flag in flags]
    watch.names += inside.names
    return [*state, *stacked], [True] * (len(state) + len(stacked))


def born(f: Callable, *args: Any) -> list[str]:
    """Operations of f(*args) whose result has a NaN in it."""
    closed = jax.make_jaxpr(f)(*args)
    watch = Watch()

    def watched(*leaves):
        watch.flags, watch.names = [], []
        run(closed.jaxpr, closed.consts, list(leaves), [True] * len(leaves), watch)
        return watch.flags

    flags = quickly(watched)(*jax.tree.leaves(args))
    return [name for name, flag in zip(watch.names, flags, strict=True) if flag]
