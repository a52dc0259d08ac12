"""What the tasks with programs share: sampling, the program in a response, scores from the sandbox, pass@k."""

import ast
import builtins
import gzip
import json
import math
import re
import sys
import textwrap
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.evaluation.execution.sandbox import LIMITS, Limits, Program, check_allowed, run_programs
from isheep_jax.evaluation.figures import Figure, mean_figure
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring
from isheep_jax.files import write_atomically
from isheep_jax.text_files import decoded, objects_of

MAX_TOKENS = 1024
# More responses per problem give pass@k for these k, besides pass@1.
PASS_AT = (8, 64)

_FENCE = re.compile(r"^([ \t]*)(`{3,}+|~{3,}+)[^\n]*+\n(.*?)(?:^[ \t]*\2[ \t]*$|\Z)", re.DOTALL | re.MULTILINE)
_CODE = re.compile(
    r"[ \t]|$|#|@|\)|\]|\}|(async |def |class |import |from \S+ import |if |elif |else:|for |while |with |try:|except|"
    r"finally:|return |assert |print\()|[A-Za-z_][\w.\[\], ]*(: *\S+ *)?[-+*/|&]?= *\S"
)
_START = re.compile(r"(async def |def |class |import |from \S+ import |@)")


def sampling(settings: EvaluateConfig, stop: tuple[str, ...] = ()) -> SamplingParams:
    """Returns how programs are sampled: greedily if there is one attempt per problem."""
    several = settings.attempts > 1
    return SamplingParams(
        temperature=0.8 if several else 0.0,
        top_p=0.95 if several else 1.0,
        max_tokens=settings.max_tokens or MAX_TOKENS,
        stop=stop,
    )


def read_rows(path: epath.Path, needed: tuple[str, ...], title: str) -> list[dict[str, Any]]:
    """Returns the rows of a published file: JSON lines or a JSON list, which may be compressed by gzip.

    Raises UserError where a row lacks one of the `needed` keys.
    """
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
        like = json.dumps(dict.fromkeys(needed, "..."))
        text = decoded(data, f"evaluate.task_data: {path}")
        rows = [row for _, row in objects_of(text, path, "evaluate.task_data", like)]
        missing = [key for row in rows for key in needed if key not in row]
    except (OSError, EOFError, ValueError, TypeError) as error:
        raise UserError(f"{path} is not {title}'s data ({error!r})") from None
    if missing or not rows:
        raise UserError(f"{path} is not {title}'s data: each row needs {', '.join(needed)}")
    return rows


def code_in(response: str, name: str) -> str:
    """Returns the code in a response: of the first block with the function `name`, else of the first block.

    A block that is not closed ends with the response. Without blocks, it is the response from its first line that can
    only be code up to the prose after it; without such a line, the whole response.
    """
    blocks = [_without_indent(block[3], block[1]) for block in _FENCE.finditer(response)]
    if blocks:
        return next((block for block in blocks if defines(block, name)), blocks[0])
    lines = response.splitlines()
    start = next((n for n, line in enumerate(lines) if _START.match(line)), None)
    if start is None:
        return response
    end = next((n for n in range(start, len(lines)) if not _CODE.match(lines[n])), len(lines))
    return "\n".join(lines[start:end]) + "\n"


def _without_indent(block: str, indent: str) -> str:
    """Returns a block's lines without the indentation of its fence, as in an item of a list."""
    return "".join(line.removeprefix(indent) for line in block.splitlines(keepends=True))


def defines(code: str, name: str) -> bool:
    """Returns whether the code has a function, or anything else, of this name at its top level."""
    return (
        re.search(rf"^((async )?def|class) +{re.escape(name)}\b|^{re.escape(name)} *=", code, re.MULTILINE) is not None
    )


def completed(prompt: str, code: str, name: str) -> str:
    """Returns the program of a prompt that begins a function and of code that repeats the function or continues it.

    The prompt stays, with its imports and helpers; a function that is repeated replaces the one it begins.
    """
    if defines(code, name):
        return f"{prompt}\n\n{code}"
    first = next((line for line in code.splitlines() if line.strip()), "")
    if first.startswith("\t"):  # prompts have spaces
        return prompt + code.expandtabs(4)
    return prompt + (code if first.startswith(" ") else textwrap.indent(code, "    "))


