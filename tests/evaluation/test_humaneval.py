"""HumanEval and HumanEval+: right functions pass in every form of response, wrong ones do not."""

import ast
import gzip
import json

import pytest
from code_tasks import options, reasons, scored, write_rows
from published import published

from isheep_jax.evaluation.humaneval import DATA, DATA_PLUS, HUMANEVAL, HUMANEVAL_PLUS, program
from isheep_jax.evaluation.task import Response

# Two problems in the published format, of our own.
DOUBLE = {
    "task_id": "HumanEval/900",
    "prompt": "from typing import List\n\n\ndef double(xs: List[int]) -> List[int]:\n"
    '    """ Doubles each number.\n    """\n',
    "entry_point": "double",
    "canonical_solution": "    return [2 * x for x in xs]\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n    assert candidate([1, 2]) == [2, 4]\n"
    "    assert candidate([]) == [], 'empty'\n",
}
ROOT = {
    "task_id": "HumanEval/901",
    "prompt": "import math\n\n\ndef square(x: float) -> float:\n    return x * x\n\n\ndef root(x: float) -> float:\n"
    '    """ Returns y with square(y) = x.\n    """\n',
    "entry_point": "root",
    "canonical_solution": "    return math.sqrt(x)\n",
    "test": "def check(candidate):\n    for x in range(9):\n        assert math.isclose(square(candidate(x)), x)\n",
}
ROWS = [DOUBLE, ROOT]
BY_ID = {row["task_id"]: row for row in ROWS}


@pytest.fixture
def data(tmp_path):
    write_rows(tmp_path / DATA, ROWS)
    return tmp_path


def whole(row) -> str:
    return row["prompt"] + row["canonical_solution"]


def test_right_completions_pass_and_are_written_for_the_official_script(data, tmp_path):
    scores = scored(HUMANEVAL, options(data, chat=False), tmp_path, lambda s: BY_ID[s.id]["canonical_solution"])
    assert reasons(scores) == {}
    lines = [json.loads(line) for line in (tmp_path / "human_eval.jsonl").read_text().splitlines()]
    assert lines == [{"task_id": row["task_id"], "completion": row["canonical_solution"]} for row in ROWS]


def test_right_responses_in_a_chat_pass_and_complete_the_prompt_for_the_official_script(data, tmp_path):
    # The second one leaves out the helper and the import that the prompt has.
    answers = {"HumanEval/900": whole(DOUBLE), "HumanEval/901": "def root(x):\n    return math.sqrt(x)\n"}
    scores = scored(HUMANEVAL, options(data), tmp_path, lambda s: f"Here:\n```python\n{answers[s.id]}```\nDone.")
    assert reasons(scores) == {}
    for line in map(json.loads, (tmp_path / "human_eval.jsonl").read_text().splitlines()):
        row = BY_ID[line["task_id"]]
        exec(f"{row['prompt']}{line['completion']}\n{row['test']}\ncheck({row['entry_point']})", {})


def test_wrong_and_missing_functions_fail(data, tmp_path):
    for answer in ("    return 0\n", "", "    pass\n", "    return None\ndef check(x):\n    pass\n"):
        scores = scored(HUMANEVAL, options(data, chat=False), tmp_path, lambda s, answer=answer: answer)
        assert set(reasons(scores)) == set(BY_ID)
    assert set(reasons(scored(HUMANEVAL, options(data), tmp_path, lambda s: "I cannot do that."))) == set(BY_ID)


def test_a_program_cannot_change_what_the_tests_take_from_the_prompt(data, tmp_path):
    answer = "def square(x):\n    return x\n\n\ndef root(x):\n    return x\n"
    scores = scored(HUMANEVAL, options(data), tmp_path, lambda s: f"```python\n{answer}```")
    assert reasons(scores)["HumanEval/901"] == "wrong: assert math.isclose(square(candidate(x)), x)"


def test_prompts_are_the_published_text_or_a_turn_that_holds_it(data):
    (double, _), (chat, _) = (HUMANEVAL.samples(options(data, chat=c, attempts=3)) for c in (False, True))
    assert double.prompt == DOUBLE["prompt"]
    assert double.sampling.stop == ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
    assert double.attempts == 3
    assert f"```python\n{DOUBLE['prompt'].strip()}\n```" in chat.prompt[0].content
    assert chat.sampling.stop == ()
    assert DOUBLE["prompt"] in double.held_out


