"""Batch normalisation: each feature over the whole batch and all positions.

In training, with means over all axes of x [B, .., C] but the last, the N values that a feature has:

    mean = mean(x)      var = mean((x - mean)^2)      rstd = 1 / sqrt(var + eps)
    x_hat = (x - mean) * rstd                         y = scale * x_hat + bias

Backward, since mean and var depend on every value:

    dx = scale * rstd * (dy - mean(dy) - x_hat * mean(dy * x_hat))

dscale is the factor Scale(x_hat, dy), dbias the factor Shift(dy); dx needs the same sums, so they are computed once. In
evaluation mean and var are the running statistics, which every training pass moves towards those of its batch:

    running <- momentum * running + (1 - momentum) * batch

Every example's output depends on all others, so no example has a gradient of its own: the factors are `Mixing`, and
contractions that read per-example gradients are refused here, in the layers before and in those after.

Residuals: x [B, .., C]; and, each [1, .., C] in the dtype of the statistics, the power of two that x is multiplied by,
the means, the mean square and rstd.  Why these: x is the output of the layer before, whereas x_hat would be one more
array; in half precision x is exact and x_hat rounded.
Numerics: statistics and sums are in float32 for half precision. The variance is that of x minus its mean, not the
difference of two large means; of one value, or of equal ones, it is 0, and so is x_hat. To this end a feature whose
mean is more than 8 standard deviations from 0 is centred twice. One whose squares overflow is right up to the largest
finite number, as in layer norm (`norm`). Both cost a second pass over x, under `lax.cond`, which does not run where no
feature needs it. The running variance of such large values is infinite where it is not representable, in float32 from
(2e19)^2 on.
Source: Ioffe and Szegedy 2015, arXiv:1502.03167, algorithm 1 and section 3.
"""

from collections.abc import Mapping
from math import prod
from typing import Any

import jax.numpy as jnp
from jax import Array, lax

from funcnet._internal import expect
from funcnet._internal.errors import InputError, by, describe
from funcnet._internal.numerics import flat, in_front, sum_dtype
from funcnet._internal.sharding import placed
from funcnet.gradients.common_factors import Scale, Shift
from funcnet.gradients.contraction import refuse_single_examples, total
from funcnet.gradients.factor import Mixing
from funcnet.layer import Layer
from funcnet.layers.norm import NormResiduals, centre, statistics
from funcnet.structure import constructor


