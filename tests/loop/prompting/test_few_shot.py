import pytest
from scripted_backend import context_of, tiny_config

from isheep_jax.config import SynthesizeConfig
from isheep_jax.loop.prompting.few_shot import parse, shown_seeds
from isheep_jax.loop.prompting.protocols import ParsedInstruction as Parsed
from isheep_jax.loop.prompting.seeds import Seed

SEEDS = [Seed(f"seed-{i:03d}", f"Do the thing number {i} quickly.", "", "") for i in range(8)]


@pytest.mark.parametrize(
    ("text", "segments"),
    [
        (" Add two.", [Parsed("Add two.", "")]),
        (" Add two.\nInput:\n<noinput>", [Parsed("Add two.", "")]),
        (" Add two.\n4. Input: 1\n2\n", [Parsed("Add two.", "1\n2")]),
        (
            " Add.\n###\n5. Instruction: Sort\nthem.\n5. Input:\nb a\n###\n",
            [Parsed("Add.", ""), Parsed("Sort\nthem.", "b a")],
        ),
        (" Instruction: Add.\n### Instruction: Sort.", [Parsed("Add.", ""), Parsed("Sort.", "")]),
        ("\n### Instruction: Add.", [Parsed("Add.", "")]),
        (
            " Add.\n###\nHello there",
            [Parsed("Add.", ""), Parsed("Hello there", "", "not in the form")],
        ),
        (" A.\nInput: b\nInput: c", [Parsed("A.\nInput: b\nInput: c", "", "not in the form")]),
        ("", []),
        ("###", []),
    ],
)
def test_a_finished_completion_is_parsed_whole(text, segments):
    assert parse(text, finished=True) == segments


def test_the_last_task_of_an_unfinished_completion_does_not_count():
    assert parse(" Add.\n###\n5. Instruction: So", finished=False) == [
        Parsed("Add.", ""),
        Parsed("5. Instruction: So", "", "unfinished"),
    ]
    assert parse(" Add.\n###\n", finished=False) == [Parsed("Add.", "")]


def shown(seed, iteration, prompt):
    config = tiny_config("", seed=seed, synthesize=SynthesizeConfig(shots=3))
    return shown_seeds(context_of(config, seeds=SEEDS, iteration=iteration), prompt)


def test_a_prompts_seeds_follow_from_the_seed_the_iteration_and_its_index():
    assert len({s.id for s in shown(0, 1, 7)}) == 3
    assert shown(0, 1, 7) == shown(0, 1, 7)
    others = [shown(*key) for key in ((1, 1, 7), (0, 2, 7), (0, 1, 8))]
    assert all(shown(0, 1, 7) != other for other in others)
