"""Cross-entropy on the loss tokens, in chunks, so that the logits of a batch never exist as a whole.

B rows, T tokens, D model width, V vocabulary.
"""

import jax
import jax.numpy as jnp

from isheep_jax.model import transformer
from isheep_jax.model.architecture import Architecture
from isheep_jax.sharding import ActivationSharding

# Tokens per device whose logits exist at a time: 512 x 128,256 x 4 bytes = 250 MiB at Llama 3's vocabulary.
CHUNK_TOKENS = 512


def chunk_length(rows_per_device: int) -> int:
    """Returns the positions per chunk, for `cross_entropy`, when each device holds `rows_per_device` rows."""
    return max(1, CHUNK_TOKENS // rows_per_device)


def cross_entropy(
    params: dict,
    architecture: Architecture,
    hidden: jax.Array,
    targets: jax.Array,
    loss_mask: jax.Array,
    *,
    chunk: int,
    compute_dtype: jnp.dtype,
    sharding: ActivationSharding,
) -> tuple[jax.Array, jax.Array]:
    """Returns the sum of -log p(target) over the loss tokens, and their count: float32 scalars of the global batch.

    Args:
        params: the parameter tree.
        architecture: the model's.
        hidden: [B, T, D], after the final norm.
        targets: [B, T], the next tokens.
        loss_mask: [B, T], 1 where the target carries loss.
        chunk: positions of each row whose logits [B, chunk, V] exist at a time; the backward pass computes them again.
        compute_dtype: dtype of the product with the lm_head.
        sharding: moves hidden states to the shards of the lm_head; neither it nor its gradient is ever gathered.
    """
    lm_head = sharding.lm_head_sharded(transformer.lm_head(params, architecture), architecture.tied_embeddings)
    B, T = targets.shape
    chunk = min(chunk, T)
    chunks = -(-T // chunk)

    def in_chunks(x):  # [B, T, ...] -> [chunks, B, chunk, ...]; along T, because B is spread over the devices
        x = jnp.pad(x, [(0, 0), (0, chunks * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, chunks, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def add_chunk(total, inputs):
        h, target, mask = inputs
        logits = transformer.lm_head_logits(lm_head, architecture, sharding.replica_sharded(h), compute_dtype)
        logits = sharding.vocab_sharded(logits)  # [B, chunk, V] float32
        # A masked sum in place of a gather: it needs no communication of logits when V is sharded.
        is_target = jnp.arange(logits.shape[-1]) == target[..., None]
        target_logits = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - target_logits
        return total + jnp.sum(losses * mask), None

    mask = loss_mask.astype(jnp.float32)
    with jax.named_scope("loss"):
        total, _ = jax.lax.scan(add_chunk, jnp.float32(0.0), (in_chunks(hidden), in_chunks(targets), in_chunks(mask)))
    return total, jnp.sum(mask)
