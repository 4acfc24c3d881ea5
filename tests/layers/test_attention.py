"""attention: against NumPy, JAX and PyTorch; whole and in tiles; masks, lengths, windows, dropout; what it refuses."""

from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet.layers.attention_tiles import Scores

KEY = jax.random.key(0)
B, T, S, D, C, H, K, HEAD = 2, 7, 5, 8, 6, 4, 2, 4
LENGTHS = np.array([5, 3], np.int32)
# options, and the parts of the input beside x
CASES = {
    "self": ({}, ()),
    "causal": ({"causal": True}, ()),
    "window": ({"window": 3}, ()),
    "causal window, shared keys": ({"causal": True, "window": 2, "kv_heads": K}, ()),
    "rotary, other sizes": ({"rotary": True, "rotary_base": 50.0, "head_dim": 6, "features": 3}, ()),
    "cross, shared keys": ({"kv_heads": K}, ("context",)),
    "cross, one head of keys, lengths": ({"kv_heads": 1}, ("context", "lengths")),
    "cross, causal window": ({"causal": True, "window": 3}, ("context",)),
    "mask and bias": ({"kv_heads": K}, ("mask", "bias")),
    "mask and bias for each head": ({"kv_heads": K}, ("context", "mask of heads", "bias of heads", "lengths")),
}
EACH = pytest.mark.parametrize("case", CASES)


def setting(case, dtype: type[np.floating] = np.float64, **more):
    """Layer, params with biases that are not 0, inputs, dy."""
    options, names = CASES[case]
    rng = np.random.default_rng(len(case))
    draw = lambda *shape: rng.normal(size=shape).astype(dtype)
    inputs: dict[str, Any] = {"x": draw(B, T, D)} | ({"context": draw(B, S, C)} if "context" in names else {})
    keys = S if "context" in names else T
    if "lengths" in names:
        inputs["lengths"] = LENGTHS
    for name in (n for n in names if n.startswith(("mask", "bias"))):
        part = draw(B, H, T, keys) if name.endswith("heads") else draw(B, T, keys)
        inputs[name[:4]] = part < 0.5 if name.startswith("mask") else part
    if "mask" in inputs:
        inputs["mask"][0, ..., 2, :] = False  # a row that sees nothing
    if "bias" in inputs:
        inputs["bias"][1, ..., 4, :] = -np.inf  # and another
        inputs["bias"][0, ..., 0, 1] = -np.inf
    layer = fn.attention(H, **options | more)
    shapes = jax.eval_shape(layer.init, KEY, inputs)[0]
    params = jax.tree.map(lambda leaf: jnp.asarray(0.5 * draw(*leaf.shape)), shapes)
    return layer, params, inputs, draw(B, T, options.get("features", D))


def pull(layer, params, inputs, dy, key=None):
    """(y, dparams, dinputs), compiled."""

    def run(params, inputs, dy):
        y, _, residuals = layer.fwd(params, (), inputs, key)
        return y, *layer.bwd(params, residuals, dy)

    return jax.jit(run)(params, inputs, dy)


def close(got, wanted, rtol=1e-10):
    """Every leaf, to a share of its largest element; the gradient of a bias of keys is 0 but for rounding."""
    assert jax.tree.structure(got) == jax.tree.structure(wanted)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1.0))


def seen(case, inputs):
    """Which key a query may see, [B, H, T, S], a position at a time."""
    options, keys = CASES[case][0], inputs.get("context", inputs["x"]).shape[1]
    open_ = np.ones((B, H, T, keys), bool)
    for b, _, t, s in np.ndindex(*open_.shape):
        far = options.get("causal", False) and s > t
        far |= abs(t - s) >= options.get("window", keys + T)
        open_[b, :, t, s] &= not far and s < inputs.get("lengths", np.full(B, keys))[b]
    if "mask" in inputs:
        open_ &= inputs["mask"].reshape(B, -1, T, keys)
    return open_


