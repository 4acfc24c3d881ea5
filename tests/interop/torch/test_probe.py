"""A module that computes something else is refused, though its tensors fit, and is left as it was."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import assert_same

KEY = jax.random.key(0)
X = np.random.default_rng(1).normal(size=(2, 8, 8, 2)).astype(np.float32)
LAYER = fn.serial(
    *(fn.conv(4, 3, padding=1), fn.group_norm(2, eps=1e-5), fn.relu(), fn.max_pool(2)),
    *(
        fn.conv(4, 3, padding=1),
        fn.relu(),
        fn.flatten(),
        fn.layer_norm(eps=1e-5),
        fn.dense(16),
        fn.gelu(),
        fn.dense(16),
    ),
)
NAMES = {"conv": "0", "group_norm": "1", "conv_1": "4", "layer_norm": "7", "dense": "8", "dense_1": "10"}
LIKE = jax.eval_shape(LAYER.init, KEY, X)


def right(torch):
    nn = torch.nn
    return [
        *(nn.Conv2d(2, 4, 3, padding=1), nn.GroupNorm(2, 4), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(4, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.LayerNorm(64), nn.Linear(64, 16)),
        *(nn.GELU(), nn.Linear(16, 16)),
    ]


def wrong(torch):
    """name: (the module's layer that is another one, where it is first seen)."""
    nn = torch.nn
    return {
        "padding": ({0: nn.Conv2d(2, 4, 3, padding=1, padding_mode="replicate")}, "differ is conv, there 0"),
        "dilation": ({4: nn.Conv2d(4, 4, 3, padding=2, dilation=2)}, "differ is conv_1, there 4"),
        "eps": ({1: nn.GroupNorm(2, 4, eps=1e-6)}, "differ is group_norm, there 1"),
        "groups": ({1: nn.GroupNorm(4, 4)}, "differ is group_norm, there 1"),
        "eps behind a flatten": ({7: nn.LayerNorm(64, 1e-6)}, "differ is dense, there 8"),
        "activation": ({9: nn.GELU("tanh")}, "differ is dense_1, there 10"),
        "a kind of pool": ({3: nn.AvgPool2d(2)}, "differ is conv_1, there 4"),
        "a layer left out": ({5: nn.Identity()}, "differ is dense, there 8"),
        "a layer too many": ({10: nn.Sequential(nn.Linear(16, 16), nn.Tanh())}, ""),
        "another order of axes": (
            {6: nn.Sequential(Moved(torch), nn.Flatten())},
            "differ is dense, there 8",
        ),
    }


def Moved(torch):
    class Moved(torch.nn.Module):
        def forward(self, x):
            return x.movedim(1, -1)

    return Moved()


def test_a_module_that_computes_something_else_is_refused_and_the_first_layer_named(torch):
    params, _ = fn.from_torch(LAYER, torch.nn.Sequential(*right(torch)), *LIKE, NAMES, x=X)
    assert jax.tree.structure(params) == jax.tree.structure(LIKE[0])
    for name, (change, where) in wrong(torch).items():
        layers = right(torch)
        for i, module in change.items():
            layers[i] = module
        names = NAMES | ({"dense_1": "10.0"} if name == "a layer too many" else {})
        with pytest.raises(fn.InputError, match=f"outputs that differ by .*{where}") as error:
            fn.from_torch(LAYER, torch.nn.Sequential(*layers), *LIKE, names, x=X)
        assert error.value.kind == "from_torch", name
        fn.from_torch(LAYER, torch.nn.Sequential(*layers).state_dict(), *LIKE, names, x=X)


def test_layers_in_another_order_are_refused(torch):
    layers = right(torch)
    module = torch.nn.Sequential(*layers[:8], layers[8], layers[10], layers[9])
    with pytest.raises(fn.InputError, match="outputs that differ"):
        fn.from_torch(LAYER, module, *LIKE, NAMES | {"dense_1": "9"}, x=X)


def test_of_one_layer_no_part_is_named(torch):
    layer, module = fn.dense(2), torch.nn.Linear(3, 2)
    module.register_forward_hook(lambda module, args, y: y + 1)
    x = np.ones((1, 3), np.float32)
    with pytest.raises(fn.InputError, match=r"outputs that differ by \S+ of their largest\n"):
        fn.from_torch(layer, module, *jax.eval_shape(layer.init, KEY, x), x=x)


def test_outputs_of_another_shape_or_number_are_refused(torch):
    module = torch.nn.Sequential(*right(torch), torch.nn.Unflatten(1, (4, 4)))
    with pytest.raises(fn.InputError, match=r"\[2, 16\]\n.*\[2, 4, 4\]"):
        fn.from_torch(LAYER, module, *LIKE, NAMES, x=X)


def test_the_module_and_its_random_numbers_are_left_as_they_were(torch):
    class Counting(torch.nn.Sequential):
        def __init__(self, *modules):
            super().__init__(*modules)
            self.register_buffer("count", torch.zeros(()), persistent=False)

        def forward(self, x):
            self.count += 1
            return super().forward(x) + 0 * torch.rand(())

    module = Counting(*right(torch)).train()
    module[3].eval()
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    seed, modes = torch.random.get_rng_state(), [part.training for part in module.modules()]
    fn.from_torch(LAYER, module, *LIKE, NAMES, x=X)
    module[1].eps = 0.1
    with pytest.raises(fn.InputError, match="outputs that differ"):
        fn.from_torch(LAYER, module, *LIKE, NAMES, x=X)
    assert [part.training for part in module.modules()] == modes
    assert torch.equal(torch.random.get_rng_state(), seed)
    assert module.count == 0
    assert not any(part._forward_hooks for part in module.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in module.state_dict().items())
    assert all(tensor.dtype == torch.float32 and tensor.grad is None for tensor in module.parameters())


@pytest.mark.parametrize(
    ("dtype", "wrap"), [("float32", lambda layer: layer), ("bfloat16", lambda layer: layer), ("float32", fn.mixed)]
)
def test_rounding_of_no_dtype_hides_a_difference(torch, dtype, wrap):
    x = X[:, 0].astype(dtype)
    layer = wrap(fn.serial(fn.repeat(fn.serial(fn.dense(2), fn.tanh()), 2), fn.layer_norm(eps=1e-5)))
    nn = torch.nn
    module = nn.Sequential(nn.Linear(2, 2), nn.Tanh(), nn.Linear(2, 2), nn.Tanh(), nn.LayerNorm(2))
    module = module.to(getattr(torch, dtype))
    names = {"repeat.0.dense": "0", "repeat.1.dense": "2", "layer_norm": "4"}
    like = jax.eval_shape(layer.init, KEY, jnp.asarray(x))
    given = fn.from_torch(layer, module.state_dict(), *like, names)
    assert_same(fn.from_torch(layer, module, *like, names, x=x), given)
    module[4].eps = 2e-5
    with pytest.raises(fn.InputError, match="differ is layer_norm"):
        fn.from_torch(layer, module, *like, names, x=x)


def test_inputs_and_outputs_of_several_arrays(torch):
    class Pair(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = torch.nn.Linear(3, 2), torch.nn.Conv1d(2, 3, 3, padding=1)

        def forward(self, x, z):
            return {"a": self.a(x), "b": (self.b(z), None)}

    layer = fn.parallel(a=fn.dense(2), b=fn.conv(3, 3, padding=1))
    x = (X[:, 0, 0, :1].repeat(3, -1), X[0, :5])
    params, state = fn.from_torch(layer, Pair(), *jax.eval_shape(layer.init, KEY, x), x=x)
    assert params["b"]["kernel"].shape == (3, 2, 3)
    assert not jax.tree.leaves(state)
    lstm = fn.lstm(3)
    fn.from_torch(lstm, torch.nn.LSTM(2, 3, batch_first=True), *jax.eval_shape(lstm.init, KEY, X[0]), x=X[0])


def test_a_probe_that_tells_nothing_is_refused(torch):
    layer, module = fn.dense(2, use_bias=False), torch.nn.Linear(2, 2, bias=False)
    like = jax.eval_shape(layer.init, KEY, S(2))
    for x in (np.zeros((1, 2), np.float32), np.full((1, 2), np.nan, np.float32)):
        with pytest.raises(fn.InputError, match="outputs to compare"):
            fn.from_torch(layer, module, *like, x=x)
    for x in (None, S(2)):
        with pytest.raises(fn.InputError, match="an input with values as x"):
            fn.from_torch(layer, module, *like, x=x)


def S(features):
    return jax.ShapeDtypeStruct((1, features), jnp.float32)


def test_a_module_that_does_not_run_on_x_says_why(torch):
    class Narrow(torch.nn.Linear):
        def forward(self, x):
            return super().forward(x.float())

    layer = fn.dense(2)
    x = np.ones((1, 3), np.float32)
    with pytest.raises(fn.InputError, match="RuntimeError: ") as error:
        fn.from_torch(layer, Narrow(3, 2), *jax.eval_shape(layer.init, KEY, x), x=x)
    assert "state_dict" in error.value.remedy


def test_negative_infinities_are_equal_and_do_not_widen_what_is_allowed(torch):
    class Masked(torch.nn.Linear):
        def forward(self, x):
            return torch.cat([super().forward(x) * self.scale, torch.full((len(x), 1), -torch.inf).double()], 1)

    def mask(params, y):
        return jnp.concatenate([y, jnp.full((len(y), 1), -jnp.inf, y.dtype)], 1)

    layer, module = fn.serial(fn.dense(2), fn.from_function(mask)), Masked(3, 2)
    x = X[0, :1, :3, 0]
    like = jax.eval_shape(layer.init, KEY, x)
    module.scale = 1
    fn.from_torch(layer, module, *like, {"dense.weight": "weight", "dense.bias": "bias"}, x=x)
    module.scale = 1.01
    with pytest.raises(fn.InputError, match=r"differ by 0\.0099"):
        fn.from_torch(layer, module, *like, {"dense.weight": "weight", "dense.bias": "bias"}, x=x)
