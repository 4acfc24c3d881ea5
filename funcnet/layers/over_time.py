"""A recurrent cell, run over time: the layer that rnn, gru and lstm share (funcnet/layers/recurrent.py has the maths).

The forward scan carries the states and keeps what the cell says; the reverse scan emits da and du, and all parameters'
gradients are contracted over all steps at once, after it.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, describe
from funcnet._internal.numerics import contract_last, product, sum_dtype
from funcnet._internal.sharding import scan, sharded_as
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.layer import Layer, stateless

Tree = Any
Saved = dict[str, Array]
States = tuple[Array, ...]


class RecurrentResiduals(NamedTuple):
    """Residuals of a recurrent layer: its input as given, y [B, T, H], and by name what a step keeps, [T, B, ..]."""

    inputs: Tree
    y: Array
    steps: Saved


class Sequences(NamedTuple):
    """The parts of an input: x [B, T, D]; valid [B, T], or None without lengths; the initial states, each [B, H]."""

    x: Array
    valid: Array | None
    states: States


class Cell(NamedTuple):
    """One step of a recurrent layer.

    Attributes:
        blocks: how many blocks of H the kernels have.
        states: how many arrays [B, H] the state has, h the first.
        enter: (params, a, u) -> the inputs of the gates.
        gates: their inputs -> all that `step` needs besides the states: the gates, and a gru's q; for an rnn h itself.
        step: (gates, states) -> (states, what the step keeps besides the gates).
        back: (gates, kept, h_prev, dstates) -> (dstates, dz): the cotangents of the states before the step, dh without
            its part through u; and dz, which is da and all else that `split` needs.
        split: dz -> (da, du).
    """

    blocks: int
    states: int
    enter: Callable[[Mapping[str, Array], Array, Array], Array]
    gates: Callable[[Array], Array]
    step: Callable[[Array, States], tuple[States, Saved]]
    back: Callable[[Array, Saved, Array, States], tuple[tuple[Any, ...], Array]]
    split: Callable[[Array], tuple[Array, Array]] = lambda dz: (dz, dz)


def over_time(
    name: str, features: int, cell: Cell, inits: tuple[Callable, Callable, Callable], reverse: bool, return_state: bool
) -> Layer:
    """The layer that runs `cell` over time."""
    expect.flags(reverse=reverse, return_state=return_state)
    kernel_init, recurrent_init, bias_init = inits
    width = cell.blocks * features

    def shapes(inputs: int) -> dict[str, tuple[int, ...]]:
        biases = jax.eval_shape(lambda: bias_init(jnp.float32))
        return {
            "kernel": (inputs, width),
            "recurrent_kernel": (features, width),
            **{name: bias.shape for name, bias in biases.items()},
        }

    def init(key: Array, inputs: Tree) -> dict[str, Array]:
        x = _parts(inputs)["x"]
        _check(inputs, features, cell.states, None)
        dtype = expect.dtype(x)
        first, *others = jax.random.split(expect.key(key), cell.blocks + 1)
        # Orthogonal matrices come from a QR decomposition, which half precision does not have.
        blocks = [recurrent_init(k, (features, features), sum_dtype(dtype)).astype(dtype) for k in others]
        kernel = kernel_init(first, (x.shape[-1], width), dtype)
        return {"kernel": kernel, "recurrent_kernel": join(*blocks), **bias_init(dtype)}

    def read(params: dict[str, Array], inputs: Tree) -> Sequences:
        _check(inputs, features, cell.states, expect.size(params, "kernel"))
        sequences = _sequences(inputs, features, cell.states)
        expect.fields(params, sequences.x.dtype, shapes(sequences.x.shape[-1]))
        return sequences

    def fwd(params: dict[str, Array], inputs: Tree) -> tuple[Tree, RecurrentResiduals]:
        x, valid, states = read(params, inputs)
        kernel, bias = params["kernel"], params["bias"]
        a = contract_last(_swap(x), kernel, 0) + bias.astype(sum_dtype(x.dtype))[None, None]

        def body(states, at):
            a, valid = at
            u = product(states[0].astype(x.dtype), params["recurrent_kernel"], (1, 0), a)
            entering = cell.enter(params, a, u)
            gates = cell.gates(entering)
            new, kept = cell.step(gates, states)
            if x.dtype != sum_dtype(x.dtype):
                kept |= {"entering": entering}
            elif gates is not new[0]:  # the gates of an rnn are h, which is kept as y
                kept |= {"gates": gates}
            return _where(valid, new, states), (new[0].astype(x.dtype), _cast(kept, x.dtype))

        states, (h, steps) = scan(body, states, (a, _columns(valid)), reverse=reverse)
        y = _swap(h) if valid is None else jnp.where(valid[..., None], _swap(h), 0)
        out = (y, _bare(_cast(states, x.dtype))) if return_state else y
        return out, RecurrentResiduals(inputs, y, steps)

    def bwd(params, residuals, dy, contract):
        inputs, y, steps = residuals
        x, valid, states = read(params, inputs)
        dy, dstates = _cotangents(dy, y, cell.states, return_state)
        h_prev = _previous(y, states[0].astype(y.dtype), valid, reverse)
        high, recurrent_t = sum_dtype(x.dtype), _transposed(params["recurrent_kernel"], x.shape[0])

        def body(dstates, at):
            dy, valid, *kept = at
            dh, *others = dstates
            kept, h, h_prev = _cast(kept, high)
            gates = cell.gates(kept["entering"]) if "entering" in kept else kept.get("gates", h)
            direct, dz = cell.back(gates, kept, h_prev, (dh + dy.astype(high), *others))
            dz = dz.astype(x.dtype)
            through = product(cell.split(dz)[1], recurrent_t, (1, 0), dh)
            return _where(valid, (direct[0] + through, *direct[1:]), dstates), _where(valid, dz, jnp.zeros_like(dz))

        at = (_swap(dy), _columns(valid), steps, _swap(y), _swap(h_prev))
        dstates, dz = scan(body, dstates, at, reverse=not reverse)
        da, du = cell.split(_swap(dz))
        dparams = {
            "kernel": contract(Outer(x, da), params["kernel"]),
            "recurrent_kernel": contract(Outer(h_prev, du), params["recurrent_kernel"]),
            "bias": contract(Shift(da), params["bias"]),
        }
        if "recurrent_bias" in params:
            dparams["recurrent_bias"] = contract(Shift(du[..., -features:]), params["recurrent_bias"])
        dx = contract_last(da, params["kernel"], 1, like=x).astype(x.dtype)
        return dparams, _like(inputs, dx, _bare(_cast(dstates, x.dtype)))

    return stateless(name, init, fwd, bwd, reads=("lengths", "state"))


def _parts(inputs: Tree) -> Mapping[str, Any]:
    """An input as a dict, also if it is x alone."""
    return inputs if isinstance(inputs, Mapping) else {"x": inputs}


def _check(inputs: Tree, features: int, states: int, inputs_size: int | None) -> None:
    """Refuse an input other than x [B, T, D], or a dict of it with lengths and initial state that fit."""
    parts = _parts(inputs)
    if "x" not in parts or parts.keys() - {"x", "lengths", "state"}:
        wanted = "an array [B, T, D], or a dict of it as x with, where wanted, lengths and state"
        raise InputError(wanted, describe(inputs), 'write {"x": x, "lengths": lengths, "state": state}')
    x = parts["x"]
    expect.sequences(x, inputs_size)
    if "lengths" in parts:
        expect.lengths(parts["lengths"], *x.shape[:2])
    if "state" in parts:
        one = jax.ShapeDtypeStruct((x.shape[0], features), expect.dtype(x))
        like = _bare((one,) * states)
        if not all(map(expect.is_array, jax.tree.leaves(parts["state"]))) or not expect.same(parts["state"], like):
            remedy = "give the final state of such a layer, or leave state out for zeros"
            raise InputError(f"an initial state {describe(like)}", describe(parts["state"]), remedy)


def _sequences(inputs: Tree, features: int, states: int) -> Sequences:
    parts = _parts(inputs)
    x = parts["x"]
    valid = None
    if "lengths" in parts:
        valid = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < parts["lengths"].astype(jnp.int32)[:, None]
        x = jnp.where(valid[..., None], x, 0)  # a NaN in the padding would survive products with 0
    zero = jnp.zeros((x.shape[0], features), x.dtype, out_sharding=sharded_as(x, 1))
    initial = tuple(jax.tree.leaves(parts.get("state", (zero,) * states)))
    return Sequences(x, valid, _cast(initial, sum_dtype(x.dtype)))


def _cotangents(dy: Tree, y: Array, states: int, return_state: bool) -> tuple[Array, States]:
    """(dy, the cotangents of the final states), the latter zeros where the state is not returned."""
    shape = (y.shape[0], y.shape[2])
    if not return_state:
        zero = jnp.zeros(shape, sum_dtype(y.dtype), out_sharding=sharded_as(y, 1))
        return expect.cotangent(dy, y.shape, y.dtype), (zero,) * states
    like = _bare((jax.ShapeDtypeStruct(shape, y.dtype),) * states)
    if not isinstance(dy, tuple) or len(dy) != 2 or jax.tree.structure(dy[1]) != jax.tree.structure(like):
        wanted = f"cotangents like the output, ({describe(y)}, {describe(like)})"
        raise InputError(wanted, describe(dy), "give bwd a dy of the structure that fwd returned")
    dstates = tuple(expect.cotangent(leaf, shape, y.dtype) for leaf in jax.tree.leaves(dy[1]))
    return expect.cotangent(dy[0], y.shape, y.dtype), _cast(dstates, sum_dtype(y.dtype))


def _previous(y: Array, h: Array, valid: Array | None, reverse: bool) -> Array:
    """h_{t-1} for every valid t, [B, T, H], from the outputs y and the initial h; in reverse, h_{t+1}."""
    h = h[:, None]
    if not reverse:
        return jnp.concatenate([h, y[:, :-1]], axis=1)
    after = jnp.concatenate([y[:, 1:], h], axis=1)
    if valid is None:
        return after
    begins = jnp.concatenate([~valid[:, 1:], jnp.ones_like(valid[:, :1])], axis=1)
    return jnp.where(begins[..., None], h, after)


def _like(inputs: Tree, dx: Array, dstate: Tree) -> Tree:
    """The cotangent of `inputs`."""
    if not isinstance(inputs, Mapping):
        return dx
    all_of_them = {"x": dx, "lengths": None, "state": dstate}
    return {name: all_of_them[name] for name in inputs}


def _bare(states: tuple) -> Any:
    """A state of one array as that array."""
    return states[0] if len(states) == 1 else states


def _where(valid: Array | None, new: Tree, old: Tree) -> Tree:
    """`new` where valid [B, 1], `old` elsewhere; `new` without lengths."""
    return new if valid is None else jax.tree.map(lambda a, b: jnp.where(valid, a, b), new, old)


def _columns(valid: Array | None) -> Array | None:
    """valid [B, T] as [T, B, 1]."""
    return None if valid is None else valid.T[..., None]


def _transposed(kernel: Array, examples: int) -> Array:
    """The kernel's transpose, for a product in every step; a copy where that pays (0.86 of the time at 8 examples)."""
    return kernel.T if examples == 1 else lax.optimization_barrier(kernel.T)


def _cast(tree: Tree, dtype: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def _swap(x: Array) -> Array:
    """[B, T, ..] as [T, B, ..], and back."""
    return jnp.swapaxes(x, 0, 1)


def join(*blocks: Array) -> Array:
    return jnp.concatenate(blocks, axis=-1)