def numpy_attention(case, params, inputs):
    """y, an example, a head and a query at a time."""
    options = CASES[case][0]
    p, group = jax.tree.map(np.asarray, params), H // options.get("kv_heads", H)
    x, context, visible = inputs["x"], inputs.get("context", inputs["x"]), seen(case, inputs)
    q, k, v = (a @ p[n]["kernel"] + p[n]["bias"] for n, a in (("query", x), ("key", context), ("value", context)))
    d = q.shape[-1] // H
    out = np.zeros(q.shape)
    turn = lambda a, t: a
    if options.get("rotary"):
        angles = options["rotary_base"] ** (-2 * np.arange(d // 2) / d)
        turn = lambda a, t: (lambda z: np.concatenate([z.real, z.imag]))(
            (a[: d // 2] + 1j * a[d // 2 :]) * np.exp(1j * t * angles)
        )
    for b, h, t in np.ndindex(B, H, T):
        mine, theirs = slice(h * d, (h + 1) * d), slice(h // group * d, (h // group + 1) * d)
        scores = np.array([turn(q[b, t, mine], t) @ turn(k[b, s, theirs], s) for s in range(k.shape[1])]) / np.sqrt(d)
        if "bias" in inputs:
            scores = scores + inputs["bias"].reshape(B, -1, T, k.shape[1])[b, h if inputs["bias"].ndim == 4 else 0, t]
        weights = np.where(visible[b, h, t], np.exp(scores), 0.0)
        out[b, t, mine] = weights @ v[b, :, theirs] / (weights.sum() or 1.0)
    return out @ p["out"]["kernel"] + p["out"]["bias"]


@EACH
def test_the_output_is_numpys(case, x64):
    layer, params, inputs, _ = setting(case)
    close(jax.jit(layer.apply)(params, (), inputs), numpy_attention(case, params, inputs), 1e-12)


def dense_pull(options, params, inputs, dy, rounded=lambda s: s):
    """y, dparams and dinputs in float64 from all scores at once, as the docstring of the layer has them without tiles.

    `rounded` is what becomes of the sum of score and bias.
    """
    p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
    parts = {name: np.asarray(a, np.float64 if a.dtype.kind not in "biu" else a.dtype) for name, a in inputs.items()}
    x, context, heads, dy = parts["x"], parts.get("context", parts["x"]), options["heads"], np.asarray(dy, np.float64)
    kv_heads, (batch, T), S = options.get("kv_heads") or heads, x.shape[:2], context.shape[1]
    split = lambda a, n: a.reshape(batch, -1, n, a.shape[-1] // n).swapaxes(1, 2)
    join = lambda a: a.swapaxes(1, 2).reshape(batch, a.shape[2], -1)
    q, k, v = (a @ p[n]["kernel"] + p[n]["bias"] for n, a in (("query", x), ("key", context), ("value", context)))
    q, k, v = split(q, heads), split(k, kv_heads), split(v, kv_heads)
    d = q.shape[-1]
    if options.get("rotary"):
        speed = 1e4 ** (-2 * np.arange(d // 2) / d)
        turn = lambda n, sign: np.exp(sign * 1j * np.arange(n)[:, None] * speed)
        halves = lambda z: np.concatenate([z.real, z.imag], -1)
        turned = lambda a, sign=1: halves((a[..., : d // 2] + 1j * a[..., d // 2 :]) * turn(a.shape[2], sign))
        q, k = turned(q), turned(k)
    shared = lambda a: a.repeat(heads // kv_heads, 1)
    s = q @ shared(k).swapaxes(2, 3) / np.sqrt(d)
    t, u = np.arange(T)[:, None], np.arange(S)[None]
    open_ = np.broadcast_to((u <= t) | (not options.get("causal")), s.shape)
    open_ = open_ & (abs(t - u) < (options.get("window") or T + S))
    if "lengths" in parts:
        open_ = open_ & (u < parts["lengths"][:, None, None, None])
    if "mask" in parts:
        open_ = open_ & parts["mask"].reshape(batch, -1, T, S)
    if "bias" in parts:
        s = rounded(s + parts["bias"].reshape(batch, -1, T, S))
    s = np.where(open_, s, -np.inf)
    top = s.max(-1, keepdims=True)
    weights = np.exp(s - np.where(np.isinf(top), 0, top))
    weights = weights / np.where(weights.any(-1, keepdims=True), weights.sum(-1, keepdims=True), 1)
    o = join(weights @ shared(v))
    y = o @ p["out"]["kernel"] + p["out"]["bias"]

    def pull(name, a, dy):
        dparams[name] = {"kernel": np.einsum("bti,btj->ij", a, dy), "bias": dy.sum((0, 1))}
        return dy @ p[name]["kernel"].T

    dparams: dict[str, Any] = {}
    grouped = lambda a: a.reshape(batch, kv_heads, -1, S, d).sum(2)
    do = split(pull("out", o, dy), heads)
    dp = do @ shared(v).swapaxes(2, 3)
    ds = weights * (dp - (weights * dp).sum(-1, keepdims=True))
    dq, dk = ds @ shared(k) / np.sqrt(d), grouped(ds.swapaxes(2, 3) @ q) / np.sqrt(d)
    if options.get("rotary"):
        dq, dk = turned(dq, -1), turned(dk, -1)
    dx = pull("query", x, join(dq))
    dcontext = pull("key", context, join(dk)) + pull("value", context, join(grouped(weights.swapaxes(2, 3) @ do)))
    dinputs: dict[str, Any] = dict.fromkeys(inputs) | {"x": dx + (0 if "context" in inputs else dcontext)}
    if "context" in inputs:
        dinputs["context"] = dcontext
    if "bias" in inputs:
        dinputs["bias"] = ds if inputs["bias"].ndim == 4 else ds.sum(1)
    return y, {name: dparams[name] for name in params}, dinputs


def relations():
    """Options, T and S: every relation of the two, of tiles to each, and of a window to both."""
    sizes = [(1, 1), (1, 6), (6, 1), (2, 7), (7, 2), (4, 6), (6, 4), (5, 5), (8, 3), (3, 8)]
    for T, S in sizes:
        windows = sorted({None, 1, 2, min(T, S), max(T, S), T + S + 1}, key=str)
        for block, window, causal in product((None, 1, 2, 3, 4, 5), windows, (False, True)):
            yield {"block": block, "window": window, "causal": causal}, T, S


def test_tiles_cover_what_a_query_may_see_for_its_position_once():
    """A tile that was moved back to end with the scores counts from where it was."""
    for options, T, S in relations():
        tiles = Scores(
            **options, rate=0.0, queries=T, keys=S, mask=None, bias=None, lengths=None, segments=None, key=None
        ).tiles(2)
        covered = np.zeros((T, S), int)
        for tile in tiles:
            covered[tile.row : tile.row + tile.rows, tile.column : tile.column + tile.columns] += 1
        t, s = np.arange(T)[:, None], np.arange(S)[None]
        seen = ((s <= t) | (not options["causal"])) & (abs(t - s) < (options["window"] or T + S))
        assert covered.max() == 1, (options, T, S)
        assert covered[seen].all(), (options, T, S)
        assert [tile.number for tile in tiles] == list(range(len(tiles)))


def drawn(seed):
    """Options and an input at random, of `relations` and all else that a layer takes."""
    rng = np.random.default_rng(seed)
    every = list(relations())
    options, T, S = every[rng.integers(len(every))]
    heads, batch = int(rng.choice([1, 2, 4])), int(rng.integers(1, 3))
    options = {"heads": heads, "kv_heads": int(rng.choice([1, heads])), "head_dim": 2, **options}
    options |= {"rotary": bool(rng.random() < 0.2), "window": options["window"] if rng.random() < 0.5 else None}
    draw = lambda *shape: rng.normal(size=shape)
    inputs: dict[str, Any] = {"x": draw(batch, T, 3)}
    if T != S or rng.random() < 0.5:
        inputs["context"] = draw(batch, S, 2)
    each = lambda: (batch, heads, T, S) if rng.random() < 0.5 else (batch, T, S)
    if rng.random() < 0.3:
        inputs["mask"] = draw(*each()) < 0.7
    if rng.random() < 0.3:
        inputs["bias"] = np.where(draw(*(shape := each())) < 1, draw(*shape), -np.inf)
    if rng.random() < 0.3:
        inputs["lengths"] = rng.integers(0, S + 1, batch).astype(np.int32)
    return options, inputs, draw(batch, T, 3)


def filled(layer, inputs, dtype):
    """Params with biases that are not 0."""
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), dtype), jax.eval_shape(layer.init, KEY, inputs)[0]
    )


@pytest.mark.parametrize("seed", [*range(24), *(pytest.param(n, marks=pytest.mark.slow) for n in range(24, 96))])
def test_whatever_the_options_it_is_attention_over_all_scores_at_once(seed, x64):
    options, inputs, dy = drawn(seed)
    layer = fn.attention(**options)
    params = filled(layer, inputs, np.float64)
    close(pull(layer, params, inputs, dy), dense_pull(options, params, inputs, dy))


@pytest.mark.parametrize("options", [{}, {"causal": True}, {"causal": True, "block": 1}], ids=str)
def test_apply_sees_the_keys_that_fwd_sees(options, x64):
    """More queries than keys, in several tiles of queries."""
    inputs = {"x": np.cos(np.arange(9.0)).reshape(1, 3, 3), "context": np.ones((1, 1, 2))}
    layer = fn.attention(1, head_dim=2, **{"block": 2, **options})
    params = filled(layer, inputs, np.float64)
    y = dense_pull({"heads": 1, **options}, params, inputs, np.zeros((1, 3, 3)))[0]
    assert y.all()
    close((layer.apply(params, (), inputs), layer.fwd(params, (), inputs, None)[0]), (y, y))


def test_by_default_too_a_thousand_queries_see_all_of_77_keys():
    rng = np.random.default_rng(0)
    x, context = (rng.normal(size=(1, n, 8)).astype(np.float32) for n in (1024, 77))
    layer = fn.attention(8)
    inputs = {"x": x, "context": context}
    params = filled(layer, inputs, np.float32)
    y = jax.jit(layer.apply)(params, (), inputs)
    wanted = dense_pull({"heads": 8}, params, inputs, np.zeros((1, 1024, 8)))[0]
    close(y, wanted, 1e-5)


LOWEST = {dtype: float(jnp.finfo(dtype).min) for dtype in ("float32", "float64", "bfloat16", "float16")}


@pytest.mark.parametrize("block", [None, 2])
@pytest.mark.parametrize(
    ("dtype", "common"),
    [(dtype, common) for dtype, low in LOWEST.items() for common in (-1e4, -1e9, low, 1e4, 1e6) if abs(common) <= -low],
)
def test_a_finite_bias_of_all_that_a_row_sees_takes_nothing_from_its_gradients(dtype, common, block, x64):
    """Whole numbers, so that scores are what they should be: all that rounds them is the bias, where it is large.

    Such a mask forbids nothing to a row that has nothing else: rows 0 and 3. Row 1 has one key left, row 2 no bias.
    """
    rng, dtype, options = np.random.default_rng(0), jnp.dtype(dtype), {"heads": 2, "head_dim": 4}
    whole = lambda low, high, *shape: jnp.asarray(rng.integers(low, high + 1, shape), dtype)
    bias = np.full((1, 4, 7), common)
    bias[0, 1, 3] = bias[0, 2] = 0
    inputs = {"x": whole(-1, 1, 1, 4, 3), "context": whole(-1, 1, 1, 7, 3), "bias": jnp.asarray(bias, dtype)}
    layer = fn.attention(2, head_dim=4, block=block)
    shapes = jax.eval_shape(layer.init, KEY, inputs)[0]
    params, dy = jax.tree.map(lambda leaf: whole(-1, 1, *leaf.shape), shapes), whole(-2, 2, 1, 4, 3)
    high = np.float64 if dtype == jnp.float64 else np.float32
    got = pull(layer, params, inputs, dy)
    wanted = dense_pull(options, params, inputs, dy, lambda s: s.astype(high).astype(np.float64))
    assert [leaf.dtype for leaf in jax.tree.leaves(got)] == [dtype] * 12
    close(got, wanted, (4 if dtype.itemsize == 2 else 64) * float(jnp.finfo(dtype).eps))


def torch_pull(torch, case, params, inputs, dy):
    """y, dparams and dinputs by scaled_dot_product_attention and PyTorch's autograd."""
    tensor = lambda a: torch.from_numpy(np.array(a)).requires_grad_()
    p = jax.tree.map(tensor, params)
    parts = {name: tensor(inputs[name]) for name in ("x", "context", "bias") if name in inputs}
    context, options = parts.get("context", parts["x"]), CASES[case][0]
    dense = lambda name, a: a @ p[name]["kernel"] + p[name]["bias"]
    heads = lambda name, a, n: dense(name, a).unflatten(-1, (n, -1)).transpose(1, 2)
    kv_heads = options.get("kv_heads", H)
    q, k, v = heads("query", parts["x"], H), heads("key", context, kv_heads), heads("value", context, kv_heads)
    visible = torch.from_numpy(seen(case, inputs))
    if "bias" in inputs:
        visible = visible & ~torch.isneginf(parts["bias"].detach().reshape(B, -1, T, k.shape[2]))
    sees = visible.any(-1, keepdim=True)
    bias = torch.zeros(visible.shape, dtype=q.dtype)
    if "bias" in inputs:
        bias = bias + parts["bias"].reshape(B, -1, T, k.shape[2])
    # PyTorch's gradient of a row that sees nothing is NaN: let it see all there, and leave it out afterwards.
    bias = torch.where(visible, bias, torch.where(sees, -torch.inf, 0.0))
    repeat = lambda a: a.repeat_interleave(H // kv_heads, 1)
    o = torch.nn.functional.scaled_dot_product_attention(q, repeat(k), repeat(v), attn_mask=bias)
    y = dense("out", torch.where(sees, o, 0.0).transpose(1, 2).flatten(2))
    y.backward(torch.from_numpy(dy))
    gradient = lambda a: a.grad.numpy()
    dinputs = {name: gradient(parts[name]) if name in parts else None for name in inputs}
    return y.detach().numpy(), jax.tree.map(gradient, p), dinputs


@pytest.mark.parametrize("case", [case for case in CASES if "rotary" not in case])
def test_output_and_gradients_are_pytorchs(case, x64):
    torch = pytest.importorskip("torch")
    layer, params, inputs, dy = setting(case, block=3)
    close(pull(layer, params, inputs, dy), torch_pull(torch, case, params, inputs, dy))


def test_output_and_gradients_are_pytorchs_in_float32():
    torch = pytest.importorskip("torch")
    layer, params, inputs, dy = setting("mask and bias for each head", np.float32, block=2)
    wanted = torch_pull(torch, "mask and bias for each head", params, inputs, dy)
    close(pull(layer, params, inputs, dy), wanted, 1e-5)


def test_the_layer_is_pytorchs_multihead_attention(x64):
    torch = pytest.importorskip("torch")
    layer, params, inputs, dy = setting("self")
    theirs = torch.nn.MultiheadAttention(D, H, batch_first=True, dtype=torch.float64)
    tensor = lambda a: torch.nn.Parameter(torch.from_numpy(np.array(a)))
    three = ("query", "key", "value")
    theirs.in_proj_weight = tensor(np.concatenate([params[name]["kernel"].T for name in three]))
    theirs.in_proj_bias = tensor(np.concatenate([params[name]["bias"] for name in three]))
    theirs.out_proj.weight, theirs.out_proj.bias = tensor(params["out"]["kernel"].T), tensor(params["out"]["bias"])
    x = torch.from_numpy(inputs["x"]).requires_grad_()
    y = theirs(x, x, x, need_weights=False)[0]
    y.backward(torch.from_numpy(dy))
    kernels, biases = (np.split(a.grad.numpy(), 3) for a in (theirs.in_proj_weight, theirs.in_proj_bias))
    dparams = {n: {"kernel": w.T, "bias": b} for n, w, b in zip(three, kernels, biases, strict=True)}
    dparams["out"] = {"kernel": theirs.out_proj.weight.grad.numpy().T, "bias": theirs.out_proj.bias.grad.numpy()}
    close(pull(layer, params, inputs["x"], dy), (y.detach().numpy(), dparams, x.grad.numpy()))


@pytest.mark.parametrize(("window", "sizes"), [(None, None), (3, (2, 0))])
def test_output_and_gradients_are_those_of_jaxs_own_attention(window, sizes):
    x, options = jnp.asarray(np.random.default_rng(0).normal(size=(B, 40, D)), jnp.float32), {"window": window}
    layer = fn.attention(H, kv_heads=K, causal=True, block=16, **options)
    params = layer.init(KEY, x)[0]

    def theirs(params, x):
        dense = lambda name, a: (a.reshape(-1, a.shape[-1]) @ params[name]["kernel"]).reshape(*a.shape[:2], -1)
        q, k, v = (dense(n, x).reshape(B, 40, h, -1) for n, h in (("query", H), ("key", K), ("value", K)))
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            o = jax.nn.dot_product_attention(q, k, v, is_causal=True, local_window_size=sizes)
        return dense("out", o.reshape(B, 40, -1))

    y, vjp = jax.jit(lambda params, x: jax.vjp(theirs, params, x))(params, x)
    got_y, dparams, dx = pull(layer, params, x, y)
    kernels = lambda tree: {name: fields["kernel"] for name, fields in tree.items()}
    wanted, dx_wanted = vjp(y)
    close((got_y, kernels(dparams), dx), (y, kernels(wanted), dx_wanted), 2e-5)


@pytest.mark.parametrize(
    ("length", "options"),
    [
        (1, {"window": 1}),
        (63, {"causal": True}),
        (130, {"causal": True, "window": 70, "rotary": True}),
        (200, {"window": 20}),
    ],
)
def test_tiles_of_any_size_agree_with_one(length, options, x64):
    """Sizes that blocks divide, and that they do not, and blocks greater than all."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(1, length, 4)))
    whole, tiled = (fn.attention(2, block=block, **options) for block in (length, 64 if length > 64 else 47))
    params = whole.init(KEY, x)[0]
    wanted = pull(whole, params, x, jnp.cos(x))
    close(pull(tiled, params, x, jnp.cos(x)), wanted, 1e-11)


def test_large_scores_are_cut_into_tiles_by_themselves(x64):
    """600 queries of 16 heads are nine tiles by default, six of them open."""
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 600, 8)))
    layers = [fn.attention(8, causal=True, block=block) for block in (None, 600)]
    params = layers[0].init(KEY, x)[0]
    text = [str(jax.make_jaxpr(lambda x, layer=layer: layer.apply(params, (), x))(x)) for layer in layers]
    assert [("scan" in program, "600,600" in program) for program in text] == [(True, False), (False, True)]
    close(*(pull(layer, params, x, jnp.sin(x)) for layer in layers), 1e-10)


@pytest.mark.parametrize("block", [None, 2])
def test_a_row_that_sees_nothing_gives_the_bias_of_out_and_no_gradient(block):
    layer, params, inputs, dy = setting("mask and bias", np.float32, block=block)
    dy = np.zeros_like(dy)
    dy[0, 2], dy[1, 4] = 1, 2  # on the two rows that see nothing
    y, dparams, dinputs = pull(layer, params, inputs, dy)
    np.testing.assert_array_equal(y[0, 2], params["out"]["bias"])
    np.testing.assert_array_equal(y[1, 4], params["out"]["bias"])
    assert np.isfinite(y).all()
    np.testing.assert_array_equal(dparams["out"].pop("bias"), np.full(D, 3))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves((dparams, dinputs)))


@pytest.mark.parametrize("block", [None, 3])
def test_padding_has_no_influence_and_no_gradient(block):
    layer = fn.attention(H, kv_heads=K, block=block)
    x = np.random.default_rng(0).normal(size=(B, S, D)).astype(np.float32)
    params = layer.init(KEY, x)[0]
    padding = (np.arange(S)[None] >= LENGTHS[:, None])[..., None]
    dy = np.where(padding, 0, np.cos(x)).astype(np.float32)
    run = jax.jit(lambda x: pull(layer, params, {"x": x, "lengths": LENGTHS}, dy))
    (y, *gradients), (other, *others) = run(x), run(np.where(padding, np.float32(9), x))
    close(np.where(padding, 0, other), np.where(padding, 0, y), 1e-6)
    close(others, gradients, 1e-6)
    assert not np.where(padding, gradients[1]["x"], 0).any()


def test_dropping_is_fair_and_bwd_drops_what_fwd_dropped(x64):
    layer, params, inputs, dy = setting("cross, shared keys", rate=0.4, block=4)
    plain = layer.apply(params, (), inputs)
    draws = jax.jit(jax.vmap(lambda key: layer.fwd(params, (), inputs, key)[0]))(jax.random.split(KEY, 1000))
    error = (draws.mean(0) - plain) / (draws.std(0) / 1000**0.5)
    assert np.abs(error).max() < 5
    assert not np.array_equal(draws[0], draws[1])

    @jax.jit
    def reference(params, inputs):
        y, vjp = jax.vjp(lambda params, inputs: layer.fwd(params, (), inputs, KEY)[0], params, inputs)
        return y, *vjp(dy)

    close(pull(layer, params, inputs, dy, KEY), reference(params, inputs))


def test_what_rate_drops_is_its_share():
    """With equal weights and values of one, o is the sum of the weights left, times 1 / (1 - rate)."""
    x = jnp.ones((1, 64, 1))
    one, zero = jnp.ones((1, 1)), jnp.zeros((1, 1))
    params = {name: {"kernel": zero if name in ("query", "key") else one} for name in ("query", "key", "value", "out")}
    y = fn.attention(1, rate=0.25, use_bias=False).fwd(params, (), x, KEY)[0]
    kept = np.asarray(y).reshape(-1) * 64 * 0.75
    np.testing.assert_allclose(kept, kept.round(), atol=1e-4)
    assert abs(kept.mean() / 64 - 0.75) < 5 * (0.25 * 0.75) ** 0.5 / 64


@pytest.mark.parametrize(
    "model",
    [
        fn.repeat(fn.skip(fn.attention(2, causal=True, block=2)), 2),
        fn.remat(fn.attention(2, rotary=True)),
        fn.serial(fn.attention(2, kv_heads=1), fn.mixed(fn.attention(2, block=3), "float64", "float64", "float64")),
    ],
    ids=["repeat", "remat", "serial, mixed"],
)
def test_combinators_take_it(model, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 4)))
    params, state = jax.jit(model.init)(KEY, x)

    @jax.jit
    def both(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        y_plain, vjp = jax.vjp(lambda params, x: model.apply(params, state, x), params, x)
        return (y, model.bwd(params, residuals, jnp.cos(y))), (y_plain, vjp(jnp.cos(y)))

    close(*both(params, x))


@pytest.mark.parametrize("contract", [fn.per_example, fn.squared_norm])
def test_contractions_are_those_of_one_examples_own_gradient(contract, x64):
    layer, params, inputs, dy = setting("cross, one head of keys, lengths", block=3)
    own = jax.jit(lambda one, dy: layer.bwd(params, layer.fwd(params, (), one, None)[2], dy)[0])
    examples = [jax.tree.map(lambda a, b=b: a[b : b + 1], (inputs, dy)) for b in range(B)]
    each = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(own(*example) for example in examples))
    norms = jax.tree.map(lambda leaf: jnp.sum(jnp.square(leaf.reshape(B, -1)), 1), each)
    wanted = {"per_example": each, "squared_norm": norms}[contract.name]
    by = jax.jit(
        lambda contract: layer.bwd(params, layer.fwd(params, (), inputs, None)[2], dy, contract)[0], static_argnums=0
    )
    close(by(contract), wanted)
    kept = by(fn.keep)
    assert {name: type(fields["kernel"]) for name, fields in kept.items()} == dict.fromkeys(params, fn.Outer)


@pytest.mark.parametrize("block", [None, 2])
def test_in_half_precision_scores_that_move_together_have_no_gradient(block, x64):
    """A bias of the keys moves all scores of a row alike: its gradient is 0, and rounding is all that is left of it."""
    rng = np.random.default_rng(0)
    layer, x = fn.attention(2, block=block), jnp.asarray(rng.normal(size=(8, 6, 8)), "bfloat16")
    params = jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), layer.init(jax.random.key(0), x)[0])
    dy = jnp.asarray(rng.normal(size=x.shape), x.dtype)
    dparams = pull(layer, params, x, dy)[1]
    size = float(jnp.abs(dparams["key"]["kernel"]).max())
    assert float(jnp.abs(dparams["key"]["bias"]).max()) < 0.002 * size


def test_residuals_are_linear_in_the_positions_and_init_reads_sizes_off_the_input():
    layer, (x, context) = (
        fn.attention(4, kv_heads=2, head_dim=3, features=5),
        (jnp.ones((B, T, D)), jnp.ones((B, S, C))),
    )
    inputs = {"x": x, "context": context}
    init = lambda inputs: jax.eval_shape(layer.init, KEY, inputs)
    params, state = init(jax.tree.map(lambda a: jax.ShapeDtypeStruct(a.shape, jnp.bfloat16), inputs))
    shapes = {"query": (D, 12), "key": (C, 6), "value": (C, 6), "out": (12, 5)}
    assert {name: fields["kernel"].shape for name, fields in params.items()} == shapes
    assert {name: fields["bias"].shape for name, fields in params.items()} == {n: s[1:] for n, s in shapes.items()}
    assert ({leaf.dtype for leaf in jax.tree.leaves(params)}, state) == ({jnp.dtype(jnp.bfloat16)}, ())
    large = fn.attention(16).init(KEY, jnp.ones((1, 1, 256)))[0]
    for fields in large.values():
        np.testing.assert_allclose(fields["kernel"].std(), 1 / 16, rtol=0.03)
    residuals = jax.eval_shape(layer.fwd, init(inputs)[0], (), inputs, None)[2]
    shapes = {"q": (B, 2, 2, T, 3), "k": (B, 2, S, 3), "v": (B, 2, S, 3), "out": (B, T, 12)}
    shapes |= dict.fromkeys(("top", "log_mass"), (B, 2, 2, T, 1))
    assert {name: getattr(residuals, name).shape for name in shapes} == shapes
    assert residuals.key is None


X, CONTEXT = jnp.ones((B, T, D)), jnp.ones((B, S, C))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (jnp.ones((T, D)), "3 axes"),
        (jnp.ones((B, 1, T, D)), "x as sequences"),
        (jnp.ones((B, T, D), jnp.int32), "floating"),
        (jnp.ones((B, 0, D)), "not empty"),
        (jnp.ones((B, T, 2 * D)), r"query: |kernel: float32\[16, 8\]|8 features"),
        (jnp.ones((B, T, D), jnp.bfloat16), "kernel: bfloat16"),
        ({"context": CONTEXT}, "a dict of it as x"),
        ({"x": X, "masks": None}, "a dict of it as x"),
        ({"x": X, "context": CONTEXT[0]}, "3 axes"),
        ({"x": X, "context": CONTEXT[:1]}, "a context with 2 examples"),
        ({"x": X, "context": CONTEXT.astype(jnp.bfloat16)}, "a context with 2 examples of float32"),
        ({"x": X, "mask": jnp.ones((T, T), bool)}, r"a mask of booleans, \[2, 7, 7\] or \[2, 4, 7, 7\]"),
        ({"x": X, "mask": jnp.ones((B, 1, T, T), bool)}, "a mask of booleans"),
        ({"x": X, "mask": jnp.ones((B, T, T), jnp.int32)}, "a mask of booleans"),
        ({"x": X, "bias": jnp.ones((B, T, S))}, r"a bias of float32, \[2, 7, 7\]"),
        ({"x": X, "bias": jnp.ones((B, T, T), bool)}, "a bias of float32"),
        ({"x": X, "bias": None}, "a bias of float32"),
        ({"x": X, "lengths": LENGTHS[:1]}, "integers from 0 to 7, one for each of 2"),
        ({"x": X, "lengths": LENGTHS + 5}, "from 8 to 10"),
        ({"x": X, "context": CONTEXT, "lengths": LENGTHS + 1}, "from 0 to 5"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    params = fn.attention(H).init(KEY, X)[0]
    with pytest.raises(fn.InputError, match=message):
        fn.attention(H, head_dim=2).apply(params, (), inputs)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"heads": 0}, "heads as a positive"),
        ({"heads": 4, "kv_heads": 3}, "heads that 3 kv_heads divide"),
        ({"heads": 4, "kv_heads": 0}, "kv_heads as a positive"),
        ({"heads": 4, "head_dim": 0}, "head_dim as a positive"),
        ({"heads": 4, "window": 0}, "window as a positive"),
        ({"heads": 4, "features": 0}, "features as a positive"),
        ({"heads": 4, "block": 0}, "block as a positive"),
        ({"heads": 4, "rate": 1.0}, "rate"),
    ],
)
def test_options_that_make_no_sense_are_refused(options, message):
    with pytest.raises(fn.InputError, match=message):
        fn.attention(**options)


def test_a_missing_key_uneven_heads_and_what_does_not_belong_are_refused():
    params = fn.attention(H).init(KEY, X)[0]
    with pytest.raises(fn.InputError, match="a random key") as caught:
        fn.attention(H, rate=0.1).fwd(params, (), X, None)
    assert str(caught.value).startswith("attention")
    with pytest.raises(fn.InputError, match="features that 3 heads divide"):
        fn.attention(3).init(KEY, X)
    with pytest.raises(fn.InputError, match="even number of features"):
        fn.attention(8, rotary=True).apply(fn.attention(8).init(KEY, X)[0], (), X)
    with pytest.raises(fn.InputError, match="params for the layers"):
        fn.attention(H).apply({"query": params["query"]}, (), X)
    residuals = fn.attention(H).fwd(params, (), X, None)[2]
    with pytest.raises(fn.InputError, match=r"float32\[2, 7, 8\]"):
        fn.attention(H).bwd(params, residuals, X[:, 1:])
