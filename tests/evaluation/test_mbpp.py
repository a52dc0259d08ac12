"""MBPP, its sanitized part and MBPP+: right programs pass, wrong ones do not."""

import json

import pytest
from code_tasks import options, reasons, scored, write_rows
from published import published
from test_humaneval import mutated

from isheep_jax.errors import UserError
from isheep_jax.evaluation.mbpp import (
    DATA,
    DATA_PLUS,
    DATA_SANITIZED,
    MBPP,
    MBPP_PLUS,
    MBPP_SANITIZED,
    SHOTS,
    STOP_PLUS,
)


def row(task_id: int, text: str, code: str, tests: list[str], setup: str = "") -> dict:
    keys = {"text": text, "code": code, "test_setup_code": setup, "test_list": tests, "challenge_test_list": []}
    return {"task_id": task_id} | keys


# In the published format, with its line ends.
ROWS = [
    *(row(n, f"Give {n}.", f"def f{n}():\r\n  return {n}", [f"assert f{n}() == {n}"]) for n in (1, *SHOTS)),
    row(
        11,
        "Write a function to add the values of a chain.",
        "class Node:\r\n  def __init__(self, value):\r\n    self.value = value\r\n    self.next = None\r\n"
        "def chain_sum(node):\r\n  return node.value + chain_sum(node.next) if node else 0",
        ["assert chain_sum(head) == 3", "assert chain_sum(None) == 0"],
        "head = Node(1)\r\nhead.next = Node(2)",
    ),
    row(510, "Write a function to add two numbers.", "def sum(a, b):\n  return a + b", ["assert sum(1, 2) == 3"]),
    row(511, "Not in the test split.", "def g():\n  return 1", ["assert g() == 1"]),
]
CODE = {str(row["task_id"]): row["code"] for row in ROWS}


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / DATA, ROWS)
    return tmp_path


def test_right_programs_pass_and_are_written_for_evalplus(data, tmp_path):
    for chat in (False, True):
        task_options = options(data, chat)
        scores = scored(MBPP, task_options, tmp_path, lambda s: f"```python\n{CODE[s.id]}\n```" if s.prompt else "")
        assert list(scores) == ["11", "510"]  # the test split
        assert reasons(scores) == {}
    assert reasons(scored(MBPP, options(data, chat=False), tmp_path, lambda s: CODE[s.id])) == {}
    lines = [json.loads(line) for line in (tmp_path / "evalplus.jsonl").read_text().splitlines()]
    assert lines == [{"task_id": f"Mbpp/{id}", "solution": CODE[id]} for id in ("11", "510")]


def test_wrong_programs_fail(data, tmp_path):
    answers = {"11": CODE["11"].replace("else 0", "else 1"), "510": "def add(a, b):\n  return a + b"}
    scores = scored(MBPP, options(data), tmp_path, lambda s: f"```python\n{answers[s.id]}\n```")
    # Python's own function `sum` is not the one that was asked for.
    assert reasons(scores) == {
        "11": "wrong: assert chain_sum(head) == 3",
        "510": "TypeError: 'int' object is not iterable in: assert sum(1, 2) == 3",
    }


def test_the_prompt_to_continue_is_the_published_one_with_three_examples(data):
    sample = MBPP.samples(options(data, chat=False))[0]
    tasks = sample.prompt.split("You are an expert Python programmer, and here is your task: ")
    assert tasks[0] == ""
    assert tasks[1] == "Give 2. Your code should pass these tests:\n\nassert f2() == 2\n[BEGIN]\n" + (
        "def f2():\n  return 2\n[DONE]\n\n"
    )
    assert len(tasks) == 5
    assert tasks[4].startswith(ROWS[4]["text"])
    assert tasks[4].endswith("assert chain_sum(head) == 3\nassert chain_sum(None) == 0\n[BEGIN]\n")
    assert sample.sampling.stop == ("[DONE]",)


def test_missing_examples_are_a_user_error_where_the_prompt_needs_them(tmp_path):
    write_rows(tmp_path / DATA, ROWS[-2:])
    assert len(MBPP.samples(options(tmp_path))) == 1
    with pytest.raises(UserError, match=r"mbpp\.jsonl: the worked examples .* task_id 2"):
        MBPP.samples(options(tmp_path, chat=False))


def test_the_sanitized_part_has_its_own_format(tmp_path):
    rows = [
        {"task_id": n, "prompt": f"Half of {n}.", "code": "import math\ndef half(n):\n  return n / 2"}
        | {"test_imports": ["import math"], "test_list": [f"assert math.isclose(half({n}), {n / 2})"]}
        for n in (*SHOTS, 12)
    ]
    (tmp_path / "mbpp").mkdir()
    (tmp_path / DATA_SANITIZED).write_text(json.dumps(rows))
    for chat in (True, False):
        task_options = options(tmp_path, chat)
        assert reasons(scored(MBPP_SANITIZED, task_options, tmp_path, lambda s: "def half(n):\n  return n / 2")) == {}


