"""rnn, gru, lstm: against a loop in NumPy and against PyTorch; lengths, direction, states, and what they refuse."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn
from funcnet._internal.casting import cast

S = jax.ShapeDtypeStruct
KEY = jax.random.key(0)
LAYERS = {"rnn": fn.rnn, "gru": fn.gru, "lstm": fn.lstm}
BLOCKS = {"rnn": 1, "gru": 3, "lstm": 4}
ALL = pytest.mark.parametrize("name", LAYERS)
BOTH_WAYS = pytest.mark.parametrize("reverse", [False, True])
B, T, D, H = 3, 5, 4, 2
LENGTHS = np.array([5, 2, 3], np.int32)


def params_of(name, inputs=D, features=H, dtype=np.float64, seed=0):
    rng, n = np.random.default_rng(seed), BLOCKS[name]
    shapes = {"kernel": (inputs, n * features), "recurrent_kernel": (features, n * features), "bias": (n * features,)}
    if name == "gru":
        shapes["recurrent_bias"] = (features,)
    return {k: jnp.asarray(rng.normal(size=shape).astype(dtype)) for k, shape in shapes.items()}


def inputs_of(name, seed=1, dtype=np.float64):
    """x, initial states and the cotangents of y and of the final states."""
    draw = lambda *shape: jnp.asarray(rng.normal(size=shape).astype(dtype))
    rng = np.random.default_rng(seed)
    states = lambda: (draw(B, H), draw(B, H)) if name == "lstm" else draw(B, H)
    return draw(B, T, D), states(), (draw(B, T, H), states())


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def numpy_step(name, p, x, states):
    """One step of one example."""
    a, u, h = x @ p["kernel"] + p["bias"], states[0] @ p["recurrent_kernel"], states[0]
    if name == "rnn":
        return (np.tanh(a + u),)
    if name == "gru":
        r, z = sigmoid(a[:H] + u[:H]), sigmoid(a[H : 2 * H] + u[H : 2 * H])
        n = np.tanh(a[2 * H :] + r * (u[2 * H :] + p["recurrent_bias"]))
        return ((1 - z) * n + z * h,)
    i, f, g, o = np.split(a + u, 4)
    c = sigmoid(f) * states[1] + sigmoid(i) * np.tanh(g)
    return sigmoid(o) * np.tanh(c), c


def numpy_loop(name, params, x, states, lengths, reverse):
    """y and the final states, an example and a step at a time."""
    p = {k: np.asarray(v) for k, v in params.items()}
    y, final = np.zeros((B, T, H)), []
    for b in range(B):
        state = tuple(np.asarray(leaf)[b] for leaf in jax.tree.leaves(states))
        steps = range(lengths[b])
        for t in reversed(steps) if reverse else steps:
            state = numpy_step(name, p, np.asarray(x)[b, t], state)
            y[b, t] = state[0]
        final.append(state)
    return y, tuple(np.stack(leaf) for leaf in zip(*final, strict=True))


def close(got, wanted, rtol=1e-10):
    """Every leaf, to a share of its largest element."""
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        np.testing.assert_allclose(a, b, rtol=0, atol=rtol * max(np.abs(b).max(), 1e-3))


def pull(layer, params, inputs, dy):
    """(y, dparams, dx), compiled."""

    def run(params, inputs, dy):
        y, _, residuals = layer.fwd(params, (), inputs, None)
        return y, *layer.bwd(params, residuals, dy)

    return jax.jit(run)(params, inputs, dy)


@ALL
@BOTH_WAYS
def test_the_output_is_that_of_a_loop(name, reverse, x64):
    params, (x, state, _) = params_of(name), inputs_of(name)
    layer, zeros = LAYERS[name](H, reverse=reverse, return_state=True), jax.tree.map(jnp.zeros_like, state)
    inputs = {"x": x, "lengths": LENGTHS, "state": state}
    alone, ragged = jax.jit(lambda x, inputs: (layer.apply(params, (), x), layer.apply(params, (), inputs)))(x, inputs)
    close(alone, numpy_loop(name, params, x, zeros, np.full(B, T), reverse))
    close(ragged, numpy_loop(name, params, x, state, LENGTHS, reverse))


def torch_layer(torch, name, params, dtype, bidirectional=False):
    """PyTorch's layer with our params, or with a pair of them; its recurrent biases 0 but the gru's for n."""
    make = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU, "lstm": torch.nn.LSTM}[name]
    layer = make(D, H, batch_first=True, bidirectional=bidirectional, dtype=dtype)
    tensor = lambda a: torch.nn.Parameter(torch.from_numpy(np.array(a)))
    for suffix, p in zip(("", "_reverse"), params if bidirectional else (params,), strict=False):
        recurrent_bias = np.zeros_like(p["bias"])
        if name == "gru":
            recurrent_bias[2 * H :] = p["recurrent_bias"]
        setattr(layer, f"weight_ih_l0{suffix}", tensor(p["kernel"].T))
        setattr(layer, f"weight_hh_l0{suffix}", tensor(p["recurrent_kernel"].T))
        setattr(layer, f"bias_ih_l0{suffix}", tensor(p["bias"]))
        setattr(layer, f"bias_hh_l0{suffix}", tensor(recurrent_bias))
    return layer


def torch_grads(name, layer, suffix="l0"):
    weight = lambda kind: getattr(layer, f"{kind}_{suffix}").grad.numpy()
    grads = {"kernel": weight("weight_ih").T, "recurrent_kernel": weight("weight_hh").T, "bias": weight("bias_ih")}
    return grads | ({"recurrent_bias": weight("bias_hh")[2 * H :]} if name == "gru" else {})


def torch_pull(torch, layer, x, state, dy, lengths=None):
    """(y, final state), then the cotangents of x and of the initial state; those of the weights are left on them."""
    tensor = lambda a: torch.from_numpy(np.array(a)).requires_grad_()
    x, state = tensor(x), jax.tree.map(tensor, state)
    inputs = x
    if lengths is not None:
        pack = torch.nn.utils.rnn.pack_padded_sequence
        inputs = pack(x, torch.from_numpy(np.array(lengths, np.int64)), batch_first=True, enforce_sorted=False)
    y, final = layer(inputs, state)
    if lengths is not None:
        y, _ = torch.nn.utils.rnn.pad_packed_sequence(y, batch_first=True, total_length=T)
    torch.autograd.backward((y, *jax.tree.leaves(final)), [torch.from_numpy(np.array(d)) for d in jax.tree.leaves(dy)])
    host = lambda tree: jax.tree.map(lambda a: a.detach().numpy(), tree)
    return host((y, final)), x.grad.numpy(), jax.tree.map(lambda a: a.grad.numpy(), state)


@ALL
@pytest.mark.parametrize(
    ("dtype", "lengths"),
    [("float64", None), ("float64", LENGTHS), ("float32", LENGTHS)],
    ids=["float64", "float64, lengths", "float32, lengths"],
)
def test_outputs_and_gradients_are_pytorchs(name, dtype, lengths):
    torch = pytest.importorskip("torch")
    with jax.enable_x64(dtype == "float64"):
        params, (x, state, dy) = params_of(name, dtype=dtype), inputs_of(name, dtype=dtype)
        inputs = {"x": x, "state": state} | ({} if lengths is None else {"lengths": lengths})
        y, dparams, dx = pull(LAYERS[name](H, return_state=True), params, inputs, dy)
        theirs = torch_layer(torch, name, params, getattr(torch, dtype))
        one_layer = lambda tree: jax.tree.map(lambda a: a[None], tree)
        wanted_y, wanted_dx, wanted_dstate = torch_pull(
            torch, theirs, x, one_layer(state), (dy[0], one_layer(dy[1])), lengths
        )
        rtol = 1e-10 if dtype == "float64" else 1e-5
        close(y, (wanted_y[0], jax.tree.map(lambda a: a[0], wanted_y[1])), rtol)
        close(dparams, torch_grads(name, theirs), rtol)
        close((dx["x"], dx["state"]), (wanted_dx, jax.tree.map(lambda a: a[0], wanted_dstate)), rtol)


@ALL
@BOTH_WAYS
def test_padding_has_no_influence_and_no_gradient(name, reverse):
    params, (x, state, dy) = params_of(name, dtype=np.float32), inputs_of(name, dtype=np.float32)
    layer = LAYERS[name](H, reverse=reverse, return_state=True)
    padding = np.arange(T)[None] >= LENGTHS[:, None]
    run = jax.jit(lambda x, dy: pull(layer, params, {"x": x, "lengths": LENGTHS, "state": state}, dy))
    y, dparams, dx = run(x, dy)
    other = run(jnp.where(padding[..., None], jnp.nan, x), (jnp.where(padding[..., None], jnp.nan, dy[0]), dy[1]))
    close(other, (y, dparams, dx), 1e-6)
    assert not np.asarray(y[0])[padding].any()
    assert not np.asarray(dx["x"])[padding].any()


@ALL
def test_an_empty_sequence_hands_its_state_on(name):
    params, (x, state, dy) = params_of(name, dtype=np.float32), inputs_of(name, dtype=np.float32)
    inputs = {"x": x, "lengths": np.zeros(B, np.int8), "state": state}
    y, dparams, dx = pull(LAYERS[name](H, return_state=True), params, inputs, dy)
    close(y, (np.zeros((B, T, H)), state))
    close(dx["state"], dy[1])
    assert not any(leaf.any() for leaf in jax.tree.leaves((dparams, dx["x"])))


@ALL
@BOTH_WAYS
def test_a_sequence_in_two_pieces_is_the_whole(name, reverse, x64):
    params, (x, state, _) = params_of(name), inputs_of(name)
    run = lambda x, state: LAYERS[name](H, reverse=reverse, return_state=True).apply(
        params, (), {"x": x, "state": state}
    )
    pieces = [x[:, :1], x[:, 1:]]
    ys = []
    final = state
    for piece in reversed(pieces) if reverse else pieces:
        y, final = run(piece, final)
        ys.append(y)
    close((jnp.concatenate(ys[::-1] if reverse else ys, 1), final), run(x, state))


@ALL
def test_gradients_with_one_step_and_under_vmap_are_autodiffs(name, x64):
    params, (x, state, dy) = params_of(name), inputs_of(name)
    layer = LAYERS[name](H, reverse=True, return_state=True)

    @jax.jit
    def gradients(x, dy):
        inputs = {"x": x, "state": state}
        return layer.bwd(params, layer.fwd(params, (), inputs, None)[2], dy)

    @jax.jit
    def reference(x, dy):
        return jax.vjp(lambda p, inputs: layer.apply(p, (), inputs), params, {"x": x, "state": state})[1](dy)

    one, dy_one = x[:, :1], (dy[0][:, :1], dy[1])
    mapped = jax.vmap(lambda x: gradients(x, dy_one))(jnp.stack([one, 2 * one]))
    close(gradients(one, dy_one), reference(one, dy_one))
    close(jax.tree.map(lambda leaf: leaf[1], mapped), reference(2 * one, dy_one))


@pytest.mark.parametrize(
    "model",
    [
        fn.repeat(fn.lstm(3), 2),
        fn.serial(fn.rnn(3), fn.bidirectional(fn.remat(fn.gru(2)), fn.gru(2, reverse=True))),
    ],
    ids=["repeat", "serial, bidirectional, remat"],
)
def test_combinators_take_them(model, x64):
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 3)))
    params, state = jax.jit(model.init)(KEY, x)

    @jax.jit
    def both(params, x):
        y, _, residuals = model.fwd(params, state, x, None)
        y_plain, vjp = jax.vjp(lambda params, x: model.apply(params, state, x), params, x)
        return (y, model.bwd(params, residuals, jnp.cos(y))), (y_plain, vjp(jnp.cos(y)))

    close(*both(params, x))


@ALL
def test_init_reads_size_and_dtype_off_the_input(name):
    layer, n = LAYERS[name](H), BLOCKS[name]
    for dtype in (jnp.float32, jnp.bfloat16):
        params, state = jax.eval_shape(lambda dtype=dtype: layer.init(KEY, S((B, T, D), dtype)))
        assert state == ()
        assert {k: v.shape for k, v in params.items()} == {k: v.shape for k, v in params_of(name).items()}
        assert {v.dtype for v in params.values()} == {jnp.dtype(dtype)}
    wide = jax.jit(LAYERS[name](64).init)(KEY, {"x": jnp.ones((1, 1, 256))})[0]
    np.testing.assert_allclose(wide["kernel"].std(), 1 / 16, rtol=0.05)
    for block in np.split(np.asarray(wide["recurrent_kernel"]), n, axis=1):
        np.testing.assert_allclose(block.T @ block, np.eye(64), atol=1e-5)
    forget = np.repeat([0.0, 1, 0, 0], 64) if name == "lstm" else np.zeros(64 * n)
    np.testing.assert_array_equal(wide["bias"], forget)


@ALL
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_parameter_gradients_are_summed_in_float32(name, dtype):
    """A weight gradient of 4096 equal terms: float16 counts to 2048 by ones, bfloat16 to 256."""
    params = jax.tree.map(lambda leaf: jnp.zeros_like(leaf, dtype), params_of(name, 1, 1, np.float32))
    ones = jnp.ones((4096, 1, 1), dtype)
    dparams = pull(LAYERS[name](1), params, ones, ones)[1]
    slope = {"rnn": [4096], "gru": [0, 0, 2048], "lstm": [0, 0, 1024, 0]}[name]  # the gates are 1/2
    assert dparams["kernel"].dtype == dtype
    np.testing.assert_array_equal(dparams["bias"].astype(jnp.float32), slope)
    np.testing.assert_array_equal(dparams["kernel"].astype(jnp.float32), [slope])


@pytest.mark.parametrize(("dtype", "kept", "of_rnn"), [("float32", "gates", 0), ("bfloat16", "entering", H)])
def test_residuals_are_the_input_the_output_and_the_gates_or_what_enters_them(dtype, kept, of_rnn):
    for name, steps in {"rnn": {kept: of_rnn}, "gru": {kept: 4 * H}, "lstm": {kept: 4 * H, "c_prev": H}}.items():
        saved = LAYERS[name](H).fwd(cast(params_of(name), dtype), (), jnp.ones((B, T, D), dtype), None)[2]
        wanted = {name: ((T, B, width), dtype) for name, width in steps.items() if width}
        assert {name: (v.shape, v.dtype) for name, v in saved.steps.items()} == wanted
        assert (saved.inputs.shape, saved.y.shape) == ((B, T, D), (B, T, H))


@ALL
def test_in_half_precision_a_saturated_gate_keeps_its_gradient(name, x64):
    """Every gate is within 0.003 of an end of its range, where bfloat16 has no more than two or three numbers."""
    layer, params = LAYERS[name](1), cast(params_of(name, 1, 1, seed=5), "bfloat16")
    ends = {"rnn": [3.5], "gru": [6.5, -6.5, 3.5], "lstm": [6.5, 6.5, -3.5, -6.5]}[name]
    params["bias"] = jnp.asarray(ends, "bfloat16")
    x, dy = jnp.full((1, 1, 1), 0.25, "bfloat16"), jnp.ones((1, 1, 1), "bfloat16")
    state = jnp.full((1, 1), 0.5, "bfloat16")
    inputs = {"x": x, "state": (state, state) if name == "lstm" else state}
    got = pull(layer, params, inputs, dy)[1]["bias"]
    exact = jax.vjp(lambda p: layer.apply(p, (), cast(inputs, "float64")), cast(params, "float64"))[1]
    wanted = exact(dy.astype("float64"))[0]["bias"]
    np.testing.assert_allclose(got.astype("float32"), wanted, rtol=0.04)


X, STATE = jnp.ones((B, T, D)), jnp.ones((B, H))


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        (jnp.ones((T, D)), "3 axes"),
        (jnp.ones((B, 1, T, D)), "sequences"),
        (jnp.ones((B, T, D), jnp.int32), "floating"),
        (jnp.ones((B, 0, D)), "not empty"),
        (jnp.ones((B, T, D + 1)), "4 features"),
        (jnp.ones((B, T, D), jnp.bfloat16), "kernel: bfloat16"),
        ({"lengths": LENGTHS}, "a dict of it as x"),
        ({"x": X, "length": LENGTHS}, "a dict of it as x"),
        ({"x": X, "lengths": LENGTHS[:2]}, "integers from 0 to 5, one for each of 3"),
        ({"x": X, "lengths": LENGTHS.astype(np.float32)}, "lengths as integers"),
        ({"x": X, "lengths": LENGTHS + 1}, "from 3 to 6"),
        ({"x": X, "lengths": LENGTHS - 3}, "from -1 to 2"),
        ({"x": X, "state": STATE}, "initial state"),
        ({"x": X, "state": (STATE, STATE[:, :1])}, "initial state"),
        ({"x": X, "state": (STATE, STATE.astype(jnp.bfloat16))}, "initial state"),
        ({"x": X, "state": None}, "initial state"),
    ],
)
def test_inputs_that_do_not_fit_are_refused(inputs, message):
    with pytest.raises(fn.InputError, match=message):
        fn.lstm(H).apply(params_of("lstm", dtype=np.float32), (), inputs)


@pytest.mark.parametrize("dy", [jnp.ones((B, T, H + 1)), jnp.ones((B, T, H)), (jnp.ones((B, T, H)), STATE)])
def test_cotangents_that_do_not_fit_are_refused(dy):
    params = params_of("lstm", dtype=np.float32)
    layer = fn.lstm(H, return_state=True)
    with pytest.raises(fn.InputError, match=r"cotangents? like the output"):
        layer.bwd(params, layer.fwd(params, (), X, None)[2], dy)


def test_params_of_another_layer_and_no_features_are_refused():
    with pytest.raises(fn.InputError, match=r"recurrent_kernel: float32\[2, 8\]"):
        fn.lstm(H).apply(params_of("gru", dtype=np.float32), (), X)
    with pytest.raises(fn.InputError, match="features as a positive whole number"):
        fn.gru(0)
