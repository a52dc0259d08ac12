import json
import math
import re
import sqlite3
from collections import Counter
from fractions import Fraction

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop.filters.normalization import tokenize
from isheep_jax.loop.filters.novelty import Pool
from isheep_jax.loop.filters.text_rules import clean_response, instruction_reason, response_reason
from isheep_jax.loop.prompting import templates
from isheep_jax.loop.prompting.seeds import read_seeds


def write(tmp_path, *lines):
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_three_dialects_give_the_same_seed(tmp_path):
    path = write(
        tmp_path,
        {"instruction": "Do it. ", "input": "this", "output": "done"},
        "",
        {"id": "s_1", "instruction": "Do it.", "instances": [{"input": "this", "output": "done"}]},
        {"instruction": "Do it."},
    )
    seeds = read_seeds(path, 3)
    assert [s.id for s in seeds] == ["seed-001", "seed-002", "seed-003"]
    assert [(s.instruction, s.input, s.output) for s in seeds[:2]] == [("Do it.", "this", "done")] * 2
    assert (seeds[2].input, seeds[2].output) == ("", "")


def test_a_seed_whose_input_says_that_there_is_none_has_none(tmp_path):
    said = ["No input", "noinput", "<no input>", "N/A", "None", "No input required."]
    assert {
        s.input for s in read_seeds(write(tmp_path, *({"instruction": "Do it.", "input": x} for x in said)), 1)
    } == {""}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1]", "line 2 should be an object"),
        ('{"input": "x"}', "line 2: there is no 'instruction'"),
        ('{"instruction": 3}', "line 2: 'instruction' should be text"),
        ('{"instruction": "x", "instances": []}', "line 2: 'instances' should be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, {"instruction": "Do it."}, line)
    with pytest.raises(UserError) as e:
        read_seeds(path, 1)
    assert f"synthesize.seeds: {path}, {message}" in str(e.value)
    assert "\n" not in str(e.value)


def test_empty_missing_binary_and_too_few_are_refused(tmp_path):
    with pytest.raises(UserError, match="is empty; each line should be like"):
        read_seeds(write(tmp_path, "", "  "), 1)
    with pytest.raises(UserError, match=r"synthesize.seeds: cannot read .*nowhere.jsonl: No such file"):
        read_seeds(tmp_path / "nowhere.jsonl", 1)
    with pytest.raises(UserError, match=r"synthesize.shots \(or other_shots\): 5 seeds per prompt, but .* has only 1"):
        read_seeds(write(tmp_path, {"instruction": "Do it."}), 5)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="is not UTF-8 text"):
        read_seeds(tmp_path / "binary", 1)


def test_an_array_is_read_like_lines(tmp_path):
    path = tmp_path / "alpaca.json"
    tasks = [{"instruction": "Do it.", "input": "this", "output": "done"}, {"instruction": "Do that."}]
    path.write_text(json.dumps(tasks, indent=4))
    assert read_seeds(path, 2) == read_seeds(write(tmp_path, *tasks), 2)
    path.write_text(json.dumps([*tasks, {"input": "x"}]))
    with pytest.raises(UserError, match=r"alpaca.json, item 3: there is no 'instruction'"):
        read_seeds(path, 1)
    path.write_text('[\n{"instruction": "Do it."},\n{"instruction" "x"}]')
    with pytest.raises(UserError, match=r"alpaca.json: not JSON: .* at line 3, character 16"):
        read_seeds(path, 1)


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (
            {"prompt": "Do it.", "response": "done"},
            "'prompt' and 'response' should be called 'instruction' and 'output'",
        ),
        ({"Question": "Who?", "Answer": "I."}, "'Question' and 'Answer' should be called 'instruction' and 'output'"),
        (
            {"instruction": "Do it.", "context": "this", "response": "done"},
            "'context' and 'response' should be called 'input' and 'output'",
        ),
        ({"Instruction": "Do it.", "Output": "done"}, "'Instruction' and 'Output' should be called"),
        ({"messages": [{"role": "user", "content": "Do it."}]}, "'messages' holds a conversation"),
    ],
)
def test_fields_by_another_name_are_refused_with_the_right_one(tmp_path, task, message):
    with pytest.raises(UserError) as e:
        read_seeds(write(tmp_path, {"instruction": "Do it."}, task), 1)
    assert "line 2: " + message in str(e.value)
    assert "a task has the fields instruction, input and output" in str(e.value)
    assert "\n" not in str(e.value)


