"""What is checked: a rule at a point, and everything that is computed there more than once."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field
from functools import cache, cached_property, partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from funcnet.check.judge import BASELINE, Leaf, as_float64, leaves_of, measure, tolerance
from funcnet.check.plain import Plain, is_inexact, reduction_length
from funcnet.check.report import said

Tree = Any
NEARBY = 16  # points, a unit of rounding apart, that show how accurately a gradient is known
Values = dict[str, np.ndarray]


@cache
def fast() -> dict[str, Any]:
    """Options with which XLA compiles fast and runs slowly; only those that this version of XLA knows."""
    options = {
        "xla_backend_optimization_level": 0,
        "xla_cpu_use_fusion_emitters": False,
        "xla_cpu_parallel_codegen_split_count": 1,
    }
    known = {}
    for name, value in options.items():
        with suppress(jax.errors.JaxRuntimeError):
            jax.jit(lambda: 0, compiler_options={name: value}).lower().compile()
            known[name] = value
    return known


def quickly(f: Callable) -> Any:
    """`jax.jit` of what runs a few times only."""
    return jax.jit(f, compiler_options=fast())


@dataclass(frozen=True, eq=False)
class Subject:
    """A backward rule at a point.

    Attributes:
        title: what it is called in the report.
        args: the point, a tuple of pytrees of arrays.
        roots: for each argument, what its paths begin with.
        pull: args -> (y, pullback), as `jax.vjp` gives them; the pullback takes dy to gradients, a tuple like the args.
        plain: the program of the forward pass without custom rules.
        x64: whether the rule runs in JAX's 64-bit mode.
        layer: the layer, if it is one; its args are then (params, x).
        state, key: what the layer's fwd is given beside them.
        raw: the same as pull, but with the gradients as the rule returned them, before JAX checks them; None where that
            cannot be had.
        notes: what the report should say about it.
    """

    title: str
    args: tuple
    roots: tuple[str, ...]
    pull: Callable[[tuple], tuple[Tree, Callable[[Tree], tuple]]]
    plain: Plain
    x64: bool = False
    layer: Any = None
    state: Tree = ()
    key: Any = None
    raw: Any = None
    notes: tuple[str, ...] = ()

    def mode(self) -> AbstractContextManager:
        """The context of the mode, 64-bit or JAX's present one, in which the rule runs."""
        return jax.enable_x64(True) if self.x64 else nullcontext()


