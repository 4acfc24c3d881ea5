"""Wrong rules for functions of whole arrays: products, sums, choices and moves along an axis."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax.nn import softmax

from tests.check.rules import Right, total

MATMUL = Right("matmul", lambda x, w: x @ w, lambda x, w, y, dy: (dy @ w.T, x.T @ dy), ("f32[3,5]", "f32[5,4]"))
SQUARES = replace(MATMUL, name="matmul of squares", args=("f32[4,4]", "f32[4,4]"))
BIAS = Right("bias", lambda x, b: x + b[None], lambda x, b, y, dy: (dy, dy.sum(0)), ("f32[5,3]", "f32[3]"))
SQUARE_BIAS = replace(BIAS, name="bias of a square", args=("f32[4,4]", "f32[4]"))
PRODUCT = Right("product", lambda a, b: a * b, lambda a, b, y, dy: (b * dy, a * dy), ("f32[3,4]", "f32[3,4]"))
QUOTIENT = Right("quotient", lambda a, b: a / b, lambda a, b, y, dy: (dy / b, -a / b**2 * dy), ("f32[6]", "f32[6]>0.5"))
INVERSE = Right("inverse", jnp.linalg.inv, lambda a, y, dy: (-y.T @ dy @ y.T,), ("f32[3,3]",))
HIDDEN = Right(
    "tanh of a matmul",
    lambda x, w: jnp.tanh(x @ w),
    lambda x, w, y, dy: ((dy * (1 - y * y)) @ w.T, x.T @ (dy * (1 - y * y))),
    ("f32[3,5]", "f32[5,4]"),
)
EXAMPLES = replace(
    PRODUCT, name="product under vmap", around=lambda ruled: jax.vmap(ruled, (0, None)), args=("f32[5,4]", "f32[4]")
)
TIED = Right(
    "tied matmuls",
    lambda x, w: (x @ w) @ w,
    lambda x, w, y, dy: (dy @ w.T @ w.T, x.T @ dy @ w.T + (x @ w).T @ dy),
    ("f32[3,4]", "f32[4,4]"),
)
STATS = Right(
    "mean and spread",
    lambda x: (x.mean(0), (x * x).sum(0)),
    lambda x, y, dy: (dy[0][None] / 5 + 2 * x * dy[1][None],),
    ("f32[5,3]",),
)

LINEAR = [
    *MATMUL.wrong(
        (
            "dw is a mean over the batch",
            lambda x, w, y, dy: (dy @ w.T, x.T @ dy / 3),
            "[1]",
            "divided by 3, the size of axis 0",
        ),
        (
            "the last example is lost",
            lambda x, w, y, dy: (dy @ w.T, x[:2].T @ dy[:2]),
            "[1]",
            "index 2 of axis 0 of the",
        ),
        (
            "an example counts twice",
            lambda x, w, y, dy: (dy @ w.T, x.T @ dy + jnp.outer(x[0], dy[0])),
            "[1]",
            "weights 2, 1",
        ),
        ("examples are mixed up", lambda x, w, y, dy: (dy @ w.T, x.T @ dy[::-1]), "[1]", "reversed along axis 0"),
        ("dx has a transposed shape", lambda x, w, y, dy: ((dy @ w.T).T, x.T @ dy), "[0]", "transposed"),
    ),
    *SQUARES.wrong(
        ("dx by w, not its transpose", lambda x, w, y, dy: (dy @ w, x.T @ dy), "[0]", "as if [1] were transposed"),
        ("dw by x, not its transpose", lambda x, w, y, dy: (dy @ w.T, x @ dy), "[1]", "as if [0] were transposed"),
        ("dw is transposed", lambda x, w, y, dy: (dy @ w.T, dy.T @ x), "[1]", "transposed"),
        ("both gradients swapped", lambda x, w, y, dy: (x.T @ dy, dy @ w.T), "[0] [1]", "this is the gradient of [1]"),
    ),
    *BIAS.wrong(
        ("not summed over the batch", lambda x, b, y, dy: (dy, dy), "[1]", "not summed over axis 0"),
        ("the sum keeps its axis", lambda x, b, y, dy: (dy, total(dy, 0)), "[1]", "the right numbers in another shape"),
        ("a mean, not a sum", lambda x, b, y, dy: (dy, dy.mean(0)), "[1]", "divided by 5, the size of axis 0"),
        ("the first example alone", lambda x, b, y, dy: (dy, dy[0]), "[1]", "only index 0 of axis 0"),
    ),
    *SQUARE_BIAS.wrong(
        (
            "summed over the wrong axis",
            lambda x, b, y, dy: (dy, dy.sum(1)),
            "[1]",
            "as if the cotangent were transposed",
        ),
    ),
    *PRODUCT.wrong(
        ("its own factor, not the other's", lambda a, b, y, dy: (a * dy, b * dy), "[0] [1]", "the gradient of [1]"),
        ("y for b", lambda a, b, y, dy: (y * dy, a * dy), "[0]", "a factor [0] too many"),
    ),
    *QUOTIENT.wrong(
        ("b for b^2", lambda a, b, y, dy: (dy / b, -a / b * dy), "[1]", "a factor [1] too many"),
        ("no minus", lambda a, b, y, dy: (dy / b, a / b**2 * dy), "[1]", "the sign is flipped"),
    ),
    *INVERSE.wrong(("not transposed", lambda a, y, dy: (-y @ dy @ y,), "[0]", "as if [0] were transposed")),
    *HIDDEN.wrong(
        (
            "the derivative of tanh is missing",
            lambda x, w, y, dy: (dy @ w.T, x.T @ dy),
            "[0] [1]",
            "1 - y^2 is missing",
        ),
        (
            "1 - y for 1 - y^2",
            lambda x, w, y, dy: ((dy * (1 - y)) @ w.T, x.T @ (dy * (1 - y))),
            "[0] [1]",
            "1 + y is missing",
        ),
        (
            "a stale x",
            lambda x, w, y, dy: ((dy * (1 - y * y)) @ w.T, (x + 1).T @ (dy * (1 - y * y))),
            "[1]",
            "the same along axis 0",
        ),
    ),
    *EXAMPLES.wrong(
        (
            "b's gradient is over the batch",
            lambda a, b, y, dy: (b * dy, a * dy / 5),
            "[1]",
            "divided by 5, the size of axis 0",
        ),
    ),
    *TIED.wrong(
        ("the first use alone", lambda x, w, y, dy: (dy @ w.T @ w.T, x.T @ dy @ w.T), "[1]", ""),
        ("one use counted for both", lambda x, w, y, dy: (dy @ w.T @ w.T, 2 * (x @ w).T @ dy), "[1]", ""),
    ),
    *STATS.wrong(
        ("the second output's cotangent is lost", lambda x, y, dy: (dy[0][None] / 5 + 0 * x,), "[0]", "y[1] is lost"),
        ("the mean is a sum", lambda x, y, dy: (dy[0][None] + 2 * x * dy[1][None],), "[0]", "of y[0] counts 5 times"),
        ("the cotangents swapped", lambda x, y, dy: (dy[1][None] / 5 + 2 * x * dy[0][None],), "[0]", ""),
    ),
]


SOFTMAX = Right("softmax", softmax, lambda x, y, dy: (y * (dy - total(dy * y)),), ("f32[4,4]",))
LOGSUMEXP = Right(
    "logsumexp of large numbers",
    lambda x: jax.nn.logsumexp(x, -1),
    lambda x, y, dy: (softmax(x) * dy[:, None],),
    ("f32[3,5]>800",),
)
ENTROPY = Right(
    "cross-entropy",
    lambda x, t: jax.nn.logsumexp(x, -1) - jnp.take_along_axis(x, t[:, None], 1)[:, 0],
    lambda x, t, y, dy: (dy[:, None] * (softmax(x) - jax.nn.one_hot(t, 5)), None),
    ("f32[4,5]", "i32[4]<5"),
)
UNIT = Right(
    "unit vectors",
    lambda x: x / jnp.sqrt(total(x * x)),
    lambda x, y, dy: ((dy - y * total(dy * y)) / jnp.sqrt(total(x * x)),),
    ("f32[3,4]",),
)
CUMSUM = Right("cumsum", lambda x: jnp.cumsum(x, 0), lambda x, y, dy: (jnp.cumsum(dy[::-1], 0)[::-1],), ("f32[6,2]",))
TAKE = Right(
    "rows of a table",
    lambda w, i: w[i],
    lambda w, i, y, dy: (jnp.zeros_like(w).at[i].add(dy), None),
    ("f32[6,3]", np.int32([0, 4, 4, 2, 1])),
)
TAIL = Right(
    "all but the first",
    lambda a, b: jnp.concatenate([a, b])[1:],
    lambda a, b, y, dy: (jnp.pad(dy[:2], (1, 0)), dy[2:]),
    ("f32[3]", "f32[5]"),
)
ORDER = Right(
    "in another order",
    lambda x: x[np.array([2, 0, 1, 4, 3, 5])],
    lambda x, y, dy: (dy[np.array([1, 2, 0, 4, 3, 5])],),
    ("f32[6]",),
)
AXES = Right("axes", lambda x: x.transpose(2, 0, 1), lambda x, y, dy: (dy.transpose(1, 2, 0),), ("f32[3,3,3]",))
MAXIMUM = Right(
    "maximum",
    lambda x: x.max(1),
    lambda x, y, dy: (jax.nn.one_hot(x.argmax(1), 5) * dy[:, None],),
    ("f32[3,5]",),
)
MASKED = Right(
    "masked mean",
    lambda x, m: jnp.where(m[:, None], x, 0.0).sum(0) / m.sum(dtype=x.dtype),
    lambda x, m, y, dy: (jnp.where(m[:, None], dy[None], 0.0) / m.sum(dtype=x.dtype), None),
    ("f32[5,3]", np.array([True, True, True, False, False])),
)
DROP = Right(
    "dropout",
    lambda x, key: jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * x, 0.0),
    lambda x, key, y, dy: (jnp.where(jax.random.bernoulli(key, 0.5, x.shape), 2 * dy, 0.0), None),
    ("f32[4,5]", "key"),
)
ROTARY = Right(
    "rotary",
    lambda x, angle: turned(x, angle),
    lambda x, angle, y, dy: (turned(dy, -angle), (dy * turned(x, angle + jnp.pi / 2)).reshape(3, 2, 2).sum(1)),
    ("f32[3,4]", "f32[3,2]"),
)


def turned(x, angle):
    """Each pair (x_i, x_{i+2}) turned by an angle."""
    a, b = jnp.split(x, 2, 1)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], 1)


def drawn_anew(x, key, y, dy):
    return jnp.where(jax.random.bernoulli(jax.random.fold_in(key, 1), 0.5, x.shape), 2 * dy, 0.0), None


ALONG = [
    *SOFTMAX.wrong(
        ("the diagonal alone", lambda x, y, dy: (dy * y * (1 - y),), "[0]", "only the diagonal of the Jacobian"),
        ("the sum is missing", lambda x, y, dy: (dy * y,), "[0]", "like y along axis 1"),
        ("summed over the wrong axis", lambda x, y, dy: (y * (dy - total(dy * y, 0)),), "[0]", ""),
        ("the sum along the other axis", lambda x, y, dy: (y * (dy - total(dy * y).T),), "[0]", ""),
    ),
    *LOGSUMEXP.wrong(
        (
            "exp overflows",
            lambda x, y, dy: (dy[:, None] * jnp.exp(x) / total(jnp.exp(x)),),
            "[0]",
            "where exp overflows",
        ),
    ),
    *ENTROPY.wrong(
        ("the label is forgotten", lambda x, t, y, dy: (dy[:, None] * softmax(x), None), "[0]", ""),
        (
            "a mean over the batch",
            lambda x, t, y, dy: (ENTROPY.bwd(x, t, y, dy)[0] / 4, None),
            "[0]",
            "divided by 4, the size of axis 0",
        ),
        (
            "the labels get a gradient",
            lambda x, t, y, dy: (*ENTROPY.bwd(x, t, y, dy)[:1], dy),
            "[1]",
            "for a leaf that has none",
        ),
        ("the label of the neighbour", lambda x, t, y, dy: ENTROPY.bwd(x, jnp.roll(t, 1), y, dy), "[0]", ""),
    ),
    *UNIT.wrong(
        (
            "as if the length were constant",
            lambda x, y, dy: (dy / jnp.sqrt(total(x * x)),),
            "[0]",
            "like [0] along axis 1",
        ),
        ("the length is forgotten", lambda x, y, dy: (dy - y * total(dy * y),), "[0]", "have the wrong weights"),
    ),
    *CUMSUM.wrong(
        ("not reversed", lambda x, y, dy: (jnp.cumsum(dy, 0),), "[0]", "runs along axis 0 in the wrong direction"),
        (
            "without its own element",
            lambda x, y, dy: (CUMSUM.bwd(x, y, dy)[0] - dy,),
            "[0]",
            "shifted by -1 along axis 0",
        ),
        ("not accumulated", lambda x, y, dy: (dy,), "[0]", "this is dy itself"),
    ),
    *TAKE.wrong(
        (
            "set, not added",
            lambda w, i, y, dy: (jnp.zeros_like(w).at[i].set(dy), None),
            "[0]",
            "only index 4 of axis 0",
        ),
        (
            "the ids are off by one",
            lambda w, i, y, dy: (jnp.zeros_like(w).at[i + 1].add(dy), None),
            "[0]",
            "shifted by 1 along axis 0",
        ),
        ("rows in the order of the ids", lambda w, i, y, dy: (jnp.zeros_like(w).at[:5].set(dy), None), "[0]", ""),
    ),
    *TAIL.wrong(
        ("split one early", lambda a, b, y, dy: (jnp.pad(dy[:2], (1, 0)), dy[1:6]), "[1]", "shifted by 1 along axis 0"),
        ("not moved back", lambda a, b, y, dy: (dy[:3], dy[2:]), "[0]", "shifted by -1 along axis 0"),
    ),
    *ORDER.wrong(
        (
            "the order, not its inverse",
            lambda x, y, dy: (dy[np.array([2, 0, 1, 4, 3, 5])],),
            "[0]",
            "in each other's places",
        )
    ),
    *AXES.wrong(
        ("the order, not its inverse", lambda x, y, dy: (dy.transpose(2, 0, 1),), "[0]", "its axes are permuted")
    ),
    *MAXIMUM.wrong(
        (
            "every element, not the largest",
            lambda x, y, dy: (jnp.broadcast_to(dy[:, None], x.shape),),
            "[0]",
            "a mask is missing",
        ),
        ("the smallest", lambda x, y, dy: (MAXIMUM.bwd(-x, y, dy)[0],), "[0]", "another mask"),
    ),
    *MASKED.wrong(
        ("divided by all", lambda x, m, y, dy: (MASKED.bwd(x, m, y, dy)[0] * 3 / 5, None), "[0]", "times 0.6"),
        (
            "padding gets a gradient",
            lambda x, m, y, dy: (jnp.broadcast_to(dy[None] / 3, x.shape), None),
            "[0]",
            "should be zero",
        ),
        (
            "the mask is off by one",
            lambda x, m, y, dy: MASKED.bwd(x, jnp.roll(m, 1), y, dy),
            "[0]",
            "shifted by 1 along axis 0",
        ),
    ),
    *DROP.wrong(
        ("the mask is drawn anew", drawn_anew, "[0]", "another mask"),
        (
            "the scale is forgotten",
            lambda x, key, y, dy: (DROP.bwd(x, key, y, dy)[0] / 2, None),
            "[0]",
            "half the gradient",
        ),
    ),
    *ROTARY.wrong(
        (
            "the sign of the angle",
            lambda x, a, y, dy: (turned(dy, a), ROTARY.bwd(x, a, y, dy)[1]),
            "[0]",
            "as if [1] were negated",
        ),
    ),
]
