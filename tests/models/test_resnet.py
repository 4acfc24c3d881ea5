"""A small network in the shape of ResNet-18 against a twin in PyTorch: loss, every gradient, running statistics."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

WIDTHS, STRIDES = (8, 16, 16, 24), (1, 2, 2, 2)
SHAPE, CLASSES = (4, 16, 16, 3), 10


def resnet():
    blocks = {}
    for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        blocks |= {f"stage_{i}": fn.residual_block(width, stride), f"stage_{i}_again": fn.residual_block(width)}
    stem = {"conv": fn.conv(WIDTHS[0], 3, padding=1, use_bias=False), "batch_norm": fn.batch_norm(), "relu": fn.relu()}
    return fn.serial(**stem, **blocks, pool=fn.global_avg_pool(), head=fn.dense(CLASSES))


def twin(torch):
    """Modules under funcnet's names, and the function of them that the network is."""
    nn = torch.nn
    conv = partial(nn.Conv2d, bias=False)

    def main(inputs, width, stride):
        first = {"conv": conv(inputs, width, 3, stride, 1), "batch_norm": nn.BatchNorm2d(width)}
        return nn.ModuleDict(first | {"conv_1": conv(width, width, 3, 1, 1), "batch_norm_1": nn.BatchNorm2d(width)})

    def projection(inputs, width, stride):
        return nn.ModuleDict({"conv": conv(inputs, width, 1, stride), "batch_norm": nn.BatchNorm2d(width)})

    modules, inputs = {"conv": conv(3, WIDTHS[0], 3, 1, 1), "batch_norm": nn.BatchNorm2d(WIDTHS[0])}, WIDTHS[0]
    for i, (width, stride) in enumerate(zip(WIDTHS, STRIDES, strict=True)):
        first = main(inputs, width, stride)
        if stride != 1:
            first = nn.ModuleDict({"main": first, "shortcut": projection(inputs, width, stride)})
        modules |= {f"stage_{i}": nn.ModuleDict({"skip": first})}
        modules |= {f"stage_{i}_again": nn.ModuleDict({"skip": main(width, width, 1)})}
        inputs = width
    modules = nn.ModuleDict(modules | {"head": nn.Linear(inputs, CLASSES)})

    def forward(x):
        x = torch.relu(modules["batch_norm"](modules["conv"](x)))
        for name, block in modules.items():
            if name.startswith("stage"):
                inner = dict(block["skip"].items())
                f, g = inner.get("main", inner), inner.get("shortcut")
                y = f["batch_norm_1"](f["conv_1"](torch.relu(f["batch_norm"](f["conv"](x)))))
                x = torch.relu(y + (g["batch_norm"](g["conv"](x)) if g else x))
        return modules["head"](x.mean((2, 3)))

    return modules, forward


NAMES = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}


def theirs(modules, path):
    """PyTorch's tensor for the path of a leaf."""
    for name in path[:-1]:
        modules = modules[name.key]
    return getattr(modules, NAMES[path[-1].key])


def carried(leaf, back=False):
    """A kernel in PyTorch's order of axes, or back in funcnet's."""
    if leaf.ndim == 4:
        leaf = np.transpose(leaf, (2, 3, 1, 0) if back else (3, 2, 0, 1))
    return np.array(leaf.T if leaf.ndim == 2 else leaf)


def assert_close(got, wanted, tolerance, what):
    got, wanted = np.asarray(got), np.asarray(wanted)
    assert got.shape == wanted.shape, what
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    assert error < tolerance, f"{what}: {error:.1e}"


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-4), ("float64", 1e-9)])
def test_everything_is_pytorchs(dtype, tolerance, x64):
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(0)
    x, labels = rng.standard_normal(SHAPE).astype(dtype), rng.integers(0, CLASSES, SHAPE[0]).astype(np.int32)
    model = resnet()
    like = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct(SHAPE, dtype))
    draw = lambda path, leaf: jnp.asarray(
        {"scale": 1.0, "var": 1.0}.get(path[-1].key, 0.0) + rng.uniform(-0.3, 0.3, leaf.shape), leaf.dtype
    )
    params, state = jax.tree_util.tree_map_with_path(draw, like)
    objective = fn.objective(model, fn.cross_entropy(), metrics={})

    @jax.jit
    def ours(params, state):
        both = {"model": params, "loss": {}}, {"model": state, "loss": ()}
        (loss, moved), grads = fn.value_and_grad(objective)(*both, (x, labels))
        logits = model.fwd(params, state, x, None)[0]
        return logits, loss, grads["model"], moved["model"], model.apply(params, state, x)

    logits, loss, grads, moved, evaluated = ours(params, state)

    modules, forward = twin(torch)
    modules.to(getattr(torch, dtype))
    sizes = {}
    with torch.no_grad():
        for tree in (params, state):
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
                theirs(modules, path).copy_(torch.tensor(carried(np.asarray(leaf))))
    for module in modules.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(lambda m, _, out: sizes.__setitem__(m, out.numel() // out.shape[1]))
    images = torch.tensor(np.moveaxis(x, -1, 1).copy())
    modules.eval()
    assert_close(evaluated, forward(images).detach().numpy(), tolerance, "logits of evaluation")
    modules.train()
    out = forward(images)
    value = torch.nn.functional.cross_entropy(out, torch.tensor(labels).long())
    value.backward()

    assert_close(logits, out.detach().numpy(), tolerance, "logits")
    assert_close(loss, value.item(), tolerance, "loss")
    for path, leaf in jax.tree_util.tree_leaves_with_path(grads):
        wanted = carried(theirs(modules, path).grad.numpy(), back=True)
        assert_close(leaf, wanted, tolerance, jax.tree_util.keystr(path))
    for path, leaf in jax.tree_util.tree_leaves_with_path(moved):
        wanted = theirs(modules, path).numpy()
        if path[-1].key == "var":  # PyTorch keeps N / (N - 1) times the mean square
            n = sizes[owner(modules, path)]
            before = 0.9 * np.asarray(owned(state, path))
            wanted = before + (wanted - before) * (n - 1) / n
        assert_close(leaf, wanted, tolerance, jax.tree_util.keystr(path))


def owner(modules, path):
    for name in path[:-1]:
        modules = modules[name.key]
    return modules


def owned(tree, path):
    for name in path:
        tree = tree[name.key]
    return tree