@constructor
def batch_norm(
    *, momentum: float = 0.9, eps: float = 1e-5, use_scale: bool = True, use_bias: bool = True
) -> Layer[dict[str, Array], dict[str, Array], NormResiduals]:
    """y = scale * (x - mean) * rstd + bias for each feature of x [B, .., C]; params scale [C] (ones), bias [C] (zeros).

    `fwd` takes mean and variance from the batch, over all axes but the last, and returns the updated state; `apply`
    takes those of the state, {"mean": [C] (zeros), "var": [C] (ones)}, in float32 or wider.

    The statistics are of all of x: of the whole batch if it is sharded over a mesh, but of a device's own shard inside
    `jax.shard_map`, and of one micro-batch where a step accumulates over several. Rows that only pad a batch count like
    the others, and so do examples of weight 0 in the loss: leave them out instead.

    Args:
        momentum: what the running statistics are multiplied by before (1 - momentum) times the batch's are added, as in
            Flax and Keras; PyTorch's `momentum` is 1 minus this.
        eps: added to the variance, inside the root.
        use_scale, use_bias: whether there are such parameters.

    The running variance is the biased one, the mean square, as in Flax; PyTorch's is N / (N - 1) of it.

    Raises:
        InputError: if x is not floating of at least two axes, its features are not those of the state and the
            parameters, its dtype is not the parameters', or the contraction reads per-example gradients.
    """
    momentum = expect.number(momentum, "momentum")
    if not 0 <= momentum <= 1:
        raise InputError("a momentum from 0 to 1", f"momentum={momentum}", "use the default, 0.9")
    eps = expect.positive(eps, "eps", "use the default, 1e-5")
    expect.flags(use_scale=use_scale, use_bias=use_bias)
    names = ("scale",) * use_scale + ("bias",) * use_bias

    def check(params: Any, state: Any, x: Array) -> None:
        expect.float_array(x, rank=2)
        shapes = {name: jnp.shape(v) for name, v in state.items()} if isinstance(state, Mapping) else {}
        if shapes != dict.fromkeys(("mean", "var"), x.shape[-1:]):
            wanted = f"running statistics mean and var of {x.shape[-1]} features"
            raise InputError(wanted, describe(state), "pass the state that this layer's init returned for such input")
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))

    def slope(params: dict[str, Array], rstd: Array) -> Array:
        """scale * rstd."""
        return rstd * in_front(params["scale"].astype(rstd.dtype), rstd.ndim) if use_scale else rstd

    def line(params: dict[str, Array], centred: Array, rstd: Array) -> Array:
        """scale * centred * rstd + bias."""
        y = centred * slope(params, rstd)
        return y + in_front(params["bias"].astype(y.dtype), y.ndim) if use_bias else y

    @by("batch_norm")
    def init(key: Array, x: Any) -> tuple[dict[str, Array], dict[str, Array]]:
        expect.float_array(x, rank=2)
        features, dtype = x.shape[-1], expect.dtype(x)
        params = {"scale": jnp.ones(features, dtype), "bias": jnp.zeros(features, dtype)}
        state = {"mean": jnp.zeros(features, sum_dtype(dtype)), "var": jnp.ones(features, sum_dtype(dtype))}
        return {name: params[name] for name in names}, state

    @by("batch_norm")
    def apply(params: dict[str, Array], state: dict[str, Array], x: Any) -> Array:
        x = jnp.asarray(x)
        check(params, state, x)
        mean, var = (in_front(state[name].astype(sum_dtype(x.dtype)), x.ndim) for name in ("mean", "var"))
        return line(params, x.astype(mean.dtype) - mean, lax.rsqrt(var + eps)).astype(x.dtype)

    @by("batch_norm")
    def fwd(params: dict[str, Array], state: dict[str, Array], x: Any, key: Array | None):
        x = jnp.asarray(x)
        check(params, state, x)
        high, saved = statistics(x, x, 2, eps, _mean, sparing=True)
        inverse = 1 / saved.power  # not its square, which may overflow where the variance does not
        mean, var = sum(saved.means) * inverse, saved.square * inverse * inverse

        def move(running: Array, batch: Array) -> Array:
            return momentum * running + (1 - momentum) * batch.reshape(running.shape).astype(running.dtype)

        moved = {"mean": move(state["mean"], mean), "var": move(state["var"], var)}
        return line(params, high, saved.rstd).astype(x.dtype), moved, saved

    @by("batch_norm")
    def bwd(params: dict[str, Array], residuals: NormResiduals, dy: Any, contract=total):
        x, rstd = residuals.x, residuals.rstd
        refuse_single_examples(contract)
        expect.fields(params, x.dtype, dict.fromkeys(names, x.shape[-1:]))
        dy = expect.cotangent(dy, x.shape, x.dtype)
        x_hat, g = centre(x, residuals) * rstd, dy.astype(rstd.dtype)
        dx = (g - _mean(g) - x_hat * _mean(x_hat * g)) * slope(params, rstd) * residuals.power
        factors = {"scale": Mixing(Scale(x_hat, dy)), "bias": Mixing(Shift(dy))}
        dparams = {name: contract(factors[name], params[name]) for name in names}
        return dparams, placed(dx.astype(x.dtype), x)

    return Layer("batch_norm", init, apply, fwd, bwd)


def _mean(x: Array) -> Array:
    """The mean, [.., C] to [1, .., C], by the same sum as `total`: the compiler makes it once where both are wanted."""
    return in_front(jnp.sum(flat(x), axis=0) / prod(x.shape[:-1]), x.ndim)
