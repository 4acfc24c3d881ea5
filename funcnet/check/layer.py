"""Hold a layer to the laws: its hand-written rule against JAX's automatic one, in float64, with random cotangents.

A leaf may be off by the tolerance of its dtype relative to its scale (`funcnet.check.report`), and beyond that by what
its reference itself moves when every input is moved by one unit of rounding: where a gradient is a small difference of
large terms, no rule can be closer.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.check.report import Leaf, Report, compare
from funcnet.expect import InputError, describe, is_array, is_floating
from funcnet.layer import Layer, a_layer
from funcnet.transform import cast

Tree = Any


def check_layer(
    layer: Layer,
    x: Any,
    *,
    seed: int = 0,
    params: Tree = None,
    state: Tree = None,
    dtype: Any = "float64",
    draws: int = 2,
) -> Report:
    """Compare `layer.bwd` with `jax.vjp` of `layer.fwd`, leaf by leaf, and hold the layer to laws 1 to 4 and 6.

    Args:
        layer: any `Layer`; a loss is a layer over (prediction, target).
        x: its input, or `jax.ShapeDtypeStruct`s for which a normal input is drawn; or a pytree of either.
        seed: of everything that is drawn: input, parameters, cotangents, and the key given to `fwd`.
        params, state: by default from `init`, the parameters then moved at random, so that no zero bias or unit scale
            hides a mistake.
        dtype: floating arrays are cast to it. Give "float32" for a layer that takes nothing else, such as `mixed`.
        draws: how many random cotangents to compare with, at least two.

    Returns:
        A `Report` whose leaves are named `params[..]` and `x`, worst first. Its tolerance is that of the coarsest dtype
        that the layer computes in.
    """
    a_layer(layer)
    if draws < 2:
        raise InputError("at least two draws", f"draws={draws}", "linearity needs two cotangents")
    title = f"{layer.name}: hand-written bwd against jax.vjp of fwd, seed {seed}"
    with jax.enable_x64(True):
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        params, state, x = _draw(layer, x, params, state, jnp.dtype(dtype), key, rng)
        if strange := _strange_residuals(layer, params, state, x, key):
            return Report(title, (), tuple(strange))
        case = _case(layer, params, state, x, key)
        if not _any_floating(case.y) and _any_floating((params, x)):
            return Report(title, (), ("law 1: the output has no floating array, so there is nothing to differentiate",))
        cotangents = [_normal_like(case.y, rng) for _ in range(draws)]
        noise = _noise(case, cotangents[0], rng)
        leaves = _law_1(case, cotangents, noise)
        broken = [*_law_2(case), *_law_3(case), *_law_6(case, cotangents[0])]
        if not any(leaf.problem for leaf in leaves):
            broken += [*_law_4(case, cotangents, noise), *_forward_mode(case, rng)]
    return Report(title, tuple(leaves), tuple(broken))


@dataclass(frozen=True)
class _Case:
    """One layer at one point: its functions, compiled, and what `fwd` returns there."""

    layer: Layer
    params: Tree
    state: Tree
    x: Any
    key: jax.Array
    fwd: Any
    bwd: Any
    vjp: Any
    y: Any
    new_state: Tree
    residuals: Tree
    dtype: Any

    def pull(self, dy: Tree) -> tuple[Tree, Tree]:
        return self.bwd(self.params, self.residuals, dy)


def _case(layer: Layer, params: Tree, state: Tree, x: Any, key: jax.Array) -> _Case:
    def vjp(params, x, dy):
        return _vjp(lambda params, x: layer.fwd(params, state, x, key)[0], params, x, dy)

    fwd = jax.jit(layer.fwd)
    y, new_state, residuals = fwd(params, state, x, key)
    dtypes = [leaf.dtype for leaf in jax.tree.leaves((params, x, y, residuals)) if is_floating(leaf)]
    coarsest = max(dtypes, key=lambda dtype: float(jnp.finfo(dtype).eps), default=jnp.dtype("float64"))
    return _Case(layer, params, state, x, key, fwd, jax.jit(layer.bwd), jax.jit(vjp), y, new_state, residuals, coarsest)


def _vjp(f, params, x, dy):
    """The VJP in params and the floating leaves of x; None for the others."""
    leaves, structure = jax.tree.flatten(x)
    floating = {i: leaf for i, leaf in enumerate(leaves) if is_floating(leaf)}

    def of_floating(params, floating):
        return f(params, jax.tree.unflatten(structure, [floating.get(i, leaf) for i, leaf in enumerate(leaves)]))

    y, pullback = jax.vjp(of_floating, params, floating)
    dparams, dfloating = pullback(jax.tree.map(_cotangent, y, dy))
    return dparams, jax.tree.unflatten(structure, [dfloating.get(i) for i in range(len(leaves))])


def _cotangent(y, dy):
    """JAX wants float0 for an integer output."""
    return dy if is_floating(y) else np.zeros(y.shape, jax.dtypes.float0)


def _draw(layer, x, params, state, dtype, key, rng):
    """Parameters, state and input in `dtype`, those not given drawn."""
    x = cast(jax.tree.map(lambda leaf: _input(leaf, rng), x), dtype)
    if params is None or state is None:
        fresh, fresh_state = jax.jit(layer.init)(key, x)
        noise = _normal_like(fresh, rng)
        moved = jax.tree.map(lambda p, n: p + (n * 0.3).astype(p.dtype) if is_floating(p) else p, fresh, noise)
        params, state = moved if params is None else params, fresh_state if state is None else state
    return cast(params, dtype), cast(state, dtype), x


def _input(leaf, rng):
    if not is_array(leaf):
        raise InputError("an array or a jax.ShapeDtypeStruct", describe(leaf), "convert it with np.asarray")
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    if not is_floating(leaf):
        remedy = "pass an array: which integers are valid is for you to say"
        raise InputError("values for an integer input", describe(leaf), remedy)
    return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def _normal_like(tree: Tree, rng: np.random.Generator) -> Tree:
    """Independent standard normal values in the shapes of the floating leaves; others as they are."""
    return jax.tree.map(lambda leaf: _input_like(leaf, rng) if is_floating(leaf) else leaf, tree)


def _input_like(leaf, rng):
    return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def _both(got: tuple[Tree, Tree], wanted: tuple[Tree, Tree], dtype: Any, noise: dict[str, float]) -> list[Leaf]:
    """(dparams, dx) compared with the reference, named `params[..]` and `x`."""
    return [
        leaf
        for name, ours, theirs in zip(("params", "x"), got, wanted, strict=True)
        for leaf in compare(ours, theirs, name, dtype, noise)
    ]


def _noise(case: _Case, dy: Tree, rng: np.random.Generator) -> dict[str, float]:
    """By leaf: how far the reference moves, in absolute terms, when its inputs are moved by a unit of rounding."""

    def moved(tree):
        def move(leaf):
            if not is_floating(leaf):
                return leaf
            leaf = np.asarray(leaf)
            return leaf + leaf * (rng.choice([-1, 1], leaf.shape) * jnp.finfo(leaf.dtype).eps).astype(leaf.dtype)

        return jax.tree.map(move, tree)

    at = case.vjp(case.params, case.x, dy)
    beside = case.vjp(*moved((case.params, case.x)), dy)
    return {leaf.leaf: leaf.error * (leaf.scale or 1.0) for leaf in _both(beside, at, case.dtype, {})}


def _law_1(case: _Case, cotangents: list[Tree], noise: dict[str, float]) -> list[Leaf]:
    """Each leaf's worst comparison over all cotangents, the worst leaf first."""
    worst: dict[str, Leaf] = {}
    for dy in cotangents:
        for leaf in _both(case.pull(dy), case.vjp(case.params, case.x, dy), case.dtype, noise):
            worst[leaf.leaf] = min(leaf, worst.get(leaf.leaf, leaf), key=Leaf.badness)
    return sorted(worst.values(), key=Leaf.badness)


