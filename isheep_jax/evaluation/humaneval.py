"""The tasks `humaneval` and `humaneval_plus`: Python functions to complete (Chen et al., 2021; Liu et al., 2023)."""

import ast
from collections.abc import Mapping, Sequence
from typing import Any

from isheep_jax.evaluation import programs
from isheep_jax.evaluation.evalplus import LIMITS, differential_tests
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.text.conversation import Message

DATA = "humaneval/HumanEval.jsonl.gz"
DATA_PLUS = "humaneval_plus/HumanEvalPlus.jsonl.gz"
# A completion ends where the function does (Chen et al., 2021, section 2.1).
STOP = ("\nclass", "\ndef", "\n#", "\nif", "\nprint")
_INSTRUCTION = (
    "Complete this Python function. Reply with the whole function, and with all imports that it needs, in one block of "
    "code."
)


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the 164 problems."""
    needed = ("task_id", "prompt", "entry_point", "canonical_solution", "test")
    rows = programs.read_rows(task_file(options.settings, DATA), needed, "HumanEval")
    return [_sample(row, {"tests": _tests(row)}, options) for row in rows]


def samples_plus(options: TaskOptions) -> list[Sample]:
    """Returns the problems with the tests of HumanEval ("base") and those that EvalPlus adds ("plus")."""
    needed = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
    rows = programs.read_rows(task_file(options.settings, DATA_PLUS), needed, "HumanEval+")
    return [_sample(row, differential_tests("humaneval", row), options) for row in rows]


def _tests(row: Mapping[str, Any]) -> dict[str, Any]:
    tests = f"{_helpers(row)}{row['test']}\n\ncheck({row['entry_point']})\n"
    names, modules = programs.uses(tests, row["prompt"] + row["canonical_solution"])
    return {"tests": tests, "names": list(names), "modules": list(modules)}


def _helpers(row: Mapping[str, Any]) -> str:
    """Returns what the prompt has besides the function to complete, if the tests call any of it; else "".

    The tests get it from here: a program could define it otherwise, so that its wrong results would be right.
    """
    whole = ast.parse(row["prompt"] + row["canonical_solution"]).body
    given = [node for node in whole if node.end_lineno <= row["prompt"].count("\n")]
    functions = {node.name for node in given if isinstance(node, ast.FunctionDef)}
    used = {node.id for node in ast.walk(ast.parse(row["test"])) if isinstance(node, ast.Name)}
    return ast.unparse(given) + "\n\n" if functions & used else ""


def _sample(row: Mapping[str, Any], tests: dict[str, Any], options: TaskOptions) -> Sample:
    prompt = row["prompt"]
    message = Message("user", f"{_INSTRUCTION}\n\n```python\n{prompt.strip()}\n```")
    return Sample(
        id=row["task_id"],
        prompt=(message,) if options.chat else prompt,
        sampling=programs.sampling(options.settings, () if options.chat else STOP),
        reference={"prompt": prompt, "name": row["entry_point"], "tests": tests},
        attempts=options.settings.attempts,
        held_out=(prompt, message.content),
    )


def program(sample: Sample, response: Response) -> str:
    """Returns the program in a response: the prompt and what completes it."""
    prompt, name = sample.reference["prompt"], sample.reference["name"]
    if isinstance(sample.prompt, str):
        return prompt + response.text
    return programs.completed(prompt, programs.code_in(response.text, name), name)


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns whether each program passes; writes the completions for the script of human-eval."""
    return programs.score_programs(responses, scoring, program, _human_eval_line)


def _human_eval_line(sample: Sample, source: str) -> dict[str, dict[str, str]]:
    completion = source.removeprefix(sample.reference["prompt"])
    return {"human_eval.jsonl": {"task_id": sample.id, "completion": completion}}


def score_plus(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns whether each program passes both kinds of tests, and each; writes the programs for evalplus."""
    return programs.score_programs(responses, scoring, program, _evalplus_line, LIMITS)


def _evalplus_line(sample: Sample, source: str) -> dict[str, dict[str, str]]:
    return {"evalplus.jsonl": {"task_id": sample.id, "solution": source}}


HUMANEVAL = Task(
    title="HumanEval",
    version=1,
    samples=samples,
    score=score,
    main="pass@1",
    shown=("pass@8", "pass@64"),
    figures=programs.figures,
    check=programs.check,
)

HUMANEVAL_PLUS = Task(
    title="HumanEval+",
    version=1,
    samples=samples_plus,
    score=score_plus,
    main="pass@1",
    shown=("base_pass@1", "pass@8", "pass@64"),
    figures=programs.figures,
    check=programs.check,
)
