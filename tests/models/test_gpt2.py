"""A model of GPT-2's shape beside `transformers`' own, with the same random weights: logits, loss, every gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import funcnet as fn

V, D, HEADS, LAYERS, B, T = 19, 12, 3, 2, 2, 7


def gpt2(dtype):
    """The head is a layer of its own: its kernel is the transposed table, and both gradients add."""
    block = fn.transformer_block(
        D, HEADS, causal=True, norm=lambda: fn.layer_norm(eps=1e-5), activation=fn.gelu(approximate=True)
    )
    return fn.serial(
        wte=fn.embedding(V, D, dtype=dtype),
        wpe=fn.position_embedding(T + 2),
        **{f"h_{i}": block for i in range(LAYERS)},
        ln_f=fn.layer_norm(eps=1e-5),
        head=fn.dense(V, use_bias=False),
    )


def norm(t, name):
    return {"scale": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def linear(t, name):
    return {"kernel": t[f"{name}.weight"], "bias": t[f"{name}.bias"]}


def block_params(t, name):
    """transformers packs query, key and value into one kernel."""
    packed = {field: np.split(a, 3, axis=-1) for field, a in linear(t, f"{name}.attn.c_attn").items()}
    three = {part: {f: a[i] for f, a in packed.items()} for i, part in enumerate(("query", "key", "value"))}
    attention = three | {"out": linear(t, f"{name}.attn.c_proj")}
    mlp = {"hidden": linear(t, f"{name}.mlp.c_fc"), "activation": {}, "out": linear(t, f"{name}.mlp.c_proj")}
    return {
        "attention": {"norm": norm(t, f"{name}.ln_1"), "attention": attention},
        "mlp": {"norm": norm(t, f"{name}.ln_2"), "mlp": mlp},
    }


def params_of(t):
    """Ours from {name there: array}; the head is left out."""
    blocks = {f"h_{i}": block_params(t, f"transformer.h.{i}") for i in range(LAYERS)}
    tables = {name: {"embedding": t[f"transformer.{name}.weight"]} for name in ("wte", "wpe")}
    return tables | blocks | {"ln_f": norm(t, "transformer.ln_f")}


@pytest.mark.parametrize(("dtype", "rtol"), [("float64", 1e-9), ("float32", 1e-4)])
def test_logits_loss_and_every_gradient_are_those_of_transformers(dtype, rtol):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    sizes = {"vocab_size": V, "n_positions": T + 2, "n_embd": D, "n_layer": LAYERS, "n_head": HEADS}
    config = transformers.GPT2Config(**sizes, attn_implementation="eager", bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    theirs = transformers.GPT2LMHeadModel(config).to(getattr(torch, dtype)).eval()
    rng = np.random.default_rng(0)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter += torch.from_numpy(rng.normal(0, 0.3, parameter.shape)).to(parameter.dtype)
    ids, targets = rng.integers(0, V, (2, B, T))
    logits = theirs(torch.from_numpy(ids)).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.from_numpy(targets).flatten())
    loss.backward()
    arrays = lambda get: {name: get(p).numpy() for name, p in theirs.named_parameters()}
    wanted = params_of(arrays(lambda p: p.grad))

    with jax.enable_x64(dtype == "float64"):
        params = jax.tree.map(jnp.asarray, params_of(arrays(lambda p: p.detach())))
        params["head"] = {"kernel": params["wte"]["embedding"].T}
        objective = fn.objective(gpt2(dtype), fn.cross_entropy())
        batch = ids.astype(np.int32), targets.astype(np.int32)
        state = jax.eval_shape(objective.model.init, jax.random.key(0), batch[0])[1]
        ours = jax.jit(objective.model.apply)(params, state, batch[0])
        both = {"model": params, "loss": {}}, {"model": state, "loss": ()}
        (value, _), grads = jax.jit(fn.value_and_grad(objective))(*both, batch)
        grads = grads["model"]
        grads["wte"]["embedding"] += grads.pop("head")["kernel"].T
    close(ours, logits.detach().numpy(), rtol)
    close(value, loss.detach().numpy(), rtol)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(wanted)]
    assert jax.tree.structure(grads) == jax.tree.structure(wanted)
    for path, a, b in zip(paths, jax.tree.leaves(grads), jax.tree.leaves(wanted), strict=True):
        if "['key']['bias']" in path:  # 0 but for rounding
            assert max(np.abs(a).max(), np.abs(b).max()) < rtol
        else:
            close(a, b, rtol)


def close(got, wanted, rtol):
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    assert np.linalg.norm(got - wanted) <= rtol * np.linalg.norm(wanted)
