"""Responses by principles: thoughts and answer are told apart, and each filter drops its text alone."""

import json

import pytest
from scripted_backend import Fuse, ScriptedModel, context_of, tiny_config

from isheep_jax.config import Config, RespondConfig, SelectConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.loop.prompting.principles import Form, Principles, clean, read_form, until_repeated
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import KEPT, Instruction, Pair, Scores, dropped
from isheep_jax.loop.selection.select import select
from isheep_jax.loop.stages.respond import respond

TASK = Instruction("1-000000", "Explain why the sea is salt.", "", 0, (), KEPT)
PRINCIPLES = Principles(load("standard", ("synthesize", "principles")))
LONG = (
    "Rivers wash salts out of the rocks and carry them into the sea. The water leaves the sea again as vapour, while "
    "all that was dissolved in it stays behind, year after year, for ages."
)
THOUGHTS = " A question of nature. Rules that matter: 2, 5."


def read(answer, thoughts=THOUGHTS, label="\nAnswer: ", task=TASK):
    return PRINCIPLES.parse(f"{thoughts}{label}{answer}", task)


def test_thoughts_and_answer_are_told_apart():
    assert read(LONG) == (THOUGHTS.strip(), LONG, None)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (f"{THOUGHTS}\nAnswer: {LONG}", None),
        (f"{THOUGHTS} {LONG}", "no answer"),
        (f"{THOUGHTS}\nThe answer: {LONG}", "no answer"),
        (f"\nAnswer: {LONG}", "no thoughts"),
        (f" I just answer.\nAnswer: {LONG}", "no thoughts"),
        (f" The rules that matter are many.\nAnswer: {LONG}", None),
        (f"{THOUGHTS}\nAnswer: {LONG}\nAnswer: {LONG}", "leftover of the form"),
        (f"{THOUGHTS}\nAnswer: {LONG} The answer: salt.", None),
        (f"{THOUGHTS}\nAnswer: ", "empty"),
    ],
)
def test_what_is_not_thoughts_and_then_an_answer_is_dropped(text, reason):
    assert PRINCIPLES.parse(text, TASK)[2] == reason


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("x" * 159, "too short"),
        ("x" * 160, None),
        (f"Sorry, but {LONG}", "opens with an apology"),
        (f"I'm so sorry: {LONG}", "opens with an apology"),
        (f"My sincere apologies. {LONG}", "opens with an apology"),
        (f"I apologise. {LONG}", "opens with an apology"),
        (f"Sorry is a word that I need not say. {LONG}", None),
        (f"Sorrel does not grow there. {LONG}", None),
        (f"{LONG} Nobody is sorry.", None),
        (f"{LONG} The Titanic lies there.", "leak from the examples"),
        (f"{LONG} Titanically much.", None),
        (f"{LONG} As rules that matter say.", "leak from the examples"),
    ],
)
def test_each_filter_drops_its_text_and_keeps_the_nearest_other(answer, reason):
    thoughts, text, found = read(answer)
    assert (thoughts, text, found) == (THOUGHTS.strip(), answer, reason)


def test_a_word_of_the_examples_may_be_answered_with_where_it_was_asked_for():
    asked = Instruction("1-000001", "Where does the titanic lie?", "", 0, (), KEPT)
    assert read(f"{LONG} The Titanic lies there.", task=asked)[2] is None


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        ("Salt comes from the rocks. It stays. Salt comes from the rocks.", "Salt comes from the rocks. It stays."),
        ("It is salt that comes, it is salt that comes.", ""),
        ("One two three four. One two three four.", "One two three four. One two three four."),
        (
            "Salt comes from the rocks. Salt comes from the rivers.",
            "Salt comes from the rocks. Salt comes from the rivers.",
        ),
        (
            "First this.\nIt is salt that comes, true.\nWell, IT IS SALT that comes!",
            "First this.\nIt is salt that comes, true.",
        ),
        ("without an end", "without an end"),
    ],
)
def test_an_answer_ends_before_what_it_said_already(answer, left):
    assert until_repeated(answer) == left


@pytest.mark.parametrize(
    ("answer", "left"),
    [
        (" According to Wikipedia, the sea is salt. ", "The sea is salt."),
        ("As stated in the encyclopedia of seas, it is.", "It is."),
        ("According to sailors, the sea is salt.", "According to sailors, the sea is salt."),
    ],
)
def test_a_preamble_that_names_an_encyclopedia_goes(answer, left):
    assert clean(answer) == left


