"""CTC against a sum over all alignments, optax and PyTorch; lengths, repeats, no labels, too few steps."""

from itertools import groupby, product

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy.special

import funcnet as fn

RNG = np.random.default_rng(0)
B, T, V, N = 6, 7, 5, 3
LOGITS = 2 * RNG.normal(size=(B, T, V))
TARGET = {
    "labels": np.array([[1, 2, 3], [1, 1, 1], [4, 2, 0], [2, 0, 0], [0, 0, 0], [3, 3, 4]], np.int32),
    "label_lengths": np.array([3, 3, 2, 1, 0, 3], np.int32),
    "logit_lengths": np.array([7, 5, 4, 1, 6, 7], np.int32),
}
WEIGHTS = np.linspace(-1.0, 2.0, B)


@jax.jit
def pull(logits, target, dy):
    """(values, dlogits) of ctc with blank 0."""
    values, _, residuals = fn.ctc().fwd({}, (), (logits, target), None)
    dparams, (dlogits, dtarget) = fn.ctc().bwd({}, residuals, dy)
    assert (dparams, dtarget) == ({}, dict.fromkeys(target))
    return values, dlogits


def by_alignments(logits, labels, blank=0):
    """-log of the sum over all alignments of one example, one by one."""
    log_p = scipy.special.log_softmax(logits, axis=-1)
    reads = lambda path: [v for v, _ in groupby(path) if v != blank]
    paths = (path for path in product(range(logits.shape[1]), repeat=len(logits)) if reads(path) == list(labels))
    return -scipy.special.logsumexp([sum(log_p[t, v] for t, v in enumerate(path)) for path in paths])


def test_values_are_those_of_all_alignments_one_by_one(x64):
    target = TARGET | {"logit_lengths": np.minimum(TARGET["logit_lengths"], 5).astype(np.int32)}
    values, _ = pull(LOGITS, target, WEIGHTS)
    each = zip(LOGITS, *target.values(), strict=True)
    np.testing.assert_allclose(values, [by_alignments(z[:t], labels[:n]) for z, labels, n, t in each], rtol=1e-12)


def test_another_class_can_be_the_blank(x64):
    target = {"labels": np.array([[0, 0]]), "label_lengths": np.array([2]), "logit_lengths": np.array([4])}
    value = fn.ctc(blank=2).apply({}, (), (LOGITS[:1, :4, :3], target))
    np.testing.assert_allclose(value, [by_alignments(LOGITS[0, :4, :3], [0, 0], blank=2)], rtol=1e-12)


def test_values_and_gradients_are_those_of_pytorch(x64):
    torch = pytest.importorskip("torch")
    z = torch.tensor(LOGITS, requires_grad=True)
    labels, n, t = (torch.tensor(a, dtype=torch.int64) for a in TARGET.values())
    log_p = torch.log_softmax(z, -1).transpose(0, 1)
    wanted = torch.nn.functional.ctc_loss(log_p, labels, t, n, reduction="none")
    wanted.backward(torch.tensor(WEIGHTS))
    values, dz = pull(LOGITS, TARGET, WEIGHTS)
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-10)
    np.testing.assert_allclose(dz, z.grad.numpy(), rtol=1e-10, atol=1e-12)


def test_values_and_gradients_are_those_of_optax(x64, standard_promotion):
    """To what is left of optax's -1e5 in place of -inf."""
    labels, n, t = TARGET.values()
    paddings = [np.float64(np.arange(size)[None] >= lengths[:, None]) for size, lengths in ((T, t), (N, n))]
    wanted, pullback = jax.vjp(lambda z: optax.ctc_loss(z, paddings[0], labels, paddings[1]), jnp.asarray(LOGITS))
    values, dz = pull(LOGITS, TARGET, WEIGHTS)
    np.testing.assert_allclose(values, wanted, rtol=1e-8)
    np.testing.assert_allclose(dz, pullback(jnp.asarray(WEIGHTS))[0], rtol=1e-7, atol=1e-9)


def test_what_is_behind_the_lengths_has_no_part_in_it(x64):
    behind = np.arange(T)[None] >= TARGET["logit_lengths"][:, None]
    logits = np.where(behind[..., None], np.nan, LOGITS)
    labels = np.where(np.arange(N)[None] >= TARGET["label_lengths"][:, None], -7, TARGET["labels"])
    got, wanted = pull(logits, TARGET | {"labels": labels}, WEIGHTS), pull(LOGITS, TARGET, WEIGHTS)
    np.testing.assert_array_equal(got[0], wanted[0])
    np.testing.assert_array_equal(got[1], wanted[1])
    assert not np.any(got[1][behind])


def test_no_steps_and_no_labels_are_certain():
    target = {
        "labels": np.zeros((2, 0), np.int32),
        "label_lengths": np.zeros(2, np.int32),
        "logit_lengths": np.array([0, 3]),
    }
    values, dz = pull(np.float32(LOGITS[:2]), target, np.ones(2, np.float32))
    assert values[0] == 0
    np.testing.assert_allclose(values[1], -scipy.special.log_softmax(LOGITS[1], -1)[:3, 0].sum(), rtol=1e-5)
    assert not np.any(dz[0])


