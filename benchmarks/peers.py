"""One training step in each framework, as its own documentation writes it, from the same parameters and batch.

Every side does the same work: forward pass, mean loss, gradients, Adam. The JAX sides are jitted and donate their
parameters and optimizer state alike. A workload says what the network looks like in each framework, and where in it
each of funcnet's layers is: `places(network) -> {path of the funcnet layer: module, or a list of modules that funcnet
has stacked}`. With that, parameters are carried over and gradients are brought back into one layout,

    {path: {field: array}}      fields as in funcnet: kernel [in, out], bias, scale, embedding
"""

import os
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from benchmarks.harness import Side

LEARNING_RATE = 1e-3
SIDES = ("funcnet", "plain", "equinox", "flax", "torch")

Batch = tuple[Any, Any]
Fields = Mapping[str, Mapping[str, np.ndarray]]
Network = Callable[[], Any]
Places = Callable[[Any], Mapping[str, Any]]


class Loss(NamedTuple):
    """A mean loss three times: funcnet's layer, a function of (prediction, target), a name in torch.nn.functional."""

    funcnet: fn.Layer
    jax: Callable[[Any, Any], Any]
    torch: str


def cross_entropy() -> Loss:
    def plain(logits, labels):
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    return Loss(fn.cross_entropy(), plain, "cross_entropy")


def mse() -> Loss:
    return Loss(fn.mse(), lambda prediction, target: jnp.mean(jnp.square(prediction - target)), "mse_loss")


def sides(
    model: fn.Layer,
    loss: Loss,
    batch: Batch,
    *,
    plain: Callable[[Any, Any], Any],
    equinox: Network,
    flax: Network,
    torch: Network,
    places: Places,
    example_rank: int = 1,
) -> dict[str, Callable[[], Side]]:
    """The five sides of a workload, each made when called, so that what is not installed is not needed.

    Args:
        model: the network in funcnet; its init draws everybody's parameters.
        loss: the mean that is minimised.
        batch: (inputs, targets), NumPy.
        plain: (funcnet's params, inputs) -> prediction in plain JAX.
        equinox, flax, torch: make the network; Equinox's takes one example without its leading axes.
        places: as above, for all three.
        example_rank: how many axes the input of Equinox's network has.
    """
    key = jax.random.key(0)
    objective = fn.objective(model, loss.funcnet, metrics={})
    params = jax.tree.map(np.array, fn.init_train_state(objective, _adam(), key, batch).params["model"])
    fields = by_layer(params)
    return {
        "funcnet": lambda: funcnet_side(objective, key, batch),
        "plain": lambda: plain_side(plain, loss, params, batch),
        "equinox": lambda: equinox_side(equinox(), loss, places, fields, batch, example_rank),
        "flax": lambda: flax_side(flax(), loss, places, fields, batch),
        "torch": lambda: torch_side(torch(), loss, places, fields, batch),
    }


def funcnet_side(objective: Any, key: Any, batch: Batch) -> Side:
    batch = _on_device(batch)
    step: Any = fn.train_step(objective, _adam(), norms=False)

    def check(carried):
        (loss, _), grads = jax.jit(fn.value_and_grad(objective))(carried.params, carried.state, batch, key)
        return float(loss), by_layer(grads["model"])

    def advance(carried):
        carried, metrics = step(carried, batch)
        return carried, metrics["loss"]

    start = fn.init_train_state(objective, _adam(), key, batch)
    return _jax_side(start, check, advance, lambda carried: step.lower(carried, batch))


def plain_side(predict: Callable[[Any, Any], Any], loss: Loss, params: Any, batch: Batch) -> Side:
    optimizer, batch, params = _adam(), _on_device(batch), _on_device(params)

    def loss_of(params, batch):
        inputs, targets = batch
        return loss.jax(predict(params, inputs), targets)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, opt_state, batch):
        value, grads = jax.value_and_grad(loss_of)(params, batch)
        updates, opt_state = optimizer.update(grads, opt_state, params)
        return optax.apply_updates(params, updates), opt_state, value

    def check(carried):
        value, grads = jax.jit(jax.value_and_grad(loss_of))(carried[0], batch)
        return float(value), by_layer(grads)

    def advance(carried):
        params, opt_state, value = step(*carried, batch)
        return (params, opt_state), value

    start = params, optimizer.init(params)
    return _jax_side(start, check, advance, lambda carried: step.lower(*carried, batch))


