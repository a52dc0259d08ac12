"""The tasks `mbpp`, `mbpp_sanitized` and `mbpp_plus`: small Python programs (Austin et al., 2021; Liu et al., 2023)."""

from collections.abc import Mapping, Sequence
from typing import Any

from isheep_jax.errors import UserError
from isheep_jax.evaluation import programs
from isheep_jax.evaluation.evalplus import LIMITS, differential_tests
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.text.conversation import Message

DATA = "mbpp/mbpp.jsonl"
DATA_SANITIZED = "mbpp/sanitized-mbpp.json"
DATA_PLUS = "mbpp_plus/MbppPlus.jsonl.gz"
TEST_SPLIT = range(11, 511)  # by task_id
SHOTS = (2, 3, 4)  # task_id of the worked examples of the completion prompt
STOP = ("[DONE]",)


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the 500 problems of the test split."""
    return _test_split(options, DATA, "text")


def samples_sanitized(options: TaskOptions) -> list[Sample]:
    """Returns the problems of the test split whose statements and tests were verified by hand (257)."""
    return _test_split(options, DATA_SANITIZED, "prompt")


def _test_split(options: TaskOptions, data: str, text_key: str) -> list[Sample]:
    path = task_file(options.settings, data)
    rows = programs.read_rows(path, ("task_id", text_key, "code", "test_list"), "MBPP")
    by_id = {row["task_id"]: row for row in rows}
    missing = [n for n in SHOTS if n not in by_id]
    if missing and not options.chat:
        raise UserError(f"{path}: the worked examples of MBPP's prompt are missing: task_id {missing[0]}")
    shots = "" if options.chat else "".join(_shot(by_id[n], text_key) for n in SHOTS)
    return [_sample(row, row[text_key], shots, options) for row in rows if row["task_id"] in TEST_SPLIT]


def _sample(row: Mapping[str, Any], text: str, shots: str, options: TaskOptions) -> Sample:
    reference = _lines(row["code"])
    setup = [*row.get("test_imports", ()), _lines(row.get("test_setup_code", ""))]
    tests = "\n".join([*setup, *row["test_list"]]) + "\n"
    names, modules = programs.uses(tests, reference)
    asked = "\n".join(row["test_list"])
    name = next((name for name in names if programs.defines(reference, name) and name in asked), "")
    return Sample(
        id=str(row["task_id"]),
        prompt=_chat_prompt(text, row["test_list"]) if options.chat else shots + _task(text, row["test_list"]),
        sampling=programs.sampling(options.settings, () if options.chat else STOP),
        reference={"name": name, "tests": {"tests": {"tests": tests, "names": list(names), "modules": list(modules)}}},
        attempts=options.settings.attempts,
        held_out=(text,),
    )


def _chat_prompt(text: str, tests: Sequence[str]) -> tuple[Message, ...]:
    block = "\n".join(tests)
    return (
        Message(
            "user",
            f"Solve this task in Python: {text}\n\nThe code must pass these tests:\n\n```python\n{block}\n```\n\n"
            "Reply with the code, and with all imports that it needs, in one block of code.",
        ),
    )


def _task(text: str, tests: Sequence[str]) -> str:
    """Returns a task as the benchmark's own prompt has it (Austin et al., 2021, section 3)."""
    return (
        f"You are an expert Python programmer, and here is your task: {text} Your code should pass these tests:\n\n"
        + "\n".join([*tests, "[BEGIN]\n"])
    )


def _shot(row: Mapping[str, Any], text_key: str) -> str:
    return f"{_task(row[text_key], row['test_list'])}{_lines(row['code'])}\n[DONE]\n\n"


def _lines(text: str) -> str:
    """Returns a text with the line ends of Unix; the published ones vary."""
    return text.replace("\r\n", "\n")


def samples_plus(options: TaskOptions) -> list[Sample]:
    """Returns the problems with the tests of MBPP ("base") and those that EvalPlus adds ("plus")."""
    needed = ("task_id", "prompt", "entry_point", "canonical_solution", "base_input", "plus_input", "atol")
    rows = programs.read_rows(task_file(options.settings, DATA_PLUS), needed, "MBPP+")
    return [_sample_plus(row, options) for row in rows]


def _sample_plus(row: Mapping[str, Any], options: TaskOptions) -> Sample:
    # Statement and a test, as a docstring.
    statement = row["prompt"].strip().strip("\"'").strip()
    instruction = (
        f"Solve this task in Python. Reply with the code, and with all imports that it needs, in one block of code.\n\n"
        f"{statement}"
    )
    if "assert" not in statement:
        instruction += f"\n\nThe function's name is {row['entry_point']}."
    return Sample(
        id=str(row["task_id"]),
        prompt=(Message("user", instruction),) if options.chat else row["prompt"].rstrip() + "\n",
        sampling=programs.sampling(options.settings, () if options.chat else STOP_PLUS),
        reference={"name": row["entry_point"], "tests": differential_tests("mbpp", row)},
        attempts=options.settings.attempts,
        held_out=(statement, row["prompt"]),
    )


# A completion may define helpers, so that only what follows the code ends it.
STOP_PLUS = ('\n"""', "\nassert", "\nprint", "\nif __name__", "\n```")


def program(sample: Sample, response: Response) -> str:
    """Returns the program in a response."""
    if isinstance(sample.prompt, str) and "```" not in response.text:
        return response.text
    return programs.code_in(response.text, sample.reference["name"])


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns whether each program passes; writes the programs for evalplus."""
    return programs.score_programs(responses, scoring, program, _evalplus_line)


def score_plus(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns whether each program passes both kinds of tests, and each; writes the programs for evalplus."""
    return programs.score_programs(responses, scoring, program, _evalplus_line, LIMITS)


def _evalplus_line(sample: Sample, source: str) -> dict[str, dict[str, str]]:
    return {"evalplus.jsonl": {"task_id": f"Mbpp/{sample.id.rpartition('/')[2]}", "solution": source}}


def _task_of(title: str, samples, score, *shown: str) -> Task:
    return Task(
        title=title,
        version=1,
        samples=samples,
        score=score,
        main="pass@1",
        shown=(*shown, "pass@8", "pass@64"),
        figures=programs.figures,
        check=programs.check,
    )


MBPP = _task_of("MBPP", samples, score)
MBPP_SANITIZED = _task_of("MBPP sanitized", samples_sanitized, score)
MBPP_PLUS = _task_of("MBPP+", samples_plus, score_plus, "base_pass@1")
