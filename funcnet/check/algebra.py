"""What holds for every VJP, whatever its function: it is linear in the cotangent, adjoint to forward mode, and the same
wherever and however often it runs; its gradients match the leaves that they belong to.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.check.judge import as_float64, leaves_of, measure, mismatch, tolerance
from funcnet.check.plain import Program, is_inexact, jaxpr_of
from funcnet.check.report import Failure, said, values_failure
from funcnet.check.slopes import Numerical
from funcnet.check.subject import Point, Values, host, quickly, sharded_like

Tree = Any
ORACLE = "algebra"


def structure(point: Point) -> list[Failure]:
    """Whether every gradient has the kind, shape, dtype, weak type and sharding of its leaf, and integers have none.

    Leaves whose gradient cannot be compared become the point's `broken` ones.
    """

    def probe(pull: Callable) -> Any:
        y, gradients = pull(point.values, point.dys[0])
        return y, gradients, point.named(gradients)

    with point.subject.mode():
        raised = _attempt(lambda: probe(point.compiled.eval_shape))
        raw = _attempt(lambda: probe(partial(jax.eval_shape, point.raw))) if point.subject.raw else None
        if isinstance(raised, Exception) and raw is not None:  # JAX refuses what the rule returned: look at it here
            point.bare, raised = True, raw
    if isinstance(raised, Exception):
        point.raises = True
        point.broken |= set(point.values)
        return [Failure("", ORACLE, "structure", f"the rule raises {said(raised)}")]
    y, gradients, got = raised
    failures = []
    if jax.tree.structure(y) != jax.tree.structure(point.y_shape):
        failures.append(Failure("", ORACLE, "structure", "the rule returns another output than the function"))
    extra = raw[2] if isinstance(raw, tuple) else {}
    for path in [*point.values, *(p for p in {**got, **extra} if p not in point.values)]:
        leaf = point.values.get(path)
        failures += _unlike(path, got.get(path, extra.get(path)), leaf)
        if path in got and leaf is not None and tuple(got[path].shape) == tuple(leaf.shape) and is_inexact(got[path]):
            continue
        point.broken.add(path)
    return failures or _tree_unlike(point, gradients)


def _tree_unlike(point: Point, gradients: Tree) -> list[Failure]:
    """Whether a layer's gradients are the right trees: {} without parameters, None for an integer input.

    For functions JAX checks this itself.
    """
    if not point.subject.layer:
        return []
    got = jax.tree.structure(jax.tree.map(lambda g: None if g.dtype == jax.dtypes.float0 else g, gradients))
    wanted = jax.tree.structure(jax.tree.map(lambda leaf: leaf if is_inexact(leaf) else None, point.subject.args))
    message = f"the gradients (dparams, dx) have the structure {got}, where {wanted} was to be"
    return [] if got == wanted else [Failure("", ORACLE, "structure", message)]


def _attempt(f: Callable[[], Any]) -> Any:
    try:
        return f()
    except Exception as error:
        return error


def _unlike(path: str, got: Any, leaf: Any) -> list[Failure]:
    if problem := mismatch(got, leaf):
        same_shape = got is not None and leaf is not None and tuple(got.shape) == tuple(leaf.shape)
        return [Failure(path, ORACLE, "dtype" if same_shape else "structure", problem)]
    if getattr(got, "weak_type", False) and not getattr(leaf, "weak_type", False):
        return [Failure(path, ORACLE, "weak type", "the gradient is weakly typed, its leaf is not")]
    placed, wanted = (getattr(v, "sharding", None) for v in (got, jax.typeof(leaf)))
    lies = [sharding.spec if sharding is not None else None for sharding in (placed, wanted)]
    if lies[1] is not None and any(axis is not None for axis in lies[1]) and lies[0] != lies[1]:
        return [Failure(path, ORACLE, "sharding", f"the gradient lies as {lies[0]}, its leaf as {lies[1]}")]
    return []


def algebra(point: Point, finder: Numerical) -> list[Failure]:
    """The algebraic checks that need values."""
    failures = [f for oracle in (output, linearity, repeatable, modes, uses) for f in oracle(point)]
    return failures + adjoint(point, finder)


def linearity(point: Point) -> list[Failure]:
    """pull(2 a - 3 b) = 2 pull(a) - 3 pull(b), and pull(0) = 0."""
    a, b = ({k: (np.round(4 * as_float64(v)) / 4).astype(v.dtype) for k, v in dy.items()} for dy in point.dys)
    mixed = {
        k: (2 * as_float64(a[k]) - 3 * as_float64(b[k])).astype(a[k].dtype) for k in a
    }  # multiples of 1/4: exact in any dtype
    laid_out = lambda dy: {k: sharded_like(v, point.outputs[k]) for k, v in dy.items()}
    of_a, of_b, got = (point.gradients(laid_out(dy)) for dy in (a, b, mixed))
    zero = point.gradients(laid_out({k: np.zeros_like(v) for k, v in a.items()}))
    failures = []
    for path in point.sound:
        first, second = as_float64(of_a[path]), as_float64(of_b[path])
        with np.errstate(all="ignore"):
            size = np.abs(2 * first) + np.abs(3 * second)
            finite = np.isfinite(first) & np.isfinite(second)
            most = np.max(size, initial=0.0, where=finite)
            leaf = point.measured(path, got[path], 2 * first - 3 * second, 8.0, most, ~finite)
        if finite.any() and not leaf.within:
            failures.append(values_failure(leaf, ORACLE, "linearity", "of 2 a - 3 b, the gradient"))
        if np.any((as_float64(zero[path]) != 0) & finite):
            failures.append(Failure(path, ORACLE, "zero cotangent", "the gradient of a zero cotangent is not zero"))
    return failures


def repeatable(point: Point) -> list[Failure]:
    """Two calls agree bit for bit, compiled and eagerly: nothing stale, drawn anew or uninitialised is used. And the
    eager gradients agree with the compiled ones."""
    once = lambda: host(point.named(point.pull(*jax.device_put((point.values, point.dys[0])))[1]))
    with point.subject.mode():
        eagerly = [_attempt(once), _attempt(once)]
    if raised := [e for e in eagerly if isinstance(e, Exception)]:
        message = f"without jit the rule raises {said(raised[0])}"
        return [Failure("", ORACLE, "eager", message)]
    failures = [
        Failure(path, ORACLE, "repeatable", f"two {how} calls with the same arguments give different gradients")
        for how, a, b in (("compiled", point.gradients(point.dys[0]), point.rule[0]), ("eager", *eagerly))
        for path in point.sound
        if not _identical(a[path], b[path])
    ]
    return failures or _differences(point, "eager", [(k, eagerly[0][k], point.rule[0][k]) for k in point.sound])


def _identical(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=True)


def adjoint(point: Point, finder: Numerical) -> list[Failure]:
    """<u, J v> = <pull(u), v> by forward mode through the plain program in float64, v in one leaf at a time."""

    def push(values, tangents):
        return jax.jvp(lambda v: point.outputs_of(v, True), (values,), (tangents,))

    values: Values = point.values
    failures = []
    forward = quickly(push)
    for path in point.sound:
        v = {k: np.zeros(np.shape(x)) for k, x in values.items()} | point.draw({path: as_float64(values[path])})
        try:
            with jax.enable_x64(True):
                out = forward(point.in_float64(values), point.in_float64(v))[1]
        except Exception as error:
            point.notes.append(f"forward mode is not to be had: {said(error)}")
            return []
        gradient, terms = as_float64(point.rule[0][path]), [_pairing(point.dys[0][k], out[k]) for k in out]
        by_forward, size = sum(t for t, _ in terms), sum(s for _, s in terms)
        if not np.isfinite(gradient).all() or not np.isfinite(by_forward):
            continue
        ours = _pairing(gradient, v[path])[0]
        rooms = (np.linalg.norm((room * np.abs(v[path])).ravel()) for room in point.rooms(path))
        near = any(abs(ours - by_forward) <= 2 * room + 2.0**-40 * size for room in rooms)
        if not near and not _excused(finder, path, v[path], by_forward):
            message = f"<pull(u), v> is {ours:.9g} by the rule, <u, J v> is {by_forward:.9g} by forward mode"
            failures.append(Failure(path, ORACLE, "adjoint", message, (), ours, by_forward))
    return failures


def _excused(finder: Numerical, path: str, v: Any, by_forward: float) -> bool:
    """Forward mode cannot judge at a kink, nor where the numerical slope is the rule's and not its own."""
    return finder.slope(path, v).kind != "smooth" or finder.backs(path, v, by_forward)


