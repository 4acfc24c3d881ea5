"""Models with a flatten, there and back: PyTorch's channels are first, ours last, and both compute the same."""

import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.interop.torch import axes
from tests.trees import assert_same, normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct


def first(x):
    return x.movedim(-1, 1)


def same(x):
    return x


def models(torch):
    """name: (layer, module, names, shape of an example, our input to the module's)."""
    nn = torch.nn

    class Apply(nn.Module):
        def __init__(self, forward, **modules):
            super().__init__()
            self.f = forward
            for name, module in modules.items():
                self.add_module(name, module)

        def forward(self, x):
            return self.f(self, x)

    sequential = lambda *modules: nn.Sequential(*modules)
    lenet = fn.serial(
        *(fn.conv(6, 5, padding=2), fn.tanh(), fn.avg_pool(2), fn.conv(5, 3, padding="VALID"), fn.tanh()),
        *(fn.avg_pool(2), fn.flatten(), fn.dense(7), fn.tanh(), fn.dense(3)),
    )
    lenet_names = {"conv": "0", "conv_1": "3", "dense": "7", "dense_1": "9"}
    features = lambda: fn.serial(
        *(fn.conv(4, 3, padding=1), fn.batch_norm(), fn.relu(), fn.max_pool(2)),
        *(fn.conv(6, 3, padding=1), fn.batch_norm(), fn.relu()),
    )
    residual = fn.serial(
        *(fn.residual_block(4, project=True), fn.flatten(), fn.dropout(0.5), fn.batch_norm(), fn.relu(), fn.dense(3))
    )

    def block(self, x):
        h = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return torch.relu(h + self.norm3(self.conv3(x)))

    blocks = lambda: Apply(
        block,
        conv1=nn.Conv2d(2, 4, 3, padding=1, bias=False),
        norm1=nn.BatchNorm2d(4),
        conv2=nn.Conv2d(4, 4, 3, padding=1, bias=False),
        norm2=nn.BatchNorm2d(4),
        conv3=nn.Conv2d(2, 4, 1, bias=False),
        norm3=nn.BatchNorm2d(4),
    )
    inside = "residual_block.skip"
    return {
        "lenet": (
            lenet,
            sequential(
                *(nn.Conv2d(2, 6, 5, padding=2), nn.Tanh(), nn.AvgPool2d(2), nn.Conv2d(6, 5, 3), nn.Tanh()),
                *(nn.AvgPool2d(2), nn.Flatten(), nn.Linear(5 * 2 * 3, 7), nn.Tanh(), nn.Linear(7, 3)),
            ),
            lenet_names,
            (12, 16, 2),
            first,
        ),
        "vgg": (
            fn.serial(
                features=features(),
                flatten=fn.flatten(),
                classifier=fn.serial(fn.dense(8), fn.relu(), fn.dropout(0.5), fn.dense(3)),
            ),
            sequential(
                sequential(
                    *(nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.MaxPool2d(2)),
                    *(nn.Conv2d(4, 6, 3, padding=1), nn.BatchNorm2d(6), nn.ReLU()),
                ),
                nn.AdaptiveAvgPool2d((7, 7)),
                nn.Flatten(),
                sequential(nn.Linear(6 * 49, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 3)),
            ),
            {
                "features": "0",
                "features.conv": "0.0",
                "features.batch_norm": "0.1",
                "features.conv_1": "0.4",
                "features.batch_norm_1": "0.5",
                "classifier.dense": "3.0",
                "classifier.dense_1": "3.3",
            },
            (14, 14, 3),
            first,
        ),
        "signals": (
            fn.serial(
                *(fn.conv(4, 3, padding="VALID"), fn.prelu(), fn.max_pool(2), fn.reshape(-1)),
                *(fn.layer_norm(eps=1e-5), fn.prelu(), fn.rms_norm(eps=1e-5), fn.dense(3)),
            ),
            sequential(
                *(nn.Conv1d(2, 4, 3), nn.PReLU(4), nn.MaxPool1d(2), nn.Flatten()),
                *(nn.LayerNorm(20), nn.PReLU(20), nn.RMSNorm(20, 1e-5), nn.Linear(20, 3)),
            ),
            {
                "conv": "0",
                "prelu": "1",
                "layer_norm": "4",
                "prelu_1": "5",
                "rms_norm": "6",
                "dense": "7",
            },
            (12, 2),
            first,
        ),
        "volumes": (
            fn.serial(
                *(
                    fn.depthwise_conv(2, multiplier=2, padding="VALID"),
                    fn.group_norm(2, eps=1e-5),
                    fn.conv_transpose(3, 2, 1, 1),
                ),
                *(fn.instance_norm(eps=1e-5), fn.named("flat", fn.remat(fn.flatten())), fn.freeze(fn.dense(3))),
            ),
            sequential(
                *(nn.Conv3d(2, 4, 2, groups=2), nn.GroupNorm(2, 4), nn.ConvTranspose3d(4, 3, 2)),
                *(nn.InstanceNorm3d(3, affine=True), nn.Flatten(), nn.Linear(3 * 3 * 4 * 5, 3)),
            ),
            {"depthwise_conv": "0", "group_norm": "1", "conv_transpose": "2", "instance_norm": "3", "dense": "5"},
            (3, 4, 5, 2),
            first,
        ),
        "residual": (
            residual,
            sequential(
                *(blocks(), nn.Flatten(), nn.Dropout(), nn.BatchNorm1d(48), nn.ReLU(), nn.Linear(48, 3)),
            ),
            {
                f"{inside}.main.conv": "0.conv1",
                f"{inside}.main.batch_norm": "0.norm1",
                f"{inside}.main.conv_1": "0.conv2",
                f"{inside}.main.batch_norm_1": "0.norm2",
                f"{inside}.shortcut.conv": "0.conv3",
                f"{inside}.shortcut.batch_norm": "0.norm3",
                "batch_norm": "3",
                "dense": "5",
            },
            (3, 4, 2),
            first,
        ),
        "branches of two flattens": (
            fn.serial(
                fn.conv(4, 3, padding=1),
                fn.branch(
                    a=fn.serial(fn.max_pool(2), fn.flatten()),
                    b=fn.serial(fn.conv(3, 1), fn.flatten()),
                    c=fn.global_avg_pool(),
                ),
                fn.concat(),
                fn.relu(),
                fn.dense(3),
            ),
            Apply(
                lambda m, x: m.out(
                    torch.relu(
                        torch.cat(
                            [
                                torch.max_pool2d(m.stem(x), 2).flatten(1),
                                m.side(m.stem(x)).flatten(1),
                                m.stem(x).mean((2, 3)),
                            ],
                            1,
                        )
                    )
                ),
                stem=nn.Conv2d(2, 4, 3, padding=1),
                side=nn.Conv2d(4, 3, 1),
                out=nn.Linear(4 * 4 + 3 * 16 + 4, 3),
            ),
            {"conv": "stem", "branch.b.conv": "side", "dense": "out"},
            (4, 4, 2),
            first,
        ),
        "joined before": (
            fn.serial(fn.branch(a=fn.conv(2, 3, padding=1), b=fn.conv(3, 1)), fn.concat(), fn.flatten(), fn.dense(3)),
            Apply(
                lambda m, x: m.out(torch.cat([m.a(x), m.b(x)], 1).flatten(1)),
                a=nn.Conv1d(2, 2, 3, padding=1),
                b=nn.Conv1d(2, 3, 1),
                out=nn.Linear(5 * 4, 3),
            ),
            {"branch.a": "a", "branch.b": "b", "dense": "out"},
            (4, 2),
            first,
        ),
        "repeated": (
            fn.serial(
                fn.repeat(fn.skip(fn.conv(2, 3, padding=1)), 2),
                fn.flatten(),
                fn.repeat(fn.serial(fn.tanh(), fn.mixed(fn.dense(8), compute="float32")), 2),
            ),
            Apply(
                lambda m, x: m.d(torch.tanh(m.c(torch.tanh((h := x + m.a(x)).add(m.b(h)).flatten(1))))),
                a=nn.Conv1d(2, 2, 3, padding=1),
                b=nn.Conv1d(2, 2, 3, padding=1),
                c=nn.Linear(8, 8),
                d=nn.Linear(8, 8),
            ),
            {"repeat.0": "a", "repeat.1": "b", "repeat_1.0.dense": "c", "repeat_1.1.dense": "d"},
            (4, 2),
            first,
        ),
        "tokens of patches": (
            fn.serial(fn.conv(4, 2, 2, "VALID"), fn.reshape(4, 4), fn.lstm(3), fn.flatten(), fn.dense(2)),
            Apply(
                lambda m, x: m.out(m.lstm(m.patch(x).flatten(2).transpose(1, 2))[0].flatten(1)),
                patch=nn.Conv2d(1, 4, 2, 2),
                lstm=nn.LSTM(4, 3, batch_first=True),
                out=nn.Linear(12, 2),
            ),
            {"conv": "patch", "dense": "out"},
            (4, 4, 1),
            first,
        ),
        "sequences": (
            fn.serial(fn.lstm(4), fn.layer_norm(eps=1e-5), fn.flatten(), fn.dense(3)),
            Apply(
                lambda m, x: m.out(m.norm(m.lstm(x)[0]).flatten(1)),
                lstm=nn.LSTM(3, 4, batch_first=True),
                norm=nn.LayerNorm(4),
                out=nn.Linear(20, 3),
            ),
            {"layer_norm": "norm", "dense": "out"},
            (5, 3),
            same,
        ),
        "words and windows": (
            fn.serial(fn.embedding(7, 4), fn.conv(3, 2, padding="VALID"), fn.relu(), fn.flatten(), fn.dense(2)),
            Apply(
                lambda m, x: m.out(torch.relu(m.conv(m.table(x).transpose(1, 2))).flatten(1)),
                table=nn.Embedding(7, 4),
                conv=nn.Conv1d(4, 3, 2),
                out=nn.Linear(12, 2),
            ),
            {"embedding": "table", "dense": "out"},
            (5,),
            same,
        ),
        "one channel, flattened at once": (
            fn.serial(fn.flatten(), fn.dense(3)),
            sequential(nn.Flatten(), nn.Linear(12, 3)),
            {"dense": "1"},
            (3, 4, 1),
            first,
        ),
        "pooled to one position": (
            fn.serial(fn.conv(4, 3, padding="VALID"), fn.flatten(), fn.dense(3)),
            sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Linear(4, 3)),
            {"conv": "0", "dense": "2"},
            (3, 3, 2),
            first,
        ),
        "a function of one's own, on features": (
            fn.serial(
                *(fn.conv(2, 3, padding=1), fn.flatten(), fn.dense(4)),
                *(fn.from_function(lambda params, x: jnp.sin(x)), fn.dense(2)),
            ),
            Apply(
                lambda m, x: m.b(torch.sin(m.a(m.conv(x).flatten(1)))),
                conv=nn.Conv1d(2, 2, 3, padding=1),
                a=nn.Linear(8, 4),
                b=nn.Linear(4, 2),
            ),
            {"dense": "a", "dense_1": "b"},
            (4, 2),
            first,
        ),
        "the output flattened": (
            fn.serial(fn.conv(4, 3, padding=1), fn.flatten(), fn.relu()),
            sequential(nn.Conv1d(2, 4, 3, padding=1), nn.Flatten(), nn.ReLU()),
            {"conv": "0"},
            (4, 2),
            first,
        ),
    }


