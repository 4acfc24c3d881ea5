"""Round trips through real PyTorch modules."""

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
        "layer_norm": (fn.layer_norm(eps=1e-5), nn.LayerNorm(3), (2, 3), same, same),
        "rms_norm": (fn.rms_norm(eps=1e-5), nn.RMSNorm(3, 1e-5), (2, 3), same, same),
        "group_norm": (fn.group_norm(2, eps=1e-5), nn.GroupNorm(2, 4), (2, 5, 4), first, last),
        "instance_norm": (
            fn.instance_norm(eps=1e-5),
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


@pytest.mark.parametrize("options", [{"kv_heads": 1}, {"head_dim": 3}, {"features": 3}])
def test_attention_of_other_sizes_is_refused(options):
    layer = fn.attention(2, **options)
    params, _ = layer.init(KEY, jnp.ones((1, 3, 4)))
    with pytest.raises(fn.InputError, match=r"kernels \[D, D\] alone"):
        fn.to_torch(layer, params)


@pytest.mark.parametrize("of", [np.asarray, jnp.asarray, lambda a: np.asfortranarray(np.asarray(a))])
def test_every_array_is_ones_own_row_by_row_and_comes_back_from_a_file(torch, tmp_path, of):
    """A writer takes memory as it lies: what lies column by column would be read back scrambled."""
    files = [(pytest.importorskip("safetensors.numpy"), lambda a: a)]
    files += [(pytest.importorskip("safetensors.torch"), torch.from_numpy)]
    more = {
        "batch_norm": (fn.batch_norm(), (2, 3)),
        "embedding": (fn.embedding(5, 3), None),
        "position_embedding": (fn.position_embedding(4), (2, 4, 3)),
        "tied": (fn.tied(fn.serial(fn.dense(3), head=fn.dense(3)), {"head/kernel": "dense/kernel.T"}), (2, 3)),
    }
    every = {name: (layer, shape) for name, (layer, _, shape, *_) in modules(torch).items()} | more
    for name, (layer, shape) in every.items():
        x = S((2, 3), jnp.int32) if shape is None else S(shape, jnp.float32)
        params, state = jax.tree.map(of, normal(4, jax.eval_shape(layer.init, KEY, x)))
        arrays = fn.to_torch(layer, params, state)
        for array in arrays.values():
            assert array.flags.c_contiguous, name
            assert array.flags.writeable, name
            assert array.flags.owndata, name
            assert not any(np.shares_memory(array, leaf) for leaf in jax.tree.leaves((params, state))), name
        for package, to in files:
            package.save_file({key: to(array) for key, array in arrays.items()}, tmp_path / "file")
            assert_same(fn.from_torch(layer, package.load_file(tmp_path / "file"), params, state)[0], params)


def test_numbers_of_64_bits_stay_such_without_64_bits_in_jax():
    params = {"kernel": np.full((3, 2), np.pi), "bias": np.full(2, np.pi)}
    arrays = fn.to_torch(fn.dense(2), params)
    assert all(array.dtype == np.float64 and np.all(array == np.pi) for array in arrays.values())
    turned = fn.to_torch(fn.dense(2), {name: a.astype(">f4") for name, a in params.items()})
    assert all(array.dtype == np.dtype("=f4") and array.dtype.isnative for array in turned.values())
