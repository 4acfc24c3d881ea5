"""What `linear_cross_entropy` computes from logits: values and dz, for one block of the classes at a time.

The formulas and their symbols are those of `funcnet.losses.linear`.
"""

from dataclasses import dataclass
from math import ceil
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import Array, lax

from funcnet._internal.numerics import flat, product
from funcnet.gradients.blocked import block, fresh
from funcnet.gradients.common_factors import Outer, Shift
from funcnet.losses.cross_entropy import counts, label_weights, standing
from funcnet.losses.loss import silenced


@dataclass(frozen=True, eq=False)
class LogitsLoss:
    """The loss of logits z = x @ kernel + bias, with the options of `linear_cross_entropy`.

    Attributes:
        names: those of the head's params: kernel and, if it has one, bias.
        uniform: the sum over v of w_v s / V.
    """

    vocab: int
    names: tuple[str, ...]
    label_smoothing: float
    uniform: float
    ignore_index: int | None
    z_loss: float
    class_weights: np.ndarray | None

    def seen(self, x: Array, label: Array) -> Array:
        """The features, with 0 in place of those of an ignored label."""
        return x if self.ignore_index is None else jnp.where(counts(label, self.ignore_index)[..., None], x, 0.0)

    def columns(self, params: Any, i: Array, size: int) -> dict[str, Array]:
        """Block i of each of the head's params."""
        return {name: block(params[name], i, size) for name in self.names}

    def logits(self, params: Any, x: Array) -> Array:
        z = product(x, params["kernel"], (1, 0), x)
        return z + params["bias"].astype(z.dtype)[None] if "bias" in self.names else z

    def weights(self, i: Array, size: int, dtype: Any) -> Array:
        """w of block i."""
        given = self.class_weights
        return jnp.ones(size, dtype) if given is None else block(jnp.asarray(given, dtype), i, size)

    def own_weight(self, label: Array, dtype: Any) -> Array:
        """w_y of each label."""
        given = self.class_weights
        return jnp.ones(label.shape, dtype) if given is None else label_weights(given, label, dtype)

    def values(self, top: Array, total: Array, own: Array, everything: Array, label: Array) -> Array:
        """l [N], where `own` is z_y - top and `everything` the sum over v of w_v (z_v - top)."""
        w, log_total = self.own_weight(label, top.dtype), jnp.log(total)
        loss = (1 - self.label_smoothing) * w * (log_total - jnp.where(w == 0, 0.0, own))
        if self.label_smoothing:
            loss = loss + self.uniform * log_total - self.label_smoothing / self.vocab * everything
        if self.z_loss:
            loss = loss + self.z_loss * w * jnp.square(top + log_total)
        factor = standing(label, self.vocab, self.ignore_index).astype(loss.dtype)
        return jnp.where(factor == 0, 0.0, factor * loss)

    def heard(self, dy: Array, label: Array) -> Array:
        """g, from dy: 0 for an ignored label, NaN for a label out of range unless its dy is 0."""
        factor = standing(label, self.vocab, self.ignore_index).astype(dy.dtype)
        return jnp.where(factor == 0, 0.0, dy * silenced(dy, factor))

    def slope(self, z: Array, top: Array, total: Array, label: Array, g: Array, i: Array, size: int) -> Array:
        """dz of block i, from its logits [N, size], and top, total, label and g [N].

        It is 0 for the entries that an earlier block has too.
        """
        v, new = fresh(i, size, self.vocab)
        w = self.own_weight(label, z.dtype)
        mass = (1 - self.label_smoothing) * w + self.uniform
        if self.z_loss:
            mass = mass + 2 * self.z_loss * w * (top + jnp.log(total))
        q = (1 - self.label_smoothing) * (label[:, None] == v.astype(label.dtype)[None]).astype(z.dtype)
        q = self.weights(i, size, z.dtype)[None] * (q + self.label_smoothing / self.vocab)
        scale = mass / total
        silent = (g == 0) & ~(jnp.isfinite(top) & jnp.isfinite(scale))  # where both are finite, so is all of dz
        dz = g[:, None] * (jnp.exp(z - top[:, None]) * scale[:, None] - q)
        return jnp.where(new[None] & ~silent[:, None], dz, 0.0)

    def dz_of(self, saved: Any, i: Array, size: int) -> tuple[dict[str, Array], Array]:
        """Block i of the head's params, and of dz [.., size]."""
        params, x, *each = saved
        head, (top, total, label, g) = self.columns(params, i, size), (a.reshape(-1) for a in each)
        dz = self.slope(self.logits(head, flat(x)), top, total, label, g, i, size)
        return head, dz.astype(x.dtype).reshape(*x.shape[:-1], size)

    def outer(self, saved: Any, i: Array, size: int) -> Outer:
        """The factor of block i of the kernel."""
        _, x, *_, g = saved
        return Outer(silenced(g[..., None], x), self.dz_of(saved, i, size)[1])

    def shift(self, saved: Any, i: Array, size: int) -> Shift:
        """The factor of block i of the bias."""
        return Shift(self.dz_of(saved, i, size)[1])


def weighed(w: Array, z: Array, top: Array) -> Array:
    """sum_v w_v (z_v - top); a class of weight 0 may have a logit of -inf."""
    shifted = z - lax.optimization_barrier(top)[:, None]  # apart from the exponential's z - top, so that none is kept
    return jnp.sum(jnp.where((w == 0)[None], 0.0, w[None] * shifted), axis=1)


def even(length: int, largest: int) -> int:
    """The size of blocks that divide `length` entries about evenly, none above `largest`, with at least one entry."""
    return ceil(length / ceil(length / max(1, min(largest, length))))