@pytest.mark.parametrize(("steps", "possible"), [(4, False), (5, True)])
def test_too_few_steps_are_infinitely_unlikely_with_gradient_0_and_refused_where_seen(steps, possible):
    """Three equal labels want two blanks between them."""
    target = jax.tree.map(lambda a: a[1:3].copy(), TARGET)
    target["logit_lengths"][0] = steps
    logits = np.float32(LOGITS[1:3])
    values, dz = pull(logits, target, np.ones(2, np.float32))
    assert np.isfinite(values[0]) == np.any(dz[0]) == possible
    assert values[0] > 0
    assert np.isfinite(dz).all()
    if not possible:
        with pytest.raises(fn.InputError, match="4 steps for 3 labels with 2 repeats, at index 0"):
            fn.ctc().check(logits, target)


def sure(confidence, offset=0.0, steps=60):
    """Models that are right with this confidence: 40 examples of 6 labels, each at steps of its own."""
    rng = np.random.default_rng(1)
    logits, labels = rng.normal(size=(40, steps, V)), rng.integers(1, V, (40, 6)).astype(np.int32)
    path = np.zeros((40, steps), int)
    for row, own in zip(path, labels, strict=True):
        row[np.sort(rng.choice(np.arange(1, steps, 2), 6, replace=False))] = own
    logits += confidence * np.eye(V)[path]
    lengths = np.full(40, 6, np.int32), np.full(40, steps, np.int32)
    return np.float32(logits + offset), dict(zip(TARGET, (labels, *lengths), strict=True))


@pytest.mark.parametrize("offset", [0.0, 1024.0, -16384.0])
@pytest.mark.parametrize("confidence", [2, 15, 20, 25, 40])
def test_losses_of_sure_and_right_models_keep_their_digits_and_are_never_negative(confidence, offset):
    """In float32 against float64 of the same logits; a loss of 1e-15 has its digits too."""
    logits, target = sure(confidence, offset)
    values, dz = pull(logits, target, np.ones(40, np.float32))
    with jax.enable_x64(True):
        wanted, wanted_dz = pull(logits.astype(np.float64), target, np.ones(40))
    assert np.all(values >= 0)
    np.testing.assert_allclose(values, wanted, rtol=2e-6)
    np.testing.assert_allclose(dz, wanted_dz, atol=4e-6 if confidence == 2 else 3e-7)


def test_a_label_that_is_sure_at_several_steps_is_no_more_than_sure():
    """Blank or the same label again, at a chance of its own: the alignments' shares sum to one, to rounding."""
    rng = np.random.default_rng(0)
    logits, labels = np.full((40, 12, 5, V), -40.0), 1 + np.arange(12) % (V - 1)
    logits[:, :, [0, 3, 4], 0] = 0
    chance = rng.uniform(0.1, 0.9, (40, 12))
    at = np.arange(12)
    logits[:, at, 1, labels] = 0
    logits[:, at, 2, labels], logits[:, :, 2, 0] = np.log(chance), np.log1p(-chance)
    full = lambda n: np.full(40, n, np.int32)
    target = dict(zip(TARGET, (np.tile(np.int32(labels), (40, 1)), full(12), full(60)), strict=True))
    values, _ = pull(np.float32(logits.reshape(40, 60, V)), target, np.ones(40, np.float32))
    assert np.all(values >= 0)
    np.testing.assert_allclose(values, 0, atol=3e-7)


def test_zero_infinity_is_that_of_pytorch(x64):
    """Values, gradients, and the mean over the examples, in which those of too few steps count."""
    torch = pytest.importorskip("torch")
    target = TARGET | {"logit_lengths": np.array([7, 4, 4, 1, 6, 3], np.int32)}  # two have too few
    z = torch.tensor(LOGITS, requires_grad=True)
    labels, n, t = (torch.tensor(a, dtype=torch.int64) for a in target.values())
    log_p = torch.log_softmax(z, -1).transpose(0, 1)
    wanted = torch.nn.functional.ctc_loss(log_p, labels, t, n, reduction="none", zero_infinity=True)
    loss = fn.ctc(zero_infinity=True)
    loss.check(LOGITS, target)
    values, _, residuals = loss.fwd({}, (), (LOGITS, target), None)
    np.testing.assert_allclose(values, wanted.detach().numpy(), rtol=1e-10)
    assert np.count_nonzero(values) == 4
    wanted.backward(torch.tensor(WEIGHTS))
    np.testing.assert_allclose(loss.bwd({}, residuals, WEIGHTS)[1][0], z.grad.numpy(), rtol=1e-10, atol=1e-12)
    objective = fn.objective(fn.identity(), loss)
    params, state = objective.init(jax.random.key(0), (LOGITS, target))
    (mean, _), _ = jax.jit(fn.value_and_grad(objective))(params, state, (LOGITS, target))
    np.testing.assert_allclose(mean, wanted.detach().numpy().mean(), rtol=1e-10)
    np.testing.assert_allclose(fn.evaluate(objective, params, state, [(LOGITS, target)])["loss"], mean, rtol=1e-10)
    with pytest.raises(fn.InputError, match="label 5 at index"):
        loss.check(LOGITS, target | {"labels": np.full_like(target["labels"], 5)})


