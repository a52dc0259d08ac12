import pytest

from isheep_jax.loop.prompting.few_shot import parse
from isheep_jax.loop.prompting.protocols import ParsedInstruction as Parsed


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


@pytest.mark.parametrize(
    "dressed",
    [
        "Instruction：{}\nInput：{}",
        "**Instruction:** {}\n**Input:** {}",
        "**5. Instruction**: {}\n5. **Input**: {}",
        "*Instruction:* {}\n__Input:__ {}",
        "## Instruction: {}\n- Input: {}",
        "[Instruction]: {}\n> `Input:` {}",
        "INSTRUCTION :{}\n\n\ninput\n:{}",
    ],
)
def test_a_label_in_bold_or_with_another_colon_is_a_label(dressed):
    text = dressed.format("Sort **them**.", "*b* a")
    assert parse(text + "\n###\n", finished=True) == [Parsed("Sort **them**.", "*b* a")]


def test_every_way_to_say_that_there_is_no_input_is_none():
    for said in ("None", "<noinput>", "N/A", "No input needed.", "(none)", "-"):
        assert parse(f" Name a color.\nInput: {said}\n###\n", finished=True) == [Parsed("Name a color.", "")]
