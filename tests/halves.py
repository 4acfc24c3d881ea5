"""All numbers of half precision, and how far results in it are from what is exact."""

import jax.numpy as jnp
import numpy as np

HALVES = ("float16", "bfloat16")
SMALL = {"float16": 0.0, "bfloat16": 1e-35}  # what XLA may lose on a CPU, which takes subnormal float32 for 0


def every(dtype):
    """All 65,536 numbers of a dtype, NaNs and infinities among them."""
    return np.arange(2**16, dtype=np.uint16).view(jnp.dtype(dtype))


def exact(a):
    """In float64."""
    with np.errstate(invalid="ignore"):  # bfloat16's NaNs
        return np.asarray(a).astype(np.float64)


def units(got, wanted):
    """The errors of `got` in units in the last place of `wanted`, which is float64; 0 for a NaN for a NaN."""
    info, got = jnp.finfo(got.dtype), exact(got)
    size = np.clip(np.abs(np.nan_to_num(wanted)), float(info.smallest_normal), float(info.max))
    with np.errstate(invalid="ignore", over="ignore"):
        errors = np.abs(got - wanted) / np.exp2(np.floor(np.log2(size)) - info.nmant)
        rounded = wanted.astype(info.dtype).astype(np.float64)  # beyond the largest number, infinity
    same = (got == wanted) | (np.isinf(got) & (got == rounded)) | (np.isnan(got) & np.isnan(wanted))
    return np.where(same, 0, np.nan_to_num(errors, nan=np.inf))


def assert_within(allowed, got, wanted, x):
    """Every entry within `allowed` units in the last place, but for what XLA loses on a CPU."""
    small, info = SMALL[str(x.dtype)], jnp.finfo(x.dtype)
    lost = (np.abs(exact(got)) <= small) & (np.abs(wanted) <= small)
    if small:  # what is the result of 0 may be that of a subnormal x
        subnormal = (np.abs(exact(x)) < float(info.smallest_normal)) & (exact(x) != 0)
        lost |= subnormal & (exact(got) == exact(got)[exact(x) == 0][0])
    errors = np.where(lost, 0, units(got, wanted))
    worst = errors.argmax()
    assert errors[worst] <= allowed, f"{errors[worst]:.3g} units at {x[worst]}: {got[worst]}, {wanted[worst]} is right"
