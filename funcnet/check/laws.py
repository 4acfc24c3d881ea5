"""What a layer has to keep besides a correct `bwd`: the laws of its residuals, `apply`, state and contractions."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal.errors import InputError, describe
from funcnet.check.judge import as_float64, leaves_of, measure, tolerance
from funcnet.check.plain import jaxpr_of
from funcnet.check.report import Failure, said, values_failure
from funcnet.check.subject import Point, Values, host, quickly, sharded_like
from funcnet.combinators.packed import UNTOLD, Packed
from funcnet.gradients.contraction import (
    Rows,
    contraction,
    keep,
    per_example,
    rows,
    squared_norm,
    total,
)
from funcnet.gradients.factor import Use, is_factor

Tree = Any
BLIND = [f"a {kind.__name__}" for kind in (*UNTOLD, Use)]  # of which `packed` may not know what is whose


def residuals(point: Point) -> list[Failure]:
    """Law 6: residuals are arrays, depend on the input, and on no dy. Their bytes are noted."""
    layer, state, key = point.subject.layer, point.subject.state, point.subject.key
    with point.subject.mode():
        params, x = jax.device_put(point.subject.args)
        if strange := _strange(point):
            return strange
        before = layer.fwd(params, state, x, key)
        if not point.raises:
            layer.bwd(params, before[2], jax.device_put(point.cotangent(point.dys[1])))
        after = layer.fwd(params, state, x, key)
        of_params = _of_params(point, before[2])
    failures = [
        Failure(
            f"residuals{path}", "residuals", "parameters", "depends on parameters alone, which bwd is handed anyway"
        )
        for path in of_params
    ]
    if changed := _changed(before[2], after[2]):
        message = "two calls of fwd with the same key, before and after calls of bwd, give different residuals"
        failures.append(Failure(f"residuals{changed}", "residuals", "repeatable", message))
    elif _changed(before[:2], after[:2]):
        message = "two calls of fwd with the same key give different outputs or states"
        failures.append(Failure("", "residuals", "repeatable", message))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(before[2]))
    point.notes.append(f"residuals: {size:,} bytes in {len(jax.tree.leaves(before[2]))} arrays")
    return failures


def _strange(point: Point) -> list[Failure]:
    """Residuals that are no arrays: such could not even pass through jit."""
    found: list[Any] = []

    def outputs(params, state, x, key):
        y, new_state, residuals = point.subject.layer.fwd(params, state, x, key)
        found.extend(jax.tree_util.tree_leaves_with_path(residuals))
        return y, new_state

    params, x = point.subject.args
    jax.eval_shape(outputs, params, point.subject.state, x, point.subject.key)
    return [
        Failure(
            f"residuals{jax.tree_util.keystr(path)}", "residuals", "not an array", f"is {describe(leaf)}, not an array"
        )
        for path, leaf in found
        if not isinstance(leaf, jax.Array)
    ]


def _of_params(point: Point, residuals: Tree) -> list[str]:
    """Paths of the residuals that depend on params and not on x, by following both through the program."""
    subject = point.subject
    program = jaxpr_of(lambda params, x: subject.layer.fwd(params, subject.state, x, subject.key)[2], *subject.args)
    split = len(jax.tree.leaves(subject.args[0]))
    of_params, of_x = (program.reached(part) for part in (range(split), range(split, len(point.leaves))))
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(residuals)]
    return [path for i, path in enumerate(paths) if i in of_params and i not in of_x]


def _changed(a: Tree, b: Tree) -> str | None:
    """The path of the first leaf that is not bit for bit the same."""
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        if not np.array_equal(_bits(x), _bits(y), equal_nan=jnp.issubdtype(x.dtype, jnp.inexact)):
            return jax.tree_util.keystr(path)
    return None


def _bits(v: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)


def laws(point: Point) -> list[Failure]:
    """Laws 2 and 3 (apply, state), and the contractions."""
    with point.subject.mode():
        return [*_state(point), *_apply(point), *_contractions(point)]


def _state(point: Point) -> list[Failure]:
    subject = point.subject
    (params, x), state = subject.args, subject.state
    new = jax.eval_shape(lambda *args: subject.layer.fwd(*args)[1], params, state, x, subject.key)
    like = [
        (jax.tree.structure(s), [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(s)])
        for s in (state, new)
    ]
    if like[0] == like[1]:
        return []
    return [Failure("", "laws", "state", f"fwd returned the state {like[1][1]} for {like[0][1]}")]


def _apply(point: Point) -> list[Failure]:
    """apply equals fwd's output where there is no state and nothing is drawn; else it has its shapes and dtypes."""
    subject = point.subject
    (params, x), state, layer = subject.args, subject.state, subject.layer
    shapes = jax.eval_shape(layer.apply, params, state, x)
    if describe(shapes) != describe(point.y_shape):
        return [Failure("", "laws", "apply", f"apply returns {describe(shapes)}, fwd {describe(point.y_shape)}")]
    if jax.tree.leaves(state) or _draws(point):
        return []
    both = quickly(lambda *args: (layer.apply(*args), layer.fwd(*args, subject.key)[0]))
    applied, run = (host(leaves_of(y, "y")) for y in both(params, state, x))
    failures = []
    for path in point.outputs:
        got, wanted, allowed = applied[path], run[path], 4 * tolerance(run[path].dtype, point.terms)
        leaf = measure(path, got, wanted, allowed)
        if not leaf.within:
            leaf = measure(path, got, wanted, allowed, point.baseline_output_error[path])
        if not leaf.within:
            failures.append(values_failure(leaf, "laws", "apply", "by apply, the output"))
    return failures or _positionwise(point, run, both)