NAMES = [
    *("lenet", "vgg", "signals", "volumes", "residual", "branches of two flattens", "joined before", "repeated"),
    *("tokens of patches", "sequences", "words and windows", "one channel, flattened at once"),
    *("pooled to one position", "a function of one's own, on features", "the output flattened"),
]


def case(torch, name):
    layer, module, names, shape, to = models(torch)[name]
    names = dict(names)
    rng = np.random.default_rng(1)
    of_ids = shape == (5,)
    x = rng.integers(0, 7, (2, *shape)) if of_ids else rng.normal(size=(2, *shape)).astype(np.float32)
    x = x.astype(np.int32) if of_ids else x
    params, state = jax.eval_shape(layer.init, KEY, S(x.shape, x.dtype))
    return layer, module.eval(), names, x, to, params, state


def positive(state):
    """Running variances are."""
    of = lambda path, leaf: jnp.abs(leaf) + 0.1 if "'var'" in jax.tree_util.keystr(path) else leaf
    return jax.tree_util.tree_map_with_path(of, state)


def outputs(torch, layer, module, params, state, x, to, flattened):
    ours = np.asarray(jax.jit(layer.apply)(params, state, x))
    with torch.no_grad():
        theirs = module(to(torch.from_numpy(x))).numpy()
    if flattened:  # no layer has put these into one order
        ours = ours.reshape(2, 4, 4).swapaxes(1, 2).reshape(2, -1)
    return ours, theirs


