"""Hold a layer to the laws: its hand-written rule against JAX's automatic one, in float64, with random cotangents."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.check.report import Leaf, Report, compare
from funcnet.expect import InputError, describe, is_array, is_floating
from funcnet.layer import Layer
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
        draws: how many random cotangents to compare with.

    Returns:
        A `Report` whose leaves are named `params[..]` and `x`, worst first. Its tolerance is that of the coarsest dtype
        that the layer computes in.
    """
    with jax.enable_x64(True):
        key, rng = jax.random.key(seed), np.random.default_rng(seed)
        case = _Case(layer, *_draw(layer, x, params, state, jnp.dtype(dtype), key, rng), key)
        cotangents = [_normal_like(case.y, rng) for _ in range(max(draws, 2))]
        leaves = _compare_draws(case, cotangents)
        broken = [
            *_law_2(case),
            *_law_3(case),
            *_law_4(case, cotangents),
            *_law_6(case, cotangents[0]),
            *_forward(case, rng),
        ]
    return Report(f"{layer.name}: hand-written bwd against jax.vjp of fwd, seed {seed}", tuple(leaves), tuple(broken))


class _Case:
    """One layer at one point: what its functions return there."""

    def __init__(self, layer: Layer, params: Tree, state: Tree, x: Any, key: jax.Array):
        self.layer, self.params, self.state, self.x, self.key = layer, params, state, x, key
        self.residual_types: list[Any] = []

        def fwd(params, state, x, key):
            out = layer.fwd(params, state, x, key)
            self.residual_types = jax.tree.leaves(out[2])
            return out

        self.fwd = jax.jit(fwd)
        self.bwd = jax.jit(layer.bwd)
        self.y, self.new_state, self.residuals = self.fwd(params, state, x, key)
        coarse = [leaf.dtype for leaf in jax.tree.leaves((params, x, self.y, self.residuals)) if is_floating(leaf)]
        self.dtype = max(coarse, key=lambda dtype: float(jnp.finfo(dtype).eps))

    def pull(self, dy: Tree) -> tuple[Tree, Tree]:
        return self.bwd(self.params, self.residuals, dy)

    def output(self, params: Tree, x: Any) -> Any:
        return self.layer.fwd(params, self.state, x, self.key)[0]


def _draw(layer, x, params, state, dtype, key, rng):
    """Parameters, state and input in `dtype`, those not given drawn."""
    x = cast(jax.tree.map(lambda leaf: _input(leaf, rng), x), dtype)
    if params is None:
        params, fresh = jax.jit(layer.init)(key, x)
        noise = _normal_like(params, rng)
        params = jax.tree.map(lambda p, n: p + (n * 0.3).astype(p.dtype) if is_floating(p) else p, params, noise)
        state = fresh if state is None else state
    return cast(params, dtype), () if state is None else state, x


def _input(leaf, rng):
    if not is_array(leaf):
        raise InputError("an array or a jax.ShapeDtypeStruct", describe(leaf), "convert it with np.asarray")
    if not isinstance(leaf, jax.ShapeDtypeStruct):
        return np.asarray(leaf)
    if not is_floating(leaf):
        raise InputError(
            "values for an integer input", describe(leaf), "pass an array: which integers are valid is yours"
        )
    return rng.standard_normal(leaf.shape).astype(leaf.dtype)


def _normal_like(tree: Tree, rng: np.random.Generator) -> Tree:
    """Independent standard normal values in the shapes of the floating leaves; others as they are."""
    draw = lambda leaf: rng.standard_normal(leaf.shape).astype(leaf.dtype) if is_floating(leaf) else leaf
    return jax.tree.map(draw, tree)


def _compare_draws(case: _Case, cotangents: list[Tree]) -> list[Leaf]:
    """Law 1: each leaf's worst comparison over all cotangents."""

    @jax.jit
    def automatic(params, x, dy):
        return _vjp(case.output, params, x, dy)

    worst: dict[str, Leaf] = {}
    for dy in cotangents:
        (dparams, dx), (want_params, want_x) = case.pull(dy), automatic(case.params, case.x, dy)
        leaves = compare(dparams, want_params, "params", case.dtype) + compare(dx, want_x, "x", case.dtype)
        for leaf in leaves:
            seen = worst.get(leaf.leaf)
            worst[leaf.leaf] = leaf if seen is None or (leaf.ok, -leaf.error) < (seen.ok, -seen.error) else seen
    return sorted(worst.values(), key=lambda leaf: (leaf.ok, -leaf.error / (leaf.allowed or 1.0)))


def _all_floating(tree: Tree) -> bool:
    return all(is_floating(leaf) for leaf in jax.tree.leaves(tree))


