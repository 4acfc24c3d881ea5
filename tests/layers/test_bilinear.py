"""bilinear: against NumPy and PyTorch, its factor's questions, and what it refuses; the table of cases has its rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import normal

KEY = jax.random.key(0)


def setting(x_shape, z_shape, features, dtype="float64", **options):
    pair = tuple(normal(i, jax.ShapeDtypeStruct(shape, jnp.dtype(dtype))) for i, shape in enumerate((x_shape, z_shape)))
    layer = fn.bilinear(features, **options)
    params, _ = layer.init(KEY, pair)
    return layer, normal(2, params), pair


@pytest.mark.parametrize("rank", [(), (4,), (2, 3)])
def test_the_output_is_numpys(rank, x64):
    layer, params, (x, z) = setting((*rank, 5), (*rank, 2), 3)
    wanted = np.einsum("...i,ijk,...j->...k", x, params["kernel"], z) + np.asarray(params["bias"])
    np.testing.assert_allclose(layer.apply(params, (), (x, z)), wanted, rtol=1e-12)


def test_it_is_pytorchs(x64):
    torch = pytest.importorskip("torch")
    layer, params, (x, z) = setting((4, 5), (4, 2), 3)
    module = torch.nn.Bilinear(5, 2, 3, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(torch.tensor(np.moveaxis(np.array(params["kernel"]), 2, 0)))
        module.bias.copy_(torch.tensor(np.array(params["bias"])))
    theirs = [torch.tensor(np.array(a), requires_grad=True) for a in (x, z)]
    out = module(*theirs)
    dy = normal(3, jax.ShapeDtypeStruct((4, 3), jnp.float64))
    out.backward(torch.tensor(np.array(dy)))
    dparams, dpair = layer.bwd(params, layer.fwd(params, (), (x, z), None)[2], dy)
    np.testing.assert_allclose(layer.apply(params, (), (x, z)), out.detach().numpy(), rtol=1e-12)
    np.testing.assert_allclose(dparams["kernel"], np.moveaxis(module.weight.grad.numpy(), 0, 2), rtol=1e-12)
    for got, wanted in zip(dpair, theirs, strict=True):
        np.testing.assert_allclose(got, wanted.grad.numpy(), rtol=1e-12)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype):
    layer = fn.bilinear(1)
    ones = {"kernel": jnp.ones((64, 64, 1), dtype), "bias": jnp.zeros(1, dtype)}
    pair = jnp.ones((1, 64), dtype), jnp.ones((1, 64), dtype)
    assert layer.apply(ones, (), pair).item() == 4096
    many = jnp.ones((4096, 1), dtype), jnp.ones((4096, 1), dtype)
    kernel = {"kernel": jnp.ones((1, 1, 1), dtype), "bias": jnp.zeros(1, dtype)}
    grads, _ = layer.bwd(kernel, layer.fwd(kernel, (), many, None)[2], jnp.ones((4096, 1), dtype))
    assert grads["kernel"].item() == 4096


def test_norms_of_examples_need_no_gradient_of_an_example(x64):
    """With few positions; no array has the kernel's size and an axis of examples."""
    layer, params, pair = setting((3, 2, 8), (3, 2, 5), 7)
    residuals, dy = layer.fwd(params, (), pair, None)[2], normal(3, jax.ShapeDtypeStruct((3, 2, 7), jnp.float64))
    squares = layer.bwd(params, residuals, dy, fn.squared_norm)[0]["kernel"]
    each = layer.bwd(params, residuals, dy, fn.per_example)[0]["kernel"]
    np.testing.assert_allclose(squares, np.square(each).sum((1, 2, 3)), rtol=1e-12)
    program = jax.make_jaxpr(lambda dy: layer.bwd(params, residuals, dy, fn.squared_norm)[0]["kernel"])(dy)
    assert not any(v.aval.size >= 3 * 8 * 5 * 7 for eqn in program.jaxpr.eqns for v in eqn.outvars)


def test_the_kernel_keeps_the_variance_of_products():
    x, z = (normal(i, jax.ShapeDtypeStruct((512, 32), jnp.float32)) for i in (1, 2))
    layer = fn.bilinear(64)
    params, _ = layer.init(KEY, (x, z))
    assert 0.9 < float(jnp.std(layer.apply(params, (), (x, z)))) < 1.1


@pytest.mark.parametrize(
    "pair",
    [
        jnp.ones((2, 3)),
        (jnp.ones((2, 3)),),
        (jnp.ones((2, 3)), jnp.ones((4, 3))),
        (jnp.ones((2, 3)), jnp.ones((2, 3), jnp.bfloat16)),
        (jnp.ones((2, 3)), jnp.ones((1, 2, 3))),
        (jnp.ones((2, 3)), jnp.ones((2, 3), jnp.int32)),
        [jnp.ones((2, 3)), jnp.ones((2, 3))],
    ],
    ids=["an array", "one array", "examples", "dtypes", "ranks", "integers", "a list"],
)
def test_what_is_no_pair_is_refused(pair):
    with pytest.raises(fn.InputError, match="bilinear"):
        fn.bilinear(4).init(KEY, pair)


def test_input_that_does_not_fit_the_parameters_is_refused():
    layer, params, _ = setting((2, 3), (2, 5), 4, "float32")
    with pytest.raises(fn.InputError, match="parameters"):
        layer.apply(params, (), (jnp.ones((2, 5)), jnp.ones((2, 3))))