@pytest.mark.parametrize("name", NAMES)
def test_a_model_with_a_flatten_computes_the_same_both_ways(torch, name):
    layer, module, names, x, to, *like = case(torch, name)
    flattened = name == "the output flattened"
    params, state = normal(2, like)
    state = positive(state)
    arrays = fn.to_torch(layer, params, state, names, x=S(x.shape, x.dtype))
    module.load_state_dict({key: torch.from_numpy(array) for key, array in arrays.items()})
    ours, theirs = outputs(torch, layer, module, params, state, x, to, flattened)
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5 * np.abs(theirs).max())
    assert_same(fn.from_torch(layer, module.state_dict(), *like, names, x=x), (params, state))
    assert_same(fn.from_torch(layer, module, *like, names, x=x), (params, state))


def test_all_models_are_walked(torch):
    assert list(models(torch)) == NAMES


def test_a_model_with_a_flatten_asks_for_an_input(torch):
    layer, module, names, *_, params, state = case(torch, "lenet")
    for call in (
        lambda: fn.to_torch(layer, normal(2, params), names=names),
        lambda: fn.from_torch(layer, module.state_dict(), params, state, names),
    ):
        with pytest.raises(fn.InputError, match="an input as x") as error:
            call()
        assert "flatten" in error.value.received


