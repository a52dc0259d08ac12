import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import LLAMA, QWEN, weights

from isheep_jax.model import transformer
from isheep_jax.sft.lora import init_lora, lora_table, merge_lora

TOKENS = jnp.asarray([[0, 5, 6, 7, 2, 9, 1]])


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
    assert np.abs(plain - logits(weights(), LLAMA, **lora, dropout_key=jax.random.key(0))).max() > 0.1
