"""Tied parameters: one array that several layers of a model use, such as an embedding that is also the output head.

    logits = h @ embedding^T        embedding = the table that the ids were looked up in

The gradient of a parameter is the sum over its uses. For each use the layer's `bwd` gives the factor, and all of these
together are one factor `Sum`, which goes to `contract`:

    dL/dE = sum_bt [ids = v] dy[b, t]  +  sum_bt dlogits[b, t, v] h[b, t]        Sum(Gather(ids, dy), Outer(dlogits, h))

A use as a transpose has the transposed gradient: the factor Outer(x, dy) becomes Outer(dy, x).

Residuals: those of the model.
Numerics: the gradients of the uses are added in float32 for half precision, and rounded once.
Source: Press and Wolf 2016, arXiv:1608.05859; Inan, Khosravi and Socher 2016, arXiv:1611.01462.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet.gradients.common_factors import Outer, Sum
from funcnet.gradients.contraction import total
from funcnet.gradients.factor import Factor, Stacked, is_factor
from funcnet.layer import Layer, a_layer
from funcnet.structure import Composed, Transparent, Wrapped, constructor

Tree = Any
Path = tuple[str, ...]


class Tie(NamedTuple):
    """A parameter `copy` that is another one, `source`, or its transpose."""

    copy: Path
    source: Path
    transposed: bool


@dataclass(frozen=True, eq=False, kw_only=True)
class Tied(Transparent):
    """A model with tied parameters; `whole` maps its params to those of the model inside, `apart` maps them back."""

    whole: Callable[[Tree], Tree]
    apart: Callable[[Tree], Tree]


@constructor
def tied(model: Layer, ties: Mapping[str, str]) -> Layer:
    """The same model, in which some parameters are copies of others: for each of `ties`, copy is source.

        tied(
            serial(embedding(V, D), blocks, layer_norm(), head=dense(V, use_bias=False)),
            {"head/kernel": "embedding/embedding.T"},
        )

    The copies are no longer among the params; state and residuals are the model's own. All contractions are defined;
    `squared_norm` includes the cross terms between the uses, and `rows` gives rows where every use is a lookup. The
    kernel of `linear_cross_entropy`, whose factor is never formed whole, cannot be a transpose: take `dense` and
    `cross_entropy`.

    Args:
        model: a combinator with parts.
        ties: path of the copy -> path of the source; ".T" after the source stands for its transpose, which only the
            kernel of a matrix product, such as a dense kernel, can be. A parameter inside a `repeat` can be tied to
            another one inside the same `repeat`.

    Raises:
        InputError: for a path that leads to no layer or parameter, a copy that is a source or a copy too, a source
            whose shape or dtype is not the copy's, and params that still hold a copy.
    """
    links = _links(a_layer(model), ties)
    sources = tuple(dict.fromkeys(link.source for link in links))
    keeping = _keeping(model, (*sources, *(link.copy for link in links)))

    @by("tied")
    def whole(params: Tree) -> Tree:
        for link in links:
            if _holds(params, link.copy):
                copy, source = "/".join(link.copy), "/".join(link.source)
                remedy = "leave it out, or run the model that is not tied, if its values are to count"
                raise InputError(f"params without {copy}, which is {source}", f"params with {copy}", remedy)
            source = _get(params, link.source)
            params = _put(params, link.copy, jnp.swapaxes(source, -1, -2) if link.transposed else source)
        return params

    def apart(params: Tree) -> Tree:
        for link in links:
            params = _without(params, link.copy)
        return params

    @by("tied")
    def check(params: Tree) -> None:
        for link in links:
            copy, source = _get(params, link.copy), _get(params, link.source)
            if not link.transposed:
                like = source
            elif source.ndim < 2:
                raise InputError(f"a matrix at {'/'.join(link.source)}", describe(source), 'leave out ".T"')
            else:
                like = jax.ShapeDtypeStruct((*source.shape[:-2], source.shape[-1], source.shape[-2]), source.dtype)
            if not expect.same(copy, like):
                wanted = f"a source for {'/'.join(link.copy)} that is {describe(copy)}"
                remedy = 'give the layers sizes that fit, or write ".T" behind the source for its transpose'
                raise InputError(wanted, describe(like), remedy)

    def init(key, x):
        params, state = model.init(key, x)
        check(params)
        return apart(params), state

    def apply(params, state, x):
        return model.apply(whole(params), state, x)

    def fwd(params, state, x, key):
        return model.fwd(whole(params), state, x, key)

    def bwd(params, residuals, dy, contract=total):
        inside = replace(contract, changes=())  # what is around this layer changes the sum, not each use
        dparams, dx = keeping.bwd(whole(params), residuals, dy, inside)
        with by("tied"):
            for source in sources:
                uses = [_factor(_get(dparams, source), source)]
                uses += [_use(link, _get(dparams, link.copy)) for link in links if link.source == source]
                dparams = _put(dparams, source, contract(_summed(uses, source), _get(params, source)))
        return apart(dparams), dx

    def again(model):
        return tied(model, ties)

    made = Tied(model, again, whole=whole, apart=apart)
    return replace(model, init=init, apply=apply, fwd=fwd, bwd=bwd, made=made)


@by("tied")
def _links(model: Layer, ties: Mapping[str, str]) -> list[Tie]:
    are_paths = isinstance(ties, Mapping) and all(isinstance(path, str) for pair in ties.items() for path in pair)
    if not are_paths or not ties:
        raise InputError("ties as a dict of paths", describe(ties), 'write {"head/kernel": "embedding/embedding.T"}')
    links = []
    for copy, source in ties.items():
        transposed = source.endswith(".T")
        links.append(Tie(tuple(copy.split("/")), tuple(source.removesuffix(".T").split("/")), transposed))
    sources = {link.source for link in links}
    for link in links:
        if link.copy in sources:
            remedy = "tie all of them to one source that is no copy"
            raise InputError("copies that are no sources", "/".join(link.copy), remedy)
        for path in (link.copy, link.source):
            if path[0] not in model.parts:
                received = f"{'/'.join(path)}, among the layers {list(model.parts)}"
                raise InputError("paths that begin with a layer's name", received, "take names from fn.summary")
    return links


def _keeping(layer: Layer, paths: Sequence[Path]) -> Layer:
    """The same layer, whose `bwd` gives the factors of the parameters at these paths and contracts all others."""
    of_parts = all(path[0] in layer.parts for path in paths)  # and none is the combinator's own
    match layer.structure:
        case Wrapped(direct=True, inner=inner, again=again) if of_parts:
            return again(_keeping(inner, paths))
        case Composed(direct=True, parts=parts, again=again) if of_parts:
            inside = {name: [path[1:] for path in paths if path[0] == name and path[1:]] for name in parts}
            return again({name: _keeping(part, inside[name]) if inside[name] else part for name, part in parts.items()})

    def bwd(params, residuals, dy, contract=total):
        factors, dx = layer.bwd(params, residuals, dy, contract.keeping)

        def one(path, param, factor):
            kept = tuple(entry.key for entry in path) in paths
            if not is_factor(factor):
                return factor
            return contract.changed(factor, param) if kept else contract(factor, param)

        return jax.tree_util.tree_map_with_path(one, params, factors), dx

    return replace(layer, bwd=bwd)


def _summed(uses: Sequence[Any], source: Path) -> Factor:
    """One factor for all uses; for uses that are stacked, as then all must be, a stack of one for each layer."""
    if not any(isinstance(use, Stacked) for use in uses):
        return Sum(tuple(uses))
    if not all(isinstance(use, Stacked) for use in uses):
        remedy = "tie what is repeated to what is repeated with it"
        raise InputError(f"uses of {'/'.join(source)} inside the same repeat", "some outside of it", remedy)
    return Stacked(_summed([use.factor for use in uses], source))


def _factor(answer: Any, path: Path) -> Any:
    if not is_factor(answer):
        remedy = "tie all of a parameter's uses in one tied(..), and write bwd with contract(factor, param)"
        raise InputError(f"a factor as the gradient of {'/'.join(path)}", describe(answer), remedy)
    return answer


def _use(link: Tie, answer: Any) -> Any:
    factor = _factor(answer, link.copy)
    return _turned(factor, link.copy) if link.transposed else factor


def _turned(factor: Any, path: Path) -> Factor:
    """The factor of the transposed parameter."""
    if isinstance(factor, Stacked):
        return Stacked(_turned(factor.factor, path))
    if not isinstance(factor, Outer):
        remedy = "let the copy be the dense kernel, and the table the source"
        raise InputError(f"a kernel that is multiplied by at {'/'.join(path)}", type(factor).__name__, remedy)
    return Outer(factor.dy, factor.x)


def _get(tree: Tree, path: Path) -> Any:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            received = f"keys {list(tree)}" if isinstance(tree, Mapping) else describe(tree)
            raise InputError(f"a parameter {'/'.join(path)}", received, "take names from the model's params")
        tree = tree[name]
    if isinstance(tree, Mapping):
        raise InputError(f"a parameter {'/'.join(path)}", describe(tree), "name the array, not the layer")
    return tree


def _holds(tree: Tree, path: Path) -> bool:
    for name in path:
        if not isinstance(tree, Mapping) or name not in tree:
            return False
        tree = tree[name]
    return True


def _put(tree: Tree, path: Path, value: Any) -> Tree:
    name, *rest = path
    return {**tree, name: _put(tree.get(name, {}), tuple(rest), value) if rest else value}


def _without(tree: Tree, path: Path) -> Tree:
    name, *rest = path
    return {**tree, name: _without(tree[name], tuple(rest))} if rest else {k: v for k, v in tree.items() if k != name}
