"""Tables and sizes as text, written out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.tables import aligned, bytes_of, readable, tabulated


def test_columns_are_as_wide_as_their_longest_cell():
    rows = [("a", "1", "x"), ("long", "22", ""), ("", "333", "yz")]
    assert aligned(rows) == ["a     1    x", "long  22", "      333  yz"]
    assert aligned(rows, right={1}) == ["a       1  x", "long   22", "      333  yz"]
    assert aligned(rows, right={0, 2}) == ["   a  1     x", "long  22", "      333  yz"]


def test_a_table_has_a_rule_as_wide_as_its_columns():
    assert tabulated(("name", "n"), [("a", "10"), ("b", "1")], right=[1]) == [
        "name   n",
        "----  --",
        "a     10",
        "b      1",
    ]


def test_no_rows_are_no_lines_and_a_head_stands_alone():
    assert aligned([]) == []
    assert tabulated(("name", "n"), []) == ["name  n", "----  -"]


def test_rows_of_different_lengths_are_refused():
    with pytest.raises(ValueError, match="zip"):
        aligned([("a", "b"), ("c",)])


def test_bytes_count_each_array_once():
    x = jnp.ones((3, 2), jnp.float32)
    assert bytes_of({"a": x, "b": [x, None]}) == 3 * 2 * 4
    assert bytes_of({"a": x, "b": x + 0}) == 2 * 3 * 2 * 4
    assert bytes_of((np.ones(5, np.int8), jax.ShapeDtypeStruct((7, 0), jnp.float32))) == 5
    assert bytes_of((jax.ShapeDtypeStruct((7,), jnp.bfloat16), np.float64(1))) == 7 * 2 + 8
    assert bytes_of({}) == 0


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (999, "999 B"),
        (1000, "1 kB"),
        (1234, "1.23 kB"),
        (999_499, "999 kB"),
        (999_500, "1 MB"),  # 999.5 kB has three digits as 1000 kB only
        (999_999, "1 MB"),
        (12_345_678, "12.3 MB"),
        (3e9, "3 GB"),
        (2.5e12, "2.5 TB"),
    ],
)
def test_sizes_have_three_digits_and_the_unit_that_fits(size, text):
    assert readable(size) == text