def test_the_prompt_is_a_shared_head_with_rules_and_conversations():
    request = PRINCIPLES.request("x", TASK)
    assert request.prompt.startswith(request.prefix)
    assert request.prompt.removeprefix(request.prefix) == "Explain why the sea is salt.\nThoughts:"
    assert all(f"\n{n}. " in request.prefix for n in range(1, 17))
    assert request.prefix.count("\nThoughts: ") == request.prefix.count("\nAnswer: ") == 5
    assert PRINCIPLES.stop == ("\nUser:", "\nThoughts:")


def test_the_examples_pass_their_own_filters():
    head = PRINCIPLES.request("x", TASK).prefix
    form = read_form(load("standard", ("synthesize", "principles")).directory / "principles.json")
    for turn in head.split("\nUser: ")[1:6]:
        question, _, rest = turn.partition("\nThoughts:")
        thoughts, answer, reason = PRINCIPLES.parse(rest, Instruction("x", question, "", 0, (), KEPT))
        assert form.thoughts in thoughts
        assert len(answer) >= form.least_characters
        assert reason in (None, "leak from the examples")


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"leak": []}', '{"stop": "x"}', '{"answer": 1}', '{"leaks": [1]}', '{"least_characters": "9"}']
)
def test_a_bad_form_shows_a_good_one(tmp_path, text):
    (tmp_path / "principles.json").write_text(text)
    with pytest.raises(UserError, match=r"principles\.json.* should be like \{") as e:
        read_form(tmp_path / "principles.json")
    assert "\n" not in str(e.value)


def test_a_form_may_do_without_thoughts(tmp_path):
    (tmp_path / "principles.json").write_text(json.dumps({"stop": ["\nQ:"]}))
    assert read_form(tmp_path / "principles.json") == Form(stop=("\nQ:",))
    tiny = Principles(load("tiny", ("synthesize", "principles")))
    assert tiny.parse(" ( 4 )\n", TASK) == (None, "( 4 )", None)


class Says(ScriptedModel):
    def __init__(self, *completions):
        super().__init__("says", Fuse())
        self.completions, self.sampling = completions, None

    def generate(self, requests, sampling):
        self.sampling = sampling
        return super().generate(requests, sampling)

    def complete(self, request):
        text, finish = self.completions[int(request.id.rsplit("/", 2)[1])]
        return Completion(request.id, text, finish_reason=finish)


def test_records_keep_the_thoughts_and_nothing_of_them_goes_on(tmp_path):
    good = f"{THOUGHTS}\nAnswer: {LONG}"
    model = Says((good, "stop"), (good, "length"), (f"{THOUGHTS}", "stop"), (f"{THOUGHTS}\nAnswer: No.", "stop"))
    config = tiny_config(tmp_path, respond=RespondConfig(method="principles", rules="basic"))
    tasks = [Instruction(str(n), TASK.instruction, "", 0, (), KEPT) for n in range(4)]
    context = context_of(config)
    pairs = respond(context, model, tasks, PRINCIPLES)
    assert [p.verdict.reason for p in pairs] == ["", "unfinished", "no answer", "too short"]
    assert {p.thoughts for p in pairs} == {THOUGHTS.strip()}
    assert [p.response for p in pairs] == [LONG, LONG, "", "No."]
    assert context.files("responses").records() == pairs
    assert model.sampling.stop == PRINCIPLES.stop


@pytest.mark.parametrize("reason", ["no thoughts", "no answer", "too short"])
def test_no_threshold_brings_back_what_may_be_thoughts(reason):
    config = Config(select=SelectConfig(threshold=-1))
    pair = PRINCIPLES.parse(f"{THOUGHTS}\nAnswer: {LONG}", TASK)
    records = [
        Pair("a-0", "a", "Do it.", "", pair[1], KEPT, pair[0]),
        Pair("b-0", "b", "Do it.", "", pair[1], dropped(reason), pair[0]),
    ]
    scores = [Scores("a-0", None, None, KEPT)]
    kept = [s.id for s in select(config, 1, records, scores) if s.verdict.kept]
    assert kept == (["a-0", "b-0"] if reason == "too short" else ["a-0"])