def _pairing(a: Any, b: Any) -> tuple[float, float]:
    """<a, b> as JAX pairs cotangents with tangents, and the size of its terms."""
    a, b = as_float64(a), as_float64(b)
    with np.errstate(all="ignore"):
        terms = np.where((a == 0) | (b == 0), 0, a * b)
        return float(np.real(terms.sum())), float(np.abs(terms).sum())


def modes(point: Point) -> list[Failure]:
    """The gradients are the same under vmap over a new axis of examples and in the body of a scan.

    Both are tried in one program, a scan of a vmap; only where that fails is each tried alone, to tell which it is.
    """
    pull = lambda v, dy: {k: g for k, g in point.named(point.pull(v, dy)[1]).items() if k in point.sound}
    scan = lambda f: lambda *given: jax.lax.scan(lambda carry, each: (carry, f(*each)), None, given)[1]

    def tried(way: str, mapped: Any, places: Any) -> list[Failure]:
        given, at = _stacked(point.pair, places), np.asarray(places)
        got = _attempt(lambda: host(quickly(mapped)(*given)))
        if isinstance(got, Exception):
            return [Failure("", ORACLE, way, f"under {way} the rule raises {said(got)}")]
        pairs = [(k, g[i], wanted[at[i]][k]) for k, g in got.items() for i in np.ndindex(at.shape)]
        return _differences(point, way, pairs)

    wanted = [point.gradients(dy, values) for values, dy in point.pair]
    with point.subject.mode():
        together = tried("scan of vmap", scan(jax.vmap(pull)), ((0, 1), (1, 0)))
        if not together:
            return []
        failures = (tried("vmap", jax.vmap(pull), (0, 1)) + tried("scan", scan(pull), (0, 1))) or together
        raised = [failure for failure in failures if not failure.leaf]
        if not raised or _mappable(point):
            return failures
    point.notes += [f"{failure.message}; the plain program does not run under vmap either" for failure in raised]
    return [failure for failure in failures if failure.leaf]