def test_where_the_input_has_its_channels_can_be_said(torch):
    nn = torch.nn
    layer, module = fn.serial(fn.flatten(), fn.dense(3)), nn.Sequential(nn.Flatten(), nn.Linear(24, 3))
    x = np.random.default_rng(1).normal(size=(2, 3, 4, 2)).astype(np.float32)
    like = jax.eval_shape(layer.init, KEY, x)
    with pytest.raises(fn.InputError, match=r"channels=\"first\" or channels=\"last\"") as error:
        fn.from_torch(layer, module.state_dict(), *like, {"dense": "1"}, x=x)
    assert error.value.path == ("flatten",)
    for channels, to in {"first": first, "last": same}.items():
        params, state = fn.from_torch(layer, module.state_dict(), *like, {"dense": "1"}, x=x, channels=channels)
        theirs = module(to(torch.from_numpy(x))).detach()
        np.testing.assert_allclose(layer.apply(params, state, x), theirs, rtol=1e-5, atol=1e-5)
        assert_same(fn.from_torch(layer, module, *like, {"dense": "1"}, x=x, channels=channels), (params, state))
        arrays = fn.to_torch(layer, params, state, {"dense": "1"}, x=x, channels=channels)
        np.testing.assert_array_equal(arrays["1.weight"], module.state_dict()["1.weight"])
    with pytest.raises(fn.InputError, match="channels="):
        fn.from_torch(layer, module, *like, {"dense": "1"}, x=x, channels="NHWC")


