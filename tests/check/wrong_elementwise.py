"""Wrong rules for functions of one array, element by element, alone and inside scan, jit, cond and remat."""

from dataclasses import replace
from itertools import count

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.nn import sigmoid

from tests.check.rules import Right, Whole

SQUARE = Right("square", lambda x: x * x, lambda x, y, dy: (2 * x * dy,), ("f32[3,4]",))
TANH = Right("tanh", jnp.tanh, lambda x, y, dy: (dy * (1 - y * y),), ("f32[3,4]",))
SIGMOID = Right("sigmoid", sigmoid, lambda x, y, dy: (dy * y * (1 - y),), ("f32[7]",))
SINE = Right("sine", jnp.sin, lambda x, y, dy: (dy * jnp.cos(x),), ("f32[2,3]",))
ROOT = Right("root", jnp.sqrt, lambda x, y, dy: (dy / (2 * y),), ("f32[6]>0.1",))
CUBE = Right("cube", lambda x: x**3, lambda x, y, dy: (3 * x * x * dy,), ("f32[6]",))
LOG = Right("log", jnp.log, lambda x, y, dy: (dy / x,), ("f32[5]>0.2",))
CLIP = Right(
    "clip",
    lambda x: jnp.clip(x, -0.5, 0.5),
    lambda x, y, dy: (jnp.where(jnp.abs(x) < 0.5, dy, 0.0),),
    ("f32[4,5]",),
)
RELU = Right("relu", lambda x: jnp.where(x > 0, x, 0.0), lambda x, y, dy: (jnp.where(x > 0, dy, 0.0),), ("f32[4,5]",))
AT_ZERO = replace(RELU, name="relu at 0", args=(np.float32([-1, 0, 2, 0.5]),))
SAFE_ROOT = Right(
    "root where positive",
    lambda x: jnp.where(x > 0, jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0),
    lambda x, y, dy: (jnp.where(x > 0, dy * 0.5 / jnp.sqrt(jnp.where(x > 0, x, 1.0)), 0.0),),
    ("f32[3,4]",),
)
SOFTPLUS = Right("softplus in float16", jax.nn.softplus, lambda x, y, dy: (dy * sigmoid(x),), ("f16[6]>12<16",))
COMPLEX = Right("complex square", lambda z: z * z, lambda z, y, dy: (2 * z * dy,), ("c64[5]",))
IN_SCAN = replace(
    SQUARE,
    name="square in a scan",
    around=lambda ruled: (
        lambda x: lax.scan(lambda carry, row: (carry + ruled(row), ruled(row)), jnp.zeros_like(x[0]), x)
    ),
)
IN_JIT = replace(TANH, name="tanh in a jit", around=lambda ruled: lambda x: jax.jit(ruled)(x))
IN_COND = replace(
    SINE,
    name="sine in a cond",
    around=lambda ruled: lambda x, c: lax.cond(c.sum() > 0, ruled, jnp.cos, x),
    args=("f32[2,3]", "f32[4]>0"),
)
IN_REMAT = replace(
    ROOT, name="root in a remat", around=lambda ruled: lambda x: jax.checkpoint(lambda x: ruled(x))(x) ** 2
)


def accumulating():
    """A rule that adds what it returned before, as a hook with memory would."""
    calls = count()
    return lambda x, y, dy: (2 * x * dy * (1 + next(calls)),)


