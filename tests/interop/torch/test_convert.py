"""Whole models there and back, and what is refused before anything is changed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import assert_same, normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct
DENSE = fn.serial(fn.dense(4), fn.relu(), fn.dense(2))
LIKE = jax.eval_shape(DENSE.init, KEY, S((2, 3), jnp.float32))
NAMES = {"dense": "0", "dense_1": "2"}


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

    block = fn.skip(fn.serial(fn.layer_norm(eps=1e-5), fn.dense(4), fn.tanh()))
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


def test_repeats_without_params_and_nested_ones_go_there_and_back():
    model = fn.serial(fn.repeat(fn.tanh(), 3), fn.repeat(fn.serial(fn.repeat(fn.dense(3), 2), fn.dense(3)), 2))
    params, state = jax.eval_shape(model.init, KEY, S((2, 3), jnp.float32))
    params = normal(6, params)
    arrays = fn.to_torch(model, params, state)
    assert "repeat_1.1.repeat.0.weight" in arrays
    assert "repeat_1.0.dense.bias" in arrays
    assert_same(fn.from_torch(model, arrays, params, state), (params, state))


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


def test_the_arrays_are_copies_that_can_be_written_to(torch):
    params = {"kernel": jnp.ones((3, 4)), "bias": jnp.ones(4)}
    tensors = {name: torch.from_numpy(array) for name, array in fn.to_torch(fn.dense(4), params).items()}
    tensors["bias"].zero_()
    np.testing.assert_array_equal(params["bias"], jnp.ones(4))
    given = {"weight": np.ones((4, 3), np.float32), "bias": np.ones(4, np.float32)}
    taken, _ = fn.from_torch(fn.dense(4), given, params)
    given["bias"][:] = 0
    np.testing.assert_array_equal(taken["bias"], jnp.ones(4))


def test_shapes_alone_go_into_no_state_dict():
    with pytest.raises(fn.InputError, match="arrays with values as params"):
        fn.to_torch(DENSE, LIKE[0])


def test_an_error_says_where():
    normed = fn.serial(fn.dense(2), fn.batch_norm())
    with pytest.raises(fn.InputError) as error:
        fn.to_torch(fn.serial(block=normed), {"block": normed.init(KEY, jnp.ones((1, 2)))[0]})
    assert error.value.path == ("block", "batch_norm")
    with pytest.raises(fn.InputError) as error:
        fn.to_torch(fn.serial(fn.skip(fn.serial(fn.lstm(2, reverse=True)))), {})
    assert error.value.path == ("skip", "lstm")