def equinox_side(network: Any, loss: Loss, places: Places, fields: Fields, batch: Batch, example_rank: int = 1) -> Side:
    """`eqx.filter_jit`; the batch goes first, since `donate="all-except-first"` keeps exactly that."""
    import equinox as eqx

    optimizer, batch = _adam(), _on_device(batch)
    values = [jnp.array(_native(field, fields[path][field])) for path, field in _slots(fields)]

    def weights(network):
        return [getattr(places(network)[path], _WEIGHT[field]) for path, field in _slots(fields)]

    # a bias of a convolution has axes of size one for the positions
    values = [value.reshape(weight.shape) for value, weight in zip(values, weights(network), strict=True)]
    network = eqx.tree_at(weights, network, values)

    def loss_of(network, batch):
        inputs, targets = batch
        for _ in range(inputs.ndim - example_rank):
            network = jax.vmap(network)
        return loss.jax(network(inputs), targets)

    def one_step(batch, network, opt_state):
        value, grads = eqx.filter_value_and_grad(loss_of)(network, batch)
        updates, opt_state = optimizer.update(grads, opt_state, eqx.filter(network, eqx.is_inexact_array))
        return eqx.apply_updates(network, updates), opt_state, value

    step: Any = eqx.filter_jit(one_step, donate="all-except-first")

    def check(carried):
        value, grads = eqx.filter_jit(eqx.filter_value_and_grad(loss_of))(carried[0], batch)
        found = places(grads)

        def gradient(path, field):
            return _ours(field, getattr(found[path], _WEIGHT[field])).reshape(fields[path][field].shape)

        return float(value), _read(fields, gradient)

    def advance(carried):
        network, opt_state, value = step(batch, *carried)
        return (network, opt_state), value

    start = network, optimizer.init(eqx.filter(network, eqx.is_inexact_array))
    return _jax_side(start, check, advance, lambda carried: step.lower(batch, *carried).lowered)


def flax_side(network: Any, loss: Loss, places: Places, fields: Fields, batch: Batch) -> Side:
    """Flax's documented "functional training loop": it walks the module graph once, where `nnx.jit` does at every call.

    On the digits workload a step takes it a quarter of the time of `nnx.jit` (flax 0.12.8, jax 0.10.2, two cores).
    """
    from flax import nnx

    batch = _on_device(batch)
    for path, field in _slots(fields):
        getattr(places(network)[path], field).set_value(jnp.array(fields[path][field]))
    graph, start = nnx.split((network, nnx.Optimizer(network, _adam(), wrt=nnx.Param)))

    def loss_of(network, batch):
        inputs, targets = batch
        return loss.jax(network(inputs), targets)

    @partial(jax.jit, donate_argnums=0)
    def step(carried, batch):
        network, optimizer = nnx.merge(graph, carried)
        value, grads = nnx.value_and_grad(loss_of)(network, batch)
        optimizer.update(network, grads)
        return nnx.state((network, optimizer)), value

    def check(carried):
        network, _ = nnx.merge(graph, carried)
        value, grads = nnx.jit(nnx.value_and_grad(loss_of))(network, batch)
        holder = nnx.clone(network)
        nnx.update(holder, grads)
        found = places(holder)
        return float(value), _read(fields, lambda path, field: np.array(getattr(found[path], field)[...]))

    return _jax_side(start, check, lambda carried: step(carried, batch), lambda carried: step.lower(carried, batch))