def _positionwise(point: Point, run: Values, both: Any) -> list[Failure]:
    """Of a layer that looks at each position alone: whether the first and last outputs are the same beside others."""
    (params, x), layer = point.subject.args, point.subject.layer
    of_features = lambda leaf: jnp.issubdtype(leaf.dtype, jnp.floating)
    if not layer.positionwise or any(leaf.ndim < 2 + of_features(leaf) for leaf in jax.tree.leaves(x)):
        return []
    rows = jax.tree.leaves(x)[0].shape[:2]
    for path, y in run.items():
        if y.shape[:2] != rows:
            message = f"Layer.positionwise is True, but the output {describe(y)} has not the positions {list(rows)}"
            return [Failure(path, "laws", "positionwise", message)]
    for at in (0, -1):
        moved = jax.tree.map(lambda leaf, at=at: jnp.roll(leaf, 1, axis=1).at[:, at].set(leaf[:, at]), x)
        beside = host(leaves_of(both(params, point.subject.state, moved)[1], "y"))
        for path in point.outputs:
            got, wanted = beside[path][:, at], run[path][:, at]
            if not measure(path, got, wanted, 4 * tolerance(wanted.dtype, point.terms)).within:
                message = "Layer.positionwise is True, but the output at a position depends on x at others"
                return [Failure(path, "laws", "positionwise", message)]
    return []


def _draws(point: Point) -> bool:
    """Whether fwd's output depends on its key."""
    subject = point.subject
    program = jaxpr_of(
        lambda key, args: subject.layer.fwd(args[0], subject.state, args[1], key)[0], subject.key, subject.args
    )
    return bool(program.reached([0]))


