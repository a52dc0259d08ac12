"""Pages hold questions of a kind by one writer; the base that has read them takes its manners from examples."""

import itertools
import random
import re

import jax.numpy as jnp
import numpy as np
import pytest
from meshes import mesh_of

from isheep_jax.checkpoint.hf_config import read_architecture
from isheep_jax.checkpoint.hf_weights import load_parameters
from isheep_jax.config import DecodeConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Request, SamplingParams
from isheep_jax.evaluation import tiny_domain
from isheep_jax.loop.prompting.templates import load
from isheep_jax.runtime.vector_index import Index
from isheep_jax.sharding import DECODE_RULES
from isheep_jax.text.conversation import Message
from isheep_jax.text.tokenizer import Tokenizer
from isheep_jax.tiny import CHECKPOINT, PAGES_CHECKPOINT, corpus, pages, world


def pairs(page):
    found = re.findall(r"(?:Question|Q|Task): (.*)\n(?:Answer|A|Result): (.*)\n", page)
    return [(world.parse_instruction(question), answer) for question, answer in found]


def test_writer_of_page_keeps_its_habits_and_nothing_is_held_out():
    rng = random.Random(0)
    read = [pairs(pages.page(rng)) for _ in range(300)]
    assert {len(page) for page in read} == {3, 4, 5, 6}
    habits = []
    for page in read:
        assert all(item is not None and item.split == "train" for item, _ in page)
        seen: dict[str, set[bool]] = {}
        for item, answer in page:
            check = world.check(item, answer)
            # Only a whole answer tells: parts of wrong ones may look like decorations.
            if check.content:
                for constraint, obeyed in check.constraints.items():
                    seen.setdefault(constraint, set()).add(obeyed)
        habits += seen.values()
    assert sum(len(h) == 1 for h in habits) > 0.98 * len(habits)
    assert 0.2 < sum(h == {True} for h in habits) / len(habits) < 0.6


def test_documents_are_pages_and_others_and_not_those_of_embedded_base():
    read = list(itertools.islice(pages.documents(0), 400))
    share = sum(len(pairs(document)) > 2 for document in read) / len(read)
    assert abs(share - pages.SHARE) < 0.1
    assert list(itertools.islice(pages.documents(0), 20)) == read[:20]
    assert not set(read) & set(itertools.islice(corpus.documents(0), 400))


@pytest.fixture(scope="module")
def base() -> Engine:
    mesh = mesh_of()
    architecture = read_architecture(PAGES_CHECKPOINT)
    params = load_parameters(PAGES_CHECKPOINT, architecture, mesh=mesh, rules=DECODE_RULES, dtype=jnp.float32)
    config = DecodeConfig(slots=64, steps_per_call=16, max_length=128)
    tokenizer = Tokenizer.load(PAGES_CHECKPOINT)
    return Engine(params, architecture, tokenizer, config, mesh=mesh, seed=0, compute_dtype=jnp.float32)


@pytest.mark.slow
def test_similar_examples_make_it_follow_formats_that_it_ignores_without(base):
    items, samples = tiny_domain.split_items("development")[:120], tiny_domain.samples()
    templates = load("tiny", ("retrieved",))

    def vectors(texts):
        found = {v.id: v.vector for v in base.embed([Request(str(i), text) for i, text in enumerate(texts)])}
        return np.array([found[str(i)] for i in range(len(texts))])

    def accuracy(prompts):
        requests = [Request(str(i), prompt) for i, prompt in enumerate(prompts)]
        sampling = SamplingParams(temperature=0.0, max_tokens=32, stop=("\nQuestion:",))
        found = {c.id: c.text.strip() for c in base.generate(requests, sampling)}
        return sum(found[str(i)] == item.response for i, item in enumerate(items)) / len(items)

    def after(shown):
        return [
            templates.render("retrieved", examples=[samples[i] for i in row], question=x.instruction)
            for row, x in zip(shown, items)
        ]

    index = Index(vectors([s["question"] for s in samples]), mesh_of())
    near = index.nearest(vectors([x.instruction for x in items]), 3)[:, ::-1]
    alone = accuracy([(Message("user", x.instruction),) for x in items])
    drawn = accuracy(after(np.random.default_rng(0).integers(len(samples), size=(len(items), 3))))
    nearest = accuracy(after(near))
    assert alone < 0.15
    assert nearest > drawn + 0.05 > alone + 0.3


def test_it_is_embedded_base_but_for_its_weights():
    assert read_architecture(PAGES_CHECKPOINT) == read_architecture(CHECKPOINT)
    for name in ("tokenizer.json", "tokenizer.model", "chat_template.jinja"):
        assert (PAGES_CHECKPOINT / name).read_bytes() == (CHECKPOINT / name).read_bytes()
    assert sum(path.stat().st_size for path in PAGES_CHECKPOINT.iterdir()) < 3e6


def test_card_is_one_that_command_writes():
    card = (PAGES_CHECKPOINT / "README.md").read_text()
    assert card == pages.card(0, {"loss_tokens": 1_535_169, "steps": pages.STEPS, "fresh_document_loss": 0.745})
