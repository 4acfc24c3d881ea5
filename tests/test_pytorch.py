"""Round trips through real PyTorch modules, and what is refused before anything is changed."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import assert_same, normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct


def modules(torch):
    """name: (layer, module, input, our input to the module's, the module's output to ours)."""
    nn = torch.nn
    same = lambda x: x
    first = lambda x: x.movedim(-1, 1)
    last = lambda y: y.movedim(1, -1)
    of_pair = lambda y: y[0]
    sequence = (2, 5, 3)

    def attending(module):
        attend = module.forward
        module.forward = lambda x: attend(x, x, x, need_weights=False)[0]
        return module

    return {
        "dense": (fn.dense(4), nn.Linear(3, 4), (2, 3), same, same),
        "dense, no bias": (fn.dense(4, use_bias=False), nn.Linear(3, 4, bias=False), (2, 3), same, same),
        "conv 1d": (fn.conv(4, 3, padding=1), nn.Conv1d(2, 4, 3, padding=1), (2, 7, 2), first, last),
        "conv 2d, groups": (
            fn.conv(4, (3, 2), 2, padding=1, groups=2),
            nn.Conv2d(6, 4, (3, 2), 2, padding=1, groups=2),
            (2, 7, 5, 6),
            first,
            last,
        ),
        "conv 3d": (fn.conv(4, (1, 2, 3), padding="VALID"), nn.Conv3d(2, 4, (1, 2, 3)), (2, 3, 4, 5, 2), first, last),
        "layer_norm": (fn.layer_norm(1e-5), nn.LayerNorm(3), (2, 3), same, same),
        "rms_norm": (fn.rms_norm(1e-5), nn.RMSNorm(3, 1e-5), (2, 3), same, same),
        "group_norm": (fn.group_norm(2, 1e-5), nn.GroupNorm(2, 4), (2, 5, 4), first, last),
        "instance_norm": (
            fn.instance_norm(1e-5),
            nn.InstanceNorm1d(3, affine=True),
            (2, 5, 3),
            first,
            last,
        ),
        "depthwise_conv": (
            fn.depthwise_conv(3, padding=1, multiplier=2),
            nn.Conv1d(3, 6, 3, padding=1, groups=3),
            (2, 5, 3),
            first,
            last,
        ),
        "conv_transpose 1d": (
            fn.conv_transpose(4, 3, 2, 1),
            nn.ConvTranspose1d(2, 4, 3, 2, 1),
            (2, 5, 2),
            first,
            last,
        ),
        "conv_transpose 2d": (
            fn.conv_transpose(3, (2, 3), (1, 2), ((1, 1), (2, 3)), use_bias=False),
            nn.ConvTranspose2d(2, 3, (2, 3), (1, 2), 0, (0, 1), bias=False),
            (2, 3, 4, 2),
            first,
            last,
        ),
        "attention": (fn.attention(2), attending(nn.MultiheadAttention(4, 2, batch_first=True)), (2, 5, 4), same, same),
        "attention, no bias": (
            fn.attention(2, use_bias=False),
            attending(nn.MultiheadAttention(4, 2, batch_first=True, bias=False)),
            (2, 5, 4),
            same,
            same,
        ),
        "prelu": (fn.prelu(), nn.PReLU(3), (2, 3), same, same),
        "rnn": (fn.rnn(4), nn.RNN(3, 4, batch_first=True), sequence, same, of_pair),
        "lstm": (fn.lstm(4), nn.LSTM(3, 4, batch_first=True), sequence, same, of_pair),
        "gru": (fn.gru(4), nn.GRU(3, 4, batch_first=True), sequence, same, of_pair),
        "bidirectional": (
            fn.bidirectional(fn.gru(4), fn.gru(4, reverse=True)),
            nn.GRU(3, 4, batch_first=True, bidirectional=True),
            sequence,
            same,
            of_pair,
        ),
        "stacked": (
            fn.stacked(fn.lstm(4), fn.lstm(4), fn.lstm(4)),
            nn.LSTM(3, 4, num_layers=3, batch_first=True),
            sequence,
            same,
            of_pair,
        ),
        "stacked, both directions": (
            fn.stacked(*[fn.bidirectional(fn.gru(4), fn.gru(4, reverse=True))] * 2),
            nn.GRU(3, 4, num_layers=2, batch_first=True, bidirectional=True),
            sequence,
            same,
            of_pair,
        ),
    }


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch")


def test_every_module_computes_the_same_with_the_same_weights_both_ways(torch, x64):
    for name, (layer, module, shape, to, back) in modules(torch).items():
        module.double()
        x = np.random.default_rng(1).normal(size=shape)
        params, state = normal(2, jax.eval_shape(layer.init, KEY, S(shape, jnp.float64)))
        of_module = lambda module=module, to=to, back=back, x=x: back(module(to(torch.from_numpy(x)))).detach().numpy()
        apply = jax.jit(layer.apply)
        loaded, _ = fn.from_torch(layer, module.state_dict(), params, state)
        np.testing.assert_allclose(apply(loaded, state, x), of_module(), rtol=1e-10, atol=1e-12, err_msg=name)
        arrays = fn.to_torch(layer, params, state)
        module.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in arrays.items()})
        np.testing.assert_allclose(apply(params, state, x), of_module(), rtol=1e-10, atol=1e-12, err_msg=name)
        assert_same(fn.from_torch(layer, arrays, params, state)[0], params)


def test_a_batch_norms_running_statistics_go_there_and_back(torch, x64):
    layer, module = fn.batch_norm(eps=1e-5), torch.nn.BatchNorm1d(3).double().eval()
    x = np.random.default_rng(1).normal(size=(2, 5, 3))
    like = jax.eval_shape(layer.init, KEY, S(x.shape, jnp.float64))
    params, state = normal(3, like)
    state["var"] = jnp.abs(state["var"])
    arrays = fn.to_torch(layer, params, state)
    module.load_state_dict({key: torch.from_numpy(array.copy()) for key, array in arrays.items()})
    theirs = module(torch.from_numpy(x).movedim(-1, 1)).movedim(1, -1).detach().numpy()
    np.testing.assert_allclose(layer.apply(params, state, x), theirs, rtol=1e-10, atol=1e-12)
    assert_same(fn.from_torch(layer, module.state_dict(), *like), (params, state))


def test_a_model_of_many_layers_by_names(torch, x64):
    """A tied language model with a stack and a frozen layer: PyTorch's names by a mapping."""

    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.linear = torch.nn.LayerNorm(4), torch.nn.Linear(4, 4)

        def forward(self, h):
            return h + torch.tanh(self.linear(self.norm(h)))

    class Language(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.wte, self.project = torch.nn.Embedding(7, 4), torch.nn.Linear(4, 4)
            self.h = torch.nn.ModuleList([Block(), Block()])
            self.lm_head = torch.nn.Linear(4, 7, bias=False)
            self.lm_head.weight = self.wte.weight

        def forward(self, ids):
            h = self.project(self.wte(ids))
            for block in self.h:
                h = block(h)
            return self.lm_head(h)

    block = fn.skip(fn.serial(fn.layer_norm(1e-5), fn.dense(4), fn.tanh()))
    model = fn.tied(
        fn.serial(
            fn.embedding(7, 4, dtype=float),
            fn.named("project", fn.freeze(fn.dense(4))),
            fn.repeat(fn.remat(block), 2),
            head=fn.dense(7, use_bias=False),
        ),
        {"head/kernel": "embedding/embedding.T"},
    )
    names = {"embedding": "wte", "head": "lm_head", "repeat.*.layer_norm": "h.*.norm", "repeat.*.dense": "h.*.linear"}
    module, ids = Language().double(), np.array([[0, 3, 6], [1, 1, 2]])
    like = jax.eval_shape(model.init, KEY, ids)
    params, state = fn.from_torch(model, module.state_dict(), *like, names=names)
    wanted = module(torch.from_numpy(ids)).detach().numpy()
    np.testing.assert_allclose(model.apply(params, state, ids), wanted, rtol=1e-10, atol=1e-12)
    again = fn.to_torch(model, params, state, names)
    assert again.keys() == module.state_dict().keys()
    assert all(np.array_equal(again[name], tensor.numpy()) for name, tensor in module.state_dict().items())
    untied = dict(module.state_dict()) | {"lm_head.weight": torch.zeros(7, 4).double()}
    with pytest.raises(fn.InputError, match="equal values for what is tied"):
        fn.from_torch(model, untied, *like, names=names)


DENSE = fn.serial(fn.dense(4), fn.relu(), fn.dense(2))
LIKE = jax.eval_shape(DENSE.init, KEY, S((2, 3), jnp.float32))
NAMES = {"dense": "0", "dense_1": "2"}


def arrays():
    return fn.to_torch(DENSE, normal(4, LIKE[0]), {}, NAMES)


REFUSED = {
    "a missing tenso": (lambda a: a.pop("0.bias"), "0.bias: float32[4]", "0.bias missing"),
    "a superfluous tenso": (lambda a: a.update(extra=np.ones(1)), "4 arrays", "extra superfluous"),
    "a kernel that is not transposed": (
        lambda a: a.update({"0.weight": a["0.weight"].T}),
        "0.weight: float32[4, 3]",
        "0.weight: float32[3, 4]",
    ),
    "another dtype": (
        lambda a: a.update({"0.bias": a["0.bias"].astype(np.float64)}),
        "0.bias: float32[4]",
        "0.bias: float64[4]",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_state_dict_that_does_not_fit_is_refused(name):
    change, expected, received = REFUSED[name]
    given = arrays()
    assert given.keys() == {"0.weight", "0.bias", "2.weight", "2.bias"}
    change(given)
    with pytest.raises(fn.InputError, match="from_torch") as error:
        fn.from_torch(DENSE, given, *LIKE, names=NAMES)
    assert expected in error.value.expected
    assert received in error.value.received


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ({"dens": "0"}, r"\['dens'\]"),
        ({"dense": "0", "dense_2": "1"}, r"\['dense_2'\]"),
        ({"dense": "0", "dense_1": "0"}, "a name for each array"),
    ],
)
def test_names_that_nothing_has_or_two_would_have_are_refused(names, message):
    with pytest.raises(fn.InputError, match=message):
        fn.to_torch(DENSE, normal(4, LIKE[0]), {}, names)


def test_the_longest_name_that_fits_is_taken_and_no_part_of_one():
    params = normal(5, LIKE[0])
    names = fn.to_torch(DENSE, params, names={"dense": "a", "dense.bias": "b", "dense_1": "c"}).keys()
    assert names == {"a.weight", "b", "c.weight", "c.bias"}
    names = fn.to_torch(DENSE, params, names={"*.bias": "biases.*", "*": "layers.*.0", "dense_1.weight": "w"}).keys()
    assert names == {"layers.dense.0.weight", "biases.dense", "w", "biases.dense_1"}


def test_a_layer_that_pytorch_has_not_is_refused():
    odd = fn.from_function(lambda p, x: x * p["w"], lambda key, x: {"w": x})
    for call in (
        lambda: fn.to_torch(fn.serial(odd=odd), {"odd": {"w": jnp.ones(2)}}),
        lambda: fn.from_torch(fn.serial(odd=odd), {}, {"odd": {"w": jnp.ones(2)}}),
    ):
        with pytest.raises(fn.InputError, match="convert this layer by hand"):
            call()


def test_repeats_without_params_and_nested_ones_go_there_and_back():
    model = fn.serial(fn.repeat(fn.tanh(), 3), fn.repeat(fn.serial(fn.repeat(fn.dense(3), 2), fn.dense(3)), 2))
    params, state = jax.eval_shape(model.init, KEY, S((2, 3), jnp.float32))
    params = normal(6, params)
    arrays = fn.to_torch(model, params, state)
    assert "repeat_1.1.repeat.0.weight" in arrays
    assert "repeat_1.0.dense.bias" in arrays
    assert_same(fn.from_torch(model, arrays, params, state), (params, state))


@pytest.mark.parametrize("options", [{"kv_heads": 1}, {"head_dim": 3}, {"features": 3}])
def test_attention_of_other_sizes_is_refused(options):
    layer = fn.attention(2, **options)
    params, _ = layer.init(KEY, jnp.ones((1, 3, 4)))
    with pytest.raises(fn.InputError, match=r"kernels \[D, D\] alone"):
        fn.to_torch(layer, params)


def test_tensors_of_bfloat16_go_there_and_back_bit_for_bit(torch):
    layer, module = fn.dense(4), torch.nn.Linear(3, 4).bfloat16()
    like = jax.eval_shape(layer.init, KEY, S((2, 3), jnp.bfloat16))
    params, _ = fn.from_torch(layer, module.state_dict(), *like)
    np.testing.assert_array_equal(params["bias"].astype("float32"), module.bias.detach().float().numpy())
    twin = torch.nn.Linear(3, 4).bfloat16()
    arrays = fn.to_torch(layer, params)
    twin.load_state_dict({name: torch.from_numpy(array.astype("float32")) for name, array in arrays.items()})
    assert all(torch.equal(twin.state_dict()[name], tensor) for name, tensor in module.state_dict().items())


def test_parameters_and_their_derivatives_are_let_go(torch):
    module = torch.nn.Linear(3, 4)
    like = jax.eval_shape(fn.dense(4).init, KEY, S((2, 3), jnp.float32))
    params, _ = fn.from_torch(fn.dense(4), dict(module.named_parameters()), *like)
    np.testing.assert_array_equal(params["kernel"], module.weight.detach().numpy().T)


def test_the_arrays_are_copies_that_can_be_written_to(torch):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    tensors = {name: torch.from_numpy(array) for name, array in fn.to_torch(fn.dense(4), params).items()}
    tensors["bias"].zero_()
    np.testing.assert_array_equal(params["bias"], jnp.ones(4))
    given = {"weight": np.ones((4, 3), np.float32), "bias": np.ones(4, np.float32)}
    taken, _ = fn.from_torch(fn.dense(4), given, params)
    given["bias"][:] = 0
    np.testing.assert_array_equal(taken["bias"], jnp.ones(4))


@pytest.mark.parametrize("tensors", [[np.ones(3)], None, {0: np.ones(3)}])
def test_what_is_no_state_dict_is_refused(tensors):
    with pytest.raises(fn.InputError, match="tensors by name"):
        fn.from_torch(DENSE, tensors, *LIKE)


@pytest.mark.parametrize("names", ["0", [("dense", "0")], {"dense": 0}])
def test_names_that_are_no_dict_of_texts_are_refused(names):
    params = normal(4, LIKE[0])
    with pytest.raises(fn.InputError, match="names as a dict of texts"):
        fn.to_torch(DENSE, params, names=names)
    with pytest.raises(fn.InputError, match="names as a dict of texts"):
        fn.from_torch(DENSE, fn.to_torch(DENSE, params), params, names=names)


NORMED = fn.serial(fn.dense(2), fn.batch_norm())
FROZEN = fn.serial(fn.freeze(fn.dense(2)))
INCOMPLETE = {
    "no kernel": (fn.dense(3), {}, (), "params of dense: kernel, bias"),
    "no kernel in a repeat": (fn.repeat(fn.dense(3), 2), {}, (), "params of dense: kernel, bias"),
    "no params at all": (fn.dense(3), None, (), "params of dense: kernel, bias"),
    "no params of an activation": (fn.relu(), None, (), "params of relu: an empty dict"),
    "no scale": (fn.layer_norm(), {"bias": jnp.ones(3)}, (), "params of layer_norm: scale, bias"),
    "no gates": (fn.lstm(3), {}, (), "params of lstm: kernel, recurrent_kernel, bias"),
    "no recurrent bias": (fn.gru(1), fn.lstm(1).init(KEY, jnp.ones((1, 1, 1)))[0], (), "recurrent_bias"),
    "no heads": (fn.attention(1), {}, (), "params of attention: query, key, value, out"),
    "a head without kernel": (
        fn.attention(1),
        {name: {"kernel": jnp.ones((2, 2))} for name in ("query", "key", "value")} | {"out": {}},
        (),
        "a kernel in each of",
    ),
    "no statistics": (NORMED, NORMED.init(KEY, jnp.ones((1, 2)))[0], (), "state of batch_norm: mean, var"),
    "no state of a part": (NORMED, NORMED.init(KEY, jnp.ones((1, 2)))[0], {"batch_norm": ()}, "state for the layers"),
    "no frozen params": (FROZEN, {"dense": {}}, (), r"a state Frozen\(params, state\)"),
    "frozen params twice": (
        FROZEN,
        {"dense": {"kernel": jnp.ones((2, 2))}},
        FROZEN.init(KEY, jnp.ones((1, 2)))[1],
        r"params {} and a state Frozen",
    ),
    "numbers": (fn.dense(1), {"kernel": 1.0}, (), "float at kernel"),
    "other lengths": (
        fn.repeat(fn.dense(1), 2),
        {"kernel": jnp.ones((2, 1, 1)), "bias": jnp.ones((1, 1))},
        (),
        "stacked along first axes of one size",
    ),
}


@pytest.mark.parametrize("name", INCOMPLETE)
def test_params_and_states_that_are_not_the_layers_are_refused_both_ways(name):
    layer, params, state, message = INCOMPLETE[name]
    with pytest.raises(fn.InputError, match=message):
        fn.to_torch(layer, params, state)
    with pytest.raises(fn.InputError, match=message):
        fn.from_torch(layer, {}, params, state)


def test_shapes_alone_go_into_no_state_dict():
    with pytest.raises(fn.InputError, match="arrays with values as params"):
        fn.to_torch(DENSE, LIKE[0])


def test_an_error_says_where():
    with pytest.raises(fn.InputError) as error:
        fn.to_torch(fn.serial(block=NORMED), {"block": NORMED.init(KEY, jnp.ones((1, 2)))[0]})
    assert error.value.path == ("block", "batch_norm")
    with pytest.raises(fn.InputError) as error:
        fn.to_torch(fn.serial(fn.skip(fn.serial(fn.lstm(2, reverse=True)))), {})
    assert error.value.path == ("skip", "lstm")


BACKWARD = fn.lstm(2, reverse=True)
BOTH = fn.bidirectional(fn.lstm(2), BACKWARD)
FOREIGN = {
    "reverse alone": BACKWARD,
    "reverse alone, renamed": fn.named("lstm", fn.remat(BACKWARD)),
    "reverse alone, its rule replaced": replace(BACKWARD, bwd=fn.lstm(2).bwd),
    "reverse alone, repeated": fn.repeat(BACKWARD, 2),
    "swapped": fn.bidirectional(BACKWARD, fn.lstm(2)),
    "forward twice": fn.bidirectional(fn.lstm(2), fn.lstm(2)),
    "forward and another kind": fn.bidirectional(fn.lstm(2), fn.gru(2, reverse=True)),
    "a direction inside another": fn.bidirectional(fn.lstm(2), fn.serial(BACKWARD)),
    "directions of stacks": fn.bidirectional(*[fn.stacked(fn.lstm(2), fn.lstm(2))] * 2),
    "a stack of two kinds": fn.stacked(fn.lstm(2), fn.gru(2)),
    "a stack of two directions": fn.stacked(fn.lstm(2), BACKWARD),
    "a stack in reverse": fn.stacked(BACKWARD, BACKWARD),
    "a stack of one direction and of both": fn.stacked(fn.lstm(2), BOTH),
    "a stack of two kinds, renamed": fn.stacked(fn.named("a", fn.lstm(2)), fn.named("b", fn.remat(fn.gru(2)))),
    "a stack of two sizes": fn.stacked(fn.lstm(2), fn.lstm(3)),
    "rotary positions": fn.attention(1, rotary=True),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_model_that_pytorch_has_not_is_refused_though_its_params_would_fit(name):
    layer = FOREIGN[name]
    params, state = layer.init(KEY, jnp.ones((1, 3, 2)))
    with pytest.raises(fn.InputError, match=r"recurrent layers|without rotary"):
        fn.to_torch(layer, params, state)
    with pytest.raises(fn.InputError, match=r"recurrent layers|without rotary"):
        fn.from_torch(layer, {}, params, state)


def test_transparent_combinators_around_parts_change_no_module():
    plain = fn.stacked(BOTH, BOTH)
    wrapped = fn.stacked(
        fn.named("low", BOTH), fn.named("high", fn.remat(fn.bidirectional(fn.remat(fn.lstm(2)), BACKWARD)))
    )
    params, state = plain.init(KEY, jnp.ones((1, 3, 2)))
    renamed = dict(zip(wrapped.parts, params.values(), strict=True))
    assert_same(fn.to_torch(wrapped, renamed), fn.to_torch(plain, params, state))
    frozen = fn.stacked(fn.freeze(fn.lstm(2)), fn.lstm(2))
    assert "weight_hh_l1" in fn.to_torch(frozen, *frozen.init(KEY, jnp.ones((1, 3, 2))))


def test_a_stack_with_other_layers_between_is_several_modules():
    layer = fn.stacked(fn.serial(fn.lstm(2), fn.tanh()), fn.lstm(2))
    params, state = layer.init(KEY, jnp.ones((1, 3, 2)))
    assert {"serial.lstm.weight_hh_l0", "lstm.weight_hh_l0"} < fn.to_torch(layer, params, state).keys()


@pytest.mark.parametrize("name", ["dense", "lstm", "bidirectional", "attention"])
def test_a_function_is_not_taken_for_the_layer_of_its_name(name):
    def f(params, x):
        return x * params["kernel"]

    f.__name__ = name
    layer = fn.from_function(f, lambda key, x: {"kernel": jnp.ones(3)})
    with pytest.raises(fn.InputError, match=f"{name} by from_function"):
        fn.to_torch(layer, {"kernel": jnp.ones(3)})


def test_a_layer_of_another_name_is_no_recurrent_pair():
    pair = fn.named("bidirectional", fn.branch(forward=fn.dense(2), backward=fn.dense(2)))
    params, state = pair.init(KEY, jnp.ones((1, 2)))
    assert {"forward.weight", "backward.weight"} < fn.to_torch(pair, params, state).keys()
