import jax
import jax.numpy as jnp
import numpy as np
import pytest
from letter_tokenizer import LetterTokenizer
from small_model import LLAMA, QWEN, copying, weights

from isheep_jax.model import transformer
from isheep_jax.sft import data
from isheep_jax.sft.loss import chunk_length, cross_entropy
from isheep_jax.sharding import one_device_sharding

STATIC = {"compute_dtype": jnp.float32, "sharding": one_device_sharding()}


def batch_of(count: int, sequence_length: int, rows: int) -> data.Batch:
    columns = data.tokenize(LetterTokenizer(), copying(count), sequence_length).columns
    (batch,) = data.batches(columns, sequence_length=sequence_length, batch_size=rows)
    return batch


def mean_loss(params, architecture, batch, *, packed=True, chunk=8):
    hidden, _ = transformer.forward(
        params,
        architecture,
        batch.tokens,
        batch.positions,
        transformer.ForwardSetup(jnp.float32),
        segment_ids=batch.segment_ids if packed else None,
    )
    total, count = cross_entropy(params, architecture, hidden, batch.targets, batch.loss_mask, chunk=chunk, **STATIC)
    return total / count


def assert_close(first, second):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), first, second)


@pytest.mark.parametrize(
    ("architecture", "chunk"), [(LLAMA, 1), (LLAMA, 7), (QWEN, 32)], ids=["tied-1", "tied-7", "untied-all"]
)
def test_chunks_give_loss_and_gradient_of_full_logits(architecture, chunk):
    params, batch = weights(architecture), batch_of(12, 32, 8)
    hidden = jax.random.normal(jax.random.key(1), (8, 32, architecture.hidden_size))

    def chunked(params, hidden):
        total, count = cross_entropy(
            params, architecture, hidden, batch.targets, batch.loss_mask, chunk=chunk, **STATIC
        )
        return total / count

    def plain(params, hidden):
        logp = jax.nn.log_softmax(transformer.logits(params, architecture, hidden, jnp.float32))
        chosen = jnp.take_along_axis(logp, batch.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(chosen * batch.loss_mask) / batch.loss_mask.sum()

    results = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, hidden) for f in (chunked, plain)]
    assert_close(*results)


def test_packed_rows_have_loss_and_gradient_of_single_rows():
    params, packed = weights(), batch_of(10, 32, 8)
    columns = data.tokenize(LetterTokenizer(), copying(10), 20).columns
    rows = [next(iter(data.batches([c], sequence_length=20, batch_size=1))) for c in columns]
    alone = jax.tree.map(lambda *x: np.concatenate(x), *rows)
    assert packed.segment_ids.max() > 1
    assert alone.segment_ids.max() == 1
    results = [
        jax.jit(jax.value_and_grad(lambda p, b=b, s=s: mean_loss(p, LLAMA, b, packed=s)))(params)
        for b, s in ((packed, True), (alone, False))
    ]
    assert_close(*results)


def test_logits_of_batch_are_never_in_memory_as_whole():
    B, T, D, V = 8, 64, 8, 4096
    params = {"lm_head": jnp.zeros((D, V))}
    hidden, targets = jnp.zeros((B, T, D)), jnp.zeros((B, T), jnp.int32)

    def memory(chunk: int) -> int:
        def loss(hidden):
            return cross_entropy(params, QWEN, hidden, targets, jnp.ones_like(targets), chunk=chunk, **STATIC)[0]

        return jax.jit(jax.grad(loss)).lower(hidden).compile().memory_analysis().temp_size_in_bytes

    assert memory(T) >= B * T * V * 4
    assert memory(4) < B * T * V * 4 / 4


def test_device_with_many_rows_takes_short_chunks():
    assert chunk_length(1) == 512
    assert chunk_length(16) == 32
    assert chunk_length(10_000) == 1
