"""Does an optimizer update every number independently? Only then may it be applied to a model part by part.

The optimizer's update is traced, not run. Each of its outputs is a formula of its inputs; a formula that stays within
one array and uses elementwise operations only is the same formula for any part of that array. So the update of the
whole is compared with the update of each part, formula by formula.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
from jax.extend.core import ClosedJaxpr, Literal

from funcnet._internal.errors import InputError

Tree = Any
ELEMENTWISE = """
    abs add add_any and cbrt ceil clamp convert_element_type copy cos div eq erf exp exp2 expm1 floor ge gt integer_pow
    is_finite le log log1p logistic lt max min mul ne neg nextafter not or pow rem round rsqrt select_n sign sin sqrt
    square stop_gradient sub tan tanh xor
""".split()  # noqa: SIM905


CALLS = ("jit", "pjit", "closed_call", "custom_jvp_call", "custom_vjp_call", "checkpoint", "remat2")


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Hole:
    """Marks where an optimizer's state holds a tree like the parameters. It is a pytree without leaves, so the state of
    an optimizer that is initialised with it shows these places."""


HOLE: Any = Hole()


class Split(NamedTuple):
    """An optimizer's state: what all params share, with holes, and the trees like the params that fill the holes."""

    shared: Tree
    like_params: list[Tree]


def split(optimizer: optax.GradientTransformation, opt_state: Tree) -> Split:
    like_params: list[Tree] = []

    def take(mark, value):
        if not _is_hole(mark):
            return value
        like_params.append(value)
        return mark

    return Split(jax.tree.map(take, optimizer.init(HOLE), opt_state, is_leaf=_is_hole), like_params)


def join(shared: Tree, like_params: Sequence[Tree]) -> Tree:
    """The optimizer's state, put together again from the parts that `split` made of it."""
    values = iter(like_params)
    return jax.tree.map(lambda mark: next(values) if _is_hole(mark) else mark, shared, is_leaf=_is_hole)


def _is_hole(x: Any) -> bool:
    return isinstance(x, Hole)


@dataclass(frozen=True)
class Value:
    """The number of a formula, equal for equal formulas, and whether the formula involves an array like the params."""

    formula: int
    own: bool


class Formulas:
    """Numbers the formulas; all formulas that are to be compared are numbered by the same object."""

    def __init__(self):
        self._numbers: dict[Any, int] = {}

    def name(self, what: Any, own: bool) -> Value:
        return Value(self._numbers.setdefault(what, len(self._numbers)), own)

    def names(self, tree: Tree, what: Any, own: bool) -> Tree:
        """A `Value` for each leaf of a tree of inputs."""
        paths, structure = jax.tree_util.tree_flatten_with_path(tree)
        return jax.tree.unflatten(structure, [self.name((what, jax.tree_util.keystr(p)), own) for p, _ in paths])

    def of(self, f: Callable, arguments: Tree, names: Tree) -> Tree:
        """The formulas of all outputs of f(*arguments), where the `Value`s in `names` stand for the inputs."""
        closed, shape = jax.make_jaxpr(f, return_shape=True)(*arguments)
        return jax.tree.unflatten(jax.tree.structure(shape), self._outputs(closed, jax.tree.leaves(names)))

    def _outputs(self, closed: ClosedJaxpr, inputs: Sequence[Value]) -> list[Value]:
        jaxpr = closed.jaxpr
        known = dict(zip(jaxpr.invars, inputs, strict=True))
        known |= {var: self._constant(value) for var, value in zip(jaxpr.constvars, closed.consts, strict=True)}

        def read(var):
            return self._constant(var.val) if isinstance(var, Literal) else known[var]

        for equation in jaxpr.eqns:
            known.update(
                zip(equation.outvars, self._apply(equation, [read(var) for var in equation.invars]), strict=True)
            )
        return [read(var) for var in jaxpr.outvars]

    def _constant(self, value: Any) -> Value:
        array = np.asarray(value)
        return self.name(("constant", str(array.dtype), array.shape, array.tobytes()), own=False)

    def _apply(self, equation: Any, inputs: list[Value]) -> list[Value]:
        name, params = equation.primitive.name, equation.params
        inner = params.get("jaxpr", params.get("call_jaxpr"))
        if isinstance(inner, ClosedJaxpr) and name in CALLS:
            return self._outputs(inner, inputs)
        own = any(value.own for value in inputs)
        shapes = [var.aval.shape for var in (*equation.invars, *equation.outvars)]
        unmoved = shapes[0] == shapes[-1] or (shapes[0] == () and not own)
        if name in ("broadcast_in_dim", "reshape") and unmoved and not params.get("dimensions"):
            return inputs[:1]
        if own and name not in ELEMENTWISE:
            raise _mixing(f"one that applies {name} to a whole gradient, parameter or update")
        settings = str(sorted((k, str(v)) for k, v in params.items() if "sharding" not in k))
        operation = (name, settings, *(value.formula for value in inputs))
        return [self.name((operation, i), own) for i in range(len(equation.outvars))]


