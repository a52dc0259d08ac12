"""Runs inside the sandbox, as the untrusted process: executes a program and calls its functions for the supervisor.

It knows neither the tests nor the nonce. What the program does to this process is its own affair: the supervisor takes
nothing from it but values. Messages are JSON, one per line; `encode` and `Decoder` give the values that JSON lacks.
"""

import functools
import itertools
import json
import sys
import types

# A test that asks for the items of an endless generator shall fail, not hang.
MAX_ITEMS = 100_000
# Types that JSON has.
PLAIN = frozenset((type(None), bool, int, float, str))


class Codec:
    """Turns values into JSON and back.

    Numbers, strings, None and lists are themselves; other plain values are an object with the type as its only key. A
    subclass of a plain type becomes that type. `refer` returns the number that stands for any other object, and
    `resolve` what a number stands for.
    """

    def __init__(self, refer, resolve):
        self._refer, self._resolve = refer, resolve

    def encode(self, value):
        if type(value) in PLAIN:
            return value
        for kind in (str, int, float):
            if isinstance(value, kind):
                return kind(value)
        if isinstance(value, list):
            return self._encode_all(value)
        for kind in (tuple, set, frozenset):
            if isinstance(value, kind):
                return {kind.__name__: self._encode_all(value)}
        if isinstance(value, type({}.keys())):
            return {"set": self._encode_all(value)}
        if isinstance(value, dict):
            return {"dict": [[self.encode(k), self.encode(v)] for k, v in value.items()]}
        if isinstance(value, complex):
            return {"complex": [value.real, value.imag]}
        if isinstance(value, (bytes, bytearray)):
            return {"bytes": bytes(value).hex()}
        if isinstance(value, range):
            return {"range": [value.start, value.stop, value.step]}
        name = type(value).__module__ + "." + type(value).__name__
        if name in ("decimal.Decimal", "fractions.Fraction"):
            return {name: str(value)}
        return {"object": self._refer(value)}

    def _encode_all(self, values):
        return [v if type(v) in PLAIN else self.encode(v) for v in values]

    def decode(self, value):
        if isinstance(value, list):
            return [v if type(v) in PLAIN else self.decode(v) for v in value]
        if not isinstance(value, dict):
            return value
        ((kind, content),) = value.items()
        if kind in ("tuple", "set", "frozenset"):
            return {"tuple": tuple, "set": set, "frozenset": frozenset}[kind](self.decode(content))
        if kind == "dict":
            return {self.decode(k): self.decode(v) for k, v in content}
        if kind == "complex":
            return complex(*content)
        if kind == "bytes":
            return bytes.fromhex(content)
        if kind == "range":
            return range(*content)
        if kind == "decimal.Decimal":
            from decimal import Decimal

            return Decimal(content)
        if kind == "fractions.Fraction":
            from fractions import Fraction

            return Fraction(content)
        if kind == "object":
            return self._resolve(content)
        raise ValueError(f"unknown kind of value {kind!r}")


# What a test may do with an object that stays in the program's process.
OPERATIONS = {
    "call": lambda function, arguments, keywords: function(*arguments, **keywords),
    "get": getattr,
    "set": setattr,
    "items": lambda value: list(itertools.islice(value, MAX_ITEMS)),
    "next": next,
    "item": lambda value, key: value[key],
    "len": len,
    "bool": bool,
    "str": str,
}


def operate(codec, operation, arguments):
    return OPERATIONS[operation](*codec.decode(arguments))


def serve(requests, replies):
    """Executes the program of the first request, then does what further requests ask for until there are none."""
    objects = []

    def refer(value):
        objects.append(value)
        return len(objects) - 1

    codec = Codec(refer, objects.__getitem__)

    def answer(action):
        try:
            reply = {"value": codec.encode(action())}
        except BaseException as error:  # a program may raise SystemExit, too
            kinds = [kind.__name__ for kind in type(error).__mro__ if kind.__module__ == "builtins"]
            reply = {"raised": [kinds[0], type(error).__name__, str(error)[:300]]}
        replies.write(json.dumps(reply) + "\n")
        replies.flush()

    first = json.loads(requests.readline())
    module = types.ModuleType("program")
    sys.modules["program"] = module  # where dataclasses and typing look for the names of the program

    def load():
        exec(compile(first["program"], "program", "exec", dont_inherit=True), module.__dict__)
        found = {name: module.__dict__[name] for name in first["names"] if name in module.__dict__}
        modules = [name for name in first["modules"] if isinstance(module.__dict__.get(name), types.ModuleType)]
        return {"names": found, "modules": modules}

    answer(load)
    for line in requests:
        answer(functools.partial(operate, codec, *json.loads(line)))


if __name__ == "__main__":
    sys.set_int_max_str_digits(0)  # the length of messages is limited elsewhere
    with open(3, encoding="ascii") as requests, open(4, "w", encoding="ascii") as replies:
        serve(requests, replies)
