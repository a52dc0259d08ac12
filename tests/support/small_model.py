"""A small random model, a tokenizer of letters and a task, shared by the fine-tuning tests."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from architectures import small
from letter_tokenizer import LetterTokenizer
from meshes import mesh_of

from isheep_jax.config import SFTConfig
from isheep_jax.model.architecture import Architecture, init_parameters
from isheep_jax.sft.examples import Example
from isheep_jax.sft.trainer import fine_tune
from isheep_jax.text.conversation import Message

LLAMA = small(vocab_size=32)
QWEN = dataclasses.replace(LLAMA, family="qwen2", tied_embeddings=False)


def example(name: str, prompt: str, response: str) -> Example:
    return Example(name, (Message("user", prompt),), response)


def copying(count: int) -> list[Example]:
    """Words of 2 to 9 letters, to be repeated."""
    draw = np.random.default_rng(3)
    words = ["".join(draw.choice(list("abcdefgh"), draw.integers(2, 10))) for _ in range(count)]
    return [example(f"e{i}", word, word) for i, word in enumerate(words)]


@functools.cache
def weights(architecture: Architecture = LLAMA, seed: int = 0) -> dict:
    """Random parameters, large enough that every token matters."""
    params = init_parameters(architecture, jax.random.key(seed))
    params["layers"] = jax.tree.map(lambda leaf: leaf * 5 if leaf.std() > 0 else leaf, params["layers"])
    return params


SETTINGS = SFTConfig(
    method="full",
    learning_rate=3e-3,
    warmup_steps=2,
    epochs=2,
    sequence_length=32,
    batch_size=8,
    validation_fraction=0.0,
    checkpoint_every=100,
    lora_rank=4,
    lora_dropout=0.3,
    remat="none",
)


def tune(directory, examples=None, *, architecture=LLAMA, mesh=None, seed=0, params=None, on_step=None, **settings):
    """`fine_tune` of the small model on copying, with some settings changed: the weights, and what it did."""
    tuned, _, result = fine_tune(
        # A copy, because training all weights consumes them.
        jax.tree.map(jnp.copy, weights(architecture) if params is None else params),
        architecture,
        LetterTokenizer(),
        copying(40) if examples is None else examples,
        dataclasses.replace(SETTINGS, **settings),
        mesh=mesh or mesh_of(),
        directory=directory,
        seed=seed,
        compute_dtype=jnp.float32,
        on_step=on_step,
    )
    return tuned, result


def same_bits(first, second) -> bool:
    """Whether two trees are equal bit for bit."""
    equal = jax.tree.map(lambda a, b: a.dtype == b.dtype and bool((a == b).all()), on_host(first), on_host(second))
    return all(jax.tree.leaves(equal))


def on_host(tree) -> dict:
    return jax.tree.map(np.asarray, tree)
