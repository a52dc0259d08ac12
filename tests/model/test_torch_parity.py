"""Live comparisons with Hugging Face's PyTorch models; they need torch."""

import jax.numpy as jnp
import numpy as np
import parity
import pytest

from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="compares with Hugging Face's PyTorch models; pip install torch")

from make_fixtures import CASES, random_model  # noqa: E402 (needs torch)
from transformers import AutoModelForCausalLM  # noqa: E402

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("seed", [7, 8, 9])
@pytest.mark.parametrize("name", parity.NAMES)
def test_another_random_model_and_its_export_give_equal_logits_at_every_length(tmp_path, small_checkpoint, name, seed):
    config, _ = CASES[name]
    model = random_model(config, seed=seed)
    model.save_pretrained(tmp_path / "theirs")
    architecture, params = parity.load(tmp_path / "theirs")
    save_checkpoint(tmp_path / "ours", params, architecture, Tokenizer.load(small_checkpoint))
    export = AutoModelForCausalLM.from_pretrained(tmp_path / "ours", attn_implementation="eager")
    for length in (1, 17, 250):
        tokens = np.random.default_rng(length).integers(0, config.vocab_size, (2, length))
        with torch.no_grad():
            theirs, again = (m(torch.from_numpy(tokens)).logits.numpy() for m in (model, export))
        np.testing.assert_array_equal(again, theirs)
        ours = parity.plain_logits(params, architecture, jnp.asarray(tokens))
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-4 * parity.largest(theirs))


@pytest.mark.parametrize("name", parity.NAMES)
def test_export_loads_in_transformers_with_equal_logits_and_end_tokens(tmp_path, small_checkpoint, name):
    architecture, params = parity.load(parity.FIXTURES / name)
    tokenizer = Tokenizer.load(small_checkpoint)
    save_checkpoint(tmp_path / "out", params, architecture, tokenizer)
    model, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert set(tokenizer.eos_ids) <= set(model.generation_config.eos_token_id)
    expected = parity.expected(name)
    with torch.no_grad():
        theirs = model(torch.from_numpy(expected["tokens"]).long()).logits.numpy()
    np.testing.assert_allclose(theirs, expected["logits"], rtol=1e-5, atol=1e-5)
