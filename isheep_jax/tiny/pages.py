"""The command that makes the base model that reads examples: python -m isheep_jax.tiny.pages --output DIRECTORY

Continues the pre-training of the embedded base model on its corpus and on pages. A page has several questions of a kind
with the answers of one writer, who obeys a format constraint throughout the page or ignores it throughout. A model that
has read such pages follows the examples in its context, as large base models do; the embedded one cannot.
"""

import math
import random
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import sentencepiece
from etils import epath

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_save import save_checkpoint
from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import run_command
from isheep_jax.config import MeshConfig
from isheep_jax.sharding import TRAIN_RULES, make_mesh
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT, corpus, pretrain, world
from isheep_jax.tiny.world import Item

STEPS = 800  # 1.6 million tokens
LEARNING_RATE = 1e-3
SHARE = 0.4  # share of the documents that are pages
FORMS = tuple(form + "\n" for form in corpus.ANSWER_FORMS)
LENGTHS = (3, 6)  # fewest and most questions of a page; the part of a page beyond a row is cut
CONSTRAINT_COUNTS = {1: 0.65, 2: 0.35}  # probability of each number of constraints that a page's questions share
SAME_TASK = 0.5  # share of the pages whose questions also share their task
OFF_TOPIC = 0.15  # share of the questions that have nothing to do with their page
CAREFUL = 0.25  # share of the writers who obey every constraint; the others have the habits of the corpus


def page(rng: random.Random) -> str:
    """Samples a page. Held-out instructions never appear."""
    task = rng.choice(tuple(world.TASKS)) if rng.random() < SAME_TASK else None
    count = rng.choices(tuple(CONSTRAINT_COUNTS), tuple(CONSTRAINT_COUNTS.values()))[0]
    constraints = rng.sample(tuple(world.CONSTRAINTS), count)
    care, careful = rng.choice((0.5, 1.0, 2.0)), rng.random() < CAREFUL
    obeyed = {c for c, p in world.OBEYED.items() if careful or rng.random() < corpus.scale_odds(p, care)}
    form, text = rng.choice(FORMS), ""
    for _ in range(rng.randint(*LENGTHS)):
        item = corpus.training_item(rng) if rng.random() < OFF_TOPIC else _on_topic(rng, task, constraints)
        right = rng.random() < corpus.scale_odds(corpus.CONTENT_RIGHT, care)
        answer = item.answer if right else world.wrong_answer(item, rng)
        response = world.apply_constraints(answer, obeyed & set(item.constraints))
        text += form.format(instruction=item.instruction, response=response)
    return text


def _on_topic(rng: random.Random, task: str | None, constraints: list[str]) -> Item:
    while True:
        item = world.draw_item(rng)
        item = Item(item.task, item.arguments, tuple(rng.sample(constraints, len(constraints))), item.phrasing)
        if item.task == (task or item.task) and item.split == "train":
            return item


def documents(seed: int) -> Iterator[str]:
    """Yields pages among documents of the corpus that the embedded base has not read, without end."""
    rng = random.Random(f"tiny pages {seed}")
    for document in corpus.documents(seed + 2_000_003):
        yield page(rng) if rng.random() < SHARE else document


def continue_pretraining(output: Path, seed: int, steps: int = STEPS) -> None:
    """Trains the embedded base on these documents and writes it to `output` in Hugging Face format."""
    architecture, tokenizer = read_architecture(CHECKPOINT), Tokenizer.load(CHECKPOINT)
    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    params = load_parameters(epath.Path(CHECKPOINT), architecture, mesh=mesh, rules=TRAIN_RULES, dtype=jnp.float32)
    # Pre-training computes without a mesh.
    params = jax.tree.map(lambda leaf: jnp.asarray(jax.device_get(leaf)), params)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(CHECKPOINT / "tokenizer.model"))
    params, figures = pretrain.train(
        params, architecture, pieces, seed, steps, LEARNING_RATE, documents, pretrain.print_line
    )
    save_checkpoint(output, params, architecture, tokenizer, dtype=jnp.bfloat16, card=card(seed, figures))


def card(seed: int, figures: dict[str, float]) -> str:
    """Returns the model card."""
    loss = figures["fresh_document_loss"]
    return f"""---
license: apache-2.0
tags: [isheep_jax]
---
# The tiny base model that reads examples

The tiny base model of isheep_jax (see the card in `isheep_jax/tiny/checkpoint`), with its pre-training continued by

    python -m isheep_jax.tiny.pages --seed {seed} --output DIRECTORY

- Corpus: that of the tiny base model with {100 * SHARE:.0f} % pages: {LENGTHS[0]} to {LENGTHS[1]} questions that share
  their format constraints, with answers of one writer, who obeys a constraint throughout the page or ignores it.
  {100 * CAREFUL:.0f} % of the writers obey every constraint, the others as seldom as those of the corpus. Instructions
  whose hash falls into one of the three held-out splits never occur.
- Loss tokens: {figures["loss_tokens"]:,}, each once, in {figures["steps"]:,} updates of {pretrain.BATCH} rows.
- Loss on fresh documents: {loss:.3f} nats per token (perplexity {math.exp(loss):.2f}).

Because of the pages, examples in the context decide how the model answers; without examples it still ignores most
format constraints. It is meant for trying the loop and for nothing else.
"""


@dataclass(frozen=True)
class PagesOptions:
    """Options of the command."""

    output: str = ""
    """Directory to write, which must not exist."""
    seed: int = 0
    """Seed of the documents."""


COMMAND = Command(
    module="isheep_jax.tiny.pages",
    options=PagesOptions,
    usage=("--output DIRECTORY [--seed=N]",),
    about="Makes the base model that reads examples: continues the pre-training of the embedded base model on its "
    "corpus and on pages of questions with answers, and writes a Hugging Face directory with its card.",
    example="--output bases/pages",
    required=("output",),
)


def main(arguments: Sequence[str]) -> None:
    """Trains and writes the model. Raises `UserError` for bad input."""
    options = COMMAND.parse(arguments)
    pretrain.check_new(options.output)
    continue_pretraining(Path(options.output), options.seed)


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