own = fn.from_function(lambda params, x: x.reshape(x.shape[0], -1))
CONV = fn.conv(4, 3, padding=1)
UNTOLD = {
    "an own flatten": (fn.serial(CONV, own, fn.dense(2)), (4, 4, 2), "a function of one's own"),
    "an own activation, then a flatten": (
        fn.serial(CONV, fn.from_function(lambda params, x: jnp.sin(x)), fn.flatten(), fn.dense(2)),
        (4, 4, 2),
        "a function of one's own",
    ),
    "an own activation behind a flatten": (
        fn.serial(CONV, fn.flatten(), fn.from_function(lambda params, x: jnp.sin(x)), fn.dense(2)),
        (4, 4, 2),
        "a flatten of positions",
    ),
    "a dense layer on channels": (fn.serial(CONV, fn.dense(3), fn.flatten(), fn.dense(2)), (4, 4, 2), "channels first"),
    "a layer norm on channels": (
        fn.serial(CONV, fn.layer_norm(), fn.relu(), fn.flatten(), fn.dense(2)),
        (4, 4, 2),
        "channels first",
    ),
    "a pool of sequences": (
        fn.serial(fn.lstm(3), fn.max_pool(2), fn.flatten(), fn.dense(2)),
        (4, 2),
        "channels first",
    ),
    "groups of a flatten": (fn.serial(CONV, fn.flatten(), fn.group_norm(2), fn.dense(2)), (4, 2), "flatten"),
    "gates of a flatten": (fn.serial(CONV, fn.flatten(), fn.glu(), fn.dense(2)), (4, 2), "flatten"),
    "pieces of a flatten": (fn.serial(CONV, fn.flatten(), fn.maxout(2), fn.dense(2)), (4, 2), "flatten"),
    "a sum of a flatten and features": (
        fn.serial(CONV, fn.flatten(), fn.skip(fn.dense(16)), fn.dense(2)),
        (4, 2),
        "flatten",
    ),
    "rows of positions": (fn.serial(CONV, fn.reshape(4, 16), fn.lstm(2)), (4, 4, 2), r"reshape of \[4, 4, 4\]"),
    "a flatten made rows": (fn.serial(CONV, fn.flatten(), fn.reshape(8, 2), fn.lstm(2)), (4, 2), "flatten"),
    "positions of features": (
        fn.serial(fn.dense(12), fn.reshape(3, 2, 2), fn.relu(), fn.conv_transpose(2, 2)),
        (5,),
        r"positions \[3, 2\] by a reshape",
    ),
    "positions of features, normed": (
        fn.serial(fn.dense(12), fn.reshape(3, 2, 2), fn.batch_norm(), fn.flatten(), fn.dense(2)),
        (5,),
        r"positions \[3, 2\] by a reshape",
    ),
    "a flatten inside of a reversible": (
        fn.serial(CONV, fn.flatten(), fn.reversible(fn.dense(8), fn.dense(8))),
        (4, 2),
        "flatten",
    ),
    "channels shuffled by an own function": (
        fn.serial(CONV, fn.from_function(lambda params, x: x.reshape(x.shape[0], 4, 16)), fn.lstm(2)),
        (4, 4, 2),
        "a function of one's own",
    ),
}


@pytest.mark.parametrize("name", UNTOLD)
def test_where_the_order_cannot_be_told_the_conversion_is_refused_both_ways(torch, name):
    layer, shape, received = UNTOLD[name]
    x = S((2, *shape), jnp.float32)
    like = jax.eval_shape(layer.init, KEY, x)
    params, state = normal(2, like)
    for call in (
        lambda: fn.to_torch(layer, params, state, x=x),
        lambda: fn.from_torch(layer, {}, params, state, x=x),
    ):
        with pytest.raises(fn.InputError, match=received) as error:
            call()
        assert error.value.path, "where"