def torch_side(network: Any, loss: Loss, places: Places, fields: Fields, batch: Batch) -> Side:
    """PyTorch eager on the CPU, on as many threads as JAX has."""
    import torch

    torch.set_num_threads(cores())
    torch.set_flush_denormal(True)  # as XLA does; Adam's moments of units that died would slow it down otherwise
    inputs, targets = (torch.tensor(array) for array in batch)
    targets = targets if targets.is_floating_point() else targets.long()
    network.to(getattr(torch, str(next(iter(next(iter(fields.values())).values())).dtype)))
    modules = {path: place if isinstance(place, list) else [place] for path, place in places(network).items()}
    stacked = {path for path, place in places(network).items() if isinstance(place, list)}
    with torch.no_grad():
        for path, field in _slots(fields):
            value = _native(field, fields[path][field])
            for module, part in zip(modules[path], value if path in stacked else [value], strict=True):
                getattr(module, _WEIGHT[field]).copy_(torch.tensor(part))
    optimizer = torch.optim.Adam(network.parameters(), lr=LEARNING_RATE)

    def backward():
        optimizer.zero_grad(set_to_none=True)
        value = getattr(torch.nn.functional, loss.torch)(network(inputs), targets)
        value.backward()
        return value.detach()

    def gradient(path, field):
        parts = [_ours(field, getattr(module, _WEIGHT[field]).grad.numpy()) for module in modules[path]]
        return np.stack(parts) if path in stacked else parts[0]

    def step():
        value = backward()
        optimizer.step()
        return value

    return Side(lambda: (float(backward()), _read(fields, gradient)), step)


def dense(p: Any, x: Any) -> Any:
    """A dense layer as one writes it in plain JAX, whatever the rank of x."""
    return x @ p["kernel"] + p["bias"]


def layer_norm(p: Any, x: Any, eps: float = 1e-6) -> Any:
    """Layer normalisation as one writes it in plain JAX."""
    mean, variance = jnp.mean(x, axis=-1, keepdims=True), jnp.var(x, axis=-1, keepdims=True)
    return (x - mean) * jax.lax.rsqrt(variance + eps) * p["scale"] + p["bias"]


def cores() -> int:
    """The cores that this process may use, which is how many threads XLA starts on a CPU."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def by_layer(params: Any) -> dict[str, dict[str, np.ndarray]]:
    """funcnet's nested params as {path of the layer: {field: array}}, parameter-free layers left out."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        *layer, field = (entry.key for entry in path)
        layers.setdefault("/".join(layer), {})[field] = np.array(leaf)
    return layers


def _jax_side(
    start: Any, check: Callable[[Any], Any], advance: Callable[[Any], tuple[Any, Any]], lower: Callable[[Any], Any]
) -> Side:
    """A side from functions of what it carries, first `start`; `advance` makes of it (the same one step on, the loss).

    A step waits for its loss only: the outputs of one compiled program become ready together, and waiting for a tree of
    parameters would charge a framework for walking its own tree.
    """
    carried = [start]

    def step():
        carried[0], value = advance(carried[0])
        return value.block_until_ready()

    return Side(lambda: check(carried[0]), step, lambda: lower(carried[0]))


# what Equinox and PyTorch call funcnet's fields
_WEIGHT = {
    "kernel": "weight",
    "recurrent_kernel": "recurrent_weight",
    "scale": "weight",
    "embedding": "weight",
    "bias": "bias",
}


def _native(field: str, value: Any) -> np.ndarray:
    """A parameter as Equinox and PyTorch store it: kernels with features and channels in front, or transposed."""
    value = np.array(value)
    if not field.endswith("kernel"):
        return value
    return np.moveaxis(value, (-1, -2), (0, 1)) if value.ndim > 3 else value.swapaxes(-1, -2)


def _ours(field: str, value: Any) -> np.ndarray:
    """The way back from `_native`."""
    value = np.array(value)
    if not field.endswith("kernel"):
        return value
    return np.moveaxis(value, (0, 1), (-1, -2)) if value.ndim > 3 else value.swapaxes(-1, -2)


def _slots(fields: Fields) -> Iterator[tuple[str, str]]:
    return ((path, field) for path, names in fields.items() for field in names)


def _read(fields: Fields, get: Callable[[str, str], np.ndarray]) -> dict[str, dict[str, np.ndarray]]:
    """Gradients in the common layout."""
    return {path: {field: get(path, field) for field in names} for path, names in fields.items()}


def _adam() -> optax.GradientTransformation:
    return optax.adam(LEARNING_RATE)


def _on_device(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)
