"""A small random model, a tokenizer of letters and a task, shared by the fine-tuning tests."""

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from isheep_jax.config import SFTConfig
from isheep_jax.model.architecture import Architecture, init_parameters
from isheep_jax.sft.examples import Example
from isheep_jax.sft.trainer import fine_tune
from isheep_jax.text.conversation import Conversation, Message

LLAMA = Architecture(
    family="llama",
    vocab_size=32,
    hidden_size=32,
    intermediate_size=48,
    layers=2,
    heads=4,
    kv_heads=2,
    head_dim=8,
    norm_eps=1e-5,
    rope_theta=10_000.0,
    rope_scaling=None,
    context_length=64,
    tied_embeddings=True,
    bos_token_id=0,
    eos_token_ids=(1,),
)
QWEN = dataclasses.replace(LLAMA, family="qwen2", tied_embeddings=False)


class LetterTokenizer:
    """0 begins a text, 1 ends a turn, 2 separates the conversation from the response, letters are 3, 4, ..."""

    def encode_example(self, conversation: Conversation, response: str) -> tuple[list[int], list[int]]:
        prompt = [0, *itertools.chain.from_iterable(self.letters(m.content) for m in conversation), 2]
        answer = [*self.letters(response), 1]
        return prompt + answer, [0] * len(prompt) + [1] * len(answer)

    def letters(self, text: str) -> list[int]:
        return [ord(c) - ord("a") + 3 for c in text]


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


def mesh_of(data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    return jax.make_mesh(
        (data, fsdp, tensor),
        ("data", "fsdp", "tensor"),
        axis_types=(jax.sharding.AxisType.Auto,) * 3,
        devices=jax.devices()[: data * fsdp * tensor],
    )


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
