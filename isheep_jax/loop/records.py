"""The records of the loop: frozen dataclasses, one JSON line each, with a verdict.

Ids say where a record comes from: "2-000042" is the 42nd instruction that iteration 2 wrote (dropped ones count too),
"2-000042-3" its fourth response. Nothing in a record depends on the time, the machine or a restart.
"""

import dataclasses
import functools
import json
import types
import typing
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

# A field that most runs have no use for: it is left out of the line where it is None.
_RARE = {"rare": True}


@dataclass(frozen=True)
class Verdict:
    """Kept, or dropped and why.

    reason: one of few fixed texts, so that records can be counted by it. detail: what is particular to this record.
    """

    kept: bool
    reason: str = ""
    detail: str = ""


KEPT = Verdict(True)


def dropped(reason: str, detail: str = "") -> Verdict:
    """Returns the verdict on a record that is dropped for a reason."""
    return Verdict(False, reason, detail)


@dataclass(frozen=True)
class Topic:
    """A topic that the model listed for a type. prompt: index of the prompt within the round and type."""

    id: str
    type: str
    topic: str
    round: int
    prompt: int
    verdict: Verdict


@dataclass(frozen=True)
class Instruction:
    """A task that the model wrote.

    prompt: index of the prompt within the iteration. seeds: ids of the tasks shown. hint: "(type; topic)" that it was
    asked for by, if it was. tokens: new tokens of the completion, with the first instruction of each.
    lift: how much likelier it is as a task than as any text, where `synthesize.drop_lowest` looks at it.
    """

    id: str
    instruction: str
    input: str
    prompt: int
    seeds: tuple[str, ...]
    verdict: Verdict
    hint: str | None = field(default=None, metadata=_RARE)
    tokens: int | None = field(default=None, metadata=_RARE)
    lift: float | None = field(default=None, metadata=_RARE)


@dataclass(frozen=True)
class Pair:
    """An instruction with one response.

    thoughts: what the model wrote down before it, if it was asked to. stop: the stop string that ended the completion;
    None where the model ended it or its length did.
    """

    id: str
    instruction_id: str
    instruction: str
    input: str
    response: str
    verdict: Verdict
    thoughts: str | None = field(default=None, metadata=_RARE)
    stop: str | None = field(default=None, metadata=_RARE)


@dataclass(frozen=True)
class Score:
    """The model's opinion on one criterion, from 1 to 10.

    value: the score (the mean of `distribution`, or the sampled number); None when there is none. distribution:
    probabilities of 1..10, normalized; mass: their sum before, so a low mass says that the model did not want to write
    a score. argmax: the most probable score. text: the sampled judgment, or why there is no score.
    """

    value: float | None
    argmax: int | None = None
    mass: float | None = None
    distribution: tuple[float, ...] = ()
    text: str = ""


@dataclass(frozen=True)
class ReadingValue:
    """What a reading says of a pair; higher is better.

    value: in total; None where there is none. tokens: number of tokens that it is a sum over (nats); 0 for a value that
    is none. error: why there is no value.
    """

    value: float | None
    tokens: int = 0
    error: str = ""


@dataclass(frozen=True)
class Scores:
    """What the judge says of the pair with the same id.

    quality, following: scores of the rubric; None for one that was not asked for. readings: the other readings, by
    name. verdict: dropped where a reading gave nothing, or does not see what a text rule finds.
    """

    id: str
    quality: Score | None
    following: Score | None
    verdict: Verdict
    readings: Mapping[str, ReadingValue] | None = field(default=None, metadata=_RARE)


@dataclass(frozen=True)
class Checked:
    """A pair of known standing, with what the judge says of it.

    task: id of what was asked. kind: of damage; "" for the good response.
    """

    id: str
    task: str
    kind: str
    instruction: str
    input: str
    response: str
    scores: Scores


@dataclass(frozen=True)
class Selected:
    """A pair at the end of its way: its scores, their sum (following capped), its bucket and the last verdict.

    above: probability that all scores, sampled, would exceed select.threshold; None where it is not known.
    perplexity: of the response given the instruction, per token, with the reading 'likelihood'. cluster: the
    instruction's. readings: final value of each reading, and ranked_by: what `select.ranking` makes of them; not there
    where the sum of the scores says both.
    """

    id: str
    instruction_id: str
    instruction: str
    input: str
    response: str
    quality: float | None
    following: float | None
    sum: float | None
    above: float | None
    bucket: str
    verdict: Verdict
    perplexity: float | None = field(default=None, metadata=_RARE)
    cluster: int | None = field(default=None, metadata=_RARE)
    readings: Mapping[str, float] | None = field(default=None, metadata=_RARE)
    ranked_by: float | None = field(default=None, metadata=_RARE)

    @property
    def rank(self) -> float | None:
        """What it is ranked by, and higher is better; None where the judge gave nothing or did not take it."""
        return self.sum if self.readings is None else self.ranked_by


@dataclass(frozen=True)
class Vector:
    """The embedding of the instruction with the same id, as `clusters.encode` writes it. error: why there is none."""

    id: str
    vector: str
    error: str = ""


@dataclass(frozen=True)
class ShownExamples:
    """Ids of the pairs that the prompt for the answer to the instruction with the same id shows."""

    id: str
    examples: tuple[str, ...]


def user_text(instruction: str, input: str) -> str:
    """Returns the user's message: the instruction, and the input on its own line, when answering and when training."""
    return f"{instruction}\n{input}" if input else instruction


def to_line(record: Any) -> str:
    """Returns the record as one line of JSON, without the line break."""
    rare = _rare(type(record))
    values = {name: value for name, value in vars(record).items() if value is not None or name not in rare}
    return json.dumps(values, default=vars, ensure_ascii=False)


def from_line(cls: type[T], line: str) -> T:
    """Returns the record that `to_line` wrote. Raises ValueError, KeyError or TypeError when it is not one."""
    return _build(cls, json.loads(line))


def kept(records: Iterable[T]) -> list[T]:
    """Returns the records whose verdict is kept."""
    return [r for r in records if r.verdict.kept]


def counts(records: Sequence[Any]) -> dict[str, Any]:
    """Returns how many records there are and, if they have verdicts, how many are kept and dropped for each reason."""
    if not all(hasattr(r, "verdict") for r in records):
        return {"records": len(records)}
    reasons = Counter(r.verdict.reason for r in records if not r.verdict.kept)
    return {"records": len(records), "kept": len(kept(records)), "dropped": dict(sorted(reasons.items()))}


@functools.cache
def _rare(cls: type) -> frozenset[str]:
    return frozenset(f.name for f in dataclasses.fields(cls) if f.metadata == _RARE)


@functools.cache
def _hints(cls: type) -> dict[str, Any]:
    return typing.get_type_hints(cls)


def _build(kind: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(kind):
        present = {n: hint for n, hint in _hints(kind).items() if n in value or n not in _rare(kind)}
        return kind(**{name: _build(hint, value[name]) for name, hint in present.items()})
    if typing.get_origin(kind) is tuple:
        return tuple(value)
    if typing.get_origin(kind) is Mapping:
        of = typing.get_args(kind)[1]
        return {name: _build(of, each) for name, each in value.items()}
    if isinstance(kind, types.UnionType) and value is not None:
        one = next(k for k in typing.get_args(kind) if k is not types.NoneType)
        return float(value) if one is float else _build(one, value)
    return value
