"""What counts as equal, and which arguments are converted, is as EvalPlus has it."""

import json
import math

import pytest

from isheep_jax.evaluation.execution.differential import (
    CONVERSIONS,
    CONVERT,
    check,
    conversion_of,
    is_close,
    mbpp_equal,
)


def passes(candidate, reference: str, inputs: list, benchmark="humaneval", name="f", conversion="", tolerance=0.0):
    job = {"benchmark": benchmark, "name": name, "conversion": conversion, "reference": reference, "inputs": inputs}
    try:
        check(candidate, json.dumps(job | {"tolerance": tolerance}), lambda seconds: None)
    except AssertionError:
        return False
    return True


def test_results_are_compared_with_those_of_the_reference():
    reference = "def f(x):\n    x.append(1)\n    return len(x)"
    assert passes(lambda x: len(x) + 1, reference, [[[]], [[1, 2]]])  # neither sees what the other did to the argument
    assert not passes(lambda x: 1, reference, [[[]], [[1, 2]]])
    assert not passes(lambda x: float(len(x) + 1.5), reference, [[[]]])


def test_a_call_may_take_as_long_as_the_reference_needs():
    limits = []
    slow = (
        "import time\ndef f(x):\n    end = time.process_time() + x\n    while time.process_time() < end:\n        pass"
    )
    job = {"benchmark": "humaneval", "name": "f", "conversion": "", "reference": slow, "tolerance": 0}
    check(lambda x: None, json.dumps(job | {"inputs": [[0], [1.2]]}), limits.append)
    assert limits[0] == 4
    assert 4.8 <= limits[1] < 8


def test_numbers_need_a_tolerance_or_floats_to_differ():
    assert not passes(lambda x: x + 1e-8, "f = lambda x: x", [[1]])
    assert passes(lambda x: x + 1e-8, "f = lambda x: x", [[1.0]])
    assert not passes(lambda x: x + 1e-5, "f = lambda x: x", [[1.0]])
    assert passes(lambda x: x + 1e-5, "f = lambda x: x", [[1.0]], tolerance=1e-4)
    assert not passes(lambda x: [x[0] + 1e-8], "f = lambda x: x", [[[1.0, 2.0]]])
    assert not passes(lambda x: math.nan, "f = lambda x: x", [[1.0]])
    assert passes(lambda x: math.inf, "f = lambda x: float('inf')", [[1.0]])
    assert not passes(lambda x: tuple(x), "f = lambda x: x", [[[1.0]]])


def test_sequences_are_close_by_their_parts():
    assert is_close([1.0, [2.0]], [1.0, [2.0 + 1e-7]], 1e-6)
    assert not is_close([1.0], [1.0, 2.0], 1e-6)
    assert not is_close(math.inf, -math.inf, 1.0)


def test_any_root_of_a_polynomial_is_right():
    reference = "def find_zero(xs):\n    return 1.0"
    for x, right in ((1.0, True), (-1.0, True), (0.5, False)):
        assert passes(lambda xs, x=x: x, reference, [[[-1, 0, 1]]], name="find_zero", tolerance=1e-4) == right


@pytest.mark.parametrize(
    ("name", "result", "expected", "arguments", "equal"),
    [
        ("Diff", [2, 1], [1, 2], (), True),
        ("Diff", [1], [1, 2], (), False),
        ("check_str", "a match", True, (), True),
        ("check_str", None, True, (), False),
        ("check_str", False, False, (), True),
        ("are_equivalent", False, True, (), True),
        ("sum_div", 0, 7, (8,), True),
        ("sum_div", 6, 7, (8,), False),
        ("surface_Area", 33, 1, (3, 4), False),
        ("surface_Area", 35, 1, (3, 4), True),
        ("digit_distance_nums", 1, 9, (1, 2), True),
        ("digit_distance_nums", 7, 9, (23, 156), True),
        ("anything", 1, True, (), True),
        ("anything", 0, 7, (), False),
    ],
)
def test_problems_with_several_right_results_have_a_rule(name, result, expected, arguments, equal):
    assert mbpp_equal(name, result, expected, arguments, 0) == equal


CONVERTED = {
    "tuples": ([[1], [2]], [(1,), (2,)]),
    "lists of tuples": ([[[1], [2]]], [[(1,), (2,)]]),
    "tuples of tuples": ([[[1], [2]], [[3]]], [((1,), (2,)), ((3,),)]),
    "nested tuples": ([[1, [2, [3]]]], ((1, (2, (3,))),)),
    "first a list of tuples": ([[[1]], [2]], [[(1,)], [2]]),
    "first a tuple": ([[1], [2]], [(1,), [2]]),
    "second a tuple": ([[1], [2]], [[1], (2,)]),
    "first a tuple of values and tuples": ([[1, [2]]], [(1, (2,))]),
    "first a list of sets": ([[[1, 2], []]], [[{1, 2}, {}]]),
    "first a dict of tuples": ([{"a": [1]}, 2], [{"a": (1,)}, 2]),
    "first complex": (["1+2j"], [1 + 2j]),
    "float and complex": (["1", "2j"], [1.0, 2j]),
}


@pytest.mark.parametrize("name", CONVERSIONS)
def test_arguments_get_the_types_that_json_lacks(name):
    given, converted = CONVERTED[name]
    assert CONVERT[name](*given) == converted


def test_each_problem_has_one_conversion_at_most_and_only_in_mbpp():
    numbers = [number for numbers in CONVERSIONS.values() for number in numbers]
    assert len(numbers) == len(set(numbers))
    assert conversion_of("mbpp", 2) == "tuples"
    assert conversion_of("humaneval", 2) == conversion_of("mbpp", 3) == ""
    assert CONVERT.keys() == CONVERSIONS.keys()