def _mappable(point: Point) -> bool:
    """Whether the plain program runs under vmap: a rule need not if that does not."""
    plain = jax.vmap(lambda values, dy: point.vjp(values, dy, False)[1])
    return not isinstance(_attempt(lambda: jax.eval_shape(plain, *_stacked(point.pair, (0, 1)))), Exception)


def _stacked(points: Sequence[Any], places: Any) -> Any:
    """The trees of the points that `places` numbers, stacked in the way in which `places` is nested."""
    if isinstance(places, int):
        return points[places]
    stack = lambda *leaves: np.stack(leaves) if isinstance(leaves[0], np.ndarray) else jnp.stack(leaves)
    return jax.tree.map(stack, *(_stacked(points, each) for each in places))  # NumPy has nothing to compile


def uses(point: Point) -> list[Failure]:
    """If the function is used twice before either use is differentiated, no gradient of one use may depend on the
    arguments of the other: what a rule keeps outside the residuals is the other's by then. The traced program shows it;
    where that is in order, values are compared without jit, since what is kept on the host is in no program.
    """
    way, rule = "two uses", point.by_rule

    def used(*points):
        pullbacks = [rule(jax.tree.unflatten(point.structure, leaves))[1] for leaves, _ in points]
        named = [point.named(pull(point.cotangent(dy))) for pull, (_, dy) in zip(pullbacks, points, strict=True)]
        return [{path: gradients[path] for path in point.sound} for gradients in named]

    with point.subject.mode():
        pair = jax.device_put([(point.args(values), dy) for values, dy in point.pair])
        program = _attempt(lambda: jaxpr_of(used, *pair))
        alone = _attempt(lambda: [host(used(each)[0]) for each in pair])
        got = _attempt(lambda: used(*pair))
    if not isinstance(program, Exception):
        message = "used twice, its gradient depends on the arguments of the other use: keep them in the residuals"
        if mixed := _mixed(program, point.sound, len(jax.tree.leaves(pair[0]))):
            return [Failure(path, ORACLE, way, message) for path in mixed]
        if isinstance(alone, Exception):  # it is out of bounds, or needs jit: two uses are not the cause
            return []
    for error in (program, got):
        if isinstance(error, Exception):
            return [Failure("", ORACLE, way, f"used twice, the rule raises {said(error)}")]
    return _differences(point, way, [(k, np.asarray(g[k]), of[k]) for g, of in zip(got, alone, strict=True) for k in g])


def _mixed(program: Program, sound: Sequence[str], leaves: int) -> list[str]:
    """Paths of the gradients of two uses, one after the other, that depend on the other use's `leaves` leaves."""
    of_first, of_second = program.reached(range(leaves)), program.reached(range(leaves, 2 * leaves))
    places = {path: i for i, path in enumerate(sorted(sound))}  # in the order in which a dict is flattened
    return [path for path, i in places.items() if i in of_second or len(sound) + i in of_first]


def _differences(point: Point, way: str, pairs: list[tuple[str, np.ndarray, np.ndarray]]) -> list[Failure]:
    failures = {}
    for path, got, wanted in pairs:
        if mismatch(got, wanted):
            failures[path] = Failure(path, ORACLE, way, mismatch(got, wanted) + f" under jit, by {way}")
            continue
        leaf = point.measured(path, got, wanted, 2.0)
        if not leaf.within:
            failures.setdefault(path, values_failure(leaf, ORACLE, way, f"by {way} the gradient"))
    return list(failures.values())


def output(point: Point) -> list[Failure]:
    """The rule's forward pass gives the function's own output."""
    with point.subject.mode():
        y = leaves_of(point.compiled(point.values, point.dys[0])[0], "y")
    failures = []
    for path, wanted in point.plain_output.items():
        got, allowed = np.asarray(y[path]), 4 * tolerance(y[path].dtype, point.terms)
        leaf = measure(path, got, wanted, allowed)
        if not leaf.within:
            leaf = measure(path, got, wanted, allowed, point.baseline_output_error[path])
        if not leaf.within:
            failures.append(values_failure(leaf, ORACLE, "output", "with its rule, the function's output"))
    return failures
