"""The tiny model's tokenizer: SentencePiece with bytes to fall back on; a word or number of the world is one token."""

import io
import itertools
from pathlib import Path

import sentencepiece

from isheep_jax.tiny import corpus, world

VOCABULARY_SIZE = 896
MARKERS = ("<|user|>", "<|assistant|>", "<|end|>", "\n")
CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}<|assistant|> {{ message['content'] }}<|end|>"
    "{% else %}<|user|> {{ message['content'] }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def single_tokens() -> list[str]:
    """Returns the words, numbers and marks that must each be one token after a space."""
    words = [*world.WORDS, *world.ADJECTIVES, *world.KINDS, "sure", "done", "thanks", "answer"]
    return [*words, *(w.upper() for w in words), *world.NUMBERS, *'*;"():']


def train_tokenizer(directory: Path, seed: int = 0) -> None:
    """Writes tokenizer.model into `directory`."""
    documents = itertools.islice(corpus.documents(seed), 20_000)
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=(line for document in documents for line in document.splitlines()),
        model_writer=model,
        model_type="bpe",
        vocab_size=VOCABULARY_SIZE,
        byte_fallback=True,
        normalization_rule_name="identity",
        add_dummy_prefix=False,
        remove_extra_whitespaces=False,
        user_defined_symbols=[*MARKERS, *("▁" + word for word in single_tokens())],
        character_coverage=1.0,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
