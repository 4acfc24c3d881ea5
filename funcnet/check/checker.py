"""`check_layer` and `check_vjp`: a rule at a random point, judged by every oracle."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError
from funcnet._internal.expect import count, floating_dtype
from funcnet.check import algebra, laws
from funcnet.check.autodiff import autodiff
from funcnet.check.diagnosis.diagnose import diagnose
from funcnet.check.diagnosis.wrong_leaf import Context
from funcnet.check.function import function
from funcnet.check.judge import Leaf, as_float64, blank, leaves_of
from funcnet.check.layer import layer_at
from funcnet.check.numerical import numerical
from funcnet.check.report import Report
from funcnet.check.shrink import as_code, smallest
from funcnet.check.slopes import Numerical
from funcnet.check.spec import settled, specs
from funcnet.check.subject import Point, Subject
from funcnet.layer import Layer, a_layer

Tree = Any
ORACLES = ("autodiff", "numerical", "algebra", "residuals", "laws")


def check_layer(
    layer: Layer,
    x: Any,
    *,
    params: Tree = None,
    state: Tree = None,
    dtype: Any = "float64",
    oracles: Sequence[str] = ORACLES,
    seed: int = 0,
    directions: int = 3,
    shrink: bool = True,
) -> Report:
    """Is `layer.bwd` the VJP of `layer.fwd`, and is the layer true to its laws?

    The oracles, each of which judges by itself:

    autodiff    reverse mode through the output of `fwd`, without custom rules, in float64, element by element
    numerical   extrapolated finite differences in float64 along random directions, with kinks told apart
    algebra     adjoint to forward mode, linear in dy, the same eagerly and under jit, vmap and scan, repeatable, two
                uses independent; structure, shape, dtype, weak type and sharding of every gradient
    residuals   law 6: arrays only, dependent on the input, untouched by bwd; their bytes are noted
    laws        laws 2 and 3, and that the contractions agree with each other

    Args:
        layer: any `Layer`; a loss is a layer over (prediction, target).
        x: its input: arrays, `jax.ShapeDtypeStruct`s or texts such as "f32[8,16]" and "i32[8]<10" to be drawn
            (`funcnet.check.spec`), or a pytree of them.
        params, state: given as x is; by default from `init`. Default parameters are made for x in float32, where the
            layer takes it, then cast and moved at random, so that no zero bias or unit scale hides a mistake.
        dtype: floating arrays are cast to it; float64 runs in JAX's 64-bit mode. Half precision is judged against
            float64, and by the accuracy that autodiff reaches in that dtype. Give "float32" for a layer that takes
            nothing else.
        oracles: which of the five to ask.
        seed: of everything that is drawn: sizes, input, parameters, cotangents, and the key given to `fwd`.
        directions: how many random directions to try in each leaf.
        shrink: whether to look for a smaller shape that fails as well.

    Returns:
        A `Report` with leaves `params[..]` and `x..`, worst first.

    Raises:
        InputError: for a point that the layer cannot be checked at.
    """
    a_layer(layer)
    dtype = floating_dtype(dtype)

    def build(tree):
        return layer_at(layer, tree["x"], tree.get("params"), tree.get("state"), dtype, seed)

    def line(tree):
        given = "".join(f", {name}={as_code(tree[name], name)}" for name in ("params", "state") if name in tree)
        given += "" if dtype == jnp.float64 else f', dtype="{dtype}"'
        return f"fn.check_layer(layer, {as_code(tree['x'], 'x')}{given}, {_draws(seed, directions)})"

    point = {"x": x, "params": params, "state": state}
    tree = settled(specs({name: each for name, each in point.items() if each is not None}), seed)
    title = f"{layer.name}: its bwd against its fwd, {dtype}, seed {seed}"
    return checked(build, tree, line, title, oracles, seed, directions, shrink)


def check_vjp(
    f: Callable,
    *args: Any,
    reference: Callable | None = None,
    oracles: Sequence[str] = ORACLES[:3],
    seed: int = 0,
    directions: int = 3,
    x64: bool = False,
    shrink: bool = True,
) -> Report:
    """Is the VJP that JAX gives for f, custom rules inside it included, the derivative of f?

    The oracles are those of `check_layer`, less the last two. Autodiff differentiates `reference`, or else f with every
    `jax.custom_vjp` and `jax.custom_jvp` in it replaced by the function that carries it, inside jit, scan, cond, remat
    and each other; the notes say which rules were replaced.

    Args:
        f: any JAX function of pytrees. A callback in it (`jax.pure_callback`, `io_callback`) is called with its own
            dtypes, as often as an oracle needs, and judged numerically, since JAX has no derivative of it.
        *args: its arguments: arrays, `jax.ShapeDtypeStruct`s or texts such as "f32[8,16]" to be drawn, or pytrees of
            them. Numbers have to be given as arrays.
        reference: another function with the same values, differentiable by JAX: for a rule that cannot be looked into,
            such as that of a Pallas kernel.
        oracles, seed, directions, shrink: as for `check_layer`.
        x64: run f in JAX's 64-bit mode, its floating arguments cast to float64.

    Returns:
        A `Report` whose leaves are named as `jax.tree_util.keystr` names them in the tuple of arguments: `[1]`,
        `[0]['bias']`.

    Raises:
        InputError: if f cannot be called with these arguments, has no floating output or argument, has side effects, or
            cannot be differentiated.
    """
    name = getattr(f, "__name__", type(f).__name__)
    called = name if name.isidentifier() else "f"

    def build(tree):
        return function(f, tree, reference, x64, seed)

    def line(tree):
        options = ", x64=True" * x64 + ", reference=reference" * (reference is not None)
        shown = "".join(f", {as_code(arg, f'args[{i}]')}" for i, arg in enumerate(tree))
        return f"fn.check_vjp({called}{shown}, {_draws(seed, directions)}{options})"

    return checked(
        build, settled(specs(args), seed), line, f"{name}: its VJP, seed {seed}", oracles, seed, directions, shrink
    )


def _draws(seed: int, directions: int) -> str:
    return f"seed={seed}" + ("" if directions == 3 else f", directions={directions}")


def checked(
    build: Callable[[Tree], Subject],
    tree: Tree,
    line: Callable[[Tree], str],
    title: str,
    oracles: Sequence[str],
    seed: int,
    directions: int,
    shrink: bool,
) -> Report:
    """The report on what `build` makes of a tree of specs and arrays; a failure is shrunk and shows its `line`."""
    directions = count(directions, "directions")
    with jax.debug_key_reuse(False):  # every oracle runs the rule with the same key, on purpose
        report = replace(examine(build(tree), oracles, seed, directions), title=title)
        if report.ok:
            return report
        if shrink:
            wrong = {failure.oracle for failure in report.failures}
            again = [oracle for oracle in oracles if oracle in wrong] or oracles[:1]
            tree = smallest(tree, lambda smaller: not examine(build(smaller), again, seed, 1, False).ok)
    return replace(report, repeat=line(tree), smallest=tree)


def examine(subject: Subject, oracles: Sequence[str], seed: int, directions: int, explain: bool = True) -> Report:
    """Ask the oracles about a subject at its point."""
    known = ORACLES if subject.layer else ORACLES[:3]
    if not isinstance(oracles, (tuple, list)) or not oracles or not set(oracles) <= set(known):
        raise InputError(f"oracles among {', '.join(known)}", repr(oracles), "name them in a tuple")
    point = Point(subject, seed, directions)
    point.notes += subject.notes
    failures = algebra.structure(point)
    verdicts: dict[str, dict[str, str]] = {}
    leaves = [blank(path, point.values.get(path), {}) for path in sorted(point.broken)]
    if point.sound:
        finder = Numerical(point)
        rows, words, found = autodiff(point, finder, "autodiff" in oracles)
        leaves += rows
        if "autodiff" in oracles:
            verdicts["autodiff"], failures = words, failures + found
        if "numerical" in oracles:
            verdicts["numerical"], found = numerical(point, finder)
            failures += found
        if "algebra" in oracles:
            failures += algebra.algebra(point, finder)
    if "residuals" in oracles and subject.layer:
        failures += laws.residuals(point)
    if "laws" in oracles and subject.layer:
        failures += laws.laws(point)
    if "algebra" in oracles:
        verdicts["algebra"] = dict.fromkeys(point.sound, "ok")
    for failure in failures:  # a structural failure counts whatever was asked for
        verdicts.setdefault(failure.oracle, {})[failure.leaf] = "WRONG"
    shown = [oracle for oracle in ("autodiff", "numerical", "algebra", "laws") if oracle in verdicts]
    leaves = [replace(leaf, verdicts={o: verdicts[o].get(leaf.leaf, "-") for o in shown}) for leaf in leaves]
    arrays = {path: (point.rule[k][path], point.references[k][path]) for path, k in point.shown.items()}
    if explain and failures:
        leaves = _explained(point, leaves, {failure.leaf for failure in failures if failure.kind == "repeatable"})
    return Report(
        subject.title,
        tuple(sorted(leaves, key=Leaf.badness)),
        tuple(failures),
        tuple(dict.fromkeys(point.notes)),
        tuple(oracles),
        arrays=arrays,
    )


def _explained(point: Point, leaves: list[Leaf], unsteady: set[str]) -> list[Leaf]:
    """The leaves, the wrong ones with their diagnoses, except those whose gradients differ from call to call."""
    arrays = {path: as_float64(leaf) for path, leaf in point.values.items()}
    with point.subject.mode():
        y = leaves_of(point.subject.plain(*point.args(point.values), double=False), "y")
    arrays |= {path: np.asarray(y[path]) for path in point.outputs}
    explained = []
    for leaf in leaves:
        k = point.shown.get(leaf.leaf, 0)
        known, got = point.references[k] if point.reverses else {}, point.gotten[k]
        if not leaf.ok and leaf.leaf not in unsteady and leaf.leaf in known and leaf.leaf in got:
            dy = point.dys[k]
            given = arrays | {"d" + path: v for path, v in dy.items()}
            context = Context(known, given, dy, point.reference, point.gradients)
            leaf = replace(leaf, diagnosis=diagnose(leaf, got[leaf.leaf], known[leaf.leaf], context))
        explained.append(leaf)
    return explained