def _vjp(f, params, x, dy):
    """The VJP in params and the floating leaves of x; None for the others."""
    leaves, structure = jax.tree.flatten(x)
    floating = {i: leaf for i, leaf in enumerate(leaves) if is_floating(leaf)}

    def of_floating(params, floating):
        return f(params, jax.tree.unflatten(structure, [floating.get(i, leaf) for i, leaf in enumerate(leaves)]))

    dparams, dfloating = jax.vjp(of_floating, params, floating)[1](dy)
    return dparams, jax.tree.unflatten(structure, [dfloating.get(i) for i in range(len(leaves))])


def _law_2(case: _Case) -> list[str]:
    if jax.tree.leaves(case.state):
        return []
    try:
        undrawn = case.fwd(case.params, case.state, case.x, None)[0]
    except (TypeError, ValueError):  # it needs a key, so something is drawn
        return []
    if not _equal(undrawn, case.y):
        return []
    y = jax.jit(case.layer.apply)(case.params, case.state, case.x)
    bad = [leaf for leaf in compare(y, case.y, "y", case.dtype) if not leaf.ok]
    return [
        f"law 2: apply differs from fwd's output at {leaf.leaf}{list(leaf.index)}: {leaf.got} for {leaf.wanted}"
        for leaf in bad
    ]


def _law_3(case: _Case) -> list[str]:
    like = [
        (jax.tree.structure(state), [(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(state)])
        for state in (case.state, case.new_state)
    ]
    return [] if like[0] == like[1] else [f"law 3: fwd returned the state {like[1]} for {like[0]}"]


def _law_4(case: _Case, cotangents: list[Tree]) -> list[str]:
    first, second = cotangents[:2]
    mix = lambda a, b: (2 * np.asarray(a) - 3 * np.asarray(b)).astype(a.dtype)
    mixture = jax.tree.map(mix, first, second)
    wanted = jax.tree.map(mix, case.pull(first), case.pull(second))
    bad = [leaf for leaf in compare(case.pull(mixture), wanted, "(dparams, dx)", case.dtype) if not leaf.ok]
    zero = case.pull(jax.tree.map(np.zeros_like, first))
    nonzero = [jax.tree_util.keystr(path) for path, leaf in jax.tree_util.tree_leaves_with_path(zero) if np.any(leaf)]
    return [f"law 4: bwd is not linear in dy at {leaf.leaf}{list(leaf.index)}" for leaf in bad] + [
        f"law 4: bwd of a zero dy is not zero at (dparams, dx){path}" for path in nonzero
    ]


def _law_6(case: _Case, dy: Tree) -> list[str]:
    broken = [
        f"law 6: a residual is {describe(leaf)}, not an array"
        for leaf in case.residual_types
        if not isinstance(leaf, jax.Array)
    ]
    jaxpr = jax.make_jaxpr(lambda params, x: case.layer.fwd(params, case.state, x, case.key)[2])(
        case.params, case.x
    ).jaxpr
    of_params = set(jaxpr.invars[: len(jax.tree.leaves(case.params))])
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(case.residuals)]
    kept = [
        path
        for path, var in zip(paths, jaxpr.outvars, strict=True)
        if getattr(var, "count", None) is not None and var in of_params
    ]
    broken += [f"law 6: the residual {path} is a parameter, which bwd is handed anyway" for path in kept]
    if not _equal(case.pull(dy), case.pull(dy)):
        broken.append("law 6: two calls of bwd with the same residuals and dy differ")
    if not _equal(case.fwd(case.params, case.state, case.x, case.key), (case.y, case.new_state, case.residuals)):
        broken.append("law 6: two calls of fwd with the same key differ")
    return broken


def _forward(case: _Case, rng: np.random.Generator) -> list[str]:
    """Forward mode must work too: <dy, J v> = <bwd(dy), v> needs no reverse mode at all."""
    if not _all_floating(case.x):
        return []
    tangent = _normal_like((case.params, case.x), rng)
    dy = _normal_like(case.y, rng)
    _, tangent_out = jax.jit(lambda at, v: jax.jvp(case.output, at, v))((case.params, case.x), tangent)
    one, size = _dot(dy, tangent_out)
    other, _ = _dot(case.pull(dy), tangent)
    if abs(one - other) > 1e3 * float(jnp.finfo(case.dtype).eps) * size:
        return [f"law 1: <dy, J v> = {one:.9g} by forward mode, but <bwd(dy), v> = {other:.9g}"]
    return []


def _dot(a: Tree, b: Tree) -> tuple[float, float]:
    """<a, b>, and the sum of the magnitudes of its terms."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    terms = [np.asarray(x, np.float64) * np.asarray(y, np.float64) for x, y in pairs]
    return sum(float(t.sum()) for t in terms), sum(float(np.abs(t).sum()) for t in terms) + 1e-300


def _equal(a: Tree, b: Tree) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    raw = lambda v: jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v
    return all(np.array_equal(np.asarray(raw(x)), np.asarray(raw(y)), equal_nan=is_floating(x)) for x, y in pairs)