def plus_row(task_id: str, name: str, code: str, base: list, plus: list, atol: float = 0) -> dict:
    prompt = f'"""\nWrite the function {name}.\nassert {name}() == 0\n"""\n'
    keys = {"prompt": prompt, "entry_point": name, "canonical_solution": f"\n{code}\n", "contract": ""}
    return {"task_id": task_id, "base_input": base, "plus_input": plus, "atol": atol, "assertion": ""} | keys


# Numbers and names of problems of MBPP+ with a conversion or a rule of their own; the others are made up.
PLUS = {
    "Mbpp/2": plus_row(
        "Mbpp/2",
        "similar_elements",
        "def similar_elements(a, b):\n  assert type(a) is tuple\n  return tuple(set(a) & set(b))",
        [[[1, 2], [2, 3]]],
        [[[], []], [[5, 6, 7], [7, 5]]],
    ),
    "Mbpp/252": plus_row(
        "Mbpp/252", "length", "def length(z):\n  return abs(z)", [["(3+4j)"]], [["(1+1j)"], ["-2j"]], 1e-6
    ),
    "Mbpp/9000": plus_row(
        "Mbpp/9000", "thirds", "def thirds(n):\n  return [n / 3, n / 3]", [[1.0]], [[2.0], [-5.0]]
    ),
}  # fmt: skip


@pytest.fixture
def plus(tmp_path):
    write_rows(tmp_path / DATA_PLUS, list(PLUS.values()))
    return tmp_path


def test_arguments_and_rules_of_mbpp_plus_are_those_of_evalplus(plus, tmp_path):
    right = {
        "Mbpp/2": "def similar_elements(a, b):\n  return sorted((x for x in a if x in b), reverse=True)",  # as a set
        "Mbpp/252": "def length(z):\n  return (z.real ** 2 + z.imag ** 2) ** 0.5",
        "Mbpp/9000": "def thirds(n):\n  return [n * (1 / 3)] * 2",
    }
    scores = scored(MBPP_PLUS, options(plus), tmp_path, lambda s: f"```python\n{right[s.id]}\n```")
    assert reasons(scores) == {}
    wrong = {
        "Mbpp/2": "def similar_elements(a, b):\n  return (2,)",
        "Mbpp/252": "def length(z):\n  return 5",  # equal, and so right for the first one
        "Mbpp/9000": "def thirds(n):\n  return (n / 3, n / 3)",  # a tuple
    }
    scores = scored(MBPP_PLUS, options(plus), tmp_path, lambda s: f"```python\n{wrong[s.id]}\n```")
    assert reasons(scores) == {
        "Mbpp/2": "plus: wrong: input 0",
        "Mbpp/252": "plus: wrong: input 0",
        "Mbpp/9000": "base: wrong: input 0; plus: wrong: input 0",
    }


def test_the_prompt_to_continue_is_the_published_one(plus):
    sample, chat = MBPP_PLUS.samples(options(plus, chat=False))[0], MBPP_PLUS.samples(options(plus))[0]
    assert sample.prompt == PLUS["Mbpp/2"]["prompt"]
    assert sample.sampling.stop == STOP_PLUS
    assert chat.prompt[0].content.endswith("Write the function similar_elements.\nassert similar_elements() == 0")


def test_an_unknown_id_is_a_user_error(tmp_path):
    write_rows(tmp_path / DATA_PLUS, [PLUS["Mbpp/2"] | {"task_id": "two"}])
    with pytest.raises(UserError, match="mbpp_plus: 'two'"):
        MBPP_PLUS.samples(options(tmp_path))


@pytest.mark.slow
def test_published_solutions_pass_and_mutated_ones_fail(tmp_path):
    path = published(DATA)
    code = {str(row["task_id"]): row["code"] for row in map(json.loads, path.read_text().splitlines())}
    for chat in (True, False):
        task_options = options(path.parents[1], chat)
        right = scored(MBPP, task_options, tmp_path, lambda s: f"```python\n{code[s.id]}\n```" if s.prompt else "")
        assert len(right) == 500
        assert reasons(right) == {}
    wrong = scored(
        MBPP, options(path.parents[1]), tmp_path, lambda s: f"```\n{mutated(code[s.id], s.reference['name'])}\n```"
    )
    assert len(reasons(wrong)) == 500


@pytest.mark.slow
def test_published_sanitized_solutions_pass(tmp_path):
    path = published(DATA_SANITIZED)
    code = {str(row["task_id"]): row["code"] for row in json.loads(path.read_text())}
    right = scored(MBPP_SANITIZED, options(path.parents[1], chat=False), tmp_path, lambda s: code[s.id])
    assert len(right) == 257
    assert reasons(right) == {}