def _law_2(case: _Case) -> list[str]:
    """apply equals fwd's output, where there is no state and nothing is drawn."""
    if jax.tree.leaves(case.state):
        return []
    try:
        undrawn = case.fwd(case.params, case.state, case.x, None)[0]
    except (TypeError, ValueError):  # it needs a key, so something is drawn
        return []
    if not _equal(undrawn, case.y):
        return []
    y = jax.jit(case.layer.apply)(case.params, case.state, case.x)
    return [
        f"law 2: apply differs from fwd's output at {leaf.leaf}{list(leaf.index)}: {leaf.got:.9g} for {leaf.wanted:.9g}"
        + leaf.problem
        for leaf in compare(y, case.y, "y", case.dtype)
        if not leaf.ok
    ]


def _law_3(case: _Case) -> list[str]:
    """The new state is like the state. What dparams and dx look like is seen when they are compared."""
    like = [
        (jax.tree.structure(state), [f"{leaf.dtype}{list(leaf.shape)}" for leaf in jax.tree.leaves(state)])
        for state in (case.state, case.new_state)
    ]
    return [] if like[0] == like[1] else [f"law 3: fwd returned the state {like[1]} for {like[0]}"]


def _law_4(case: _Case, cotangents: list[Tree], noise: dict[str, float]) -> list[str]:
    """bwd(2 a - 3 b) = 2 bwd(a) - 3 bwd(b), and bwd(0) = 0."""

    def mix(a, b):
        with np.errstate(invalid="ignore"):
            return (2 * np.asarray(a) - 3 * np.asarray(b)).astype(a.dtype) if is_floating(a) else a

    first, second = cotangents[:2]
    wanted = jax.tree.map(mix, case.pull(first), case.pull(second))
    got = case.pull(jax.tree.map(mix, first, second))
    bad = [leaf for leaf in _both(got, wanted, case.dtype, {name: 8 * n for name, n in noise.items()}) if not leaf.ok]
    zero = dict(zip(("params", "x"), case.pull(jax.tree.map(np.zeros_like, first)), strict=True))
    nonzero = [path for path, leaf in jax.tree_util.tree_leaves_with_path(zero) if np.any(np.asarray(leaf))]
    return [f"law 4: bwd is not linear in dy at {leaf.leaf}{list(leaf.index)}" for leaf in bad] + [
        f"law 4: bwd of a zero dy is not zero at {path[0].key}{jax.tree_util.keystr(path[1:])}" for path in nonzero
    ]