def test_question_and_answer_are_instruction_and_output(tmp_path):
    first, second = read_seeds(write(tmp_path, {"question": "Who?", "answer": "I."}, {"question": "Why?"}), 1)
    assert (first.instruction, first.input, first.output) == ("Who?", "", "I.")
    assert (second.instruction, second.output) == ("Why?", "")


def test_a_field_by_another_name_beside_the_right_one_is_left_alone(tmp_path):
    (seed,) = read_seeds(write(tmp_path, {"instruction": "Do it.", "output": "done", "answer": "7", "task": "math"}), 1)
    assert (seed.instruction, seed.output) == ("Do it.", "done")


def test_the_sign_for_no_input_is_no_input(tmp_path):
    (seed,) = read_seeds(write(tmp_path, {"instruction": "Do it.", "input": "<noinput>", "output": "done"}), 1)
    assert seed.input == ""


def test_rules_for_english_leave_out_other_languages_and_keep_the_ids(tmp_path):
    path = write(
        tmp_path,
        {"instruction": "Do it."},
        {"instruction": "Fais-le.", "language": "fr"},
        {"instruction": "Do that.", "language": "en"},
    )
    assert [s.id for s in read_seeds(path, 2, "paper")] == ["seed-001", "seed-003"]
    assert [s.id for s in read_seeds(path, 3, "basic")] == ["seed-001", "seed-002", "seed-003"]
    with pytest.raises(UserError, match=r"has only 2 in English \(synthesize.rules=basic takes the others, too\)"):
        read_seeds(path, 3, "paper")


@pytest.fixture(scope="module")
def builtin():
    """The lines of the built-in file, as they stand there."""
    file = templates.load("standard").seeds_file("builtin")
    return [json.loads(line) for line in file.read_text("utf-8").splitlines()]


def task(builtin, name):
    (found,) = (line for line in builtin if line["name"] == name)
    return found["instances"][0]["input"], found["instances"][0]["output"]


def test_builtin_seeds_have_the_fields_of_self_instruct(builtin):
    assert len(builtin) >= 180
    for number, line in enumerate(builtin, start=1):
        assert list(line) == ["id", "name", "instruction", "instances", "is_classification", "language"]
        assert line["id"] == f"seed-{number:03d}"
        assert isinstance(line["is_classification"], bool)
        (instance,) = line["instances"]
        assert set(instance) == {"input", "output"}
        for text in (line["instruction"], *instance.values()):
            assert text == text.strip()
        assert instance["output"]
    assert len({line["name"] for line in builtin}) == len(builtin)


def test_builtin_seeds_are_varied(builtin):
    seeds = read_seeds(templates.load("standard").seeds_file("builtin"), 5)
    new = Pool(0.7).admit([s.id for s in seeds], [s.instruction for s in seeds], [s.input for s in seeds])
    assert new == [None] * len(seeds)
    first_words = Counter(tokenize(s.instruction)[0] for s in seeds)
    assert max(first_words.values()) <= 8
    assert len(first_words) >= 100
    assert 0.4 <= sum(bool(s.input) for s in seeds) / len(seeds) <= 0.6
    assert sum(line["is_classification"] for line in builtin) >= 20
    languages = {line["language"] for line in builtin} - {"en"}
    assert languages >= {"zh", "es", "de", "fr", "ja", "hi", "ar", "pt"}
    assert sum(line["language"] != "en" for line in builtin) >= 15


def test_builtin_seeds_in_english_pass_the_rules_of_the_paper():
    seeds = read_seeds(templates.load("standard").seeds_file("builtin"), 5, "paper")
    assert len(seeds) >= 180
    for s in seeds:
        assert instruction_reason("paper", s.instruction, s.input) is None, s
        assert response_reason("paper", s.instruction, s.input, clean_response("paper", s.output)) is None, s
    for s in read_seeds(templates.load("standard").seeds_file("builtin"), 5):
        assert instruction_reason("basic", s.instruction, s.input) is None, s


def defined(code):
    names = {}
    exec(code, names)
    return names


