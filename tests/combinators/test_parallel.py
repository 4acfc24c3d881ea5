"""`parallel`: a tuple of as many entries as it has layers."""

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def test_the_path_in_parallel():
    model = fn.parallel(a=fn.relu(), b=fn.dense(2))
    params, state = model.init(KEY, (S((2, 3), jnp.float32),) * 2)
    with pytest.raises(fn.InputError) as error:
        model.apply(params, state, (jnp.ones((2, 3)), jnp.ones((2, 4))))
    assert error.value.path == ("b",)


@pytest.mark.parametrize("call", ["apply", "fwd", "bwd"])
def test_parallel_refuses_another_number_of_entries(call):
    model = fn.parallel(fn.relu(), fn.relu())
    params, state = model.init(KEY, (S((2, 3), jnp.float32),) * 2)
    one = (jnp.ones((2, 3)),)
    calls = {
        "apply": lambda: model.apply(params, state, one),
        "fwd": lambda: model.fwd(params, state, one, None),
        "bwd": lambda: model.bwd(params, model.fwd(params, state, one * 2, None)[2], one),
    }
    with pytest.raises(fn.InputError, match="a tuple of 2 " + ("cotangents" if call == "bwd" else "inputs")):
        calls[call]()
