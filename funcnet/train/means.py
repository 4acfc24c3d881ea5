"""Means over several batches, as if they were one.

With the loss L_b of batch b, which is the mean of its values l_i with weights w_i and masses m_i (`train/weights.py`),

    L = sum_b M_b L_b / sum_b M_b        M_b = sum_i w_i m_i

and likewise for metrics, with the number W_b = sum_i w_i c_i in place of the mass M_b.
"""

from typing import Any, NamedTuple

import jax

from funcnet.train.finite import WATCHED, Record
from funcnet.train.weights import Share

NORMS = WATCHED[1:]


class Told(NamedTuple):
    """What one step reports: its means, and how much they count in means over several batches."""

    means: dict[str, Any]
    share: Share


def pooled(scored: list[tuple[Record, Share]]) -> Record:
    """The means over several batches, the loss first, from the sums of each."""
    top = max(share.e for _, share in scored)

    def total(number):
        return sum(2.0 ** (share.e - top) * number(sums, share) for sums, share in scored)

    def mean(name):
        return total(lambda sums, share: sums[name]) / (total(lambda sums, share: _divisor(share, name)) or 1.0)

    return {name: mean(name) for name in sorted(scored[0][0], key=lambda name: (name != "loss", name))}


def means(told: list[Told]) -> Record:
    """The means over several steps; for norms every step counts the same."""

    def summed(each):
        own = each.means.keys() - NORMS
        return {name: each.means[name] * _divisor(each.share, name) for name in own}, each.share

    norms = {name: sum(each.means[name] for each in told) / len(told) for name in NORMS}
    return pooled([summed(each) for each in told]) | norms


def _divisor(share: Share, name: str) -> float:
    """What the sum called `name` is divided by to give the mean of its batch."""
    return share.mass if name == "loss" else share.weight


def floats(told: Any) -> Any:
    return jax.tree.map(float, told)
