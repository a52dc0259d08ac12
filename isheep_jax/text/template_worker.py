"""The program of the process that renders chat templates; `chat_template` starts it and talks to it.

A template comes with the checkpoint and is a program: it can loop for ever or ask for more memory than there is, in
places where nothing in the process itself could stop it. So it runs in a process of its own, in jinja2's sandbox, under
limits of the system. Only jinja2 and the standard library are imported, so that the process starts quickly.

Reads a request a line, {"template": text, "values": {...}} or "values": null to compile only. Answers with a line each:
{"text": rendered} or {"error": why, "line": of the template or null}.
"""

import contextlib
import datetime
import functools
import json
import random
import resource
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

# Of one rendering; those of published models take less than a millisecond and a kilobyte more than the conversation.
CPU_SECONDS = 5
MEMORY = 2**30  # bytes of the whole process
CHARACTERS = 32 * 2**20  # of what is rendered
_REASON = 300  # characters of an error: a template may raise any text

# The date that templates write as today's, so that a run resumed on another day gives the same records.
_TODAY = datetime.date(2024, 7, 26)


class _Generation(jinja2.ext.Extension):
    """Treats {% generation %}, which marks what the model writes, as a plain block; the loss mask is made elsewhere."""

    tags = {"generation"}  # noqa: RUF012 (the base class's attribute)

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


@functools.lru_cache(maxsize=8)
def compiled(template: str) -> jinja2.Template:
    """Compiles a template in a sandbox, with trimmed blocks and the functions that transformers adds."""

    def to_json(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)

    def refuse(message: str):
        raise jinja2.TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = _TODAY.strftime
    return environment.from_string(template)


def answer(request: dict[str, Any]) -> dict[str, Any]:
    """Returns the answer to a request."""
    try:
        template = compiled(request["template"])
        return {"text": None if request["values"] is None else "".join(_pieces(template, request["values"]))}
    except MemoryError:
        return {"error": f"it needs more than {MEMORY // 2**20} MiB of memory", "line": None}
    except Exception as error:  # a template is a program, and may fail in any way
        reason = " ".join(str(error).split()) or type(error).__name__
        return {"error": reason[:_REASON], "line": getattr(error, "lineno", None)}


def _pieces(template: jinja2.Template, values: dict[str, Any]) -> Iterator[str]:
    random.seed(0)  # a template may draw at random, but a run that is resumed must render the same
    length = 0
    for piece in template.generate(**values):
        length += len(piece)
        if length > CHARACTERS:
            raise ValueError(f"it writes more than {CHARACTERS} characters")
        yield piece


def main() -> None:
    with contextlib.suppress(ValueError, OSError):  # not every system has this limit
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    for line in sys.stdin.buffer:
        # When the time is over the system ends the process, also inside a single operation on huge numbers.
        signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
        reply = json.dumps(answer(json.loads(line)))
        signal.setitimer(signal.ITIMER_PROF, 0)
        sys.stdout.buffer.write(reply.encode() + b"\n")
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