@pytest.mark.parametrize("blank", [np.int64(2), np.uint8(2), jnp.int32(2)])
def test_a_blank_of_any_integer_kind(blank):
    target = {"labels": np.array([[0, 0]]), "label_lengths": np.array([2]), "logit_lengths": np.array([4])}
    pair = np.float32(LOGITS[:1, :4, :3]), target
    np.testing.assert_array_equal(fn.ctc(blank=blank).apply({}, (), pair), fn.ctc(blank=2).apply({}, (), pair))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.array([[1, 2, 5]])}, "label 5 at index"),
        ({"labels": np.array([[1, 0, 3]])}, "label 0 at index"),
        ({"labels": np.array([[1, -1, 3]])}, "label -1 at index"),
        ({"label_lengths": np.array([4])}, "label_lengths from 0 to 3"),
        ({"label_lengths": np.array([-1])}, "label_lengths from 0 to 3"),
        ({"logit_lengths": np.array([8])}, "logit_lengths from 0 to 7"),
        ({"logit_lengths": np.array([-1])}, "logit_lengths from 0 to 7"),
    ],
)
def test_what_is_out_of_range_is_refused_where_it_can_be_read_and_nan_elsewhere(change, message):
    logits, target = np.float32(LOGITS[:1]), jax.tree.map(lambda a: a[:1], TARGET) | change
    with pytest.raises(fn.InputError, match=message):
        fn.ctc().fwd({}, (), (logits, target), None)
    values, dz = pull(logits, target, np.ones(1, np.float32))
    assert np.isnan(values).all()
    assert np.isnan(dz).all()


@pytest.mark.parametrize(
    ("logits", "target", "message"),
    [
        (LOGITS[0], TARGET, "3 axes"),
        (LOGITS[None], TARGET, "three axes"),
        (LOGITS[..., :0], TARGET, "empty"),
        (LOGITS.astype(int), TARGET, "floating"),
        (LOGITS, TARGET["labels"], "a target"),
        (LOGITS, {"labels": TARGET["labels"]}, "give all three"),
        (LOGITS, TARGET | {"labels": TARGET["labels"][:, 0]}, "labels: int32"),
        (LOGITS, TARGET | {"labels": np.float32(TARGET["labels"])}, "labels: float32"),
        (LOGITS, TARGET | {"logit_lengths": TARGET["logit_lengths"][:3]}, "logit_lengths: int32"),
        (LOGITS, TARGET | {"label_lengths": 3}, "label_lengths: int"),
    ],
)
def test_logits_and_targets_that_do_not_fit_are_refused(logits, target, message):
    with pytest.raises(fn.InputError, match=message):
        fn.ctc().check(logits, target)


@pytest.mark.parametrize("blank", [-1, 1.0, True, None])
def test_a_blank_that_is_no_class_is_refused(blank):
    with pytest.raises(fn.InputError, match="blank"):
        fn.ctc(blank=blank)
    with pytest.raises(fn.InputError, match="a class 5"):
        fn.ctc(blank=5).check(LOGITS, TARGET)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_logits_give_float32_values_and_half_precision_gradients(dtype):
    logits, weights = jnp.asarray(LOGITS, dtype), np.float32(WEIGHTS)
    values, dz = pull(logits, TARGET, weights)
    wanted, wanted_dz = pull(logits.astype(jnp.float32), TARGET, weights)
    assert (values.dtype, dz.dtype) == (jnp.float32, dtype)
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_allclose(dz.astype(jnp.float32), wanted_dz, rtol=float(jnp.finfo(dtype).eps), atol=1e-6)


def test_long_sequences_do_not_underflow():
    """The likelihood is about e^-9000."""
    logits = np.float32(10 * RNG.normal(size=(1, 800, 30)))
    labels = RNG.integers(1, 30, (1, 300)).astype(np.int32)
    target = {"labels": labels, "label_lengths": np.array([300]), "logit_lengths": np.array([800])}
    values, dz = pull(logits, target, np.ones(1, np.float32))
    assert 1000 < values[0] < np.inf
    np.testing.assert_allclose(np.sum(dz, -1), 0, atol=1e-5)  # at each step the shares of the classes sum to one
    assert np.abs(dz).max() > 0.5


def test_an_objective_trains_with_it(standard_promotion):
    objective = fn.objective(fn.dense(V), fn.ctc())
    optimizer = optax.adam(0.1)
    batch = np.float32(LOGITS), TARGET
    state = fn.init_train_state(objective, optimizer, jax.random.key(0), batch)
    state, first = (step := fn.train_step(objective, optimizer))(state, batch)
    for _ in range(5):
        state, metrics = step(state, batch)
    assert metrics["loss"] < first["loss"]
    np.testing.assert_allclose(
        fn.evaluate(objective, state.params, state.state, [batch])["loss"], metrics["loss"], rtol=0.2
    )
