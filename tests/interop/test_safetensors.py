"""Round trips through safetensors files, and what is refused before anything is read or written."""

import os
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from tests.trees import assert_same, normal

KEY = jax.random.key(0)
S = jax.ShapeDtypeStruct


MODEL = fn.serial(fn.dense(4), fn.relu(), blocks=fn.repeat(fn.skip(fn.serial(fn.rms_norm(), fn.dense(4))), 3))
PARAMS = normal(0, jax.eval_shape(MODEL.init, KEY, S((2, 3), jnp.float32))[0])


@pytest.fixture
def safetensors():
    return pytest.importorskip("safetensors.numpy")


@pytest.mark.parametrize(
    "dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn", "float8_e5m2", "int8", "uint32", "bool"]
)
def test_params_come_back_from_a_file_bit_for_bit(dtype, tmp_path, safetensors):
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), PARAMS)
    fn.save_params(params, tmp_path / "model.safetensors")
    like = jax.eval_shape(lambda: params)
    assert_same(fn.load_params(tmp_path / "model.safetensors", like), params)
    assert_same(fn.load_params(str(tmp_path / "model.safetensors"), params), params)


def test_names_in_the_file_are_paths(tmp_path, safetensors):
    fn.save_params(PARAMS, tmp_path / "model.safetensors")
    arrays = safetensors.load_file(tmp_path / "model.safetensors")
    layers = {"blocks/dense/bias", "blocks/dense/kernel", "blocks/rms_norm/scale", "dense/bias", "dense/kernel"}
    assert arrays.keys() == layers
    np.testing.assert_array_equal(arrays["blocks/dense/kernel"], PARAMS["blocks"]["dense"]["kernel"])


def test_any_tree_of_arrays_goes_into_a_file_a_state_and_transposed_arrays_too(tmp_path, safetensors):
    tree = {"a": (jnp.arange(3), {"b": np.ones((2, 3))[:, ::2].T}), "frozen": fn.Frozen({"w": jnp.ones(2)}, ())}
    fn.save_params(tree, tmp_path / "tree")
    assert safetensors.load_file(tmp_path / "tree").keys() == {"a/0", "a/1/b", "frozen/params/w"}
    with jax.enable_x64(True):
        got = fn.load_params(tmp_path / "tree", tree)
    np.testing.assert_array_equal(got["a"][1]["b"], tree["a"][1]["b"])


