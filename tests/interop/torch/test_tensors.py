"""Tensors as arrays, and the names of other modules."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct
DENSE = fn.serial(fn.dense(4), fn.relu(), fn.dense(2))
LIKE = jax.eval_shape(DENSE.init, KEY, S((2, 3), jnp.float32))
NAMES = {"dense": "0", "dense_1": "2"}


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


@pytest.mark.parametrize("names", ["0", [("dense", "0")], {"dense": 0}])
def test_names_that_are_no_dict_of_texts_are_refused(names):
    params = normal(4, LIKE[0])
    with pytest.raises(fn.InputError, match="names as a dict of texts"):
        fn.to_torch(DENSE, params, names=names)
    with pytest.raises(fn.InputError, match="names as a dict of texts"):
        fn.from_torch(DENSE, fn.to_torch(DENSE, params), params, names=names)


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


@pytest.mark.parametrize("tensors", [[np.ones(3)], None, {0: np.ones(3)}])
def test_what_is_no_state_dict_is_refused(tensors):
    with pytest.raises(fn.InputError, match="tensors by name"):
        fn.from_torch(DENSE, tensors, *LIKE)


@pytest.mark.filterwarnings("ignore:Sparse CSR")
@pytest.mark.parametrize("of", ["to_sparse", "to_sparse_csr", "to_mkldnn", "t_contiguous_t", "requires_grad_", "half"])
def test_tensors_of_other_layouts_are_the_same_values(torch, of):
    kinds = {"t_contiguous_t": lambda w: w.t().contiguous().t(), "half": lambda w: w.half().float()}
    values = torch.tensor([[1.0, 0.0, -2.0], [0.0, 0.5, 3.0]])
    weight = kinds.get(of, lambda w: getattr(w, of)())(values.clone())
    like = {"kernel": S((3, 2), jnp.float32)}
    params, _ = fn.from_torch(fn.dense(2, use_bias=False), {"weight": weight}, like)
    np.testing.assert_array_equal(params["kernel"], values.T)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"])
def test_tensors_of_few_bits_go_in_bit_for_bit(torch, dtype):
    weight = torch.tensor([[1.0, 0.0, -2.0], [0.25, 0.5, 3.0]]).to(getattr(torch, dtype))
    for tensor in (weight, weight.t().contiguous().t()):
        params, _ = fn.from_torch(fn.dense(2, use_bias=False), {"weight": tensor}, {"kernel": S((3, 2), dtype)})
        np.testing.assert_array_equal(params["kernel"].astype("float32"), weight.float().numpy().T)


def odd(torch):
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        fake = torch.ones(2, 3)
    ones = torch.ones(2, 3)
    rows = [torch.ones(3), torch.ones(2)]
    return {
        "meta": (ones.to("meta"), "a meta tensor", "load the module's values first"),
        "fake": (fake, "FakeTensor:", "plain tensor"),
        "nested": (torch.nested.nested_tensor(rows), "a nested tensor", "one by one"),
        "jagged": (torch.nested.nested_tensor(rows, layout=torch.jagged), "a nested tensor", "one by one"),
        "quantized": (torch.quantize_per_tensor(ones, 0.1, 0, torch.qint8), "a quantized tensor", "dequantize"),
        "not made yet": (torch.nn.LazyLinear(2).weight, "UninitializedParameter:", "plain tensor"),
        "complex": (ones.to(torch.complex64).conj(), r"weight: complex64\[2, 3\]", "convert dtypes"),
        "wide": (ones.double(), r"weight: float64\[2, 3\]", "jax_enable_x64"),
        "whole": (ones.int(), r"weight: int32\[2, 3\]", "convert dtypes"),
        "a number": (1.0, r"weight: float64\[\]", ""),
        "nothing": (None, "None", "leave it out"),
        "a dict": ({"weight": ones}, "a dict by this name", "pass tensors['weight']"),
    }


@pytest.mark.filterwarnings("ignore")
def test_tensors_that_are_no_array_like_the_parameter_are_refused_by_name(torch):
    for name, (tensor, received, remedy) in odd(torch).items():
        with pytest.raises(fn.InputError, match=received) as error:
            fn.from_torch(fn.dense(2, use_bias=False), {"weight": tensor}, {"kernel": S((3, 2), jnp.float32)})
        assert remedy in error.value.remedy, name
        assert "weight" in str(error.value), name
