"""Streaming: pieces that join to the completion, wherever calls of the decode program end."""

import dataclasses
import string

import numpy as np
import pytest
from minute_model import ARCHITECTURE, TableTokenizer, make_engine, ragged
from tokenizers import Tokenizer, decoders, models

from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.decode.stops import cut_at_stop, incomplete_utf8_token, stable_text
from isheep_jax.errors import UserError

CHARACTERS = "aé你😀\n"


def drain(stream):
    """The pieces of a stream, and the completion that it returns."""
    pieces = []
    while True:
        try:
            pieces.append(next(stream))
        except StopIteration as end:
            return pieces, end.value


def byte_level() -> tuple[Tokenizer, list[int]]:
    """Every byte is a token, as in GPT-2's alphabet; and the tokens of some characters' bytes."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in plain]
    letter = {byte: chr(byte) for byte in plain} | {byte: chr(256 + i) for i, byte in enumerate(others)}
    vocabulary = {letter[byte]: byte for byte in range(256)}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, [*CHARACTERS.encode(), ord("x"), ord("|")]


def byte_fallback() -> tuple[Tokenizer, list[int]]:
    """Bytes are tokens for what the vocabulary lacks, as in Llama 2; runs of them are decoded together."""
    pieces = ["a", "x", "|", "你", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(models.BPE({piece: i for i, piece in enumerate(pieces)}, [], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer, [0, 1, 2, 3, *(4 + byte for byte in CHARACTERS.encode())]


def random_sequences(tokens: list[int], count: int) -> list[list[int]]:
    """Mostly the bytes of whole characters in order, now and then broken off."""
    draw = np.random.default_rng(0)
    sequences = []
    for _ in range(count):
        sequence: list[int] = []
        while len(sequence) < 14:
            start = draw.integers(len(tokens))
            sequence += tokens[start : start + draw.integers(1, 6)]
        sequences.append(sequence)
    return sequences


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
@pytest.mark.parametrize("stop", [(), ("x|", "|a"), ("你x",)])
def test_stable_text_is_never_taken_back_by_what_follows(kind, stop):
    tokenizer, tokens = kind()
    byte = incomplete_utf8_token(tokenizer.decode, tokenizer.get_vocab_size())
    withheld = broken = stopped = 0
    for sequence in random_sequences(tokens, 300):
        stable = []
        for count in range(1, len(sequence) + 1):
            cut = cut_at_stop(tokenizer.decode, sequence[:count], stop) if stop else None
            final = cut[0] if cut else tokenizer.decode(sequence[:count])
            # Whether the completion ends here by its length or by a stop string, all that was shown begins its text.
            assert all(final.startswith(text) for text in stable)
            if cut:
                stopped += 1
                break
            stable.append(stable_text(tokenizer.decode, sequence[:count], stop, byte))
            withheld += stable[-1] != final
            broken += "\ufffd" in final
    assert withheld
    assert broken
    assert bool(stop) == bool(stopped)


@pytest.mark.parametrize("kind", [byte_level, byte_fallback])
def test_text_is_stable_once_whole_character_of_vocabulary_follows(kind):
    tokenizer, _ = kind()
    byte = incomplete_utf8_token(tokenizer.decode, tokenizer.get_vocab_size())
    start = 0 if kind is byte_level else 4
    tokens = [start + b for b in "é你".encode()] + [tokenizer.token_to_id("a")]
    assert stable_text(tokenizer.decode, tokens[:-1], (), byte) in ("é你", "")
    assert stable_text(tokenizer.decode, tokens, (), byte) == "é你a"
    assert stable_text(tokenizer.decode, tokens[:1], (), byte) == ""


class Utf8Tokenizer(TableTokenizer):
    """Letters are single bytes of multi-byte characters, so that most tokens are incomplete."""

    def __init__(self):
        super().__init__()
        parts = [bytes([b]) for b in "é你ß😀".encode()] + ["é".encode(), "你".encode()[:2], b"a", b"|"]
        self.bytes = [b"", b"", *(parts[i % len(parts)] for i in range(ARCHITECTURE.vocab_size - 2))]

    def decode(self, ids):
        return b"".join(self.bytes[i] for i in ids).decode("utf-8", errors="replace")


@pytest.mark.parametrize("tokenizer", [TableTokenizer, Utf8Tokenizer])
@pytest.mark.parametrize(("steps", "temperature"), [(1, 1.0), (5, 0.0)])
def test_pieces_join_to_text_of_generate(params, tokenizer, steps, temperature):
    sampling = SamplingParams(temperature=temperature, max_tokens=30)
    whole = make_engine(params, tokenizer=tokenizer())
    engine = make_engine(params, tokenizer=tokenizer(), steps_per_call=steps, slots=1)
    streamed = 0
    for expected in whole.generate(ragged(8), sampling):
        request = next(r for r in ragged(8) if r.id == expected.id)
        pieces, completion = drain(engine.stream(request, sampling))
        assert "".join(pieces) == expected.text
        assert completion == expected
        assert all(pieces)
        streamed += len(pieces) > 1
    assert streamed


def test_no_piece_holds_part_of_stop_string_that_calls_cut_apart(params):
    free = {c.id: c for c in make_engine(params).generate(ragged(12), SamplingParams(temperature=1.0, max_tokens=30))}
    stopped = 0
    for request in ragged(12):
        text = free[request.id].text
        if len(text) < 8:
            continue
        sampling = SamplingParams(temperature=1.0, max_tokens=30, stop=(text[4:8], string.ascii_letters))
        expected = next(make_engine(params).generate([request], sampling))
        pieces, completion = drain(make_engine(params, steps_per_call=3, slots=1).stream(request, sampling))
        assert completion == expected
        assert "".join(pieces) == expected.text
        assert sampling.stop[0] not in expected.text
        stopped += expected.finish_reason == "stop" and expected.text != text
    assert stopped > 2


def test_beginning_of_stop_string_that_does_not_go_on_is_shown_after_all(params):
    request = ragged(12)[5]
    text = next(make_engine(params).generate([request], SamplingParams(temperature=0.0, max_tokens=12))).text
    sampling = SamplingParams(temperature=0.0, max_tokens=12, stop=(text[-1] + "never",))
    pieces, completion = drain(make_engine(params, steps_per_call=1, slots=1).stream(request, sampling))
    assert "".join(pieces) == completion.text == text


def test_prompt_that_does_not_fit_gives_no_piece_and_says_why(params):
    pieces, completion = drain(make_engine(params).stream(Request("long", "a" * 60), SamplingParams()))
    assert pieces == []
    assert completion.finish_reason == "error"
    assert "61 tokens" in completion.error


def test_sampling_settings_out_of_range_are_refused_before_anything_is_decoded(params):
    with pytest.raises(UserError, match="top_p"):
        make_engine(params).stream(Request("a", "a"), dataclasses.replace(SamplingParams(), top_p=0.0))
