"""Mutants that are no mistake, or none that a gradient can show, and why.

A mutant's key is its function and its text (`tests.check.mutate.Mutant.key`).
"""

_BY_REASON = {
    "a product, and a sum of products, is the same with its factors exchanged": [
        "total: Scale(dy, x_hat)",
        "_per_example: Scale(dy, x_hat)",
        '_norm: dparams = {"scale": contract((Scale(dy, x_hat)), params["scale"])}',
        'batch_norm: factors = {"scale": (Scale(dy, x_hat, mixes=True)), "bias": Shift(dy, mixes=True)}',
        'squared_norm: (dy, x) = _wide_examples(factor.x, "squared_norm"), _wide_examples(factor.dy, "squared_norm")',
        "squared_norm: x, dy = ((_wide_examples(factor.dy, 'squared_norm'), _wide_examples(factor.x, 'squared_norm')))",
        'squared_norm: gram = [jnp.einsum("bsi,bti->bst", a, a) for a in ((dy, x))]',
    ],
    "a Gram matrix is symmetric, and all of it is summed": [
        "squared_norm: gram = [jnp.einsum('bti,bsi->bst', a, a) for a in (x, dy)]",
        "squared_norm: gram = [jnp.einsum('bsi,bti->bts', a, a) for a in (x, dy)]",
        "squared_norm: return jnp.sum(gram[0] * gram[1], axis=((2, 1)))",
    ],
    "log softmax is x less both, and which first is within what the rounding of x itself does": [
        "log_softmax: (x, log_total, top) = residuals"
    ],
    "params and state of an activation are empty, and it looks at neither": [
        "_gated: s, _, saved = (gate.fwd((), {}, b, None))",
    ],
    "to exchange the first two axes is its own inverse": ["per_example: lambda answer: (jnp.moveaxis(answer, 1, 0))"],
    "min(max(low, x), high) does not tell which of low and x is the bound": [
        "huber: lambda r: (jnp.clip(-delta, r, delta))",
        "_gelu_tanh_slope: x = (jnp.clip(-10.0, x, 10.0))",
    ],
    "beyond 10 the slope is 0 or 1 to within rounding, and x^3 is far from overflow at 20": [
        "_gelu_tanh_slope: x = jnp.clip(x, -20.0, 10.0)",
        "_gelu_tanh_slope: x = jnp.clip(x, -10.0, 20.0)",
    ],
    "the arms are equal where the comparisons differ, at x = 0": [
        "silu: s, rest = jnp.where((x > 0), large, e * large), jnp.where(x >= 0, e * large, large)",
        "silu: s, rest = jnp.where(x >= 0, large, e * large), jnp.where((x > 0), e * large, large)",
        "mish: t = jnp.where((x > 0), (1 + 2 * u) / above, (2 * u + u * u) / below)",
        "mish: return t + x * (4 * (1 + u) * jnp.where((x > 0), jnp.square(u / above), u / jnp.square(below)))",
    ],
    "they differ at a kink alone, where either side's slope is right; test_activation.py and test_margin.py say which it is": [
        "hinge: g = jnp.where((1 - t * z < 0), 0.0, -spread(dy, z))",
        "elu: lambda y: jnp.where((y >= 0), jnp.ones_like(y), y + alpha)",
        "celu: lambda y: jnp.where((y >= 0), jnp.ones_like(y), 1 + y / alpha)",
        "selu: lambda y: jnp.where((y >= 0), s * jnp.ones_like(y), y + s * a)",
        "hard_silu: lambda x: jnp.where((x < -3), 0.0, jnp.where(x >= 3, 1.0, (2 * x + 3) / 6))",
        "hard_silu: lambda x: jnp.where(x <= -3, 0.0, jnp.where((x > 3), 1.0, (2 * x + 3) / 6))",
    ],
    "min(x, -x) is min(-x, x)": ["mish: u = jnp.exp((jnp.minimum(-x, x)))"],
    "a square has no sign": [
        "mish: return t + x * (4 * (1 + u) * jnp.where(x >= 0, jnp.square((-(u / above))), u / jnp.square(below)))",
        "squareplus: lambda y: 1 / (1 + jnp.square((-(math.sqrt(b) / 2 / y))))",
        "squareplus: lambda y: 1 / (1 + jnp.square((-(math.sqrt(b) / 2)) / y))",
    ],
    "a factor of ones": [
        "selu: lambda y: jnp.where(y > 0, (s / jnp.ones_like(y)), y + s * a)",
        "selu: lambda y: jnp.where(y > 0, (s), y + s * a)",
    ],
    "q of an integer label sums to one": ["cross_entropy: mass = (jnp.sum(q, axis=-1, keepdims=True))"],
    "the gradient is the same however long its blocks are; test_linear.py counts what is formed at a time": [
        "linear_cross_entropy: saved, size = (params, x, lse, whole(label), g), (even(chunk // label.size, vocab))",
        "linear_cross_entropy: saved, size = (params, x, lse, whole(label), g), even(vocab, (chunk))",
        "linear_cross_entropy: saved, size = (params, x, lse, whole(label), g), even(vocab, (label.size))",
    ],
    "a contraction that takes factors as they are looks at no parameter": [
        "linear_cross_entropy: dparams = {name: contract(factors[name], (params)) for name in names}",
    ],
    "what all states of a step have in common goes when their shares are divided by their sum; test_ctc.py is long": [
        "ctc: share = jnp.exp((a + b + _highest(a + b, 1)))",
        "ctc: share = jnp.exp((a + b))",
        "ctc: share = jnp.exp(a + b - _highest((a), 1))",
        "ctc: share = jnp.exp(a + b - _highest((b), 1))",
        "ctc: end = jnp.where(of.last, 1, -jnp.inf).astype(lse.dtype)",
        "ctc: end = jnp.where(of.last, -1, -jnp.inf).astype(lse.dtype)",
    ],
    "the sum is 0 only where there is no alignment, and there the gradient is set to 0": [
        "ctc: share = share / jnp.where(total == 1, 1.0, total)",
        "ctc: share = share / jnp.where(total == -1, 1.0, total)",
        "ctc: share = share / jnp.where(total == 0, 0, total)",
        "ctc: share = share / jnp.where(total == 0, 2, total)",
    ],
    "no case has a loss of inf; test_ctc.py has": ["ctc: counted = (steps[None] < lengths[:, None])"],
    "a sum is the same in any order, and an exchange of two axes has none": [
        "ctc: ways = ((_shifted(after, -1, -jnp.inf), after, "
        "_shifted(jnp.where(of.skip, after, -jnp.inf), -2, -jnp.inf)))",
        "ctc: ways = ((after, _shifted(jnp.where(of.skip, after, -jnp.inf), -2, -jnp.inf), "
        "_shifted(after, -1, -jnp.inf)))",
        "ctc: slope = softmax.at[place].add(-(jnp.swapaxes(shares, 1, 0)))",
    ],
    "either half of the line gives 0 where the factor is 0; it is NaN for labels out of range, which no case has": [
        "cross_entropy: dlogits = jnp.where(factor == -1, 0.0, factor * dy * slope)",
        "cross_entropy: dlogits = jnp.where(factor == 0, 0.0, (dy) * slope)",
    ],
    "a floating target of another dtype than the prediction is refused": [
        "binary_cross_entropy: return {}, (dz, (-g * z).astype(x[0].dtype) if expect.is_floating(x[1]) else None)",
    ],
    "the mark is for what kept factors refuse later, which no gradient shows; test_batch_norm.py has it": [
        'batch_norm: factors = {"scale": (Scale(x_hat, dy)), "bias": Shift(dy, mixes=True)}',
        'batch_norm: factors = {"scale": Scale(x_hat, dy, mixes=False), "bias": Shift(dy, mixes=True)}',
        'batch_norm: factors = {"scale": Scale(x_hat, dy, mixes=True), "bias": (Shift(dy))}',
        'batch_norm: factors = {"scale": Scale(x_hat, dy, mixes=True), "bias": Shift(dy, mixes=False)}',
    ],
    "without a mesh there is one sharding; test_factors.py has meshes": [
        "_recurrent: dx = (contract_last(da, params['kernel'], 1)).astype(x.dtype)",
        "batch_norm: return dparams, ((dx * in_front(slope, x.ndim)).astype(x.dtype))",
        "total: answer = (jnp.sum(dy.reshape(-1, *param.shape), axis=0, dtype=wide(dy.dtype)))",
        "total: answer = (jnp.sum(flat(x_hat).astype(high) * flat(dy).astype(high), axis=0))",
        "_norm: return dparams, ((rstd * dx).astype(dy.dtype))",
    ],
    "few terms in half precision are summed as well as half precision can tell; test_factors.py has long sums": [
        "total: answer = placed((jnp.sum(dy.reshape(-1, *param.shape), axis=0)), param)",
        "_wide_examples: return (a.reshape(a.shape[0], -1, *a.shape[a.ndim - rank:]))",
    ],
    "all uses of a parameter have as many layer axes": [
        "tied: both = Sum(tuple(replace(use, layers=0) for use in uses), uses[1].layers)",
    ],
    "a check of what a rule returned; test_tie.py has such a rule": ["_use: factor = (answer)"],
    "what fwd returned has these lengths": [
        "repeat: dx, dparams = (lax.scan(body, dy, (params, residuals), reverse=True))",
    ],
    "a sum is the same in any order": [
        "attention: of_context = ((pull('value', context, _side_by_side(dv)), pull('key', context, _side_by_side(turned(dk, -1)))))",
        "attention: return dparams, (added(*of_context, dx))",
        'attention: dinputs: dict[str, Any] = dict.fromkeys(inputs) | {"x": dx if "context" in inputs else (added(*of_context, dx))}',
        "_pull: heads = tuple(axis for axis in ((2, 1)) if db.shape[axis] == 1)",
        "contrastive: (by_column, by_row) = g[:, None] * nn.softmax(s, axis=1), g[None] * nn.softmax(s, axis=0)",
        "contrastive: by_row, by_column = ((g[None] * nn.softmax(s, axis=0), g[:, None] * nn.softmax(s, axis=1)))",
    ],
    "zeros have no sign, and a query, key and value of one size the same shape": [
        "_pull: lambda a: (jnp.zeros_like(-a, high))",
        "_pull: start = jax.tree.map(lambda a: jnp.zeros_like(a, high), ((q, v.mT, k.mT, scores.bias)))",
        "lru: w = in_front(turn.factor, 3) * jnp.concatenate([(jnp.zeros_like(-h[:, :1])), h[:, :-1]], axis=1)",
        "_recurrent: return _where(valid, (direct[0] + through, *direct[1:]), dstates), _where(valid, dz, (jnp.zeros_like(-dz)))",
    ],
    "what is not rounded in between is the exacter for it; it is rounded to save memory": [
        "lru: dv = [(gain * part) for part, _ in _parts(g, KERNELS[:2])]",
        "lru: real, imag = ((part) for part, _ in _parts(h, KERNELS[2:]))",
        "_recurrent: dz = (dz)",
    ],
    "the barrier is for the compiler, which turns a kernel round in every step otherwise": [
        '_recurrent: high, recurrent_t = wide(x.dtype), _transposed(params["recurrent_kernel"], (x.shape))',
        '_recurrent: high, recurrent_t = wide(x.dtype), _transposed(params["recurrent_kernel"], x.shape[1])',
        '_recurrent: high, recurrent_t = wide(x.dtype), _transposed(params["recurrent_kernel"], x.shape[-1])',
        "_transposed: return (kernel.T)",
        "_transposed: return (lax.optimization_barrier(kernel.T))",
        "_transposed: return kernel.T if (examples != 1) else lax.optimization_barrier(kernel.T)",
        "_transposed: return kernel.T if examples == 0 else lax.optimization_barrier(kernel.T)",
        "_transposed: return kernel.T if examples == 2 else lax.optimization_barrier(kernel.T)",
        "_transposed: return kernel.T if examples == 1 else (kernel.T)",
    ],
    "a sequence of length 0 has no step at which it matters": [
        "_previous: begins = jnp.concatenate([~valid[:, 1:], (valid[:, :1])], axis=1)",
    ],
    "both of a pair have one dtype": [
        "focal: return {}, (dz, dt.astype(x[0].dtype) if expect.is_floating(x[1]) else None)",
        "kl_divergence: return {}, ((-g * t).astype(x[1].dtype), dt.astype(x[1].dtype))",
        "kl_divergence: return {}, ((-g * t).astype(x[-1].dtype), dt.astype(x[1].dtype))",
        "kl_divergence: return {}, ((-g * t).astype(x[0].dtype), dt.astype(x[0].dtype))",
        "hinge: return {}, ((g * t).astype(x[0].dtype), (g * z).astype(x[0].dtype) if expect.is_floating(x[1]) else None)",
        "cosine: return {}, (dp.astype(x[1].dtype), dt.astype(x[1].dtype))",
        "cosine: return {}, (dp.astype(x[-1].dtype), dt.astype(x[1].dtype))",
        "cosine: return {}, (dp.astype(x[0].dtype), dt.astype(x[0].dtype))",
        "contrastive: return {}, (da.astype(x[1].dtype), db.astype(x[1].dtype))",
        "contrastive: return {}, (da.astype(x[-1].dtype), db.astype(x[1].dtype))",
        "contrastive: return {}, (da.astype(x[0].dtype), db.astype(x[0].dtype))",
    ],
    "no case has a class that cannot be; test_cross_entropy.py has": [
        "cross_entropy: dtarget = (1 - label_smoothing) * dy * (jnp.log(total) - shifted)",
    ],
    "no case has a target of exactly 0; test_divergence.py has": [
        "kl_divergence: dt = g * (log_t - p + jnp.where(t == 1, 0.0, 1.0))",
        "kl_divergence: dt = g * (log_t - p + jnp.where(t == -1, 0.0, 1.0))",
        "kl_divergence: dt = g * (log_t - p + jnp.where(t == 0, 1, 1.0))",
        "kl_divergence: dt = g * (log_t - p + jnp.where(t == 0, -1, 1.0))",
    ],
    "a weak type becomes that of its neighbour, and any integers will do for places": [
        "ctc: end = (jnp.where(of.last, 0.0, -jnp.inf))",
        "ctc: examples = (jnp.arange(logits.shape[0]))",
    ],
    "the default axis is the last, of two the second": [
        "contrastive: by_row, by_column = g[:, None] * (nn.softmax(s)), g[None] * nn.softmax(s, axis=0)",
    ],
}
EQUIVALENT = {key: reason for reason, keys in _BY_REASON.items() for key in keys}

# Conditions that choose between two formulas for the same number.
CHOICES = {"squared_norm: 2 * x.shape[1] ** 2 <= x.shape[2] * dy.shape[2]", "_pull: kernel.size > inputs + dy.size"}
