"""Where windows lie: counted by hand, and by trying every place; what they see against NumPy's slices."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from funcnet._internal.errors import InputError
from funcnet._internal.windows import Windows, entries, sliding, spreading

S = jax.ShapeDtypeStruct


def like(*spatial):
    return S((2, *spatial, 3), jnp.float32)


def places(size, window, stride, dilation, low, high):
    """How many windows fit, by trying every start."""
    padded = low + size + high
    return sum(start + (window - 1) * dilation < padded for start in range(0, padded, stride))


@pytest.mark.parametrize("padding", ["VALID", 0, 2, ((1, 0),), ((0, 3),)])
def test_as_many_windows_as_fit(padding):
    low, high = {"VALID": (0, 0)}.get(padding) or ((padding, padding) if isinstance(padding, int) else padding[0])
    tried = 0
    for size, window, stride, dilation in itertools.product(range(1, 8), (1, 2, 3), (1, 2, 3), (1, 2)):
        wanted = places(size, window, stride, dilation, low, high)
        lay = sliding(window, stride, padding, dilation)
        if not wanted:
            with pytest.raises(InputError, match="fits in"):
                lay(like(size))
            continue
        assert lay(like(size)) == Windows((size,), (wanted,), (window,), (stride,), ((low, high),), (dilation,))
        tried += 1
    assert tried > 50


def test_same_gives_as_many_as_strides_and_an_odd_pad_at_the_end():
    """Padded as little as it can be: with an entry less, a window would be lost."""
    for size, window, stride, dilation in itertools.product(range(1, 8), (1, 2, 3), (1, 2, 3), (1, 2)):
        laid = sliding(window, stride, "same", dilation)(like(size))
        (low, high), wanted = laid.padding[0], -(-size // stride)
        assert laid.outputs == (wanted,)
        assert high - low in (0, 1)
        assert places(size, window, stride, dilation, low, high) == wanted
        if high:
            assert places(size, window, stride, dilation, low, high - 1) == wanted - 1


def test_every_axis_has_its_own():
    laid = sliding((3, 2), [1, 2], ((1, 1), (0, 2)), (2, 1))(like(6, 7))
    assert laid == Windows((6, 7), (4, 4), (3, 2), (1, 2), ((1, 1), (0, 2)), (2, 1))
    assert sliding(2, 1, 0)(like(3, 4, 5)).outputs == (2, 3, 4)
    assert sliding(np.int64(2), 1, np.int64(1))(like(3)).outputs == (4,)


def test_a_transposed_convolution_s_windows_lie_on_its_output():
    """Counted as Flax pads: zeros around the input, between whose entries strides - 1 zeros came."""
    paddings = ("VALID", "SAME", 0, 1, ((2, 0),), ((0, 1),))
    for padding, size, window, stride, dilation in itertools.product(paddings, (1, 2, 4), (1, 2, 3), (1, 2, 3), (1, 2)):
        span = (window - 1) * dilation + 1
        pair = (padding, padding) if isinstance(padding, int) else padding[0]
        low, high = (0, 0) if isinstance(padding, str) else pair
        zeros = (size - 1) * stride + 1
        outputs = {"SAME": size * stride, "VALID": size * stride + max(span - stride, 0)}
        wanted = outputs[padding] if padding in outputs else low + zeros + high - span + 1
        lay = spreading(window, stride, padding, dilation)
        if wanted < 1:
            with pytest.raises(InputError, match="larger than a window"):
                lay(like(size))
            continue
        laid = lay(like(size))
        assert (laid.inputs, laid.outputs) == ((wanted,), (size,))
        # a convolution of that output, its pads those of the windows, has the size of the input
        assert sum(laid.padding[0]) + wanted >= span
        assert (sum(laid.padding[0]) + wanted - span) // stride + 1 == size
        if padding not in outputs:
            assert laid.padding == ((span - 1 - low, span - 1 - high),)
        shape = jax.eval_shape(
            lambda x, kernel, s=stride, d=dilation, p=padding, e=(low, high): jax.lax.conv_transpose(
                x, kernel, (s,), p if isinstance(p, str) else (e,), (d,), dimension_numbers=("NHC", "HIO", "NHC")
            ),
            like(size),
            S((window, 3, 5), jnp.float32),
        ).shape
        assert shape == (2, wanted, 5)


def test_same_begins_a_transposed_convolution_where_lax_does():
    """Seen in the output of a single one: it begins at the first entry that is not cut off."""
    size = 2
    for window, stride in itertools.product((1, 2, 3, 4), (1, 2, 3)):
        laid = spreading(window, stride, "SAME")(like(size))
        x, kernel = jnp.zeros((1, size, 1)).at[0, 0].set(1), jnp.arange(1.0, window + 1).reshape(-1, 1, 1)
        y = jax.lax.conv_transpose(x, kernel, (stride,), "SAME", dimension_numbers=("NHC", "HIO", "NHC"))
        low = laid.padding[0][0]  # entries of the first window in front of the output
        spread = np.append(np.arange(window, 0.0, -1), np.zeros(size * stride))[low:]
        np.testing.assert_array_equal(y.ravel(), spread[: size * stride])


@pytest.mark.parametrize(
    ("window", "strides", "padding", "dilation"),
    [(2, 1, "VALID", 1), ((3, 2), (2, 3), ((1, 0), (2, 3)), (1, 2)), (3, 2, "SAME", 2), ((1, 4), 1, "SAME", 1)],
)
def test_entries_are_what_each_window_has_at_an_offset(window, strides, padding, dilation):
    x = np.random.default_rng(0).normal(size=(2, 6, 7, 3)).astype(np.float32)
    laid = sliding(window, strides, padding, dilation)(x)
    padded = np.pad(x, [(0, 0), *laid.padding, (0, 0)], constant_values=-9)
    got = [np.asarray(entry) for entry in entries(laid, jnp.asarray(x), fill=-9)]
    offsets = list(itertools.product(*map(range, laid.window)))
    assert len(got) == len(offsets)
    for entry, (a, b) in zip(got, offsets, strict=True):
        assert entry.shape == (2, *laid.outputs, 3)
        for i, j in np.ndindex(*laid.outputs):
            row = i * laid.strides[0] + a * laid.dilation[0]
            column = j * laid.strides[1] + b * laid.dilation[1]
            np.testing.assert_array_equal(entry[:, i, j], padded[:, row, column])


def test_entries_beyond_the_output_of_a_transposed_convolution_are_cut_off():
    """Windows whose padding is negative: pads of 2 around the input, beyond a span of 2."""
    x = jnp.arange(1.0, 8.0).reshape(1, 7, 1)
    laid = spreading(2, 1, 2)(S((1, 4, 1), jnp.float32))
    assert laid == Windows((7,), (4,), (2,), (1,), ((-1, -1),), (1,))
    got = [entry.ravel().tolist() for entry in entries(laid, x)]
    assert got == [[2.0, 3.0, 4.0, 5.0], [3.0, 4.0, 5.0, 6.0]]


@pytest.mark.parametrize("make", [sliding, spreading])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window"),
        ({"window": ()}, "window for at least one axis"),
        ({"window": (2, 0)}, "window"),
        ({"strides": 1.5}, "strides"),
        ({"strides": True}, "strides"),
        ({"dilation": -1}, "dilation"),
        ({"padding": "FULL"}, '"SAME", "VALID"'),
        ({"padding": -1}, '"SAME", "VALID"'),
        ({"padding": True}, '"SAME", "VALID"'),
        ({"padding": (1, 1)}, "one pair"),
        ({"padding": ((1, -1),)}, "one pair"),
        ({"padding": ((1, 1, 1),)}, "one pair"),
        ({"padding": ()}, "one pair"),
        ({"window": (2, 2), "strides": (1, 1, 1)}, "window for 2, strides for 3"),
        ({"window": (2, 2), "padding": ((1, 1),)}, "window for 2, padding for 1"),
    ],
)
def test_options_that_make_no_sense_are_refused_before_an_input(make, options, message):
    with pytest.raises(InputError, match=message):
        make(**{"window": 2, "strides": 1, "padding": 0} | options)


def test_an_input_of_other_axes_is_refused():
    with pytest.raises(InputError, match="of 2 spatial axes") as error:
        sliding((2, 2), 1, ((0, 0), (0, 0)))(like(5))
    assert error.value.remedy == "give window and padding one entry for each axis between B and C"
    with pytest.raises(InputError):
        sliding(2, 1, 0)(S((2, 3), jnp.float32))
    with pytest.raises(InputError):
        sliding(2, 1, 0)(S((2, 3, 4), jnp.int32))
    with pytest.raises(InputError, match="not empty"):
        sliding(2, 1, 0)(S((0, 3, 4), jnp.float32))
