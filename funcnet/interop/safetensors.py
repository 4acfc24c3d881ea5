"""Parameters in safetensors files: a name is a path, `encoder/dense/kernel`."""

import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from uuid import uuid4

import jax
import jax.numpy as jnp
import numpy as np

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.expect import is_array, is_concrete

Tree = Any
Arrays = dict[str, np.ndarray]


@by("save_params")
def save_params(params: Tree, path: str | os.PathLike) -> None:
    """Write params, or any pytree of arrays, to a safetensors file; it appears whole, or the old one stays.

    It has the permissions of the file that it replaces, or those of any new file. Needs the extra `safetensors`.

    Raises:
        InputError: for leaves that are not arrays of numbers with values, for names with a "/", which would make paths
            ambiguous, and for a path that is no path, or a folder.
    """
    place = _a_path(path).absolute()
    if place.is_dir():
        raise InputError("the path of a file", f"a folder, {path}", "name a file in it")
    content = _safetensors().numpy.save(_by_path(params))
    temporary = place.with_name(f".saving-{uuid4().hex}")
    try:
        with open(temporary, "xb") as file:
            if os.path.exists(path):
                shutil.copymode(path, temporary)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@by("load_params")
def load_params(path: str | os.PathLike, like: Tree) -> Tree:
    """Read what `save_params` has written, as a tree like `like`: params, or `jax.eval_shape(model.init, key, x)[0]`.

    Needs the extra `safetensors`.

    Raises:
        InputError: if the file is not a safetensors file, or its names, shapes or dtypes are not those of `like`; if
            `like` has leaves without shape and dtype.
    """
    require_arrays(like, "arrays as like, or their shapes and dtypes")
    package, content = _safetensors(), _a_path(path).read_bytes()
    try:
        arrays = {name: _decoded(**view) for name, view in package.deserialize(content)}
    except (package.SafetensorError, KeyError) as error:
        raise InputError("a safetensors file", f"{path}: {error}", "write it with save_params") from error
    require_same(arrays, dict(named_leaves(as_loaded(like))), "load params for the same model")
    return jax.tree.unflatten(jax.tree.structure(like), [jnp.asarray(arrays[name]) for name, _ in named_leaves(like)])


def _a_path(path: Any) -> Path:
    if not isinstance(path, (str, os.PathLike)):
        raise InputError("a path", describe(path), 'name a file, such as "model.safetensors"')
    return Path(path)


def _safetensors() -> Any:
    try:
        import safetensors.numpy
    except ModuleNotFoundError as error:
        remedy = 'install the extra: python -m pip install "funcnet[safetensors]"'
        raise InputError("the package safetensors", "an environment without it", remedy) from error
    return safetensors


# By the format's codes. Its own reader for NumPy knows no bfloat16.
_DTYPES = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "C64": "complex64", "BOOL": "bool"}
_DTYPES |= {"F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2"}
_DTYPES |= {f"{code}{n}": f"{kind}{n}" for code, kind in (("I", "int"), ("U", "uint")) for n in (8, 16, 32, 64)}


def _decoded(dtype: str, shape: list[int], data: bytes) -> np.ndarray:
    return np.frombuffer(data, jnp.dtype(_DTYPES[dtype])).reshape(shape)


def _by_path(tree: Tree) -> Arrays:
    for name, leaf in named_leaves(tree):
        if not is_array(leaf) or getattr(leaf.dtype, "name", "") not in _DTYPES.values():
            wanted = f"arrays of the dtypes {', '.join(sorted(_DTYPES.values()))}"
            raise InputError(wanted, f"{describe(leaf)} at {name}", "leave keys and other objects out")
        if not is_concrete(leaf):
            received = f"{describe(leaf)} at {name}, a shape or a traced array"
            raise InputError("arrays with values", received, "save outside jit what init or a step returned")
    expect.not_donated(tree)
    return {name: native(leaf) for name, leaf in named_leaves(tree)}


def as_loaded(like: Tree) -> Tree:
    """Shapes and dtypes of a tree as JAX will have them, whatever the byte order."""
    turned = lambda leaf: leaf.dtype.newbyteorder("=") if isinstance(leaf.dtype, np.dtype) else leaf.dtype
    return expect.shapes(jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, turned(leaf)), like))


def native(array: Any) -> np.ndarray:
    """A copy in C order and this machine's byte order, which can be written to a file as it is in memory."""
    array = np.asarray(array)
    return np.array(array, array.dtype.newbyteorder("="), order="C")


def named_leaves(tree: Tree) -> Iterator[tuple[str, Any]]:
    """The leaves, each with its path as one string."""
    try:
        leaves = jax.tree_util.tree_leaves_with_path(tree)
    except ValueError as error:
        remedy = "make all keys of a dict texts"
        raise InputError("dicts whose keys can be sorted", f"{type(tree).__name__}: {error}", remedy) from error
    for path, leaf in leaves:
        names = [jax.tree_util.keystr((entry,), simple=True) for entry in path]
        if bad := [name for name in names if "/" in name]:
            raise InputError('names without "/"', repr(bad[0]), "rename the layer")
        yield "/".join(names), leaf


def require_arrays(
    tree: Tree,
    wanted: str,
    is_one: Callable[[Any], bool] = is_array,
    remedy: str = "pass what this model's init returned",
) -> None:
    """Refuse leaves that are not what is wanted, all of them at once; PyTorch's tensors never are."""
    bad = [(name, leaf) for name, leaf in named_leaves(tree) if not is_one(leaf) or hasattr(leaf, "detach")]
    if others := [f"{describe(leaf)} at {name or 'the top'}" for name, leaf in bad]:
        raise InputError(wanted, ", ".join(others), remedy)


def require_same(given: Mapping[str, Any], wanted: Mapping[str, Any], remedy: str) -> None:
    """Refuse other names, shapes or dtypes than the wanted ones, all of them at once."""
    missing, superfluous = sorted(wanted.keys() - given.keys()), sorted(given.keys() - wanted.keys())
    other = [name for name in wanted if name in given and describe(given[name]) != describe(wanted[name])]
    complaints = [f"{name} missing" for name in missing] + [f"{name} superfluous" for name in superfluous]
    complaints += [f"{name}: {describe(given[name])}" for name in other]
    if any(_is_cut(given[name].dtype, wanted[name].dtype) for name in other):
        switch = 'jax.config.update("jax_enable_x64", True), or work inside "with jax.enable_x64(True):"'
        remedy = f"JAX makes 32 bits of 64 here: {switch}; or {remedy}"
    if complaints:
        expected = [f"{name}: {describe(wanted[name])}" for name in [*missing, *other]] or [f"{len(wanted)} arrays"]
        raise InputError(", ".join(expected), ", ".join(complaints), remedy)


def _is_cut(given: Any, wanted: Any) -> bool:
    """Whether the wanted dtype is what JAX without 64 bits makes of the given one."""
    return given != wanted and jax.dtypes.canonicalize_dtype(given) == wanted