@dataclass(eq=False)
class Point:
    """A subject with random cotangents, its gradients by the rule and by the plain program.

    Values are NumPy arrays by path. Only leaves that have a derivative are among them.

    Attributes:
        subject: what is checked.
        seed: of everything drawn.
        directions: how many random directions a leaf is tried in.
        notes: what the oracles had to say beside their verdicts.
        values: the differentiable leaves of the arguments.
        dys: two random cotangents, each with one array per output.
        broken: leaves whose gradient cannot be compared.
        bare: whether the rule is called directly and not through JAX, which refuses what it returns.
        raises: whether the rule raises an error.
        shown: by leaf, which dy its error is reported for.
    """

    subject: Subject
    seed: int
    directions: int
    notes: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = np.random.default_rng([self.seed, 1])
        self.leaves, self.structure = jax.tree.flatten(self.subject.args)
        named = self.named(self.subject.args)
        self.places = {path: i for i, (path, leaf) in enumerate(named.items()) if is_inexact(leaf)}
        self.values: Values = {path: self.leaves[i] for path, i in self.places.items()}
        self.broken: set[str] = set()
        self.bare = self.raises = False
        self.shown: dict[str, int] = {}
        self.y_shape = self.subject.plain.shape
        self.outputs = {path: leaf for path, leaf in leaves_of(self.y_shape, "y").items() if is_inexact(leaf)}
        self.dys = [self.draw(self.outputs) for _ in range(2)]

    def named(self, args: tuple) -> dict[str, Any]:
        """By path, the leaves of the arguments, or of a tuple like them."""
        return {
            k: v for root, arg in zip(self.subject.roots, args, strict=True) for k, v in leaves_of(arg, root).items()
        }

    @property
    def sound(self) -> list[str]:
        """Paths of the leaves whose gradients have values to compare."""
        return [path for path in self.values if path not in self.broken]

    def draw(self, like: dict[str, Any], scale: dict[str, Any] | None = None) -> Values:
        """Independent standard normal values, times `scale`."""

        def one(path, leaf):
            noise = self.rng.standard_normal(leaf.shape)
            if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
                noise = noise + 1j * self.rng.standard_normal(leaf.shape)
            return sharded_like(np.asarray(noise * (1.0 if scale is None else scale[path])).astype(leaf.dtype), leaf)

        return {path: one(path, leaf) for path, leaf in like.items()}

    def in_float64(self, values: Values) -> Values:
        """Values, or cotangents, in float64 or complex128."""
        return {
            path: sharded_like(as_float64(v), self.values.get(path, self.outputs.get(path)))
            for path, v in values.items()
        }

    def args(self, values: Values) -> list[Any]:
        """The flattened arguments with these values in their places."""
        leaves = list(self.leaves)
        for path, i in self.places.items():
            leaves[i] = values[path]
        return leaves

    def cotangent(self, dy: Values) -> Tree:
        """dy as a tree like y. An integer output of a layer has the cotangent None, that of a function float0."""
        with_path, structure = jax.tree_util.tree_flatten_with_path(self.y_shape)
        none = lambda leaf: None if self.subject.layer else np.zeros(leaf.shape, jax.dtypes.float0)
        names = ["y" + jax.tree_util.keystr(path) for path, _ in with_path]
        return jax.tree.unflatten(
            structure,
            [dy[name] if name in dy else none(leaf) for name, (_, leaf) in zip(names, with_path, strict=True)],
        )

    @property
    def by_rule(self) -> Callable[[tuple], tuple[Tree, Callable[[Tree], tuple]]]:
        """The rule as it is called: directly, not through JAX, where JAX refuses what it returns."""
        return self.subject.raw if self.bare else self.subject.pull

    def pull(self, values: Values, dy: Values) -> tuple[Tree, tuple]:
        """The rule: y, and the gradients, a tuple like the args. Traceable."""
        return self._pulled(self.by_rule, values, dy)

    def raw(self, values: Values, dy: Values) -> tuple[Tree, tuple]:
        """The same, before JAX checks it."""
        return self._pulled(self.subject.raw, values, dy)

    def _pulled(self, rule: Any, values: Values, dy: Values) -> tuple[Tree, tuple]:
        y, pullback = rule(jax.tree.unflatten(self.structure, self.args(values)))
        return y, pullback(self.cotangent(dy))

    def vjp(self, values: Values, dy: Values, double: bool) -> tuple[dict[str, Any], dict[str, Any]]:
        """The plain program's outputs and gradients, by reverse mode."""
        y, pullback = jax.vjp(lambda v: self.outputs_of(v, double), values)
        return y, pullback({path: jnp.asarray(d, y[path].dtype) for path, d in dy.items()})[0]

    def outputs_of(self, values: Values, double: bool) -> dict[str, Any]:
        """The plain program's floating outputs by path. Traceable."""
        y = leaves_of(self.subject.plain(*self.args(values), double=double), "y")
        return {path: y[path] for path in self.outputs}

    def gradients(self, dy: Values, values: Values | None = None) -> Values:
        """The gradients by the rule, compiled."""
        with self.subject.mode():
            return host(self.named(self.compiled(self.values if values is None else values, dy)[1]))

    def reference(self, dy: Values, values: Values | None = None) -> Values:
        """The gradients by reverse mode through the plain program in float64."""
        with jax.enable_x64(True):
            return host(
                self._reference(self.in_float64(self.values if values is None else values), self.in_float64(dy))[1]
            )

    @cached_property
    def compiled(self) -> Any:
        """`pull`, compiled as a user's would be."""
        return jax.jit(self.pull)

    @cached_property
    def _reference(self) -> Any:
        return quickly(partial(self.vjp, double=True))

    @cached_property
    def _baseline(self) -> Any:
        return quickly(partial(self.vjp, double=False))

    @cached_property
    def _outputs(self) -> Any:
        return quickly(partial(self.outputs_of, double=False))

    @cached_property
    def coarse(self) -> bool:
        """Whether the program computes in less than float64 anywhere."""
        return self.subject.plain.coarse or any(jnp.finfo(v.dtype).bits < 64 for v in self.values.values())

    @cached_property
    def terms(self) -> int:
        """The longest sum in the program and its derivative."""
        if not self.reverses:
            return reduction_length(self.subject.plain.jaxpr)
        with jax.enable_x64(True):
            return reduction_length(
                self._reference.trace(self.in_float64(self.values), self.in_float64(self.dys[0])).jaxpr
            )

    @cached_property
    def rule(self) -> list[Values]:
        """The rule's gradients for each dy."""
        return [self.gradients(dy) for dy in self.dys]

    @cached_property
    def pair(self) -> list[tuple[Values, Values]]:
        """The point with its first dy, and a nearby point with its second.

        The nearby point's values are nearer to 0, so that probabilities stay probabilities.
        """
        noise = self.draw(self.values)
        moved = {k: as_float64(v) * (1 - 0.01 * np.abs(as_float64(noise[k]))) for k, v in self.values.items()}
        other = {k: sharded_like(moved[k].astype(v.dtype), v) for k, v in self.values.items()}
        return [(self.values, self.dys[0]), (other, self.dys[1])]

    @cached_property
    def gotten(self) -> list[Values]:
        """The rule's gradients for each dy, those of broken leaves too; none if it raises."""
        return [{}, {}] if self.raises else self.rule

    @cached_property
    def references(self) -> list[Values]:
        """The plain program's gradients for each dy; without reverse mode the rule's own, as a measure of size."""
        if not self.reverses:
            return [{path: as_float64(g) for path, g in got.items()} for got in self.rule]
        return [self.reference(dy) for dy in self.dys]

    @cached_property
    def reverses(self) -> bool:
        """Whether reverse mode goes through the plain program."""
        try:
            with jax.enable_x64(True):
                self._reference.trace(self.in_float64(self.values), self.in_float64(self.dys[0]))
        except Exception as error:
            self.notes.append(
                f"autodiff has no word: reverse mode does not go through the plain program ({said(error)})"
            )
            return False
        return True

    @cached_property
    def plain_output(self) -> Values:
        """The plain program's outputs, in its own dtypes."""
        if self.coarse or not self.reverses:
            with self.subject.mode():
                return host(self._outputs(self.values))
        with jax.enable_x64(True):
            return host(self._reference(self.in_float64(self.values), self.in_float64(self.dys[0]))[0])

    @cached_property
    def baseline_error(self) -> Values:
        """By leaf, for every element: C times the error of the plain program itself (`funcnet.check.judge`)."""
        worst = {path: np.zeros(np.shape(value)) for path, value in self.values.items()}
        for errors in self._errors() if self.reverses else ():
            for path, error in errors.items():
                worst[path] = np.maximum(worst[path], np.where(np.isfinite(error), error, 0.0))
        return {path: BASELINE * self._pooled(path, error) for path, error in worst.items()}

    @cached_property
    def baseline_output_error(self) -> Values:
        """The same for the outputs, one number each: where terms cancel, rounding is large beside what is left."""
        outputs = quickly(partial(self.outputs_of, double=True))

        def exact(values):
            with jax.enable_x64(True):
                return host(outputs(self.in_float64(values)))

        center, moves, own = exact(self.values), [], []
        for _ in range(NEARBY):
            values = self._beside({path: self.rng.choice([-1, 1], np.shape(v)) for path, v in self.values.items()})
            near = exact(values)
            moves.append((near, center))
            if self.coarse:
                with self.subject.mode():
                    own.append((host(self._outputs(values)), near))

        def usual(pairs, path):
            """The lower quartile of each element's errors, so that a jump at the point itself is none; the largest."""
            with np.errstate(all="ignore"):
                errors = np.stack([np.abs(as_float64(a[path]) - as_float64(b[path])) for a, b in pairs])
            errors = np.quantile(np.where(np.isfinite(errors), errors, 0.0), 0.25, axis=0)
            return float(np.max(errors, initial=0.0))

        kinds = [pairs for pairs in (moves, own) if pairs]
        return {path: np.asarray(BASELINE * max(usual(pairs, path) for pairs in kinds)) for path in self.outputs}

    def _errors(self) -> Iterator[Values]:
        """Errors of the gradients at points a unit of rounding apart, and their differences between these points."""

        def apart(one, other):
            with np.errstate(all="ignore"):
                return {path: np.abs(as_float64(one[path]) - other[path]) for path in self.values}

        times = lambda share, values: {path: share * as_float64(value) for path, value in values.items()}
        signs = lambda: {path: self.rng.choice([-1, 1], np.shape(value)) for path, value in self.values.items()}
        drawn = [signs() for _ in range(NEARBY // 4)]
        for k in range(NEARBY):
            up, way = drawn[k // 4], 0 if k < 2 and self.coarse else 1 - k % 4 // 2 * 2
            values = self._beside({path: way * sign for path, sign in up.items()})
            dy, wanted, share = self.dys[k % 2], self.references[k % 2], self.rng.uniform(0.5, 1.0)
            part = {
                path: sharded_like(value.astype(dy[path].dtype), dy[path]) for path, value in times(share, dy).items()
            }
            near = self.reference(part, values)
            if not self.coarse:
                yield times(1 / share, apart(near, times(share, wanted)))
                continue
            with self.subject.mode():
                own = host(self._baseline(values, part)[1])
            yield apart(self.reference(dy, values), wanted)
            yield times(1 / share, apart(own, near))

    def _pooled(self, path: str, error: np.ndarray) -> np.ndarray:
        """The leaf's largest error for all its elements, but their own for those moved by a step across a kink."""
        scale = float(
            np.abs(as_float64(self.references[0][path])).max(initial=0.0, where=np.isfinite(self.references[0][path]))
        )
        jump = float(jnp.finfo(self.values[path].dtype).eps) ** 0.5 * scale
        moved = (error > jump) & (error > 16 * np.median(error)) if error.size else np.zeros(error.shape, bool)
        return np.where(moved, error, np.max(error, initial=0.0, where=~moved))

    def _beside(self, units: dict[str, np.ndarray]) -> Values:
        """Every value moved by so many units of rounding."""

        def move(leaf, units):
            eps = float(jnp.finfo(leaf.dtype).eps)
            with np.errstate(all="ignore"):
                return sharded_like((as_float64(leaf) * (1 + eps * units)).astype(leaf.dtype), leaf)

        return {path: move(leaf, units[path]) for path, leaf in self.values.items()}

    def measured(
        self, path: str, got: Any, wanted: Any, factor: float = 1.0, size: float = 0.0, skip: Any = None
    ) -> Leaf:
        """A leaf against its reference, with `factor` times what is allowed, and more if its terms have this `size`.

        `baseline_error` takes many runs of the program: it is asked for only where the rest does not allow the error.
        """
        allowed = factor * tolerance(got.dtype, self.terms)
        leaf = measure(path, got, wanted, allowed, allowed * size, skip)
        if leaf.within:
            return leaf
        return measure(path, got, wanted, allowed, factor * self.baseline_error[path] + allowed * size, skip)

    def rooms(self, path: str) -> Iterator[np.ndarray]:
        """How far every element of a leaf may be off for the first dy: without baseline_error, then with it."""
        wanted = self.references[0][path]
        scale = float(np.abs(wanted).max(initial=0.0, where=np.isfinite(wanted))) or 1.0
        room = np.full(np.shape(wanted), scale * tolerance(self.values[path].dtype, self.terms))
        yield room
        yield room + self.baseline_error[path]


def host(values: dict[str, Any]) -> Values:
    """The values as NumPy arrays."""
    return {path: np.asarray(value) for path, value in values.items()}


def sharded_like(value: np.ndarray, like: Any) -> Any:
    """`value` with the sharding of `like` if that is on a mesh with explicit axes, else `value` itself."""
    sharding = getattr(like, "sharding", None)
    mesh = getattr(sharding, "mesh", None)
    if sharding is None or mesh is None or jax.sharding.AxisType.Explicit not in mesh.axis_types:
        return value
    return jax.sharding.reshard(value, sharding.spec)
