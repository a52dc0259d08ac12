"""Live comparisons with transformers' own reader of GGUF files; they need torch."""

import csv
import json
import random

import numpy as np
import parity
import pytest
from meshes import mesh_of
from published import published
from small_tokenizers import random_texts, write_byte_level

from isheep_jax.config import DecodeConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Request, SamplingParams, TokenIds
from isheep_jax.text.tokenizer import Tokenizer

torch = pytest.importorskip("torch", reason="compares with transformers' reader of GGUF files; pip install torch")
pytest.importorskip("gguf", reason="reads GGUF files; pip install gguf")

from gguf_files import byte_level_metadata, write_gguf  # noqa: E402 (needs gguf)
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402

pytestmark = pytest.mark.torch

# Real files are in the directory "gguf" of the published data.
MODELS = ["SmolLM2-135M-Instruct.Q4_1.gguf", "gemma-3-270m-q4_k_m.gguf"]
PROMPTS = 16
NEW_TOKENS = 64
ODD = [
    "",
    " ",
    "  two  spaces   and\ttabs\t\t\n\n\nlines\r\n",
    "naïve café ½ ² Å",
    "日本語のテキスト、中文，한국어 и русский ελληνικά العربية हिन्दी",
    "🙂👩‍👩‍👧‍👦🏳️‍🌈 e\u0301 \u200b\ufeff\u00a0",
    "1234567890 3.14159 1,000,000 2nd 0x1F",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|><bos><eos><start_of_turn>user\nhi<end_of_turn><unk><pad>",
    "\x00\x01\x7f\ud7ff\U0010fffd",
    "def f(x):\n    return {'a': [1, 2], \"b\": x**2}  # é\n\n\tif x:\n\t\tpass",
]


def published_texts() -> list[str]:
    """Instructions, answers, questions and programs of published files."""
    answers = json.loads(published("alpaca_eval/Qwen1.5-7B-Chat_outputs.json").read_text())
    texts = [text for answer in answers for text in (answer["instruction"], answer["output"])]
    for line in published("mbpp/mbpp.jsonl").read_text().splitlines():
        problem = json.loads(line)
        texts += [problem["text"], problem["code"], *problem["test_list"]]
    with published("truthfulqa/TruthfulQA.csv").open() as file:
        texts += [row["Question"] for row in csv.DictReader(file)]
    return texts


def noise(count: int) -> list[str]:
    """Texts of characters from all of Unicode."""
    rng = random.Random(2)
    ranges = [(32, 127), (0xA0, 0x500), (0x900, 0xE00), (0x3040, 0x30FF), (0x4E00, 0x9FFF), (0x1F300, 0x1FAFF)]
    return ["".join(chr(rng.randrange(*rng.choice(ranges))) for _ in range(rng.randrange(1, 40))) for _ in range(count)]


def theirs(path):
    model = AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, attn_implementation="eager"
    )
    return model.eval(), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
@pytest.mark.parametrize("name", ["llama", "qwen2"])  # transformers knows only the head size 128 of Qwen 3
def test_logits_of_small_file_are_equal(name, quantization, tmp_path):
    path = write_gguf(
        parity.FIXTURES / name,
        tmp_path / "model.gguf",
        quantization=quantization,
        tokenizer={"ggml.model": "gpt2", "ggml.tokens": ["a"] * 32},  # counted for the size of the vocabulary
    )
    model = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=path.name, attn_implementation="eager")
    tokens = np.random.default_rng(0).integers(0, 32, (2, 50))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    architecture, params = parity.load(path)
    ours = parity.plain_logits(params, architecture, tokens)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * parity.largest(expected))


@pytest.mark.parametrize("pre", ["qwen2", "smollm"])
def test_ids_of_small_file_are_equal(pre, tmp_path):
    special = ["<s>", "<|end|>", "<|endoftext|>"]
    words = write_byte_level(tmp_path / "words", special, bos_token="<s>", eos_token="<|end|>")
    metadata = byte_level_metadata(words, pre, **{"ggml.add_bos_token": True})
    path = write_gguf(parity.FIXTURES / "llama", tmp_path / "model.gguf", tokenizer=metadata)
    ours, expected = Tokenizer.load(path), AutoTokenizer.from_pretrained(tmp_path, gguf_file=path.name)
    for text in [*random_texts(), *ODD, *noise(200)]:
        assert ours.encode(text) == expected(text).input_ids, text


@pytest.mark.parametrize("file", MODELS)
def test_ids_of_real_file_are_equal(file):
    path = published(f"gguf/{file}")
    ours, expected = Tokenizer.load(path), AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = [*published_texts(), *ODD, *noise(1000)]
    unlike = [text for text in texts if ours.encode(text) != expected(text).input_ids]
    assert len(texts) > 5000
    assert not unlike


@pytest.mark.parametrize("file", MODELS)
def test_greedy_texts_and_losses_of_real_file_are_equal(file):
    path = published(f"gguf/{file}")
    model, _ = theirs(path)
    tokenizer = Tokenizer.load(path)
    architecture, params = parity.load(path)  # on one device: others would hold copies
    decode = DecodeConfig(slots=PROMPTS, max_length=256)
    engine = Engine(params, architecture, tokenizer, decode, mesh=mesh_of(), seed=0, compute_dtype="float32")
    texts = published_texts()[: 4 * PROMPTS : 4]
    prompts = [tokenizer.encode(text)[:96] for text in texts]
    requests = [Request(f"{i}", TokenIds(tuple(ids))) for i, ids in enumerate(prompts)]
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS)
    completions = {completion.id: completion for completion in engine.generate(requests, sampling)}
    start = tokenizer.start_id
    losses = []
    for i, ids in enumerate(prompts):
        with torch.no_grad():
            whole = model.generate(
                torch.tensor([ids]), do_sample=False, max_new_tokens=NEW_TOKENS, eos_token_id=list(tokenizer.eos_ids)
            )[0, len(ids) :].tolist()
            sequence = torch.tensor([[start, *ids]])
            logprobs = model(sequence).logits[0, :-1].log_softmax(-1)
        losses.append(-logprobs.gather(1, sequence[0, 1:, None]).mean().item())
        assert completions[f"{i}"].text == tokenizer.decode(whole), texts[i]
    asked = [Request(f"{i}", TokenIds((start,))) for i in range(PROMPTS)]
    scored = engine.text_logprobs(asked, [TokenIds(tuple(ids)) for ids in prompts])
    ours = {int(result.id): -result.logprob / result.tokens for result in scored}
    np.testing.assert_allclose([ours[i] for i in range(PROMPTS)], losses, rtol=0, atol=1e-4)
