"""Public data whose better and worse responses are known, for `judging.py`."""

import ast
import contextlib
import csv
import json
import random
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from isheep_jax.cli.progress import StageProgress
from isheep_jax.config import EvaluateConfig
from isheep_jax.evaluation import humaneval, ifeval, mbpp, programs
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions

INSTRUCTION_WORDS = 60  # longer instructions are left out
ANSWER_WORDS = 60  # about 80 tokens; AlpacaEval's answers are cut there
IFEVAL_WORDS = 100  # longer responses are left out: cut ones would break what they were asked for
MUTANTS = 3  # most that are tried for each program


@dataclass(frozen=True)
class Item:
    """A response that is known to be better or worse. pair: what the two to one instruction share; "": it is alone."""

    instruction: str
    response: str
    is_better: bool
    pair: str = ""


@dataclass(frozen=True)
class PublicSet:
    """A set of public data. known_by: why the order of its responses is known. read: from (directory, most pairs)."""

    title: str
    known_by: str
    read: Callable[[Path, int], list[Item]]


def alpaca_eval(directory: Path, limit: int) -> list[Item]:
    """Returns GPT-4 Turbo's and Qwen1.5-7B-Chat's answers to the same instructions, both cut."""
    files = ("gpt4_1106_preview_outputs.json", "Qwen1.5-7B-Chat_outputs.json")
    better, worse = (json.loads((directory / "alpaca_eval" / name).read_text()) for name in files)
    by_instruction = {row["instruction"]: row["output"] for row in worse}
    rows = [
        (row["instruction"], row["output"], by_instruction[row["instruction"]])
        for row in _drawn(better)
        if len(row["instruction"].split()) <= INSTRUCTION_WORDS and row["instruction"] in by_instruction
    ]
    return _pairs((i, _cut(a), _cut(b)) for i, a, b in rows[:limit])


def truthful_qa(directory: Path, limit: int) -> list[Item]:
    """Returns the best answer and one of the incorrect ones to each question."""
    with (directory / "truthfulqa" / "TruthfulQA.csv").open(encoding="utf-8") as file:
        rows = _drawn(list(csv.DictReader(file)))[:limit]
    rng = random.Random(0)
    wrong = ([x.strip() for x in row["Incorrect Answers"].split(";") if x.strip()] for row in rows)
    return _pairs((row["Question"], row["Best Answer"].strip(), rng.choice(w)) for row, w in zip(rows, wrong))


def instruction_following(directory: Path, limit: int) -> list[Item]:
    """Returns GPT-4's responses to IFEval's prompts, as many that pass the checkers as that fail."""
    path = directory / "ifeval" / "input_response_data_gpt4_20231107_145030.jsonl"
    published = {row["prompt"]: row["response"] for row in map(json.loads, path.read_text().splitlines())}
    samples = [s for s in ifeval.samples(_options(directory)) if s.reference["prompt"] in published]
    answered = [(s, published[s.reference["prompt"]]) for s in samples]
    scores = _scores(ifeval.TASK, answered, directory)
    passed, failed = (
        [
            Item(sample.reference["prompt"], text, is_better)
            for (sample, text), score in _drawn(list(zip(answered, scores)))
            if bool(score.values["prompt_strict"]) == is_better and len(text.split()) <= IFEVAL_WORDS
        ]
        for is_better in (True, False)
    )
    count = min(len(passed), len(failed), limit)
    return passed[:count] + failed[:count]


