import pytest

from isheep_jax.loop.filters.labels import is_no_input
from isheep_jax.loop.filters.text_rules import instruction_reason


@pytest.mark.parametrize(
    "text",
    [
        *("<noinput>", "noinput", "No input", "<no input>", "no_input", "NO-INPUT", "No inputs.", "No input needed."),
        *(
            "There is no input.",
            "no additional input is required",
            "none",
            "None.",
            "(none)",
            "[None]",
            "None required",
        ),
        *("N/A", "n / a", "N.A.", "n.a", "Ｎ／Ａ", "not applicable", "null", "-", "—", " **None** "),
    ],
)
def test_what_only_says_that_there_is_no_input_is_none(text):
    assert is_no_input(text)


@pytest.mark.parametrize(
    "text",
    [
        *("", "None of these is right.", "no", "nothing", "Na", "NA", "null pointer", "5", "0", "nonet", "..."),
        *("No input was lost in the fire.", "<text>", "empty", "none" * 30, "a-b"),
    ],
)
def test_other_texts_are_inputs(text):
    assert not is_no_input(text)


@pytest.mark.parametrize("rules", ["paper", "strict", "basic"])
@pytest.mark.parametrize(
    "text",
    ["Instruction：Name a good color.", "Name a good color.\n**Output:** blue", "Name one.\n- *Input*: blue sky"],
)
def test_a_dressed_label_is_a_leftover_of_the_form(rules, text):
    assert instruction_reason(rules, text, "") == "leftover of the form"
    assert instruction_reason(rules, "Name a good color.", text) == "leftover of the form"