def _mixing(received: str) -> InputError:
    wanted = "an optimizer that treats every number by itself, such as SGD, Adam or AdamW"
    remedy = "use fn.train_step, or clip by value (optax.clip) rather than by a norm"
    return InputError(wanted, received, remedy)


def require_elementwise(
    optimizer: optax.GradientTransformationExtraArgs,
    params: Tree,
    opt_state: Tree,
    parts: Sequence[tuple[Callable[[Tree], Tree], bool]],
) -> None:
    """Refuse an optimizer whose update of a part alone differs from its update of that part in the whole model.

    Args:
        optimizer: what is to be applied part by part.
        params, opt_state: of the whole model; only shapes and dtypes are read.
        parts: for each part, a function from a tree like the params to that part of it, and whether the part is updated
            layer by layer along its first axis.

    Raises:
        InputError: naming the operation that mixes numbers, or saying that a part alone is treated otherwise than
            among the others.
    """
    formulas = Formulas()

    def update(grads, like_params, params, shared, value):
        updates, state = optimizer.update(grads, join(shared, like_params), params, value=value, grad=grads)
        shared, like_params = split(optimizer, state)
        return (updates, like_params), shared

    def formulas_of(trees, names):
        grads, like_params, params = trees
        return formulas.of(update, (grads, like_params, params, shared, value), (*names, *shared_names))

    try:
        shared, like_params = split(optimizer, opt_state)
        value = jax.ShapeDtypeStruct((), np.float32)
        shared_names = formulas.names(shared, "shared", own=False), formulas.names(value, "value", own=False)
        trees = params, like_params, params
        names = tuple(formulas.names(tree, i, own=True) for i, tree in enumerate(trees))
        whole, whole_shared = formulas_of(trees, names)
        alone = [formulas_of((HOLE, [HOLE] * len(like_params), HOLE), (HOLE,) * 3)[1] == whole_shared]
        for part, by_layer in parts:
            picked = _each(part, trees)
            sliced = jax.tree.map(_one_layer, picked) if by_layer else picked
            got, _ = formulas_of(sliced, _each(part, names))
            alone.append(got == _each(part, whole))
            if by_layer:
                depths = {leaf.shape[:1] for leaf in jax.tree.leaves(picked)}
                alone.append(len(depths) <= 1 and () not in depths)
    except InputError:
        raise
    except Exception as error:  # an optimizer may do anything with a tree that it was not made for
        raise _mixing("one that cannot be applied to a part of the parameters") from error
    if not all(alone):
        raise _mixing("one that treats a part of the parameters by itself in another way than in the whole")


def _each(part: Callable[[Tree], Tree], trees: Sequence[Tree]) -> tuple:
    """`part` of (a tree, a list of trees[, a tree]), all like the params."""
    return tuple([part(t) for t in tree] if isinstance(tree, list) else part(tree) for tree in trees)


def _one_layer(leaf: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(leaf.shape[1:], leaf.dtype)
