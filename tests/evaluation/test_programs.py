"""The program in a response, what tests take from it, and pass@k."""

import gzip
import itertools
import json

import pytest
from code_tasks import options, skip_without_sandbox
from etils import epath
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation import programs
from isheep_jax.evaluation.programs import code_in, completed, pass_at, read_rows, uses
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring

ADD = "def add(a, b):\n    return a + b\n"
PROMPT = 'import math\n\n\ndef add(a, b):\n    """Adds."""\n'


@pytest.mark.parametrize(
    "response",
    [
        ADD,
        f"```python\n{ADD}```",
        f"Sure!\n\n```python\n{ADD}```\n\nIt adds both.",
        f"```\n{ADD}```",
        f"~~~ py\n{ADD}~~~",
        f"````python\n{ADD}````",
        f"Here:\n```python\n{ADD}",  # cut off before the fence
        f"Install it:\n```bash\npip install x\n```\nThen:\n```python\n{ADD}```\n```python\nprint(add(1, 2))\n```",
        f"1. The code:\n\n   ```python\n{''.join('   ' + line for line in ADD.splitlines(keepends=True))}   ```\n",
        f"The function:\n\n{ADD}\nThis adds both numbers.\n",
    ],
)
def test_the_code_is_found_in_a_response(response):
    assert code_in(response, "add").strip() == ADD.strip()


def test_a_block_with_the_function_is_preferred_and_else_the_first_is_taken():
    response = "```python\nx = 1\n```\n```python\ny = 2\n```\n"
    assert code_in(response, "add") == "x = 1\n"
    assert code_in(response + f"```\n{ADD}```", "add") == ADD
    assert code_in(response + "```\nadd = lambda a, b: a + b\n```", "add") == "add = lambda a, b: a + b\n"


def test_code_without_fences_keeps_helpers_and_constants_between_functions():
    code = f"import re\nfrom math import pi\n\nLIMIT = 3\nnames: list = []\n@decorated\n{ADD}\nclass A:\n    x = 1\n"
    assert code_in(f"Sure, here you go:\n{code}\nIt adds.", "add").strip() == code.strip()


def run(source: str, call: str):
    scope = {}
    exec(source, scope)
    return eval(call, scope)


@pytest.mark.parametrize(
    "code", [ADD, "    return a + b\n", "\treturn a + b\n", "return a + b\n", "\n    return a + b"]
)
def test_code_that_repeats_or_continues_the_prompt_completes_it(code):
    assert run(completed(PROMPT, code, "add"), "add(1, 2)") == 3
    assert run(completed(PROMPT, code, "add"), "math.floor(1.5)") == 1


def test_names_and_modules_that_tests_take_from_a_program():
    tests = (
        "from copy import deepcopy\nimport os.path\nLIMIT = 3\ndef check(candidate):\n    for n in range(LIMIT):\n"
        "        assert math.isclose(candidate(n), add(deepcopy(n), total))\n        os.path.join('a')\n"
        "check(sum)\nnode = Node(1)\n"
    )
    assert uses(tests, "import math\ndef add(a): pass\nclass Node: pass\ntotal = 1") == (
        ("Node", "add", "total"),
        ("math",),
    )
    # What the right program defines is taken from the program, also if Python has something of that name.
    assert uses(tests, "def sum(a): pass\nmath = 1")[0] == ("Node", "add", "math", "sum", "total")


def test_pass_at_k_is_the_chance_over_all_choices_of_attempts():
    for attempts in (1, 4, 7):
        for passed in range(attempts + 1):
            for k in range(1, attempts + 1):
                results = [True] * passed + [False] * (attempts - passed)
                chosen = [any(choice) for choice in itertools.combinations(results, k)]
                assert pass_at(k, passed, attempts) == pytest.approx(sum(chosen) / len(chosen))


