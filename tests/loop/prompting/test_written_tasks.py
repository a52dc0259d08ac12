"""What base models write when they are asked for tasks, and what becomes of it.

Each row is a completion, the decision wanted, and why. The decisions are written by hand, not taken from the parser.
"""

import pytest

from isheep_jax.loop.filters.text_rules import instruction_reason
from isheep_jax.loop.prompting.few_shot import parse

# Two tasks in the form of the standard prompt. The prompt ends with "6. Instruction:", so that the first has no label.
SORT = ("Sort these three words by length.", "pear fig banana")
NAME = ("Name a river that flows through Vienna.", "")
FIRST = " Sort these three words by length.\n6. Input:\npear fig banana\n"
SECOND = "7. Instruction: Name a river that flows through Vienna.\n7. Input:\n<noinput>\n"

FORM, LEFTOVER, CUT = "not in the form", "leftover of the form", "unfinished"

FINISHED = [
    # The form, and what is as good.
    (FIRST + "###\n" + SECOND, [SORT, NAME], "two tasks in the form"),
    (FIRST + "###\n" + SECOND + "###\n", [SORT, NAME], "a separator at the end opens nothing"),
    (FIRST + "###\n" + SECOND + "###\n8.", [SORT, NAME], "the number before a stop string is no task"),
    ("\n###\n6. Instruction:" + FIRST, [SORT], "the model writes the label once more"),
    (" Instruction:" + FIRST, [SORT], "the same, without a number"),
    ((FIRST + "###\n" + SECOND).replace("\n", "\r\n"), [SORT, NAME], "line ends of Windows"),
    ((FIRST + "###\n" + SECOND).replace("7.", "23."), [SORT, NAME], "a wrong number: models miscount"),
    ((FIRST + "###\n" + SECOND).replace("7.", "6."), [SORT, NAME], "a number twice"),
    ((FIRST + "###\n" + SECOND).replace("7.", "7)"), [SORT, NAME], "another mark behind the number"),
    ((FIRST + "###\n" + SECOND).replace("7. ", ""), [SORT, NAME], "no number"),
    ((FIRST + "###\n" + SECOND).replace("Instruction", "INSTRUCTION"), [SORT, NAME], "capitals"),
    (FIRST + "\n\n   ###   \n\n\n" + SECOND, [SORT, NAME], "white space around the separator"),
    (FIRST + "######\n" + SECOND, [SORT, NAME], "a longer separator"),
    (FIRST + "###\n###\n\n###\n" + SECOND, [SORT, NAME], "separators repeated: nothing between them is no task"),
    (FIRST.strip() + " ### " + SECOND, [SORT, NAME], "a separator within the line, a label behind it"),
    (FIRST + "### " + SECOND, [SORT, NAME], "separator and label on one line"),
    (" Name a river that flows through Vienna.", [NAME], "no input field: the task needs none"),
    (" Name a river that flows through Vienna.\n6. Input:\n", [NAME], "an empty input field"),
    (" Name a river that flows through Vienna.\n6. Input: <noinput>", [NAME], "the marker on the label's line"),
    (" Name a river that flows through Vienna.\n6. Input: <NoInput>", [NAME], "the marker in capitals"),
    (
        " Put these into order:\n1. wash\n2. dry\n3. rinse\n6. Input:\n<noinput>",
        [("Put these into order:\n1. wash\n2. dry\n3. rinse", "")],
        "numbered lines within a task are its own",
    ),
    (
        " Answer in two lines.\n\nWhat is rain?\n\nWhat is hail?",
        [("Answer in two lines.\n\nWhat is rain?\n\nWhat is hail?", "")],
        "paragraphs",
    ),
    (
        " Say what the mark ### does in Markdown.",
        [LEFTOVER],
        "separator in a sentence: a cut there would leave half a task that looks whole",
    ),
    (
        " 2.5 kg of pears cost 5 euros; what does one cost?",
        [("2.5 kg of pears cost 5 euros; what does one cost?", "")],
        "a number that the task begins with is no numbering",
    ),
    (
        " 1. e4 c5 is the start of which chess opening?",
        [("1. e4 c5 is the start of which chess opening?", "")],
        "the same, even where it looks like one",
    ),
    (
        FIRST + "###\n7. **Instruction:** Name a river that flows through Vienna.\n",
        [SORT, ("Name a river that flows through Vienna.", "")],
        "a label in bold",
    ),
    (
        " Name a river that flows through Vienna.\n6. Input:\nNo input",
        [("Name a river that flows through Vienna.", "")],
        "the marker in other words",
    ),
    # Not the form.
    (FIRST + "###\n7. Name a river in Vienna.\n", [SORT, FORM], "no label"),
    (FIRST + "###\n**7. Instruction: Name a river.**\n", [SORT, FORM], "a task in bold"),
    (FIRST + "###\nTask 7\nInstruction: Name a river.\n", [SORT, FORM], "a title before the label"),
    (FIRST + "###\n7. Instruction Name a river.\n", [SORT, FORM], "no colon"),
    (FIRST + "###\n7. Instructions: Name a river.\n", [SORT, FORM], "another word"),
    (FIRST + "###\nInstruction 7: Name a river.\n", [SORT, FORM], "the number behind the label"),
    (FIRST + "###\n7. Input:\nVienna\n7. Instruction: Name its river.\n", [SORT, FORM], "input before the instruction"),
    (FIRST + "###\n7.\n###\n" + SECOND, [SORT, FORM, NAME], "a number and nothing else"),
    (FIRST + "###\n7. 指令：说出一条河。\n", [SORT, FORM], "labels in another language"),
    (FIRST + '###\n{"instruction": "Name a river."}\n', [SORT, FORM], "JSON"),
    (FIRST + "6. Input:\nplum\n", [FORM], "two inputs"),
    (FIRST + "---\n" + SECOND, [FORM], "another separator: two tasks run together"),
    (FIRST + SECOND, [FORM], "no separator"),
    (" Sort these three words. 6. Input: pear fig plum", [FORM], "a numbered label within the line"),
    (" Sort these three words.\nInstruction: Name a river.", [FORM], "two instructions"),
    # The form, but rules drop what stands in it.
    (FIRST + "6. Output:\nfig pear banana\n", [LEFTOVER], "an answer behind a numbered label"),
    (FIRST + "Output:\nfig pear banana\n", [LEFTOVER], "an answer, as in Alpaca's form"),
    (" Sort these three words. Input: pear fig plum", [LEFTOVER], "a label within the line"),
    (" Name a river that flows through Vienna. <noinput>", [LEFTOVER], "the marker in the instruction"),
    ("\n6. Input:\npear fig", ["empty"], "an input without an instruction"),
    (FIRST + "###\n7. Instruction:\n7. Input:\nVienna\n", [SORT, "empty"], "an empty instruction"),
    (" ...\n6. Input:\n<noinput>", ["empty"], "no letter and no digit"),
    (" Sort them.\n6. Input:\nb a", ["too short"], "three words or fewer"),
    (" **Sort these three words by length.**", ["starts with punctuation"], "a first task in bold"),
    (" 把下面这三个词按长度排序。", ["too short"], "a language without spaces, under rules meant for English"),
    (" Übersetze diesen kurzen Satz ins Englische.", ["not English"], "another language"),
    (" Write about this page: https://example.org please.", ["has a link"], "a link"),
    # Nothing.
    ("", [], "an empty completion"),
    (" \n\n\t", [], "white space"),
    ("###", [], "a separator alone"),
    (" 6.", [], "a number alone"),
]  # fmt: skip

