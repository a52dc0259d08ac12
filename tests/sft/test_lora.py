import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import LLAMA, QWEN, weights

from isheep_jax.model import transformer
from isheep_jax.model.transformer import kept_by_dropout
from isheep_jax.sft.lora import init_lora, lora_table, merge_lora

TOKENS = jnp.asarray([[0, 5, 6, 7, 2, 9, 1]])


KEY = jnp.asarray([3, 4], jnp.uint32)


def logits(params, architecture, **lora):
    hidden, _ = transformer.forward(
        params, architecture, TOKENS, jnp.arange(TOKENS.shape[1])[None], compute_dtype=jnp.float32, **lora
    )
    return np.asarray(transformer.logits(params, architecture, hidden, jnp.float32))


def trained(architecture) -> dict:
    """Adapters whose b is no longer zero."""
    adapters = init_lora(jax.random.key(1), architecture, rank=4)
    return jax.tree.map(lambda x: x + 0.1, adapters)


def test_new_adapters_change_nothing():
    adapters = init_lora(jax.random.key(1), LLAMA, rank=4)
    np.testing.assert_array_equal(logits(weights(), LLAMA), logits(weights(), LLAMA, lora=adapters, lora_scale=2.0))


@pytest.mark.parametrize("architecture", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_merged_weights_are_the_adapted_model(architecture):
    params, adapters = weights(architecture), trained(architecture)
    in_graph = logits(params, architecture, lora=adapters, lora_scale=0.5)
    merged = logits(merge_lora(params, adapters, 0.5), architecture)
    np.testing.assert_allclose(in_graph, merged, atol=1e-5)
    assert np.abs(in_graph - logits(params, architecture)).max() > 0.1


def test_merging_keeps_the_number_format():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights())
    merged = merge_lora(params, trained(LLAMA), 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_adapters_sit_on_all_linear_leaves():
    assert set(lora_table(QWEN, 4)["layers"]) == set(transformer.LINEAR_LEAVES)


def test_dropout_needs_a_key():
    lora = {"lora": trained(LLAMA), "lora_dropout": 0.5}
    plain = logits(weights(), LLAMA, lora=trained(LLAMA))
    np.testing.assert_array_equal(plain, logits(weights(), LLAMA, **lora))
    assert np.abs(plain - logits(weights(), LLAMA, **lora, dropout_key=KEY)).max() > 0.1


def test_dropout_leaves_its_share_and_masks_are_unlike():
    shape, rate = (8, 64, 96), 0.3
    draws = [
        kept_by_dropout(key, jnp.asarray(purpose), shape, rate)
        for key in (KEY, KEY + 1, jnp.asarray([4, 3], jnp.uint32))
        for purpose in (0, 1, 2, 223)
    ]
    masks = np.stack(draws).reshape(len(draws), -1).astype(float)
    count = masks.shape[1]
    standard_error = np.sqrt(rate * (1 - rate) / count)
    assert np.abs(masks.mean(1) - (1 - rate)).max() < 5 * standard_error
    # Two masks, and one and its neighbors along each axis, agree as often as independent ones do.
    correlation = np.corrcoef(masks)[np.triu_indices(len(masks), 1)]
    assert np.abs(correlation).max() < 5 / np.sqrt(count)
    for axis in range(3):
        first = np.moveaxis(masks[0].reshape(shape), axis, 0)
        assert abs(np.corrcoef(first[1:].ravel(), first[:-1].ravel())[0, 1]) < 5 / np.sqrt(count)