def scores_of(passed: dict[str, list[bool]]):
    sample = {id: Sample(id, "", programs.sampling(EvaluateConfig())) for id in passed}
    response = Response("", 0, ("",), ("",), ("stop",))
    return [(sample[id], response, Score({"pass@1": p})) for id, results in passed.items() for p in results]


def test_pass_at_k_is_given_as_far_as_there_are_attempts():
    few = scores_of({"a": [True] * 7, "b": [False] * 9})
    assert programs.figures(few) == {}
    figures = programs.figures(scores_of({"a": [True] + [False] * 7, "b": [False] * 8, "c": [True] * 8}))
    assert list(figures) == ["pass@8"]
    assert figures["pass@8"].value == pytest.approx(2 / 3)
    assert figures["pass@8"].stderr == pytest.approx(1 / 3)  # of the mean of 1, 0 and 1: sqrt(1/3) / sqrt(3)
    many = programs.figures(scores_of({"a": [True] + [False] * 63, "b": [False] * 64}))
    assert {k: f.value for k, f in many.items()} == {"pass@8": pytest.approx(8 / 64 / 2), "pass@64": 0.5}


def test_one_attempt_is_greedy_and_more_are_sampled():
    assert programs.sampling(EvaluateConfig()).temperature == 0
    several = programs.sampling(EvaluateConfig(attempts=8, max_tokens=77))
    assert (several.temperature, several.top_p, several.max_tokens) == (0.8, 0.95, 77)


def test_rows_are_read_from_lines_lists_and_compressed_files(tmp_path):
    rows = [{"a": 1}, {"a": 2}]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    for data in (lines, json.dumps(rows).encode(), gzip.compress(lines), lines.replace(b"\n", b"\r\n")):
        path = epath.Path(tmp_path / "rows")
        path.write_bytes(data)
        assert read_rows(path, ("a",), "X") == rows


@pytest.mark.parametrize("data", [b"", b"{", b'{"b": 1}\n', b"\x1f\x8bx", b"\xff\xfe", b"[1]", b"7\n"])
def test_damaged_rows_are_a_user_error(tmp_path, data):
    path = epath.Path(tmp_path / "rows")
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"rows(, | is ).*(X's data|should be |UTF-8)"):
        read_rows(path, ("a",), "X")


def sample_of(expected: int) -> Sample:
    tests = {"tests": {"tests": f"assert answer() == {expected}\n", "names": ["answer"], "modules": []}}
    return Sample(str(expected), "", programs.sampling(EvaluateConfig()), reference={"tests": tests})


def test_a_program_that_several_attempts_wrote_runs_once_and_a_missing_response_fails(tmp_path):
    skip_without_sandbox()
    texts = [("1", "1", ""), ("1", "1", ""), ("1", "2", ""), ("2", "2", ""), ("1", "", "prompt too long")]
    pairs = [
        (sample_of(int(sample)), Response(sample, n, ("",), (f"def answer():\n    return {text}",), ("stop",), error))
        for n, (sample, text, error) in enumerate(texts)
    ]
    counting = Counting()
    scores = programs.score_programs(
        pairs,
        Scoring(options(tmp_path).settings, epath.Path(tmp_path), counting),
        lambda sample, response: response.text,
        lambda sample, source: {"programs.jsonl": {"task_id": sample.id, "solution": source}},
    )
    assert [score.values for score in scores] == [{"pass@1": p} for p in (True, True, False, True, False)]
    assert scores[2].details == {"reason": "wrong: assert answer() == 1"}
    assert scores[4].details == {"reason": "no response"}
    assert counting.opened == [["run programs", 3, "programs", 3]]
    lines = [json.loads(line) for line in (tmp_path / "programs.jsonl").read_text().splitlines()]
    assert lines[2] == {"task_id": "1", "solution": "def answer():\n    return 2"}
    assert lines[4] == {"task_id": "1", "solution": ""}


def test_programs_are_refused_before_anything_is_computed_unless_the_user_allows_them():
    with pytest.raises(UserError, match=r"--evaluate\.allow_code_execution"):
        programs.check(EvaluateConfig())
