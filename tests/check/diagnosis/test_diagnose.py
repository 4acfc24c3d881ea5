"""An error without a pattern is met with silence, and so is what is no error."""

import numpy as np
import pytest

from tests.check.diagnosis.leaf import DY, R, said, spread


@pytest.mark.parametrize("size", [1, 2, 3, 20])
@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_an_error_without_a_pattern_is_met_with_silence(size, dtype):
    rng = np.random.default_rng(size)
    ones = {"x": np.ones(size)}
    vjp = lambda dy, values=None: {"g": 3 * dy["y"] * (values or ones)["x"]}
    for _ in range(50):
        x, y, dy, other, wanted, got = (rng.normal(size=size) for _ in range(6))
        arrays, rule = {"x": x, "y": y, "dy": dy}, lambda dy: {"g": dy["y"]}
        context = {"references": {"x": other}, "dy": {"y": dy}, "vjp": vjp, "rule": rule}
        assert said(got.astype(dtype), wanted, arrays, **context) == ""
        nearly = wanted * (1 + 0.1 * rng.normal(size=size))
        assert size < 4 or said(nearly.astype(dtype), wanted, arrays, **context) == ""


def test_what_is_within_rounding_is_no_mistake():
    assert said(R * (1 + 1e-15)) == ""
    assert said(R.astype(np.float32), R) == ""
    assert said(np.zeros(0), np.zeros(0)) == ""


def test_a_large_program_is_not_run_again():
    def vjp(dy, values=None):
        raise AssertionError

    arrays = {str(i): np.float64(i) for i in range(30)}
    assert said(R * spread(0), arrays=arrays, dy={"y": DY}, vjp=vjp).startswith("times a factor that differs")
