"""Trains small tokenizers of both formats."""

import io
import json
import random
from pathlib import Path

import sentencepiece
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers

SPACES = {"add_dummy_prefix": False, "remove_extra_whitespaces": False}
SYMBOLS = ["<|user|>", "<|assistant|>", "<|end|>", "\n", "▁red", "▁cat", "▁10"]
WORDS = ["red", "cat", "green", "the", "swap", "Quality", "answer", "reddish", "1", "10", "(", "):", "catalogue"]

PIECES = [
    "red",
    "cat",
    "redish",
    " ",
    "  ",
    "a",
    "the",
    "Quality",
    "(1-10):",
    "\n",
    "<|end|>",
    "é",
    "10",
    "1",
    ".",
    "🙂",
    "<s>",
]


def random_texts(count=300):
    rng = random.Random(0)
    for _ in range(count):
        yield "".join(rng.choice(PIECES) for _ in range(rng.randint(0, 12)))


def trained_model(**options) -> bytes:
    """Returns a small SentencePiece model; some of its pieces are user-defined and begin with a space."""
    rng = random.Random(1)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([" ".join(rng.choices(WORDS, k=12)) for _ in range(500)]),
        model_writer=model,
        **{
            "model_type": "bpe",
            "vocab_size": 340,
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            **SPACES,
            "user_defined_symbols": SYMBOLS,
        }
        | options,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return model.getvalue()


def write_byte_level(directory: Path, special: list[str], plain: tuple[str, ...] = (), **config) -> Path:
    """Writes a directory with a byte-level BPE tokenizer.json, like those of Llama 3, Qwen and OLMo 2.

    special: tokens that decoding leaves out.
    plain: added tokens that decoding keeps.
    config: fields of tokenizer_config.json. A `bos_token` precedes texts, unless it is also the `eos_token`.
    """
    rng = random.Random(1)
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator([" ".join(rng.choices([*WORDS, "Blue"], k=12)) for _ in range(100)], trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens([AddedToken(token, normalized=False) for token in plain])
    begin = config.get("bos_token")
    if begin is not None and begin != config.get("eos_token"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{begin} $A", special_tokens=[(begin, tokenizer.token_to_id(begin))]
        )
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def write_sentencepiece(directory: Path, config: dict | None = None, **options) -> Path:
    """Writes a directory with a tokenizer.model, like those of Llama 2, Mistral and Gemma."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "tokenizer.model").write_bytes(trained_model(**options))
    (directory / "tokenizer_config.json").write_text(json.dumps(config or {}))
    return directory
