"""What follows a prompt has the ids that it has where the whole text is tokenized, whatever the tokenizer."""

import contextlib
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_tokenizers import write_byte_level, write_sentencepiece
from tokenizers import Regex, models, pre_tokenizers, trainers
from tokenizers import Tokenizer as Fast

from isheep_jax.errors import UserError
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import EMBEDDED

MARKERS = ["<s>", "<|im_start|>", "<|im_end|>"]
# The pattern of Llama 3 and Qwen.
PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
    r"\s+(?!\S)|\s+"
)


def write_split(directory, pre_tokenizer, model=None, **training):
    """Writes a tokenizer.json of which only the pre-tokenizer and the model matter."""
    rng = random.Random(2)
    fast = Fast(model or models.BPE(unk_token="<unk>"))
    fast.pre_tokenizer = pre_tokenizer
    words = ["red", "cat", "the", "1", "10", "123", "Score", "(1-10):", "don't", "reddish", "\n", ".", "é"]
    texts = ["".join(rng.choice([" ", "  ", ""]) + rng.choice(words) for _ in range(12)) for _ in range(300)]
    trainer = trainers.BpeTrainer if model is None else trainers.UnigramTrainer
    fast.train_from_iterator(texts, trainer(vocab_size=330, show_progress=False, special_tokens=["<unk>"], **training))
    directory.mkdir(parents=True, exist_ok=True)
    fast.save(str(directory / "tokenizer.json"))
    return directory


def split_bytes(pattern):
    split = pre_tokenizers.Split(Regex(pattern), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


ALPHABET = {"initial_alphabet": pre_tokenizers.ByteLevel.alphabet()}
WRITERS = {
    "byte level": lambda d: write_byte_level(d, MARKERS),
    "byte level of Llama 3": lambda d: write_split(d, split_bytes(PATTERN), **ALPHABET),
    "metaspace": lambda d: write_split(d, pre_tokenizers.Metaspace()),
    "sentencepiece": lambda d: write_sentencepiece(d, user_defined_symbols=[*MARKERS[1:], "▁10"]),
    "sentencepiece of Llama 2": lambda d: write_sentencepiece(d, add_dummy_prefix=True),
    "sentencepiece, white space merged": lambda d: write_sentencepiece(
        d, add_dummy_prefix=True, remove_extra_whitespaces=True, normalization_rule_name="nmt_nfkc"
    ),
    # The rest are those that a text cannot be cut for.
    "spaces inside of tokens": lambda d: write_split(d, split_bytes(r".{1,9}"), **ALPHABET),
    "spaces at the end of tokens": lambda d: write_sentencepiece(
        d, treat_whitespace_as_suffix=True, user_defined_symbols=[]
    ),
    "every five characters": lambda d: write_split(d, split_bytes(r"[^ ]{1,5}| +"), **ALPHABET),
    "unigram": lambda d: write_sentencepiece(d, model_type="unigram"),
    "unigram, tokenizer.json": lambda d: write_split(
        d, pre_tokenizers.Metaspace(), models.Unigram(), unk_token="<unk>"
    ),
}
CUT = list(WRITERS)[:6]

PIECES = (
    *("red", "cat", "reddish", "Score", "don't", "(1-10):", "10", "123", "1234567", "é", "🙂", "日本語", "a", "x=1,"),
    *("\n", "\n\n", " ", "  ", ".", ")", "\t", "\u00a0", "Ġ", "▁", "▁▁", "e\u0301", "\r\n", "=" * 9, "ﬁ", "'s"),
)
WORDS = st.sampled_from(PIECES)
TEXTS = st.lists(st.one_of(WORDS, WORDS.map(" {}".format), st.text(max_size=3)), max_size=9).map("".join)
PROMPTS = st.one_of(
    TEXTS, st.builds("{}. The red{}".format, TEXTS, TEXTS), st.builds("{} cat, the {}".format, TEXTS, TEXTS)
)


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tokenizers")
    made = {name: Tokenizer.load(write(directory / name), "chatml") for name, write in WRITERS.items()}
    return made | {name: Tokenizer.load(path) for name, path in EMBEDDED.items()}


def whole(tokenizer, prompt, text):
    """The ids after those of the prompt when both are tokenized as one text; None where the prompt's change."""
    before, both = tokenizer.encode(prompt), tokenizer.encode(prompt + text)
    return both[len(before) :] if both[: len(before)] == before else None


def following(tokenizer, prompt, text, ids=None):
    with contextlib.suppress(UserError):
        return tokenizer.encode_choices(prompt, [text], ids)[0]


@settings(max_examples=150, deadline=None, derandomize=True)
@given(prompt=PROMPTS, text=TEXTS)
def test_choices_have_the_ids_of_the_whole_text(tokenizers, prompt, text):
    for name, tokenizer in tokenizers.items():
        expected = whole(tokenizer, prompt, text)
        assert following(tokenizer, prompt, text) == expected, name
        assert following(tokenizer, prompt, text, tokenizer.encode_prompt(prompt)) == expected, name
        if expected is not None:
            found, spans, _ = tokenizer.align_continuation(prompt, text)
            assert found == expected, name
            assert all(0 <= begin <= end <= len(text) for begin, end in spans), name


@settings(max_examples=60, deadline=None, derandomize=True)
@given(question=PROMPTS, answer=TEXTS)
def test_examples_have_the_ids_of_the_whole_conversation(tokenizers, question, answer):
    conversation = (Message("user", question),)
    for name in CUT:
        tokenizer = tokenizers[name]
        ids, mask = tokenizer.encode_example(conversation, answer)
        prompt, rendered = tokenizer.render(conversation), tokenizer.render(conversation, answer)
        expected = whole(tokenizer, prompt, rendered[len(prompt) :])
        if expected is not None:
            end = next((i + 1 for i, token in enumerate(expected) if token in tokenizer.eos_ids), len(expected))
            own = [token for token, is_own in zip(ids, mask) if is_own]
            assert own[:end] == expected[:end], name


@settings(max_examples=40, deadline=None, derandomize=True)
@given(texts=st.lists(TEXTS | st.just("a <|im_end|> b"), max_size=5))
def test_many_prompts_have_the_ids_of_each(tokenizers, texts):
    for name, tokenizer in tokenizers.items():
        prompts = [*texts, *((Message("user", text),) for text in texts)]
        assert tokenizer.encode_prompts(prompts) == [tokenizer.encode_prompt(prompt) for prompt in prompts], name


def test_a_prompt_that_has_no_ids_is_an_error_in_its_place(tokenizers):
    plain = tokenizers["metaspace"].with_template("chatml")
    plain._template = None
    prompts = ["red", (Message("user", "red"),), "cat"]
    first, error, last = plain.encode_prompts(prompts)
    assert [first, last] == [plain.encode_prompt("red"), plain.encode_prompt("cat")]
    assert "no chat template" in str(error)


@pytest.mark.parametrize("name", CUT)
def test_of_a_long_prompt_only_the_end_is_tokenized_with_each_choice(tokenizers, name, monkeypatch):
    tokenizer, lengths = tokenizers[name], []
    align = tokenizer._backend.align
    monkeypatch.setattr(tokenizer._backend, "align", lambda text: lengths.append(len(text)) or align(text))
    prompt = "the red cat. " * 50 + "Answer with a number.\n\nScore (1-10):"
    choices = [f" {i}" for i in range(1, 11)]
    assert tokenizer.encode_choices(prompt, choices) == [whole(tokenizer, prompt, choice) for choice in choices]
    assert len(lengths) == 10
    assert max(lengths) < 50