def test_code_in_builtin_seeds_does_what_it_should(builtin):
    is_palindrome = defined(task(builtin, "palindrome")[1])["is_palindrome"]
    assert is_palindrome("Never odd, or even!")
    assert not is_palindrome("abc")
    loop, without = (defined(code)["count_long"] for code in task(builtin, "without_loop"))
    assert loop(["a", "bbb", "cccc"], 2) == without(["a", "bbb", "cccc"], 2) == 2
    untyped, typed = (defined(code)["clamp"] for code in task(builtin, "type_hints"))
    assert [typed(x, 0, 3) for x in (-1, 2, 5)] == [untyped(x, 0, 3) for x in (-1, 2, 5)] == [0, 2, 3]
    defined("\n".join(task(builtin, "unit_tests")))
    wrong, right = task(builtin, "vowel_bug")
    assert defined(wrong)["vowels"]("education") == 1
    assert defined(right.split("\n\n", 1)[1])["vowels"]("education") == 5
    line, explained = task(builtin, "dict_comprehension")
    assert str(defined(line)["squares"]) in explained
    dates = re.compile(task(builtin, "date_regex")[1].split("\n")[0])
    matched = [bool(dates.match(d)) for d in ("2024-07-31", "2024-02-31", "2024-13-01")]
    assert matched == [True, True, False]


def test_queries_in_builtin_seeds_run(builtin):
    database = sqlite3.connect(":memory:")
    database.executescript(task(builtin, "library_schema")[1])
    database.executescript(
        "CREATE TABLE customers(id, name); CREATE TABLE orders(customer_id, amount);"
        "INSERT INTO customers VALUES (1, 'a'), (2, 'b'), (3, 'c'), (4, 'd'), (5, 'e');"
        "INSERT INTO orders VALUES (1, 5), (1, 6), (2, 1), (3, 9), (4, 10);"
    )
    assert database.execute(task(builtin, "customers_without_orders")[1]).fetchall() == [("e",)]
    assert database.execute(task(builtin, "top_customers")[1]).fetchall() == [(1, 11), (4, 10), (3, 9)]


def test_data_in_builtin_seeds_parse(builtin):
    assert json.loads(task(builtin, "repair_json")[1]) == {"city": "Graz", "trams": [1, 3, 4], "night": True}
    assert json.loads(task(builtin, "log_line")[1])["level"] == "WARN"
    rows = [[int(cell) for cell in re.findall(r"\d+", row)] for row in task(builtin, "table_totals")[1].split("\n")[1:]]
    assert [sum(row[:2]) for row in rows] == [row[2] for row in rows]
    assert [sum(column) for column in zip(*rows[:2])] == rows[2]


@pytest.mark.parametrize(
    ("name", "answer"),
    [
        ("garden_area", 12.5 * 8 - 3 * 3),
        ("linear_equation", next(x for x in range(100) if 3 * (x - 4) + 5 == 2 * x + 9)),
        ("painters", 4 * 6 / 3),
        ("discount_and_tax", "86.40"),
        ("marbles", Fraction(5, 10) * Fraction(4, 9)),
        ("simplify_fraction", Fraction(84, 126)),
        ("decimal_to_fraction", Fraction(0.375)),
        ("handshakes", math.comb(9, 2)),
        ("order_of_operations", 18 - 4 * (2 + 1) / 6 + 5),
        ("binary", 0b101101),
        ("average_speed", 60 / (30 / 15 + 30 / 30)),
        ("compound_interest", round(1000 * 1.05**3, 2)),
        ("weekday", ["Tuesday", "Wednesday", "Thursday"][100 % 7]),
        ("train_journey", f"{(13 * 60 + 5 - 9 * 60 - 40) // 60} hours and {(13 * 60 + 5 - 9 * 60 - 40) % 60} minutes"),
        ("fahrenheit", (68 - 32) * 5 / 9),
        ("sum_of_numbers", 14 + 9 + 27 + 1),
        ("prime", "7 x 13"),
        ("count_words", "Six"),
        ("caesar", "".join(c if c == " " else chr((ord(c) - 68) % 26 + 65) for c in "PHHW PH DW QRRQ")),
        ("count_vowels", ", ".join(f"{v}: {'onomatopoeia'.count(v)}" for v in "aeiou")),
    ],
)
def test_calculations_in_builtin_seeds_are_right(builtin, name, answer):
    answer = int(answer) if isinstance(answer, float) and answer.is_integer() else answer
    assert re.search(rf"(?<![\w.]){re.escape(str(answer))}(?![\w])", task(builtin, name)[1])