PLUS = [
    {
        key: row[key]
        for key in ("task_id", "prompt", "entry_point", "canonical_solution")
    }
    | {"contract": "", "atol": 0, "base_input": base, "plus_input": plus}
    for row, base, plus in ((DOUBLE, [[[1, 2]]], [[[]], [[3] * 50]]), (ROOT, [[4.0]], [[2.0], [1e300], [0]]))
]  # fmt: skip


@pytest.fixture
def plus(tmp_path):
    write_rows(tmp_path / DATA_PLUS, PLUS)
    return tmp_path


def test_more_tests_find_what_those_of_the_benchmark_do_not(plus, tmp_path):
    right = scored(HUMANEVAL_PLUS, options(plus), tmp_path, lambda s: whole(BY_ID[s.id]))
    assert all(score.values == {"pass@1": True, "base_pass@1": True, "plus_pass@1": True} for score in right.values())
    lines = [json.loads(line) for line in (tmp_path / "evalplus.jsonl").read_text().splitlines()]
    assert [line["task_id"] for line in lines] == list(BY_ID)
    assert run_named(lines[1]["solution"], "root(9)") == 3
    answers = {"HumanEval/900": "def double(xs):\n    return [2, 4]", "HumanEval/901": "def root(x):\n    return x / 2"}
    wrong = scored(HUMANEVAL_PLUS, options(plus), tmp_path, lambda s: answers[s.id])
    for score in wrong.values():
        assert score.values == {"pass@1": False, "base_pass@1": True, "plus_pass@1": False}
    assert reasons(wrong)["HumanEval/900"] == "plus: wrong: input 0"


def run_named(source: str, call: str):
    scope = {}
    exec(source, scope)
    return eval(call, scope)


def test_a_response_without_text_still_has_a_program_to_report(data):
    sample = HUMANEVAL.samples(options(data))[0]
    response = Response(sample.id, 0, ("",), ("",), ("stop",))
    assert program(sample, response).startswith(DOUBLE["prompt"])


class Returns(ast.NodeTransformer):
    """Has a function return something else."""

    def __init__(self, name):
        self.name = name

    def visit_FunctionDef(self, node):
        if node.name == self.name:
            for inner in ast.walk(node):
                if isinstance(inner, ast.Return):
                    value = inner.value or ast.Constant(None)
                    inner.value = ast.Tuple([ast.Constant("wrong"), value], ast.Load())
        return node


def mutated(source: str, name: str) -> str:
    return ast.unparse(Returns(name).visit(ast.parse(source)))


def test_the_official_example_gives_the_official_verdicts(tmp_path):
    problem, samples = (
        [json.loads(line) for line in published(f"humaneval/example_{name}.jsonl").read_text().splitlines()]
        for name in ("problem", "samples")
    )
    write_rows(tmp_path / DATA, problem)
    task_options = options(tmp_path, chat=False)
    passed = [
        scored(HUMANEVAL, task_options, tmp_path, lambda s, text=sample["completion"]: text)["test/0"].values["pass@1"]
        for sample in samples
    ]
    assert passed == [False, False, False, True, True, True]


@pytest.mark.slow
@pytest.mark.parametrize("chat", [True, False])
def test_published_solutions_pass_and_mutated_ones_fail(tmp_path, chat):
    path = published(DATA)
    rows = {row["task_id"]: row for row in map(json.loads, gzip.decompress(path.read_bytes()).splitlines())}
    task_options = options(path.parents[1], chat)
    right = scored(
        HUMANEVAL, task_options, tmp_path, lambda s: whole(rows[s.id]) if chat else rows[s.id]["canonical_solution"]
    )
    assert len(right) == 164
    assert reasons(right) == {}
    if chat:
        wrong = scored(
            HUMANEVAL, task_options, tmp_path, lambda s: f"```\n{mutated(whole(rows[s.id]), s.reference['name'])}\n```"
        )
        assert len(reasons(wrong)) == 164
