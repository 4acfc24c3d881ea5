"""`named` changes a name and nothing else."""

import jax
import jax.numpy as jnp
import pytest

import funcnet as fn

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)


def test_named_changes_the_name_alone():
    layer = fn.dense(3)
    other = fn.named("middle", layer)
    assert (other.name, other.fwd, other.bwd, other.init, other.apply) == (
        "middle",
        layer.fwd,
        layer.bwd,
        layer.init,
        layer.apply,
    )
    model = fn.serial(fn.relu(), other, fn.named("middle", fn.tanh()), last=layer)
    assert list(model.parts) == ["relu", "middle", "middle_1", "last"]
    params, state = model.init(KEY, S((2, 3), jnp.float32))
    with pytest.raises(fn.InputError, match=r"middle \(dense\)"):
        model.apply(params, state, jnp.ones((2, 4)))


@pytest.mark.parametrize("name", ["", "a/b", None, fn.relu()])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(fn.InputError, match="a name without"):
        fn.named(name, fn.relu())