def _contractions(point: Point) -> list[Failure]:
    """keep, rows, per_example and squared_norm agree with total, and an example's gradient is that of its own dy."""
    layer, (params, x) = point.subject.layer, point.subject.args
    if not jax.tree.leaves(params) or any(path.startswith("params") for path in point.broken):
        return []
    dy = host(point.dys[0])
    count, last = _examples(point, dy)

    refused: dict[str, InputError] = {}

    def all_of_them(params, x):
        residuals = layer.fwd(params, point.subject.state, x, point.subject.key)[2]
        given = jax.tree.map(jnp.asarray, point.cotangent(dy))  # NumPy would promote bfloat16
        by = lambda contract: layer.bwd(params, residuals, given, contract)[0]
        answers = {"total": by(total)}
        for contract in (keep, per_example, squared_norm, rows, fisher_diagonal):
            try:
                answers[contract.name] = by(contract)
            except InputError as error:
                refused[contract.name] = error
        if per_example.name in refused:
            refused.pop(fisher_diagonal.name, None)
        if "rows" in answers:
            answers["rows"] = jax.tree.map(_table, answers["rows"], params, is_leaf=lambda leaf: isinstance(leaf, Rows))
        if "keep" in answers:
            kept = lambda name: jax.tree.map(partial(_own_answer, name), answers["keep"], params, is_leaf=is_factor)
            later = {f"keep, {name}": kept(name) for name in ("per_example", "squared_norm") if name in answers}
            answers |= later | {"keep": kept("total")}
        return answers

    try:
        trees = quickly(all_of_them)(params, x)
        answers = {name: host(leaves_of(tree, "params")) for name, tree in trees.items()}
    except Exception as error:
        message = f"bwd raises for other contractions than total: {said(error)}"
        return [Failure("", "laws", "contractions", message)]
    of_last = point.gradients({k: sharded_like(v, point.outputs[k]) for k, v in last.items()})
    failures = _refusals(point, refused, of_last, count)
    for path, wanted in {k: v for k, v in point.rule[0].items() if k.startswith("params")}.items():
        of = {name: tree[path] for name, tree in answers.items()}
        for name, what in {"total": "total", "keep": "keep, then total", "rows": "rows"}.items():
            failures += _contraction(point, path, what, of[name], wanted) if name in of else []
        if count and "per_example" in of:
            failures += _by_example(point, path, of, wanted, of_last[path], count)
    return failures


def _examples(point: Point, dy: Values) -> tuple[int, Values]:
    """The number of examples, 0 where it cannot be told, and dy with zeros for all but the last example."""
    sizes = {v.shape[0] for v in dy.values() if v.ndim}
    count = sizes.pop() if len(sizes) == 1 else 0
    last = {k: np.concatenate([np.zeros_like(v[:-1]), v[-1:]]) if v.ndim else v for k, v in dy.items()}
    if not isinstance(made := point.subject.layer.structure, Packed):
        return count, last
    own = np.asarray(point.subject.args[1]["segments"])[-1] == made.segments
    for v in last.values():
        v[-1][~own] = 0
    return count * made.segments, last


def _by_example(
    point: Point, path: str, of: dict[str, np.ndarray], wanted: np.ndarray, last: np.ndarray, count: int
) -> list[Failure]:
    """Check the per-example answers of a leaf with the gradient `wanted`, which is `last` for the last example's dy."""
    each = of["per_example"]
    if each.shape == wanted.shape != (count, *wanted.shape):
        message = "per_example gives the gradient itself: let bwd return contract(factor, param)"
        return [Failure(path, "laws", "contractions", message)]
    if each.shape != (count, *wanted.shape) or each.dtype != wanted.dtype:
        message = f"per_example gives {describe(each)} for a leaf {describe(wanted)} and {count} examples"
        return [Failure(path, "laws", "contractions", message)]
    failures = _contraction(point, path, "the sum of per_example", as_float64(each).sum(0).astype(wanted.dtype), wanted)
    failures += _contraction(point, path, "the last of per_example", each[-1], last)
    if "keep" in of and of["keep, per_example"].shape == each.shape:  # it was a factor
        failures += _contraction(point, path, "keep, then per_example", of["keep, per_example"], each)
        if "keep, squared_norm" in of:
            kept = of["keep, squared_norm"]
            failures += _squares(point, path, "keep, then squared_norm", kept, each, tuple(range(1, each.ndim)))
    if "squared_norm" in of:
        failures += _squares(point, path, "squared_norm", of["squared_norm"], each, axes=tuple(range(1, each.ndim)))
    if "fisher_diagonal" in of:
        failures += _squares(point, path, "a contraction of one's own", of["fisher_diagonal"], each, axes=(0,))
    return failures


