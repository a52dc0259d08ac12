"""The command that makes the embedded base model: python -m isheep_jax.tiny.pretrain --output DIRECTORY

Samples the corpus, trains the tokenizer and the model from random weights in one pass over it, and writes a directory
in Hugging Face format with its card.
"""

import itertools
import math
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import sentencepiece

from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import Architecture, parameter_count, parameter_table
from isheep_jax.model.transformer import ForwardSetup, forward, logits
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import corpus, vocabulary

LAYERS, HIDDEN, HEADS, FEED_FORWARD = 4, 128, 4, 352
CONTEXT = 128  # tokens per row; no document of the corpus is longer
BATCH = 16  # rows per update
STEPS = 3200  # 6.6 million tokens
LEARNING_RATE = 3e-3
BOS, EOS = 1, 2


def tiny_architecture(eos_token_ids: tuple[int, ...]) -> Architecture:
    """Returns the architecture of the embedded model."""
    return Architecture(
        family="llama",
        vocab_size=vocabulary.VOCABULARY_SIZE,
        hidden_size=HIDDEN,
        intermediate_size=FEED_FORWARD,
        layers=LAYERS,
        heads=HEADS,
        kv_heads=HEADS,
        head_dim=HIDDEN // HEADS,
        norm_eps=1e-5,
        rope_theta=10_000.0,
        rope_scaling=None,
        context_length=CONTEXT,
        tied_embeddings=True,
        bos_token_id=BOS,
        eos_token_ids=eos_token_ids,
    )


# Yields the documents of a seed, without end.
Corpus = Callable[[int], Iterator[str]]