def uses(tests: str, reference: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Returns what tests take from the program that they test: names, and modules of the standard library.

    reference: the right program; what it defines is a name, even where Python has something of that name.
    """
    loaded, own = set(), set()
    for node in ast.walk(ast.parse(tests)):
        match node:
            case ast.Name(name, ast.Load()):
                loaded.add(name)
            case ast.Name(name) | ast.arg(name) | ast.FunctionDef(name):
                own.add(name)
            case ast.alias(name, asname):
                own.add(asname or name.partition(".")[0])
    defined = {name for name in loaded if defines(reference, name)}
    free = loaded - own - (set(dir(builtins)) - defined)
    modules = {name for name in free if name in sys.stdlib_module_names} - defined
    return tuple(sorted(free - modules)), tuple(sorted(modules))


def score_programs(
    responses: Sequence[tuple[Sample, Response]],
    scoring: Scoring,
    program: Callable[[Sample, Response], str],
    exports: Callable[[Sample, str], dict[str, dict[str, str]]],
    limits: Limits = LIMITS,
) -> list[Score]:
    """Returns the scores of the programs in responses; pass@1 is whether one passes all tests of its sample.

    The reference of a sample has its tests: {"tests": {NAME: {"tests", "names", "modules"}}}. With several, there is
    also NAME_pass@1 for each.

    Args:
        responses: To score; one that is missing fails.
        scoring: Its directory gets the programs in official formats.
        program: Returns the program in a response.
        exports: Returns lines for official scorers, by file name, of a sample and its program.
        limits: Of each run of a program.
    """
    sources = ["" if response.error else program(sample, response) for sample, response in responses]
    files: dict[str, list[str]] = defaultdict(list)
    for (sample, _), source in zip(responses, sources):
        for file, line in exports(sample, source).items():
            files[file].append(json.dumps(line) + "\n")
    for file, lines in files.items():
        write_atomically(scoring.directory / file, "".join(lines).encode())
    verdicts = iter(distributed.from_primary(lambda: _verdicts(responses, sources, scoring, limits)))
    scores = []
    for sample, _ in responses:
        results = {name: next(verdicts) for name in sample.reference["tests"]}
        reasons = {name: reason for name, (passed, reason) in results.items() if not passed}
        values = {f"{name}_pass@1": passed for name, (passed, _) in results.items()} if len(results) > 1 else {}
        details = {"reason": "; ".join(f"{n}: {r}" if values else r for n, r in reasons.items())} if reasons else {}
        scores.append(Score({"pass@1": not reasons} | values, details))
    return scores


def _verdicts(
    responses: Sequence[tuple[Sample, Response]],
    sources: Sequence[str],
    scoring: Scoring,
    limits: Limits,
) -> list[tuple[bool, str]]:
    """Returns whether each program passes each of its sample's tests, and why not."""
    programs = []
    for (sample, response), source in zip(responses, sources):
        for tests in sample.reference["tests"].values():
            names, modules = tuple(tests["names"]), tuple(tests["modules"])
            programs.append(None if response.error else Program(source, tests["tests"], names, modules))
    different = [program for program in dict.fromkeys(programs) if program]  # several attempts may be the same
    with scoring.progress("run programs", len(different), "programs") as bar:
        verdicts = dict(zip(different, run_programs(different, scoring.settings, bar.advance, limits)))
    return [(verdicts[p].passed, verdicts[p].reason) if p else (False, "no response") for p in programs]


def pass_at(k: int, passed: int, attempts: int) -> float:
    """Returns the unbiased estimate of the chance that one of k attempts passes (Chen et al., 2021, eq. 1)."""
    return 1.0 - math.comb(attempts - passed, k) / math.comb(attempts, k)


def figures(triples: Sequence[tuple[Sample, Response, Score]]) -> dict[str, Figure]:
    """Returns pass@8 and pass@64 as far as every problem has enough attempts."""
    passed: dict[str, list[float]] = defaultdict(list)
    for sample, _, score in triples:
        passed[sample.id].append(float(score.values["pass@1"]))
    fewest = min(map(len, passed.values()), default=0)
    return {
        f"pass@{k}": mean_figure([pass_at(k, int(sum(p)), len(p))] for p in passed.values())
        for k in PASS_AT
        if k <= fewest
    }


def check(settings: EvaluateConfig) -> None:
    """Raises UserError where programs may not or cannot be run; only the primary process runs any."""
    if distributed.is_primary():
        check_allowed(settings)