@contraction
def fisher_diagonal(gradients: Any, param: Any) -> Any:
    """The diagonal of the empirical Fisher matrix: a contraction as users write them, which knows no combinator."""
    return jnp.sum(jnp.square(gradients), axis=0)


def _squares(
    point: Point, path: str, what: str, got: np.ndarray, each: np.ndarray, axes: tuple[int, ...]
) -> list[Failure]:
    """Check what should be the squares of the examples' gradients [B, *param], summed over these axes."""
    squares = np.sum(np.abs(as_float64(each)) ** 2, axis=axes)
    if got.shape != squares.shape or got.dtype not in (np.float32, np.float64):
        wanted = f"float32 or float64 {list(squares.shape)}"
        message = f"{what} gives {describe(got)} for {len(each)} examples of {describe(each[0])}, not {wanted}"
        return [Failure(path, "laws", "contractions", message)]
    terms = each.size // max(squares.size, 1)
    allowed, size = 8 * tolerance(each.dtype, point.terms), (squares.max(initial=0.0) * terms) ** 0.5
    leaf = measure(path, got, squares, allowed)
    if not leaf.within:
        leaf = measure(path, got, squares, allowed, 4 * point.baseline_error[path].max() * size)
    return [] if leaf.within else [values_failure(leaf, "laws", "contractions", what)]


def _refusals(point: Point, refused: dict[str, InputError], of_last: Values, count: int) -> list[Failure]:
    """Note and judge refused contractions: only layers that mix examples, or have no batch axis, may refuse any.

    A packed layer refuses those of factors whose rows it cannot tell apart.
    """
    for name, error in refused.items():
        point.notes.append(f"{name} is refused: {error.expected}")
        packed = isinstance(point.subject.layer.structure, Packed)
        right = error.received in BLIND if packed else _mixes(of_last, count)
        if right or error.expected.startswith("an example axis"):
            continue
        message = f"bwd refuses {name} for examples that have no part in each other: {error.expected}"
        return [Failure("", "laws", "contractions", message)]
    return []


def _own_answer(method: str, kept: Any, param: Any) -> Any:
    """What the factor from `keep` answers to `method`; an array, from a bwd that ignores `contract`, stays as it is."""
    if not is_factor(kept):
        return kept
    answer = getattr(kept, method)(param)
    return answer if method == "squared_norm" else answer.astype(param.dtype)


def _table(answer: Any, param: Any) -> Any:
    """Touched rows as the table that they stand for; any other answer of `rows` is the gradient itself."""
    if not isinstance(answer, Rows):
        return answer
    one = lambda ids, rows: jnp.zeros((param.shape[-2], rows.shape[-1]), rows.dtype).at[ids].add(rows)
    return (jax.vmap(one) if answer.ids.ndim > 1 else one)(answer.ids, answer.rows)


def _mixes(of_last: Values, count: int) -> bool:
    """Whether the last example's cotangent gives another example a gradient; True where that cannot be seen."""
    if count < 2:
        return True
    seen = [as_float64(g) for path, g in of_last.items() if path.startswith("x") and g.ndim > 1 and len(g) == count]
    return not seen or any(np.any(g[:-1] != 0) for g in seen)


def _contraction(point: Point, path: str, what: str, got: np.ndarray, wanted: np.ndarray) -> list[Failure]:
    if got.shape != wanted.shape or got.dtype != wanted.dtype:
        message = f"{what} gives {describe(got)} for a leaf {describe(wanted)}"
        return [Failure(path, "laws", "contractions", message)]
    leaf = point.measured(path, got, wanted, 2.0)
    return [] if leaf.within else [values_failure(leaf, "laws", "contractions", what)]
