"""What each damage does to a response, and when it does not apply."""

import json

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop.judging.damages import DAMAGES, TEXTS_FILE, damaged, read_texts
from isheep_jax.loop.prompting.seeds import Seed, read_seeds
from isheep_jax.loop.prompting.templates import load

SEED = Seed(
    "seed-1", "Say why the sea is salty.", "", "Rain takes salt from rocks.\nRivers bring it to the sea, day by day."
)
OTHERS = [Seed("seed-2", "Count the cats.", "", "Two cats."), Seed("seed-3", "Name a river.", "", "The Elbe.")]
TEXTS = {"generic": ["It depends."], "refusal": ["I cannot."], "wrong language": ["Das ist so."]}


def of(output, **more):
    return damaged(
        Seed("seed-1", SEED.instruction, "", output), more.get("others", OTHERS), more.get("texts", TEXTS), 0
    )


def test_each_damage_is_what_it_says():
    responses = of(SEED.output)
    assert list(responses) == list(DAMAGES)
    words = SEED.output.split()
    assert responses["mismatch"] in [other.output for other in OTHERS]
    assert sorted(responses["shuffled"].split()) == sorted(words)
    assert responses["looping"].split() == words[:12] * 3
    assert responses["echo"] == SEED.instruction
    assert responses["half echo"].startswith(f"{SEED.instruction} Rain takes salt")
    assert SEED.output.startswith(responses["truncated"])
    assert 0.2 < len(responses["truncated"]) / len(SEED.output) < 0.8
    assert not responses["truncated"].endswith(".")
    assert [responses[kind] for kind in TEXTS] == [text for (text,) in TEXTS.values()]
    assert responses["broken format"] == "Rain takes salt from rocks Rivers bring it to the sea day by day"


def test_the_same_seed_gives_the_same_damage_whatever_stands_beside_it():
    assert of(SEED.output) == of(SEED.output, others=[SEED, *OTHERS])
    assert damaged(SEED, OTHERS, TEXTS, 0) != damaged(SEED, OTHERS, TEXTS, 1)


def test_a_damage_that_does_not_apply_is_left_out():
    assert set(of("blue")) == set(DAMAGES) - {"shuffled", "truncated", "broken format"}
    assert "shuffled" not in of("go go go")
    assert "mismatch" not in of("blue", others=[])
    assert "mismatch" not in of("Two  cats.", others=OTHERS[:1])
    assert "echo" not in of(SEED.instruction)
    assert not set(TEXTS) & set(of("blue", texts={}))


@pytest.mark.parametrize("prompts", ["standard", "tiny"])
def test_every_damage_applies_to_most_of_the_seeds_that_come_with_the_prompts(prompts):
    templates = load(prompts)
    seeds = read_seeds(templates.seeds_file("builtin"), 1, "paper")
    texts = read_texts(templates.directory)
    made = [damaged(seed, seeds, texts, 0) for seed in seeds]
    for kind in DAMAGES:
        assert sum(kind in responses for responses in made) >= len(seeds) / 4, kind


def test_a_prompts_directory_needs_no_texts_but_a_file_of_them_must_be_one(tmp_path):
    assert read_texts(tmp_path) == {}
    (tmp_path / TEXTS_FILE).write_text(json.dumps(TEXTS))
    assert read_texts(tmp_path) == TEXTS
    for text in ("{", "[]x", '{"rude": ["Go away."]}', '{"generic": [3]}', '{"generic": 3}'):
        (tmp_path / TEXTS_FILE).write_text(text)
        with pytest.raises(UserError, match=f"prompts: .*{TEXTS_FILE}.*(should be like|none of the kinds)"):
            read_texts(tmp_path)