def test_views_of_features_are_the_same_there(torch):
    """Features made rows of a sequence, and back, and rows of one channel each."""
    nn = torch.nn
    layer = fn.serial(fn.dense(12), fn.reshape(4, 3), fn.gru(2), fn.flatten(), fn.dense(3))
    params, state = normal(1, jax.eval_shape(layer.init, KEY, S((2, 5), jnp.float32)))
    arrays = fn.to_torch(layer, params, state, x=S((2, 5), jnp.float32))
    a, gru, b = nn.Linear(5, 12), nn.GRU(3, 2, batch_first=True), nn.Linear(8, 3)
    for name, module in {"dense": a, "gru": gru, "dense_1": b}.items():
        given = {key.removeprefix(f"{name}."): value for key, value in arrays.items() if key.startswith(f"{name}.")}
        module.load_state_dict({key: torch.from_numpy(value) for key, value in given.items()})
    x = np.random.default_rng(1).normal(size=(2, 5)).astype(np.float32)
    with torch.no_grad():
        theirs = b(gru(a(torch.from_numpy(x)).view(2, 4, 3))[0].flatten(1)).numpy()
    np.testing.assert_allclose(layer.apply(params, state, x), theirs, rtol=1e-5, atol=1e-5)


def test_every_layer_there_is_is_known():
    """One that is not would be taken for a function that nothing is known of."""
    layers = Path(fn.__file__).parent / "layers"
    made = re.compile(r"(?:stateless|elementwise|Layer|_group_norm|_gated|_dropping|over_time|_norm)\(\s*\"(\w+)\"")
    kinds = {kind for file in layers.glob("*.py") for kind in made.findall(file.read_text())}
    assert {"dense", "relu", "attention", "batch_norm", "dropout", "glu", "lstm", "group_norm", "rms_norm"} <= kinds
    assert kinds <= {*axes._KNOWN, *axes._RESHAPES}


def test_float64_keeps_its_digits_behind_a_flatten_without_64_bits_in_jax():
    layer, x = fn.serial(fn.conv(2, 1), fn.flatten(), fn.dense(2)), S((1, 3, 2), jnp.float32)
    params = jax.tree.map(lambda a: np.full(a.shape, np.pi), jax.eval_shape(layer.init, KEY, x)[0])
    arrays = fn.to_torch(layer, params, x=x)
    assert all(array.dtype == np.float64 and np.all(array == np.pi) for array in arrays.values())
    assert all(array.flags.c_contiguous and array.flags.owndata for array in arrays.values())
    with pytest.raises(fn.InputError):  # an input of another dtype
        fn.to_torch(layer, params, x=S((1, 3, 2), jnp.bfloat16))


@pytest.mark.parametrize("given", ["tensor", "text", None])
def test_an_input_that_is_no_array_is_refused(torch, given):
    x = {"tensor": torch.ones(1, 2, 3), "text": "x", None: {"x": 1.0}}[given]
    layer = fn.serial(fn.conv(2, 1), fn.flatten(), fn.dense(2))
    like = jax.eval_shape(layer.init, KEY, S((1, 3, 2), jnp.float32))
    of_another_library = "array of NumPy or JAX"
    with pytest.raises(fn.InputError, match=of_another_library if given == "tensor" else "arrays as x"):
        fn.to_torch(layer, normal(1, like[0]), x=x)
    with pytest.raises(fn.InputError, match=of_another_library if given == "tensor" else "with values as x"):
        fn.from_torch(layer, torch.nn.Linear(1, 1), *like, x=x)
    with pytest.raises(fn.InputError, match=of_another_library):
        fn.from_torch(layer, {}, {"w": torch.ones(1)}, x=x)


def test_a_state_that_is_left_out_is_the_layers(torch):
    layer = fn.serial(fn.conv(2, 1), fn.flatten(), fn.dense(2))
    x = np.random.default_rng(1).normal(size=(2, 3, 2)).astype(np.float32)
    params = normal(1, jax.eval_shape(layer.init, KEY, x)[0])
    module = torch.nn.Sequential(torch.nn.Conv1d(2, 2, 1), torch.nn.Flatten(), torch.nn.Linear(6, 2))
    names = {"conv": "0", "dense": "2"}
    arrays = fn.to_torch(layer, params, names=names, x=x)
    module.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()})
    assert_same(fn.from_torch(layer, module, params, names=names, x=x), (params, ()))