def rows(
    tokenizer: sentencepiece.SentencePieceProcessor, seed: int, documents: Corpus
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields rows of whole documents, packed first-fit into a few open rows.

    Yields tokens [CONTEXT + 1] and segment ids [CONTEXT + 1] (1, 2, ... per document; 0 is padding).
    """
    open_rows: list[list[list[int]]] = [[] for _ in range(12)]
    for text in documents(seed):
        tokens = [BOS, *tokenizer.encode(text), EOS][: CONTEXT + 1]
        for row in open_rows:
            if sum(map(len, row)) + len(tokens) <= CONTEXT + 1:
                row.append(tokens)
                break
        else:
            fullest = max(range(len(open_rows)), key=lambda i: sum(map(len, open_rows[i])))
            full, open_rows[fullest] = open_rows[fullest], [tokens]
            flat = np.zeros(CONTEXT + 1, np.int32)
            segments = np.zeros(CONTEXT + 1, np.int32)
            flat[: sum(map(len, full))] = list(itertools.chain(*full))
            segments[: sum(map(len, full))] = [i + 1 for i, d in enumerate(full) for _ in d]
            yield flat, segments


def batches(
    tokenizer: sentencepiece.SentencePieceProcessor, seed: int, documents: Corpus = corpus.documents
) -> Iterator[dict[str, np.ndarray]]:
    """Yields tokens, targets, segment ids and positions, [BATCH, CONTEXT] each; targets of -1 have no loss."""
    source = rows(tokenizer, seed, documents)
    while True:
        group = list(itertools.islice(source, BATCH))
        tokens, segments = (np.stack(x) for x in zip(*group))
        starts = np.zeros_like(segments)
        starts[:, 1:] = np.where(segments[:, 1:] != segments[:, :-1], np.arange(1, CONTEXT + 1), 0)
        positions = np.arange(CONTEXT + 1) - np.maximum.accumulate(starts, axis=1)
        has_loss = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        yield {
            "tokens": tokens[:, :-1],
            "targets": np.where(has_loss, tokens[:, 1:], -1),
            "segment_ids": segments[:, :-1],
            "positions": positions[:, :-1].astype(np.int32),
        }


def initial_parameters(architecture: Architecture, seed: int):
    """Returns random weights, each leaf from its own generator, so that they do not depend on the compiled program."""

    def draw(path, spec):
        name = jax.tree_util.keystr(path)
        if name.endswith("norm']"):
            return jnp.ones(spec.shape, jnp.float32)
        generator = np.random.default_rng([seed, zlib.crc32(name.encode())])
        return jnp.asarray(generator.normal(0.0, 0.02, spec.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, parameter_table(architecture))


def loss_fn(params, architecture: Architecture, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the mean cross-entropy (nats per token) over the targets."""
    hidden, _ = forward(
        params,
        architecture,
        batch["tokens"],
        batch["positions"],
        ForwardSetup(jnp.float32),
        segment_ids=batch["segment_ids"],
    )
    token_logits = logits(params, architecture, hidden, jnp.float32)
    mask = batch["targets"] >= 0
    losses = optax.softmax_cross_entropy_with_integer_labels(token_logits, jnp.maximum(batch["targets"], 0))
    return jnp.sum(losses * mask) / jnp.sum(mask)


def optimizer(params, steps: int, learning_rate: float = LEARNING_RATE) -> optax.GradientTransformation:
    """Returns Muon for the matrices of the layers and AdamW for embedding and norms; warmup, then a cosine to zero."""
    schedule = optax.warmup_cosine_decay_schedule(0.0, learning_rate, min(100, steps // 10), steps)
    sides = {
        "wq": ((1,), (2, 3)),
        "wk": ((1,), (2, 3)),
        "wv": ((1,), (2, 3)),
        "wo": ((1, 2), (3,)),
        "w_gate": ((1,), (2,)),
        "w_up": ((1,), (2,)),
        "w_down": ((1,), (2,)),
    }
    dimensions = jax.tree.map(lambda _: None, params)
    dimensions["layers"] = {
        name: optax.contrib.MuonDimensionNumbers(*sides[name]) if name in sides else None for name in params["layers"]
    }
    return optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.contrib.muon(schedule, muon_weight_dimension_numbers=dimensions, consistent_rms=0.2),
    )


def train(
    params,
    architecture: Architecture,
    pieces: sentencepiece.SentencePieceProcessor,
    seed: int,
    steps: int,
    learning_rate: float = LEARNING_RATE,
    documents: Corpus = corpus.documents,
    report: Callable[[str], None] = lambda line: None,
):
    """Trains in one pass over the documents of a seed. Returns the parameters and the figures for the card.

    Args:
        params: float32, where training starts.
        architecture: the model's.
        pieces: the tokenizer.
        seed: seeds the documents.
        steps: updates.
        learning_rate: its peak.
        documents: gives the documents of a seed.
        report: called with each line of progress.
    """
    optimize = optimizer(params, steps, learning_rate)
    state = optimize.init(params)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, batch):
        loss, gradient = jax.value_and_grad(loss_fn)(params, architecture, batch)
        updates, state = optimize.update(gradient, state, params)
        return optax.apply_updates(params, updates), state, loss

    report(f"{parameter_count(architecture):,} parameters, {steps * BATCH * CONTEXT:,} tokens, seed {seed}")
    start, loss_tokens, recent = time.monotonic(), 0, []
    for i, batch in enumerate(itertools.islice(batches(pieces, seed, documents), steps), 1):
        loss_tokens += int((batch["targets"] >= 0).sum())
        params, state, loss = step(params, state, batch)
        recent.append(loss)
        if i % 100 == 0 or i == steps:
            elapsed = time.monotonic() - start
            report(
                f"step {i:5d}/{steps}  loss {float(jnp.stack(recent).mean()):.4f}  "
                f"{i * BATCH * CONTEXT / elapsed:,.0f} tokens/s  {elapsed / 60:.1f} min"
            )
            recent = []
    fresh = [
        float(jax.jit(loss_fn, static_argnums=1)(params, architecture, batch))
        for batch in itertools.islice(batches(pieces, seed + 1_000_003, documents), 20)
    ]
    loss = sum(fresh) / len(fresh)
    return params, {"steps": steps, "loss_tokens": loss_tokens, "fresh_document_loss": loss}


def print_line(line: str) -> None:
    """Prints a line of progress at once, also into a pipe."""
    print(line, flush=True)


def pretrain(output: Path, seed: int, steps: int = STEPS) -> None:
    """Trains tokenizer and model, and writes them to `output` in Hugging Face format."""
    with tempfile.TemporaryDirectory() as name:
        staging = Path(name)
        vocabulary.train_tokenizer(staging)
        (staging / "chat_template.jinja").write_text(vocabulary.CHAT_TEMPLATE)
        pieces = sentencepiece.SentencePieceProcessor(model_file=str(staging / "tokenizer.model"))
        architecture = tiny_architecture((EOS, pieces.piece_to_id("<|end|>")))
        params = initial_parameters(architecture, seed)
        params, figures = train(params, architecture, pieces, seed, steps, report=print_line)
        tokenizer = Tokenizer.load(staging)
        save_checkpoint(output, params, architecture, tokenizer, card=card(architecture, seed, figures))


def card(architecture: Architecture, seed: int, figures: dict[str, float]) -> str:
    """Returns the model card: corpus, figures and limits."""
    loss = figures["fresh_document_loss"]
    share = ", ".join(f"{100 * p:.0f} % {name}s" for name, p in corpus.DOCUMENTS.items())
    return f"""---
license: apache-2.0
tags: [isheep_jax]
---
# The tiny base model

A Llama-architecture language model of {parameter_count(architecture):,} parameters ({architecture.layers} layers,
{architecture.hidden_size} wide) for trying the loop of isheep_jax on a laptop. Pre-trained from random weights by

    python -m isheep_jax.tiny.pretrain --seed {seed} --output DIRECTORY

- Corpus: documents about a small world of words and numbers, sampled by its code ({share}).
  Its writers get the content right in about {100 * corpus.CONTENT_RIGHT:.0f} % of the answers, ignore most format
  constraints, and grade with noise. Instructions whose hash falls into one of the three held-out splits
  never occur.
- Loss tokens: {figures["loss_tokens"]:,}, each once, in {figures["steps"]:,} updates of {BATCH} rows.
- Loss on fresh documents: {loss:.3f} nats per token (perplexity {math.exp(loss):.2f}).

What it is not: it knows no English beyond these templates and no facts beyond these words. The corpus plants both the
formats that the loop elicits and the grading that it uses; what the loop gains on it is elicitation, not new ability.
"""


@dataclass(frozen=True)
class PretrainOptions:
    """Options of the command."""

    output: str = ""
    """Directory to write, which must not exist."""
    seed: int = 0
    """Seed of the weights and of the corpus."""
    steps: int = STEPS
    """Updates (count)."""


COMMAND = Command(
    module="isheep_jax.tiny.pretrain",
    options=PretrainOptions,
    usage=("--output DIRECTORY [--seed=N] [--steps=N]",),
    about="Makes the embedded base model: samples the corpus, trains the tokenizer and the model from random weights "
    f"in one pass over it (updates of {BATCH} x {CONTEXT} tokens), and writes a Hugging Face directory with its card.",
    example="--output bases/seed_0",
    required=("output",),
    ranges={"steps": "[1, inf)"},
)


def main(arguments: Sequence[str]) -> None:
    """Pre-trains and writes the model. Raises `UserError` for bad input."""
    options = COMMAND.parse(arguments)
    check_new(options.output)
    pretrain(Path(options.output), options.seed, options.steps)


def check_new(output: str) -> None:
    """Raises `UserError` when there is something at the output already."""
    if Path(output).exists():
        raise UserError(f"--output: {output} exists; name a directory that does not")


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