UNFINISHED = [
    (FIRST + "###\n7. Instruction: Name a ri", [SORT, CUT], "cut within the last instruction"),
    (FIRST + "###\n" + SECOND, [SORT, CUT], "the last may be whole; nobody knows"),
    (FIRST + "###\n7. Inst", [SORT, CUT], "cut within a label"),
    (FIRST + "###\n7.", [SORT], "cut within a number: no task was begun"),
    (FIRST + "###\n", [SORT], "cut behind a separator: the task before it is whole"),
    (FIRST + "##", [CUT], "cut within the separator"),
    (FIRST, [CUT], "cut within the first input"),
    (" Sort these", [CUT], "cut within the first instruction"),
    ("", [], "nothing"),
]


def decisions(text, finished):
    """A task (instruction, input) for each that is kept, and the reason for each that is dropped."""
    found = []
    for s in parse(text, finished):
        reason = s.reason or instruction_reason("paper", s.instruction, s.input)
        found.append(reason or (s.instruction, s.input))
    return found


@pytest.mark.parametrize(("text", "wanted", "why"), FINISHED, ids=[row[2] for row in FINISHED])
def test_a_completion_that_ended_by_itself_gives_the_tasks_that_are_whole(text, wanted, why):
    assert decisions(text, finished=True) == wanted


@pytest.mark.parametrize(("text", "wanted", "why"), UNFINISHED, ids=[row[2] for row in UNFINISHED])
def test_of_a_completion_that_was_cut_the_last_task_does_not_count(text, wanted, why):
    assert decisions(text, finished=False) == wanted


def test_the_tables_say_each_thing_once():
    for rows in (FINISHED, UNFINISHED):
        assert len({row[0] for row in rows}) == len(rows)
