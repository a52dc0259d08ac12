import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import LLAMA, QWEN, weights

from isheep_jax.model import transformer
from isheep_jax.model.linear import LoraWeight, dropout_keys, dropout_mask
from isheep_jax.model.lora import lora_table, merge_lora
from isheep_jax.sft.lora import apply_lora, init_lora

TOKENS = jnp.asarray([[0, 5, 6, 7, 2, 9, 1]])


KEY = jnp.asarray([3, 4], jnp.uint32)


def logits(params, architecture, adapters=None, *, scale=1.0, **dropout):
    if adapters is not None:
        params = apply_lora(params, adapters, architecture, scale=scale, **dropout)
    positions, setup = jnp.arange(TOKENS.shape[1])[None], transformer.ForwardSetup(jnp.float32)
    hidden, _ = transformer.forward(params, architecture, TOKENS, positions, setup)
    return np.asarray(transformer.logits(params, architecture, hidden, jnp.float32))


def trained(architecture) -> dict:
    """Adapters whose b is no longer zero."""
    adapters = init_lora(jax.random.key(1), architecture, rank=4)
    return jax.tree.map(lambda x: x + 0.1, adapters)


def test_new_adapters_change_nothing():
    adapters = init_lora(jax.random.key(1), LLAMA, rank=4)
    np.testing.assert_array_equal(logits(weights(), LLAMA), logits(weights(), LLAMA, adapters, scale=2.0))


@pytest.mark.parametrize("architecture", [LLAMA, QWEN], ids=["llama", "qwen2"])
def test_merged_weights_are_adapted_model(architecture):
    params, adapters = weights(architecture), trained(architecture)
    in_graph = logits(params, architecture, adapters, scale=0.5)
    merged = logits(merge_lora(params, adapters, 0.5), architecture)
    np.testing.assert_allclose(in_graph, merged, atol=1e-5)
    assert np.abs(in_graph - logits(params, architecture)).max() > 0.1


def test_merging_keeps_dtype():
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights())
    merged = merge_lora(params, trained(LLAMA), 0.5)
    assert {leaf.dtype for leaf in jax.tree.leaves(merged)} == {jnp.dtype(jnp.bfloat16)}
    assert jax.tree.structure(merged) == jax.tree.structure(params)


def test_adapters_sit_on_all_linear_leaves():
    leaves = {"wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down"}
    assert set(lora_table(QWEN, 4)["layers"]) == leaves
    adapted = apply_lora(weights(QWEN), trained(QWEN), QWEN, scale=1.0)
    assert {name for name, leaf in adapted["layers"].items() if isinstance(leaf, LoraWeight)} == leaves


def test_dropout_needs_key():
    plain = logits(weights(), LLAMA, trained(LLAMA))
    np.testing.assert_array_equal(plain, logits(weights(), LLAMA, trained(LLAMA), dropout=0.5))
    dropped = [logits(weights(), LLAMA, trained(LLAMA), dropout=0.5, dropout_key=key) for key in (KEY, KEY, KEY + 1)]
    assert np.abs(plain - dropped[0]).max() > 0.1
    np.testing.assert_array_equal(dropped[0], dropped[1])
    assert np.abs(dropped[0] - dropped[2]).max() > 1e-3


def test_dropout_leaves_its_share_and_masks_are_unlike():
    shape, rate = (8, 64, 96), 0.3
    draws = [
        dropout_mask(dropout_keys(key, 32, leaf, 7)[layer], shape, rate)
        for key in (KEY, KEY + 1, jnp.asarray([4, 3], jnp.uint32))
        for layer, leaf in ((0, 0), (0, 1), (0, 2), (31, 6))
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
