"""Runs inside the sandbox, in the supervisor: compares a function with a reference solution, as EvalPlus does.

Unlike other tests, EvalPlus' are a list of arguments. The right results are those of the reference, which comes with
the benchmark and is trusted. What counts as equal is EvalPlus' rule, special cases included.
"""

import copy
import json
import math
import time

# A call may take so many seconds, or so many times as long as the reference.
MIN_LIMIT, LIMIT_FACTOR = 4.0, 4.0

# Arguments of MBPP+ that JSON cannot hold, by number of the problem.
CONVERSIONS = {
    "tuples": (
        *(2, 116, 132, 143, 222, 261, 273, 394, 399, 421, 424, 429, 470),
        *(560, 579, 596, 616, 630, 726, 740, 744, 809),
    ),
    "lists of tuples": (63, 64, 70, 94, 120, 237, 272, 299, 400, 409, 417, 438, 473, 614, 780),
    "tuples of tuples": (259, 401, 445),
    "nested tuples": (580, 615, 791),
    "first a list of tuples": (75, 413, 444, 753),
    "first a tuple": (250, 307, 405, 446, 617, 720, 763, 808),
    "second a tuple": (106, 750),
    "first a tuple of values and tuples": (278,),
    "first a list of sets": (115,),
    "first a dict of tuples": (722,),
    "first complex": (252,),
    "float and complex": (124,),
}  # fmt: skip
CONVERT = {
    "tuples": lambda *a: [tuple(v) for v in a],
    "lists of tuples": lambda *a: [[tuple(i) for i in v] for v in a],
    "tuples of tuples": lambda *a: [tuple(tuple(i) for i in v) for v in a],
    "nested tuples": lambda *a: nested_tuples(list(a)),
    "first a list of tuples": lambda a, *rest: [[tuple(i) for i in a], *rest],
    "first a tuple": lambda a, *rest: [tuple(a), *rest],
    "second a tuple": lambda a, b, *rest: [a, tuple(b), *rest],
    "first a tuple of values and tuples": lambda a, *rest: [tuple(tuple(i) if is_list(i) else i for i in a), *rest],
    "first a list of sets": lambda a, *rest: [[set(i) if is_list(i) and i else {} for i in a], *rest],
    "first a dict of tuples": lambda a, *rest: [{k: tuple(v) for k, v in a.items()}, *rest],
    "first complex": lambda a, *rest: [complex(a), *rest],
    "float and complex": lambda a, b, *rest: [float(a), complex(b), *rest],
}


def is_list(value):
    return isinstance(value, list)


def nested_tuples(value):
    return tuple(map(nested_tuples, value)) if is_list(value) else value


def conversion_of(benchmark, number):
    """Returns the name of the conversion that a problem's arguments need; "" for none."""
    names = [name for name, numbers in CONVERSIONS.items() if benchmark == "mbpp" and number in numbers]
    return names[0] if names else ""


# Problems of MBPP+ whose statement allows more than the reference gives: whether a result is right besides being equal.
AS_SETS = (
    *("similar_elements", "find_char_long", "common_in_nested_lists", "extract_singly"),
    *("larg_nnum", "intersection_array", "find_dissimilar", "Diff"),
)
WHETHER_NONE = ("check_str", "text_match_three", "text_starta_endb")


def mbpp_equal(name, result, expected, arguments, tolerance):
    if name in AS_SETS:
        return set(result) == set(expected)
    if name in WHETHER_NONE:
        return (result if isinstance(result, bool) else result is not None) == expected
    if result == expected or name == "are_equivalent":
        return True
    if name == "sum_div":
        return result == 0
    if name == "surface_Area":
        return abs(result - pyramid_surface(*arguments)) <= tolerance
    if name == "digit_distance_nums":
        return result == digit_distance(*arguments)
    return False


def pyramid_surface(edge, height):
    """Returns the rounded surface of a square pyramid; height: of the apex over the base."""
    return round(edge**2 + 2 * edge * math.hypot(edge / 2, height))


def digit_distance(first, second):
    """Returns the sum of the differences of digits, aligned at the last one."""
    width = max(len(str(first)), len(str(second)))
    return sum(abs(int(a) - int(b)) for a, b in zip(str(first).zfill(width), str(second).zfill(width)))


def is_root(coefficients, x, tolerance):
    """Returns whether a polynomial is zero at x (HumanEval/32); coefficients: the lowest power first."""
    return abs(sum(c * math.pow(x, power) for power, c in enumerate(coefficients))) <= tolerance


def are_floats(value):
    return isinstance(value, float) or (
        isinstance(value, list | tuple) and bool(value) and all(isinstance(v, float) for v in value)
    )


def is_close(result, expected, tolerance):
    """Returns whether numbers, or sequences of them, are equal up to the tolerance (absolute; 1e-7 relative)."""
    if isinstance(expected, list | tuple):
        return len(result) == len(expected) and all(is_close(r, e, tolerance) for r, e in zip(result, expected))
    if math.isinf(expected):
        return result == expected
    return abs(result - expected) <= tolerance + 1e-7 * abs(expected)


def check(candidate, text, limit_calls):
    """Raises AssertionError with the number of the first input whose result is wrong.

    text: JSON with benchmark, name (of the function), conversion, reference (source text), inputs and tolerance.
    limit_calls: sets the limit on the CPU time (s) of a call of the candidate.
    """
    job = json.loads(text)
    benchmark, name, tolerance = job["benchmark"], job["name"], job["tolerance"]
    convert = CONVERT.get(job["conversion"], lambda *arguments: arguments)
    scope = {"__name__": "reference"}
    exec(job["reference"], scope)
    for number, values in enumerate(job["inputs"]):
        arguments = convert(*values)
        start = time.process_time()
        expected = scope[name](*copy.deepcopy(arguments))
        limit_calls(max(MIN_LIMIT, LIMIT_FACTOR * (time.process_time() - start)))
        result = candidate(*arguments)
        if name == "find_zero" and benchmark == "humaneval":
            assert is_root(*arguments, result, tolerance), f"input {number}"
            continue
        if benchmark == "mbpp" and name in WHETHER_NONE:
            expected = expected is not None
        equal = mbpp_equal(name, result, expected, arguments, tolerance) if benchmark == "mbpp" else result == expected
        if tolerance == 0 and are_floats(expected):
            tolerance = 1e-6  # from here on, as EvalPlus has it
        if not equal and tolerance:
            equal = type(result) is type(expected) and is_close(result, expected, tolerance)
        assert equal, f"input {number}"
