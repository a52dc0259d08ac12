"""Tests in the format of EvalPlus (Liu et al., 2023): arguments, and a reference solution that gives the results."""

import json
from collections.abc import Mapping
from typing import Any

from isheep_jax.errors import UserError
from isheep_jax.evaluation.execution.differential import conversion_of
from isheep_jax.evaluation.execution.sandbox import Limits

# EvalPlus' own: 4 s for a call, or more where the reference needs more than one, and a minute for all. Here the time of
# the reference comes on top.
LIMITS = Limits(seconds=240.0, cpu_seconds=60, call_cpu_seconds=4.0, memory=4 << 30)


def differential_tests(benchmark: str, row: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the tests of a problem: "base" are the benchmark's own, "plus" those that EvalPlus adds.

    benchmark: "humaneval" or "mbpp".
    row: of the published file.
    """
    name = row["entry_point"]
    number = str(row["task_id"]).rpartition("/")[2]
    if not number.isdecimal():
        raise UserError(
            f"{benchmark}_plus: {row['task_id']!r} is not the id of a problem, such as HumanEval/0 or Mbpp/2"
        )

    def tests(inputs: list) -> dict[str, Any]:
        job = {
            "benchmark": benchmark,
            "name": name,
            "conversion": conversion_of(benchmark, int(number)),
            "reference": row["prompt"] + row["canonical_solution"],
            "inputs": inputs,
            "tolerance": row["atol"],
        }
        text = f"import differential\ndifferential.check({name}, {json.dumps(job)!r}, limit_calls)\n"
        return {"tests": text, "names": [name], "modules": []}

    return {"base": tests(row["base_input"]), "plus": tests(row["plus_input"])}
