"""Handwritten digits, read by a small network that is trained by a hand-written backward pass.

    python examples/digits.py

It prints the model's summary, holds the hand-written gradients against jax.grad's on the first batch, trains, and ends
with the accuracy on digits it has not seen. The run folder keeps config, environment, metrics and pictures.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import funcnet as fn
from funcnet.train.plots import plot_confusion, plot_history, pyplot

BATCH = 128


def load(share: float = 0.2) -> tuple[tuple[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """scikit-learn's bundled digits, 1,797 of 8 x 8 pixels in 0..1, split once and for all: (training, test)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        sys.exit("this example needs scikit-learn: python -m pip install 'funcnet[examples]'")
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    images, labels = (images[order] / 16).astype(np.float32), labels[order].astype(np.int32)
    cut = int(len(labels) * share)
    return (images[cut:], labels[cut:]), (images[:cut], labels[:cut])


def batches(data: tuple[np.ndarray, np.ndarray], seed: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless batches: each pass over the data in an order of its own, the remainder left for the next pass."""
    images, labels = data
    rng = np.random.default_rng(seed)
    left = np.empty(0, int)
    while True:
        while len(left) < BATCH:
            left = np.concatenate([left, rng.permutation(len(labels))])
        now, left = left[:BATCH], left[BATCH:]
        yield images[now], labels[now]


def model() -> fn.Layer:
    return fn.serial(fn.dense(256), fn.relu(), fn.dropout(0.2), fn.dense(128), fn.relu(), fn.dropout(0.2), fn.dense(10))


def compare(objective: fn.Objective, state: fn.TrainState, batch: tuple[np.ndarray, np.ndarray]) -> fn.Report:
    """Every leaf of the gradient: by hand, and by jax.grad of the same forward pass."""

    def loss(params):
        prediction, _, _ = objective.model.fwd(params["model"], state.state["model"], batch[0], state.key)
        return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(prediction, batch[1]))

    _, by_hand = jax.jit(fn.value_and_grad(objective))(state.params, state.state, batch, state.key)
    return fn.compare_grads(by_hand, jax.jit(jax.grad(loss))(state.params))


def draw_misread(images: np.ndarray, labels: np.ndarray, predicted: np.ndarray, path: Path) -> None:
    """Up to ten of the digits that were read wrongly."""
    plt = pyplot()
    wrong = np.flatnonzero(labels != predicted)[:10]
    rows = max(1, -(-len(wrong) // 5))
    figure, axes = plt.subplots(rows, 5, figsize=(8, 2 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat:
        axis.axis("off")
    for axis, i in zip(axes.flat, wrong, strict=False):
        axis.imshow(images[i].reshape(8, 8), cmap="gray_r")
        axis.set_title(f"{labels[i]} read as {predicted[i]}")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--steps", type=int, default=1500, help="training steps, a multiple of 50 (default 1500)")
    length.add_argument("--smoke", action="store_true", help="100 steps only, to see that everything works")
    parser.add_argument("--seed", type=int, default=0, help="of parameters, batches and dropout (default 0)")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"), help="run folder (default runs/digits)")
    parser.add_argument("--overwrite", action="store_true", help="replace an earlier run in the run folder")
    args = parser.parse_args()
    steps = 100 if args.smoke else args.steps
    if steps < 50 or steps % 50:
        parser.error(f"--steps must be a positive multiple of 50, not {steps}")
    if args.seed < 0:
        parser.error(f"--seed must not be negative, not {args.seed}")
    if args.run_dir.exists() and not args.run_dir.is_dir():
        parser.error(f"{args.run_dir} is a file; --run-dir names a folder")
    if args.run_dir.exists() and any(args.run_dir.iterdir()) and not args.overwrite:
        parser.error(f"{args.run_dir} holds a run already; give another --run-dir, or --overwrite")

    training, test = load()
    objective = fn.objective(model(), fn.cross_entropy())
    optimizer = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    batch = next(batches(training, args.seed))
    state = fn.init_train_state(objective, optimizer, jax.random.key(args.seed), batch)

    print(f"{len(training[1])} digits to learn from, {len(test[1])} to test on\n")
    print(fn.summary(objective.model, batch[0]), "\n")
    report = compare(objective, state, batch)
    print(f"by hand against jax.grad, first batch of {BATCH}\n{report}\n")
    report.raise_for_failure()

    config = {"steps": steps, "seed": args.seed, "batch": BATCH, "optimizer": "adam, cosine decay from 2e-3"}
    state, history = fn.fit(
        objective,
        optimizer,
        state,
        batches(training, args.seed),
        steps,
        steps_per_call=10,
        log_every=50,
        validation=[test],
        run_dir=args.run_dir,
        config=config,
        overwrite=args.overwrite,
    )

    logits = objective.model.apply(state.params["model"], state.state["model"], test[0])
    predicted = np.asarray(jnp.argmax(logits, axis=-1))
    plot_history(history, args.run_dir / "curves.png")
    plot_confusion(test[1], predicted, args.run_dir / "confusion.png")
    draw_misread(test[0], test[1], predicted, args.run_dir / "misread.png")
    print(f"run folder: {args.run_dir}")
    print(f"test accuracy: {100 * np.mean(predicted == test[1]):.1f}%")


if __name__ == "__main__":
    main()