def _strange_residuals(layer: Layer, params: Tree, state: Tree, x: Any, key: jax.Array) -> list[str]:
    """Law 6: residuals are arrays. What is not, such as a text, could not even pass through jit."""
    leaves: list[Any] = []

    def outputs(params, state, x, key):
        y, new_state, residuals = layer.fwd(params, state, x, key)
        leaves.extend(jax.tree.leaves(residuals))
        return y, new_state

    jax.eval_shape(outputs, params, state, x, key)
    strange = [leaf for leaf in leaves if not isinstance(leaf, jax.Array)]
    return [f"law 6: a residual is {describe(leaf)}, not an array" for leaf in strange]


def _law_6(case: _Case, dy: Tree) -> list[str]:
    """Residuals hold what depends on the input, and two calls agree bit for bit."""
    broken = [
        f"law 6: the residual {path} depends on parameters alone, which bwd is handed" for path in _of_params(case)
    ]
    if not _equal(case.pull(dy), case.pull(dy)):
        broken.append("law 6: two calls of bwd with the same residuals and dy differ")
    if not _equal(case.fwd(case.params, case.state, case.x, case.key), (case.y, case.new_state, case.residuals)):
        broken.append("law 6: two calls of fwd with the same key differ")
    return broken


def _of_params(case: _Case) -> list[str]:
    """Paths of the residuals that depend on params and not on x, by following both through the program."""
    trace = jax.make_jaxpr(lambda params, x: case.layer.fwd(params, case.state, x, case.key)[2])
    jaxpr = trace(case.params, case.x).jaxpr
    split = len(jax.tree.leaves(case.params))
    of_params, of_x = ({id(var) for var in part} for part in (jaxpr.invars[:split], jaxpr.invars[split:]))
    for equation in jaxpr.eqns:
        for reached in (of_params, of_x):
            if any(id(var) in reached for var in equation.invars):
                reached.update(id(var) for var in equation.outvars)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(case.residuals)]
    ends = zip(paths, jaxpr.outvars, strict=True)
    return [path for path, var in ends if id(var) in of_params and id(var) not in of_x]


def _forward_mode(case: _Case, rng: np.random.Generator) -> list[str]:
    """<dy, J v> = <bwd(dy), v>: needs no reverse mode, and shows that forward mode works."""
    if not all(is_floating(leaf) for leaf in jax.tree.leaves((case.x, case.y))):
        return []
    tangent, dy = _normal_like((case.params, case.x), rng), _normal_like(case.y, rng)
    output = lambda params, x: case.layer.fwd(params, case.state, x, case.key)[0]
    _, tangent_out = jax.jit(lambda at, v: jax.jvp(output, at, v))((case.params, case.x), tangent)
    forward, size = _dot(dy, tangent_out)
    by_hand, _ = _dot(case.pull(dy), tangent)
    if abs(forward - by_hand) <= 1e3 * float(jnp.finfo(case.dtype).eps) * size:
        return []
    return [f"law 1: <dy, J v> = {forward:.9g} by forward mode, but <bwd(dy), v> = {by_hand:.9g}"]


def _dot(a: Tree, b: Tree) -> tuple[float, float]:
    """<a, b>, and the sum of the magnitudes of its terms."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    terms = [np.asarray(x, np.float64) * np.asarray(y, np.float64) for x, y in pairs]
    return sum(float(t.sum()) for t in terms), sum(float(np.abs(t).sum()) for t in terms) + 1e-300


def _any_floating(tree: Tree) -> bool:
    return any(is_floating(leaf) for leaf in jax.tree.leaves(tree))


def _equal(a: Tree, b: Tree) -> bool:
    """Bit for bit, NaN equal to NaN."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(_raw(x), _raw(y), equal_nan=is_floating(x)) for x, y in pairs)


def _raw(v: Any) -> np.ndarray:
    return np.asarray(jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v)
