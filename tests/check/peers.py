"""The wrong rules put to other gradient checkers, each called as its documentation says.

check_grads         `jax.test_util.check_grads(f, args, order=1, modes=("rev",))`, in float32 and in 64-bit mode
chex                `chex.assert_numerical_grads(f, args, order=1, modes=("rev",))`, in float32
gradcheck           `torch.autograd.gradcheck(f, args)` in float64, the JAX function and its VJP in an autograd.Function

Arguments that are not floating are bound; a layer is given as a `jax.custom_vjp` made of its fwd and bwd.
"""

from collections.abc import Callable, Sequence
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import torch
from jax.test_util import check_grads
from torch.autograd.gradcheck import GradcheckError

import funcnet as fn
from funcnet.check.spec import drawn, settled, specs
from tests.check.rules import Right, Wrong

NOTES = """\
"jax": JAX itself raises an error when the rule is used, whichever checker calls it; counted as refused.
"n/a": the checker cannot be asked. It sees a function and its VJP, not `apply`, the state, what the residuals hold or
the contractions of a layer, and no integer arguments; gradcheck takes float64 and complex128, not half precision."""


def compared(wrongs: Sequence[Wrong], rights: Sequence[Right]) -> str:
    """A table with a row for each wrong rule, in Markdown, and totals below."""
    rows = [(wrong.name, *_by_funcnet(wrong), *_by_others(wrong)) for wrong in wrongs]
    head = ("wrong rule", "funcnet", "right leaf", "named", *PEERS)
    table = ["| " + " | ".join(cells) + " |" for cells in (head, ("---",) * len(head), *rows)]
    return "\n".join([*table, "", NOTES, "", *_totals(head, rows), "", *_false_alarms(rights)])


def _by_funcnet(wrong: Wrong) -> tuple[str, str, str]:
    report = wrong.check()
    said = "\n".join([leaf.diagnosis for leaf in report.leaves] + [failure.message for failure in report.failures])
    leaf = {failure.leaf for failure in report.failures} == wrong.blamed
    return _word(not report.ok), _word(leaf), _word(bool(wrong.says) and wrong.says in said)


def _word(refused: bool) -> str:
    return "yes" if refused else "**no**"


def _by_others(subject: Wrong | Right) -> list[str]:
    return [_asked(name, subject) if _can_see(name, subject) else "n/a" for name in PEERS]


def _can_see(name: str, subject: Wrong | Right) -> bool:
    right = subject.right if isinstance(subject, Wrong) else subject
    if name == "gradcheck" and "f16" in str(right.args):
        return False
    if not isinstance(subject, Wrong):
        return True
    leaves = jax.tree_util.tree_leaves_with_path(_drawn(right))
    whole = {jax.tree_util.keystr(path) for path, leaf in leaves if not _inexact(leaf)}
    return subject.oracle not in ("laws", "residuals") and not subject.blamed <= whole


def _asked(name: str, subject: Wrong | Right) -> str:
    check, x64 = PEERS[name]
    right = subject.right if isinstance(subject, Wrong) else subject
    with jax.enable_x64(x64):
        try:
            check(*bound(right, subject.rule, x64))
        except (AssertionError, GradcheckError):
            return "yes"
        except Exception:
            return "jax"
    return "**no**"


def bound(right: Right, rule: Any, x64: bool) -> tuple[Callable, list]:
    """The ruled function of its floating arguments alone, and their values."""
    leaves, structure = jax.tree.flatten(_drawn(right))
    places = [i for i, leaf in enumerate(leaves) if _inexact(leaf)]
    f = _function(rule, right.options.get("state", ())) if isinstance(rule, fn.Layer) else rule

    def of_floats(*values):
        given = list(leaves)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        return f(*jax.tree.unflatten(structure, given))

    return of_floats, [jnp.asarray(leaves[i], _dtype(leaves[i].dtype, x64)) for i in places]


def _drawn(right: Right) -> tuple:
    return drawn(settled(specs(right.args), 0), 0)


def _inexact(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)


def _dtype(dtype: Any, x64: bool) -> Any:
    if jnp.finfo(dtype).bits < 32:
        return dtype
    return jnp.result_type(dtype, jnp.float64 if x64 else jnp.float32)


def _function(layer: fn.Layer, state: Any) -> Callable:
    """A layer as a function of its parameters and its input, with its bwd as the rule."""
    key = jax.random.key(0)
    run = lambda params, x: layer.fwd(params, jax.tree.map(jnp.asarray, state), x, key)
    f = jax.custom_vjp(lambda params, x: run(params, x)[0])

    def fwd(params, x):
        y, _, residuals = run(params, x)
        return y, (params, residuals)

    f.defvjp(fwd, lambda saved, dy: layer.bwd(*saved, dy))
    return f


def _gradcheck(f: Callable, args: list) -> None:
    torch.autograd.gradcheck(_Wrapped.of(f), [torch.tensor(np.asarray(arg), requires_grad=True) for arg in args])


class _Wrapped(torch.autograd.Function):
    """A JAX function and its VJP for PyTorch, by way of NumPy; cotangents are conjugated as PyTorch has them."""

    @staticmethod
    def of(f):
        return lambda *args: _Wrapped.apply(f, *args)

    @staticmethod
    def forward(ctx, f, *args):
        ctx.f = f
        ctx.save_for_backward(*args)
        y = jax.tree.map(lambda v: torch.tensor(np.asarray(v)), f(*map(_array, args)))
        return tuple(jax.tree.leaves(y)) if isinstance(y, (tuple, list, dict)) else y

    @staticmethod
    def backward(ctx, *dys):
        args = [_array(tensor) for tensor in ctx.saved_tensors]
        y, pullback = jax.vjp(ctx.f, *args)
        dy = jax.tree.unflatten(jax.tree.structure(y), [jnp.conj(_array(dy)) for dy in dys])
        return None, *(
            torch.tensor(np.asarray(jnp.conj(g), arg.dtype)) for g, arg in zip(pullback(dy), args, strict=True)
        )


def _array(tensor: Any) -> Any:
    return jnp.asarray(tensor.detach().numpy())


PEERS: dict[str, tuple[Callable, bool]] = {
    "check_grads": (lambda f, args: check_grads(f, args, order=1, modes=("rev",)), False),
    "check_grads, x64": (lambda f, args: check_grads(f, args, order=1, modes=("rev",)), True),
    "chex": (lambda f, args: chex.assert_numerical_grads(f, args, order=1, modes=("rev",)), False),
    "gradcheck": (_gradcheck, True),
}


def _totals(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> list[str]:
    lines = []
    for i, name in enumerate(head[1:], 1):
        cells = [row[i] for row in rows if row[i] != "n/a"]
        what = {"right leaf": "funcnet blames the right leaf in", "named": "funcnet names the mistake in"}
        refused = sum(cell in ("yes", "jax") for cell in cells)
        lines.append(f"- {what.get(name, f'{name} refuses')} {refused} of {len(cells)}")
    return lines


def _false_alarms(rights: Sequence[Right]) -> list[str]:
    """How many of the right rules each refuses, and which."""
    found = {"funcnet": [right.name for right in rights if not right.check(right.rule).ok]}
    answers = {right.name: _by_others(right) for right in rights}
    for i, peer in enumerate(PEERS):
        found[peer] = [name for name, words in answers.items() if words[i] in ("yes", "jax")]
    return [
        f"- {name} refuses {len(names)} of the {len(rights)} right rules" + f": {', '.join(names)}" * bool(names)
        for name, names in found.items()
    ]