ELEMENTWISE = [
    *SQUARE.wrong(
        ("the factor 2 is missing", lambda x, y, dy: (x * dy,), "[0]", "half the gradient"),
        ("the sign", lambda x, y, dy: (-2 * x * dy,), "[0]", "the sign is flipped"),
        ("dy is left out", lambda x, y, dy: (2 * x,), "[0]", "dy is left out"),
        ("dy counts twice", lambda x, y, dy: (2 * x * dy * dy,), "[0]", "quadratic in the cotangent"),
        ("the slope at y", lambda x, y, dy: (2 * y * dy,), "[0]", "a factor [0] too many"),
        ("one element at 0.9", lambda x, y, dy: ((2 * x * dy).at[1, 2].multiply(0.9),), "[0]", "one element alone"),
        ("one row is lost", lambda x, y, dy: ((2 * x * dy).at[2].set(0.0),), "[0]", "index 2 of axis 0"),
        ("a ten-thousandth too much", lambda x, y, dy: (2.0002 * x * dy,), "[0]", "times 1 + 0.0001"),
        ("in bfloat16", lambda x, y, dy: ((2 * x * dy).astype(jnp.bfloat16),), "[0]", "bfloat16"),
        ("rounded to bfloat16", lambda x, y, dy: (lax.reduce_precision(2 * x * dy, 8, 7),), "[0]", ""),
        ("the size of dy", lambda x, y, dy: (2 * x * jnp.abs(dy),), "[0]", "the sign of the cotangent is lost"),
        ("clipped", lambda x, y, dy: (jnp.clip(2 * x * dy, -0.5, 0.5),), "[0]", "clipped to 0.5"),
        ("something is added", lambda x, y, dy: (2 * x * dy + 0.01,), "[0]", "the same along axes [0, 1]"),
        ("no gradient at all", lambda x, y, dy: (None,), "[0]", "zero: no gradient"),
        ("another structure", lambda x, y, dy: 2 * x * dy, "-", "a tuple of 1"),
        ("memory of earlier calls", Whole(lambda: SQUARE.ruled(accumulating())), "[0]", "", "algebra"),
        (
            "fwd is another function",
            Whole(lambda: SQUARE.ruled(SQUARE.bwd, lambda x: x * x * 1.001)),
            "y",
            "with its rule",
            "algebra",
        ),
    ),
    *TANH.wrong(
        ("the derivative is missing", lambda x, y, dy: (dy,), "[0]", "this is dy itself"),
        ("1 - y for 1 - y^2", lambda x, y, dy: (dy * (1 - y),), "[0]", "a factor 1 + y is missing"),
        ("the slope at y", lambda x, y, dy: (dy * (1 - jnp.tanh(y) ** 2),), "[0]", "as if [0] were y"),
    ),
    *SIGMOID.wrong(
        ("y for y (1 - y)", lambda x, y, dy: (dy * y,), "[0]", "1 - y is missing"),
        ("(1 - y) for y (1 - y)", lambda x, y, dy: (dy * (1 - y),), "[0]", "a factor y is missing"),
    ),
    *SINE.wrong(("sine for cosine", lambda x, y, dy: (dy * y,), "[0]", "")),
    *ROOT.wrong(
        ("the factor 1/2 is missing", lambda x, y, dy: (dy / y,), "[0]", "twice the gradient"),
        ("divided by x", lambda x, y, dy: (dy / (2 * x),), "[0]", "a factor y is missing"),
    ),
    *CUBE.wrong(("3 x for 3 x^2", lambda x, y, dy: (3 * x * dy,), "[0]", "a factor [0] is missing")),
    *LOG.wrong(("times x, not over it", lambda x, y, dy: (dy * x,), "[0]", "a factor [0]^2 too many")),
    *CLIP.wrong(("passes what was clipped", lambda x, y, dy: (dy,), "[0]", "should be zero: a mask is missing")),
    *RELU.wrong(
        (
            "the mask of another threshold",
            lambda x, y, dy: (jnp.where(x > 0.5, dy, 0.0),),
            "[0]",
            "zero that should not",
        ),
        ("the mask is turned round", lambda x, y, dy: (jnp.where(x < 0, dy, 0.0),), "[0]", "another mask"),
        ("the mask of dy", lambda x, y, dy: (jnp.where(dy > 0, dy, 0.0),), "[0]", "another mask"),
    ),
    *AT_ZERO.wrong(
        (
            "a slope of -1 at the kink",
            lambda x, y, dy: (jnp.where(x == 0, -dy, jnp.where(x > 0, dy, 0.0)),),
            "[0]",
            "at a kink, [1], the slope",
            "numerical",
        )
    ),
    *SAFE_ROOT.wrong(
        (
            "NaN behind a where",
            lambda x, y, dy: (jnp.where(x > 0, dy, 0.0) * 0.5 / jnp.sqrt(x),),
            "[0]",
            "where the true gradient is 0",
        ),
    ),
    *SOFTPLUS.wrong(
        ("exp(x) overflows", lambda x, y, dy: (dy * jnp.exp(x) / (1 + jnp.exp(x)),), "[0]", "overflowed float16"),
    ),
    *COMPLEX.wrong(
        ("z conjugated", lambda z, y, dy: (2 * jnp.conj(z) * dy,), "[0]", "as if [0] were conjugated"),
        ("all conjugated", lambda z, y, dy: (jnp.conj(2 * z * dy),), "[0]", "the complex conjugate"),
    ),
    *IN_SCAN.wrong(("the factor 2 is missing", lambda x, y, dy: (x * dy,), "[0]", "half the gradient")),
    *IN_JIT.wrong(("the derivative is missing", lambda x, y, dy: (dy,), "[0]", "this is dy itself")),
    *IN_COND.wrong(("the sign", lambda x, y, dy: (-dy * jnp.cos(x),), "[0]", "the sign is flipped")),
    *IN_REMAT.wrong(("divided by x", lambda x, y, dy: (dy / (2 * x),), "[0]", "")),
]
