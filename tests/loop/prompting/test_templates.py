import re
import shutil

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop.judging.scores import NUMBERS
from isheep_jax.loop.prompting.templates import Templates, load
from isheep_jax.loop.stages.follow_up import STOP
from isheep_jax.tiny.corpus import LIST_ITEM

EXAMPLES = [
    {"instruction": "Add {{ 1 }}.", "input": "", "output": "2"},
    {"instruction": "Sort.", "input": "b a", "output": "a b"},
]


def score(prompts, name, instruction, input, response):
    """The prompt for the score of a pair."""
    return prompts.render(name, instruction=instruction, input=input, response=response)


@pytest.fixture
def own(tmp_path):
    shutil.copytree(load("standard").directory, tmp_path / "own")
    return tmp_path / "own"


@pytest.mark.parametrize("name", ["standard", "tiny"])
def test_prompts_end_where_the_model_is_to_go_on(name):
    prompts = load(name)
    text = prompts.render("synthesize", examples=EXAMPLES)
    assert "Add {{ 1 }}." in text
    assert text.endswith("Instruction:")
    for criterion in ("quality", "following"):
        text = score(prompts, criterion, "Sort.", "", "a b")
        assert "Sort." in text
        assert "a b" in text
        assert text == text.rstrip()
    assert score(prompts, "quality", "x", "", "y") != score(prompts, "following", "x", "", "y")


def test_examples_are_numbered_and_an_empty_input_is_marked():
    text = load("standard").render("synthesize", examples=EXAMPLES)
    assert "1. Input:\n<noinput>\n###\n2. Instruction: Sort.\n2. Input:\nb a\n###\n3. Instruction:" in text


@pytest.mark.parametrize("name", ["standard", "tiny"])
def test_every_prompt_of_a_template_begins_with_its_head(name):
    prompts = load(name)
    assert prompts.render("synthesize", examples=EXAMPLES).startswith(prompts.prefix("synthesize"))
    for criterion in ("quality", "following"):
        for words in (("Sort.", "", "a b"), ("Add.", "1 2", "3")):
            assert score(prompts, criterion, *words).startswith(prompts.prefix(criterion))
    if name == "standard":
        assert "number||reason" in prompts.prefix("quality")  # the rubric is shared
        assert "Instruction:" in prompts.prefix("synthesize")


@pytest.mark.parametrize(
    ("text", "prefix"),
    [
        ("Rate {{ instruction | e }}", "Rate "),
        ("Rate {{ instruction[:9] | trim }}", "Rate "),
        ("{% for e in examples[:2] %}Rate {{ e.instruction }}{% endfor %}", "Rate "),
        ("Rate {{ examples[0].instruction }}", "Rate "),
        ("Rate {{ (examples | last).instruction }}", "Rate "),
        ("{% for e in examples | reverse %}Rate {{ e['instruction'] }}{% endfor %}", "Rate "),
        ("Rate {% include 'part.jinja' %}", "Rate this: "),
        # What needs real values shares nothing, but is rendered.
        ("{% for e in examples %}{% for k, v in e.items() %}Rate {{ v }}{% endfor %}{% endfor %}", ""),
        ("Rate {{ examples | length + examples }}", ""),
        ("Rate {% include 'nothing.jinja' %}{{ instruction }}", ""),
        ("Rate {{ instruction }}{% if response == 'a' %}{% include 'quality.jinja' %}{% endif %}", ""),
    ],
)
def test_prefix_is_found_whatever_template_does_with_its_variables(tmp_path, text, prefix):
    (tmp_path / "quality.jinja").write_text(text)
    (tmp_path / "part.jinja").write_text("this: {{ instruction }}")
    (tmp_path / "seeds.jsonl").write_text("")
    assert Templates(tmp_path, ("quality",)).prefix("quality") == prefix


def test_a_directory_of_ones_own_works_and_its_digest_follows_its_text(own):
    before = load(str(own)).digests()
    (own / "quality.jinja").write_text("{{ response }} is a\n\n")
    prompts = load(str(own))
    assert score(prompts, "quality", "i", "", "r") == "r is a"
    assert {k for k in before if before[k] != prompts.digests()[k]} == {"prompts/quality.jinja"}


def test_what_is_wrong_with_a_directory_is_named(own, tmp_path):
    with pytest.raises(UserError, match="prompts: there is no directory nowhere; use 'standard', 'tiny' or"):
        load("nowhere")
    (own / "quality.jinja").write_text("{{ reponse }}")
    with pytest.raises(UserError, match=r"quality.jinja: 'reponse' is undefined"):
        score(load(str(own)), "quality", "i", "", "r")
    (own / "quality.jinja").write_text("\n{% for %}")
    with pytest.raises(UserError, match=r"quality.jinja, line 2: "):
        load(str(own))
    (own / "quality.jinja").unlink()
    with pytest.raises(UserError, match=r"has no quality\.jinja; these settings need"):
        load(str(own))


@pytest.mark.parametrize("name", ["quality_simple", "following_simple", "joint", "few_shot"])
def test_each_way_to_ask_for_a_score_shows_the_pair_and_waits_for_the_number(name):
    prompts = load("standard", ("synthesize", name))
    text = score(prompts, name, "Sort these words.", "b a", "a b")
    assert "Sort these words. b a\n" in text
    assert "Response: a b\n" in text
    assert text.endswith(("a rating (1 to 10) of", "\nRating:"))
    assert "{" not in text
    assert f"prompts/{name}.jinja" in prompts.digests()


def test_scored_examples_are_written_as_the_score_is_read():
    prompts = load("standard", ("synthesize", "few_shot"))
    text = score(prompts, "few_shot", "i", "", "r")
    ratings = re.findall(r"\nRating:( \d+)\|\|", text)
    assert len(ratings) == 3
    assert set(ratings) <= set(NUMBERS)


def test_only_the_templates_that_are_needed_must_be_there(own):
    (own / "quality.jinja").unlink()
    load(str(own), ("synthesize", "following"))
    (own / "joint.jinja").unlink()
    with pytest.raises(UserError, match=r"has no joint.jinja; these settings need synthesize.jinja, joint.jinja"):
        load(str(own), ("synthesize", "joint"))


@pytest.mark.parametrize(
    "text", ["[]", "{", '{"delimiter": "|"}', '{"synthesize_stop": 1}', '{"synthesize_stop": "x"}']
)
def test_a_bad_format_file_shows_a_good_one(own, text):
    (own / "format.json").write_text(text)
    with pytest.raises(UserError, match=r"format\.json.* should be like \{"):
        load(str(own))


def test_in_the_tiny_world_a_follow_up_is_the_next_task_of_a_list_as_its_base_has_read_them():
    prompt = load("tiny", ("follow_up",)).render("follow_up", instruction="Copy cat.", input="", response="cat")
    one, two = (LIST_ITEM.format(instruction=text) for text in ("Copy cat.", "Copy dog."))
    assert f"{prompt} Copy dog.\n" == one + two
    # What the model writes behind its task begins with what ends a follow-up.
    assert f"\n{one}".startswith(STOP)


def test_templates_saved_with_byte_order_marks_and_windows_line_ends_are_the_same(own):
    names = ("synthesize", "quality", "following")
    plain = load(str(own), names)
    pair = {"instruction": "Add one.", "input": "2", "response": "3"}
    expected = [plain.render("quality", **pair), plain.prefix("synthesize"), plain.synthesize_stop]
    for path in own.iterdir():
        path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes().replace(b"\n", b"\r\n"))
    saved = load(str(own), names)
    assert [saved.render("quality", **pair), saved.prefix("synthesize"), saved.synthesize_stop] == expected
