"""Cross-entropy on the trained tokens, in chunks, so that the logits of a batch never exist as a whole."""

import jax
import jax.numpy as jnp

from isheep_jax.model import transformer
from isheep_jax.model.architecture import Architecture
from isheep_jax.sharding import ANYWHERE, ActivationSharding

# Logits of so many tokens per device exist at a time: 512 x 128,256 x 4 bytes = 250 MiB at Llama 3's vocabulary.
CHUNK_TOKENS = 512


def chunk_length(rows_per_device: int) -> int:
    """Positions per chunk, for `cross_entropy`, when each device holds `rows_per_device` rows of the batch."""
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
    sharding: ActivationSharding = ANYWHERE,
) -> tuple[jax.Array, jax.Array]:
    """Sum over the trained tokens of -log p(target), and their count; both float32 scalars over the global batch.

    hidden: [B, T, D] after the final norm. targets, loss_mask: [B, T]. chunk: positions of each row whose logits
    [B, chunk, V] are in memory at a time; they are computed again in the backward pass. sharding: of activations;
    the hidden states then travel to the parts of the head, which is never gathered, and neither is its gradient.
    """
    head = sharding.lm_head_sharded(transformer.lm_head(params, architecture), architecture.tied_embeddings)
    B, T = targets.shape
    chunk = min(chunk, T)
    n = -(-T // chunk)

    def in_chunks(x):  # [B, T, ...] -> [n, B, chunk, ...]; along T, because B is spread over the devices
        x = jnp.pad(x, [(0, 0), (0, n * chunk - T)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(B, n, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def chunk_sum(total, inputs):
        h, target, mask = inputs
        # [B, chunk, V] float32
        logits = transformer.lm_head_logits(head, architecture, sharding.replica_sharded(h), compute_dtype)
        logits = sharding.vocab_sharded(logits)
        # A masked sum in place of a gather: it needs no communication of logits when V is sharded.
        is_target = jnp.arange(logits.shape[-1]) == target[..., None]
        chosen = jnp.sum(jnp.where(is_target, logits, 0.0), axis=-1)
        losses = jax.nn.logsumexp(logits, axis=-1) - chosen
        return total + jnp.sum(losses * mask), None

    mask = loss_mask.astype(jnp.float32)
    total, _ = jax.lax.scan(chunk_sum, jnp.float32(0.0), (in_chunks(hidden), in_chunks(targets), in_chunks(mask)))
    return total, jnp.sum(mask)