LAYOUTS = {
    "columns first": lambda a: np.asfortranarray(a),
    "every second": lambda a: np.repeat(a, 2, axis=-1)[..., ::2],
    "backwards": lambda a: a[::-1, ::-1][::-1, ::-1],
    "turned": lambda a: np.ascontiguousarray(np.swapaxes(a, -1, -2)).swapaxes(-1, -2),
    "big-endian": lambda a: a.astype(a.dtype.newbyteorder(">")),
    "read only": lambda a: np.broadcast_to(a[None], (1, *a.shape))[0],
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int32", "float16"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_what_lies_otherwise_in_memory_comes_back_as_it_was(name, dtype, tmp_path, safetensors):
    values = np.arange(6).reshape(2, 3).astype(dtype)
    tree = {"a": LAYOUTS[name](values), "number": np.array(3, dtype)}
    fn.save_params(tree, tmp_path / "tree")
    for like in (tree, {"a": values, "number": np.array(3, dtype)}):
        got = fn.load_params(tmp_path / "tree", like)
        assert_same(got, {"a": jnp.asarray(values), "number": jnp.asarray(3, dtype)})
    if dtype != "bfloat16":  # which the reader for NumPy does not know
        np.testing.assert_array_equal(safetensors.load_file(tmp_path / "tree")["a"], values)


@pytest.mark.parametrize("dtype", ["float64", "int64", "uint64"])
def test_without_64_bits_the_error_names_the_switch(dtype, tmp_path, safetensors):
    tree = {"a": np.arange(3).astype(dtype), "b": np.ones(2, np.float32)}
    fn.save_params(tree, tmp_path / "tree")
    for like in (tree, {"a": S((3,), dtype), "b": S((2,), "float32")}):
        with pytest.raises(fn.InputError, match=rf"a: {dtype}\[3\]") as error:
            fn.load_params(tmp_path / "tree", like)
        assert "jax_enable_x64" in error.value.remedy
        assert "jax.enable_x64" in error.value.remedy
        with jax.enable_x64(True):
            assert_same(fn.load_params(tmp_path / "tree", like), jax.tree.map(jnp.asarray, tree))
    with jax.enable_x64(True), pytest.raises(fn.InputError, match="load params for the same model") as error:
        fn.load_params(tmp_path / "tree", {"a": S((3,), "float32"), "b": S((2,), "float32")})
    assert "x64" not in error.value.remedy


def test_complex128_is_refused_before_anything_is_written(tmp_path, safetensors):
    with pytest.raises(fn.InputError, match="complex128"):
        fn.save_params({"a": np.ones(2, complex)}, tmp_path / "tree")
    assert not (tmp_path / "tree").exists()


def test_an_interrupted_write_leaves_the_old_file_and_nothing_else(tmp_path, safetensors, monkeypatch):
    path = tmp_path / "model"
    fn.save_params({"w": jnp.zeros(3)}, path)

    def fail(handle):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        fn.save_params({"w": jnp.ones(3)}, path)
    assert [file.name for file in tmp_path.iterdir()] == ["model"]
    assert_same(fn.load_params(path, {"w": S((3,), jnp.float32)}), {"w": jnp.zeros(3)})


def test_a_new_file_has_the_mode_of_any_new_file_and_a_replaced_one_keeps_its_own(tmp_path, safetensors):
    path = tmp_path / "model"
    (tmp_path / "other").touch()
    fn.save_params(PARAMS, path)
    assert path.stat().st_mode == (tmp_path / "other").stat().st_mode
    for mode in (0o600, 0o640, 0o444):
        path.chmod(mode)
        fn.save_params(PARAMS, path)
        assert path.stat().st_mode & 0o777 == mode


def test_like_without_shapes_is_refused(tmp_path, safetensors):
    fn.save_params({"a": jnp.ones(())}, tmp_path / "model")
    with pytest.raises(fn.InputError, match="float at a"):
        fn.load_params(tmp_path / "model", {"a": 1.0})


def without(params, name):
    return {key: value for key, value in params.items() if key != name}


UNLIKE = {
    "a layer too many": (lambda p: without(p, "dense"), "dense/bias superfluous, dense/kernel superfluous"),
    "a layer too few": (lambda p: p | {"last": p["dense"]}, "last/bias missing, last/kernel missing"),
    "another shape": (lambda p: p | {"dense": p["dense"] | {"bias": jnp.ones(5)}}, r"dense/bias: float32\[4\]"),
    "another dtype": (
        lambda p: p | {"dense": p["dense"] | {"bias": jnp.ones(4, jnp.bfloat16)}},
        r"dense/bias: float32\[4\]",
    ),
}


@pytest.mark.parametrize("name", UNLIKE)
def test_a_file_of_another_model_is_refused(name, tmp_path, safetensors):
    change, received = UNLIKE[name]
    fn.save_params(PARAMS, tmp_path / "model")
    with pytest.raises(fn.InputError, match=received) as error:
        fn.load_params(tmp_path / "model", change(PARAMS))
    assert error.value.kind == "load_params"


def test_what_is_no_such_file_or_no_array_is_refused(tmp_path, safetensors):
    (tmp_path / "text").write_text("weights")
    with pytest.raises(fn.InputError, match="a safetensors file"):
        fn.load_params(tmp_path / "text", PARAMS)
    with pytest.raises(FileNotFoundError):
        fn.load_params(tmp_path / "nothing", PARAMS)
    for tree, message in (
        ({"a": "text"}, "str at a"),
        ({"key": KEY}, "key<fry>"),
        ({"four bits": jnp.ones(2, "int4")}, "int4"),
        ({"a/b": jnp.ones(2)}, 'names without "/"'),
        ({"shape": S((2,), jnp.float32)}, r"float32\[2\] at shape, a shape or a traced array"),
        ({"a": jnp.ones(2), 1: jnp.ones(2)}, "dicts whose keys can be sorted"),
        ({"b": {"a": jnp.ones(2), 1: jnp.ones(2)}}, "dicts whose keys can be sorted"),
    ):
        with pytest.raises(fn.InputError, match=message):
            fn.save_params(tree, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_traced_and_donated_arrays_are_refused(tmp_path, safetensors):
    with pytest.raises(fn.InputError, match="a traced array"):
        jax.jit(lambda params: fn.save_params(params, tmp_path / "model"))(PARAMS)
    used = {"a": jnp.ones(2)}
    jax.jit(lambda params: params, donate_argnums=0)(used)
    with pytest.raises(fn.InputError, match="one whose arrays are deleted"):
        fn.save_params(used, tmp_path / "model")
    assert not list(tmp_path.iterdir())


def test_what_is_no_path_of_a_file_is_refused(tmp_path, safetensors):
    for path in (3, None, b"model"):
        with pytest.raises(fn.InputError, match="expected  a path"):
            fn.save_params(PARAMS, path)
        with pytest.raises(fn.InputError, match="expected  a path"):
            fn.load_params(path, PARAMS)
    with pytest.raises(fn.InputError, match=f"a folder, {tmp_path}"):
        fn.save_params(PARAMS, tmp_path)


@pytest.mark.parametrize("call", [lambda path: fn.save_params(PARAMS, path), lambda path: fn.load_params(path, PARAMS)])
def test_without_the_package_the_error_names_the_extra(call, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(fn.InputError, match=r"funcnet\[safetensors\]"):
        call(tmp_path / "model")
