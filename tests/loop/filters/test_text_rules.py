import pytest

from isheep_jax.loop.filters.text_rules import clean_response, instruction_reason, response_reason


@pytest.mark.parametrize(
    ("instruction", "input", "reason"),
    [
        ("Name three rivers in Europe.", "", None),
        ("Name it now", "", "too short"),
        ("word " * 151, "", "too long"),
        ("Name three rivers", "", "too short"),
        ("Describe the picture in words.", "", "needs more than text"),
        ("Summarise what is given below.", "a file about bees", "needs more than text"),
        ("Describe the graphite in pencils.", "", None),
        ("Go to the shop and buy milk.", "", "needs more than text"),
        ("(Name three rivers in Europe)", "", "starts with punctuation"),
        ("Über drei Flüsse etwas schreiben.", "", "not English"),
        ("Name three rivers. Noinput", "", "leftover of the form"),
        ("Name three rivers in Europe.", "no input", "leftover of the form"),
        ("Name three rivers.\nOutput: Rhine", "", "leftover of the form"),
        ("Name three rivers. Input: Rhine", "", "leftover of the form"),
        ("Name three rivers.\n6. Output: Rhine", "", "leftover of the form"),
        ("Say what the input: label is for.", "", None),
        ("Sum up https://example.org in a line.", "", "has a link"),
        ("", "", "empty"),
        ("...", "", "empty"),
    ],
)
def test_paper_rules_for_instructions(instruction, input, reason):
    assert instruction_reason("paper", instruction, input) == reason


@pytest.mark.parametrize(
    ("instruction", "reason"),
    [("Say dog", None), ("Über", None), (" ! ", "empty"), ("Say dog\nResponse: dog", "leftover of the form")],
)
def test_basic_rules_for_instructions(instruction, reason):
    assert instruction_reason("basic", instruction, "") == reason


@pytest.mark.parametrize(
    ("response", "reason"),
    [
        ("The Rhine, the Loire and the Po.", None),
        ("", "empty"),
        ("User: what else?", "starts a role line"),
        ("Assistant\nThe Rhine", "starts a role line"),
        ("The Rhine.\nHuman: what else?", "starts a role line"),
        ("The Rhine.\nHumans named it.", None),
        ("The user: nobody.", None),
        ("Systematic work.", None),
        ("Answer Choices: red or blue", "answer options"),
        ("Choices: red or blue", None),
        ("A. red\nB. blue", "answer options"),
        ("It is (c) of course", "answer options"),
        ("Rich in vitamin A. So eat it.", "answer options"),
        ("Fruit, e.g. plums.", None),
        ("return c.lower()", None),
        ("It is (f) of course", None),
        ("Take vitamin K. It helps.", None),
        ("<noinput>", "leftover of the form"),
        ("Sure.\nCan you say more?", "asks back"),
        ("As far as you can, you rest.", None),
        ("What do you want to know", "asks back"),
        ("The Rhine.\n\nWhat about the Po?", "asks back"),
        ("莱茵河", "foreign script"),
    ],
)
def test_paper_rules_for_responses(response, reason):
    assert response_reason("paper", "Name three rivers.", "", response) == reason


@pytest.mark.parametrize(
    ("instruction", "input", "reason"),
    [
        ("Greet <name> kindly.", "", "instruction has a placeholder"),
        ("Say none of these.", "", "instruction has a placeholder"),
        ("Sum up: bees fly.", "bees fly", "input repeats the instruction"),
        ("Sum up this.", "bees fly", None),
    ],
)
def test_paper_rules_look_at_the_instruction_again(instruction, input, reason):
    assert response_reason("paper", instruction, input, "Fine.") == reason


def test_basic_rules_for_responses_only_want_some_text():
    assert response_reason("basic", "x", "", "A. can you?") is None
    assert response_reason("basic", "x", "", " \n") == "empty"


def test_a_leading_label_is_cut_only_by_the_paper_rules():
    assert clean_response("paper", " 答案：42 ") == "42"
    assert clean_response("basic", " 答案：42 ") == "答案：42"