def programming(task: Task, code_of: Callable[[Path], dict[str, str]]) -> Callable[[Path, int], list[Item]]:
    """Returns a reader of canonical solutions and mutated ones that fail the tests, without docstrings."""

    def read(directory: Path, limit: int) -> list[Item]:
        code = code_of(directory)
        samples = _drawn(task.samples(_options(directory)))[: 3 * limit // 2]
        tried = [
            (sample, mutant)
            for sample in samples
            for mutant in mutants(code[sample.id], sample.reference["name"], random.Random(sample.id))
        ]
        fenced = [(sample, f"```python\n{mutant}\n```") for sample, mutant in tried]
        failing: dict[str, str] = {}
        for (sample, text), score in zip(fenced, _scores(task, fenced, directory)):
            if not score.values["pass@1"]:
                failing.setdefault(sample.id, text)
        rows = [
            (s.prompt[-1].content, f"```python\n{plain(code[s.id])}\n```", failing[s.id])
            for s in samples
            if s.id in failing
        ]
        return _pairs(rows[:limit])

    return read


def _humaneval_code(directory: Path) -> dict[str, str]:
    rows = programs.read_rows(epath.Path(directory / humaneval.DATA), ("task_id",), "HumanEval")
    return {row["task_id"]: row["prompt"] + row["canonical_solution"] for row in rows}


def _mbpp_code(directory: Path) -> dict[str, str]:
    rows = programs.read_rows(epath.Path(directory / mbpp.DATA), ("task_id",), "MBPP")
    return {str(row["task_id"]): row["code"].replace("\r\n", "\n") for row in rows}


SETS: dict[str, PublicSet] = {
    "alpaca_eval": PublicSet(
        "AlpacaEval: GPT-4 Turbo's answer, and Qwen1.5-7B-Chat's", "the official judge prefers nine of ten", alpaca_eval
    ),
    "truthful_qa": PublicSet("TruthfulQA: best answer, and an incorrect one", "its authors", truthful_qa),
    "ifeval": PublicSet(
        "IFEval: GPT-4's responses that pass, and those that fail", "the checkers; no pairs", instruction_following
    ),
    "mbpp": PublicSet("MBPP: canonical solution, and a mutated one", "the tests", programming(mbpp.MBPP, _mbpp_code)),
    "humaneval": PublicSet(
        "HumanEval: the same", "the tests", programming(humaneval.HUMANEVAL, _humaneval_code)
    ),
}  # fmt: skip


def plain(source: str) -> str:
    """Returns a program without docstrings and comments, as `mutants` writes it."""
    return ast.unparse(_without_docstrings(ast.parse(source)))


def mutants(source: str, name: str, rng: random.Random) -> Iterator[str]:
    """Yields a few programs with one small change each in the function `name` (or anywhere), drawn at random."""
    tree = _without_docstrings(ast.parse(source))
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name == name]
    nodes = [node for root in functions or [tree] for node in ast.walk(root)]
    changes = [(node, *change) for node in nodes for change in _changes(node)]
    rng.shuffle(changes)
    for node, field, value in changes[:MUTANTS]:
        before = getattr(node, field)
        setattr(node, field, value)
        yield ast.unparse(tree)
        setattr(node, field, before)


_SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Add, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult, ast.Mod: ast.Mult,
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.In: ast.NotIn, ast.NotIn: ast.In, ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip
_NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "sorted": "list"}


def _changes(node: ast.AST) -> Iterator[tuple[str, object]]:
    """Yields the changes of one node: its field and the new value."""
    if isinstance(node, ast.BinOp | ast.BoolOp) and type(node.op) in _SWAPS:
        yield "op", _SWAPS[type(node.op)]()
    if isinstance(node, ast.Compare) and type(node.ops[0]) in _SWAPS:
        yield "ops", [_SWAPS[type(node.ops[0])](), *node.ops[1:]]
    if isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield "value", not node.value
    elif isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        yield "value", node.value + 1
    if isinstance(node, ast.Name) and node.id in _NAMES and isinstance(node.ctx, ast.Load):
        yield "id", _NAMES[node.id]


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and ast.get_docstring(node) is not None and len(node.body) > 1:
            node.body = node.body[1:]
    return tree


def _options(directory: Path) -> TaskOptions:
    return TaskOptions(EvaluateConfig(task_data=str(directory), allow_code_execution=True))


def _scores(task: Task, answers: Sequence[tuple[Sample, str]], directory: Path) -> Sequence[Score]:
    """Returns the task's scores of texts."""
    pairs = [(sample, Response(sample.id, 0, ("",), (text,), ("stop",))) for sample, text in answers]
    with tempfile.TemporaryDirectory() as written:
        return task.score(pairs, Scoring(_options(directory).settings, epath.Path(written), _silent))


def _silent(what: str, total: int | None, unit: str) -> contextlib.AbstractContextManager[StageProgress]:
    return contextlib.nullcontext(StageProgress(total, unit))


def _drawn(rows: Sequence) -> list:
    """Returns the rows in an order that is random and always the same."""
    return random.Random(0).sample(list(rows), len(rows))


def _cut(text: str) -> str:
    words = text.split(" ")
    return " ".join(words[:ANSWER_WORDS])


def _pairs(rows: Iterator[tuple[str, str, str]] | Sequence[tuple[str, str, str]]) -> list[Item]:
    items = []
    for number, (instruction, better, worse) in enumerate(rows):
        items += [Item(instruction, better, True, str(number)), Item(instruction, worse, False, str(number))]
    return items
