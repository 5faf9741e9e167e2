r"""Runs that are over: three sizes of a language model in Flax NNX, trained with Optax on the source text of Python's
standard library, byte by byte. The checkpoints that Orbax saved are measured afterwards, on text that none has seen.

pip install '.[jax,plot,report]' flax optax orbax-checkpoint
python docs/examples/flax_ladder.py [folder] [steps]

On the command line, with the same bytes in held_out.npy; the size of each model is read from its tree of arrays:

lnp measure width-16 width-32 width-64 --model docs/examples/flax_ladder.py:of_tree \
    --tokens held_out.npy --out histories
lnp compare histories
lnp report histories
"""

import sys
from collections.abc import Iterable
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint
from flax import nnx
from ladder import BATCH, LENGTH, SYMBOLS, WIDTHS, measured, next_bytes, saved_steps, show, source_text

import lnp

HEADS = 2


class Block(nnx.Module):
    """Causal attention and a feed-forward layer, each on what layer normalisation leaves."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.before, self.between = nnx.LayerNorm(width, rngs=rngs), nnx.LayerNorm(width, rngs=rngs)
        self.attention = nnx.MultiHeadAttention(HEADS, width, decode=False, rngs=rngs)
        self.up, self.down = nnx.Linear(width, 4 * width, rngs=rngs), nnx.Linear(4 * width, width, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = x + self.attention(self.before(x), mask=nnx.make_causal_mask(x[..., 0]))
        return x + self.down(nnx.gelu(self.up(self.between(x))))


class Language(nnx.Module):
    """Bytes (N, T) -> logits (N, T, 256) of the next ones."""

    def __init__(self, width: int, rngs: nnx.Rngs) -> None:
        self.symbol, self.position = nnx.Embed(SYMBOLS, width, rngs=rngs), nnx.Embed(LENGTH, width, rngs=rngs)
        self.first, self.second = Block(width, rngs), Block(width, rngs)
        self.norm, self.head = nnx.LayerNorm(width, rngs=rngs), nnx.Linear(width, SYMBOLS, rngs=rngs)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        x = self.symbol(tokens) + self.position(jnp.arange(tokens.shape[1]))
        return self.head(self.norm(self.second(self.first(x))))


def of_tree(tree: dict) -> Language:
    """The model of a checkpoint's arrays."""
    model = Language(tree["symbol"]["embedding"].shape[1], nnx.Rngs(0))
    nnx.update(model, tree)
    return model


@nnx.jit
def update(model: Language, optimizer: nnx.Optimizer, batch: tuple) -> None:
    def loss(model: Language) -> jax.Array:
        return optax.softmax_cross_entropy_with_integer_labels(model(batch[0]), batch[1]).mean()

    optimizer.update(model, nnx.grad(loss)(model))


def train(folder: Path, width: int, sequences: np.ndarray, batch: tuple, steps: int) -> lnp.Tracker:
    """Train one size; about twelve checkpoints stay behind. The tracker is there to lay beside what they say."""
    model = Language(width, nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, optax.adam(2e-3), wrt=nnx.Param)
    saved, rows = saved_steps(steps), np.random.default_rng(0)
    tracker = lnp.Tracker(None, saved, batch=tuple(map(jnp.asarray, batch)))
    with orbax.checkpoint.CheckpointManager(folder.resolve()) as manager:
        for step in range(steps + 1):
            tracker.observe(step, model)
            if step in saved:
                tree = nnx.to_pure_dict(nnx.state(model, nnx.Param))
                manager.save(step, args=orbax.checkpoint.args.StandardSave(tree))
            update(model, optimizer, next_bytes(sequences[rows.integers(0, len(sequences), BATCH)]))
    return tracker


def main(folder: Path, steps: int = 240, widths: Iterable[int] = WIDTHS) -> list[float]:
    sequences, held_out = source_text(folder)
    batch = next_bytes(held_out)
    apart = []
    for width in widths:
        watched = train(folder / f"width-{width}", width, sequences, batch, steps)
        apart.append(measured(folder, width, watched, batch, of_tree))
    show(folder)
    return apart


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."), int(sys.argv[2]) if len(sys.argv) > 2 else 240)
