"""The check of a judge: pairs whose order is known, and how well each reading finds it.

The good responses are the seeds' own outputs, the others are damaged ones (`damages`), or both come from a file of the
user. A reading that cannot tell them apart is a coin, and so is what a run selects by it. The figure is the AUC: the
chance that a good response of any task stands above a damaged one of any task, ties counting half. Its interval comes
from drawing tasks anew, because responses to the same task are not independent.
"""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from isheep_jax.config import Config, GuardConfig, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.blind_spots import blind_spot
from isheep_jax.loop.judging.agreement import spearman
from isheep_jax.loop.judging.damages import damaged, read_texts
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.judging.readings import READINGS, UNSCORED, read
from isheep_jax.loop.judging.scores import median_mass
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.prompting.zero_shot import prompt_for
from isheep_jax.loop.records import KEPT, Checked, Scores, Verdict, dropped
from isheep_jax.loop.selection.ranking import rank
from isheep_jax.text_files import read_objects, texts

Item = TypeVar("Item")

# Tasks of a check, as many as a small model on two cores reads in two minutes, and the longest output (words).
TASKS = 16
MAX_WORDS = 40
# Fewest tasks with an output: of less, no interval lies above a coin.
MIN_TASKS = 5
# How a line of a file of pairs looks.
_LIKE = '{"instruction": "...", "input": "...", "better": "...", "worse": "..."}'
# Kind of the worse responses of a file.
WORSE = "worse"

_REPLICATES = 1000
# Share of the responses from which on it is said that they are lost.
_MUCH = 0.1
# What stands for a pair that a reading has no value for, or that a rule drops.
_LOWEST = -math.inf


# What no pair of known order tells: this reading compares samples of the model itself.
_UNCHECKED = ("self_consistency",)


@dataclass(frozen=True)
class KnownPair:
    """A response of known standing. task: its task's id. kind: of damage; "" for the good response."""

    task: str
    kind: str
    instruction: str
    input: str
    response: str

    @property
    def id(self) -> str:
        return f"{self.task}/{self.kind or 'good'}".replace(" ", "_")


@dataclass(frozen=True)
class Estimate:
    """A figure with its interval of 95 %."""

    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.2f} ({self.low:.2f} to {self.high:.2f})"


@dataclass(frozen=True)
class ReadingCheck:
    """How well one way to order pairs finds the known order.

    auc: mean over the kinds of damage that are left to the judge. kinds: AUC by kind. by_rule: kinds of which a text
    rule finds most, so that they say nothing of the judge. wins: share of the damaged responses below the good one to
    the same task, ties counting half. ties: share of them with the same value. length: Spearman correlation of value
    and length among the good responses; None where one of them is constant. mass: median probability of the ten scores
    together, for the rubric. lost: share of the good responses that a text rule drops. unread: share of all responses
    that have no value. Both stand lowest.
    """

    auc: Estimate
    kinds: Mapping[str, Estimate]
    by_rule: tuple[str, ...]
    wins: float
    ties: float
    length: float | None
    mass: float | None = None
    lost: float = 0.0
    unread: float = 0.0

    def losses(self) -> str:
        """Returns what the figures suffer from besides the judge, after a semicolon each; "" where it is little."""
        lost = f"; rules on the text drop {self.lost:.0%} of the good responses" if self.lost > _MUCH else ""
        unread = f"; {self.unread:.0%} of the responses have no value" if self.unread > _MUCH else ""
        return lost + unread

    def passes(self, guard: GuardConfig) -> bool:
        """Returns whether it is above guard.min_auc, and more than a coin."""
        return self.auc.value >= guard.min_auc and self.auc.low > 0.5


@dataclass(frozen=True)
class JudgeCheck:
    """The result of a check.

    tasks, pairs: how many there are. readings: the check of each order, by its label ("rubric", "lift per token",
    "lift in total"). chosen: label of the order that the settings select by. counted: kinds of damage that the means
    are over. agreement: Spearman correlation of the readings, by their names; None where one of them is constant.
    """

    tasks: int
    pairs: int
    readings: Mapping[str, ReadingCheck]
    chosen: str
    counted: tuple[str, ...]
    agreement: Mapping[str, float | None]

    @property
    def selection(self) -> ReadingCheck:
        """The check of what the settings select by."""
        return self.readings[self.chosen]

    def line(self, guard: GuardConfig) -> str:
        """Returns how good the order is that selection uses, and whether it passes."""
        verdict = "passes" if self.selection.passes(guard) else "fails"
        auc = f"AUC {self.selection.auc}, {verdict} (guard.min_auc {guard.min_auc:g})"
        return f"selection by {self.chosen}: {auc}{self.selection.losses()}"

    def as_dict(self) -> dict[str, Any]:
        """Returns it as JSON values."""
        return dataclasses.asdict(self)


def checkable(server: bool) -> tuple[str, ...]:
    """Returns the names of the readings that a check can look at. server: whether the judge is one."""
    names = [name for name, reading in READINGS.items() if not (server and reading.needs_weights)]
    return tuple(name for name in names if name not in _UNCHECKED)


def known_pairs(config: Config, seeds: Sequence[Seed], templates: Templates, limit: int = 0) -> list[KnownPair]:
    """Returns the pairs of guard.pairs, or else those of the seeds.

    limit: most tasks (count; 0: `TASKS` of the seeds, or all of the file). Raises UserError where there are too few.
    """
    path = config.guard.pairs
    if path:
        pairs = pairs_of_file(path, limit)
    else:
        pairs = pairs_of_seeds(seeds, read_texts(templates.directory), config.seed, limit or TASKS)
    tasks = len({_folded(pair.instruction, pair.input) for pair in pairs})
    if tasks < MIN_TASKS:
        raise UserError(
            f"guard.pairs: {path} has {tasks} different tasks; the check of the judge needs at least {MIN_TASKS}"
            if path
            else f"synthesize.seeds: {tasks} different ones have an output, and the check of the judge needs "
            f"{MIN_TASKS}: add some, name a file of pairs (guard.pairs), or leave it out (guard.judge=off)"
        )
    return pairs


def pairs_of_seeds(
    seeds: Sequence[Seed], texts: Mapping[str, Sequence[str]], random_seed: int, limit: int = TASKS
) -> list[KnownPair]:
    """Returns the outputs of some seeds with damaged ones.

    Args:
        seeds: The seed tasks; of those with an output of at most MAX_WORDS words the half with the longer ones are
            used where there are enough, since a run's responses are seldom as short as a label. Where hardly any is
            that short, the shortest are.
        texts: Answers that fit no task (`damages.read_texts`).
        random_seed: Decides the damages.
        limit: Most tasks to use (count; 0: all), evenly spaced.
    """
    words = {seed.id: len(seed.output.split()) for seed in seeds}
    different = _first_of_each(seeds, lambda seed: (seed.instruction, seed.input, seed.output))
    answered = [seed for seed in different if words[seed.id]]
    usable = [seed for seed in answered if words[seed.id] <= MAX_WORDS]
    if len(usable) < MIN_TASKS:
        usable = sorted(answered, key=lambda seed: words[seed.id])[:TASKS]
    median = statistics.median(words[seed.id] for seed in usable) if usable else 0
    longer = [seed for seed in usable if words[seed.id] >= median]
    usable = longer if len(longer) >= TASKS else usable
    pairs = []
    for seed in _spaced(usable, limit):
        responses = {"": seed.output, **damaged(seed, usable, texts, random_seed)}
        pairs += [KnownPair(seed.id, kind, seed.instruction, seed.input, text) for kind, text in responses.items()]
    return pairs


def pairs_of_file(path: str, limit: int = 0) -> list[KnownPair]:
    """Returns the pairs of a JSON Lines file with the fields instruction, input (optional), better and worse.

    A line that repeats another one says nothing new and is left out, so that no interval is too narrow.
    limit: most lines to use (count; 0: all), evenly spaced. Raises UserError for a file that cannot be read.
    """
    rows = [_known_pairs(where, row) for where, row in read_objects(path, "guard.pairs", _LIKE)]
    rows = _first_of_each(rows, lambda row: (row[0].instruction, row[0].input, *(pair.response for pair in row)))
    return [pair for row in _spaced(rows, limit) for pair in row]


def _first_of_each(items: Sequence[Item], texts_of: Callable[[Item], tuple[str, ...]]) -> list[Item]:
    """Returns the items without those whose texts are those of an earlier one."""
    found: dict[tuple[str, ...], Item] = {}
    for item in items:
        found.setdefault(_folded(*texts_of(item)), item)
    return list(found.values())


def _folded(*texts: str) -> tuple[str, ...]:
    """Returns texts in a form in which those that differ in case and white space alone are the same."""
    return tuple(" ".join(text.split()).casefold() for text in texts)


def _known_pairs(where: str, row: dict[str, Any]) -> list[KnownPair]:
    instruction, better, worse, input = texts(
        f"guard.pairs: {where}", row, ("instruction", "better", "worse"), ("input",)
    )
    task = where.rpartition(", ")[2].replace(" ", "-")
    return [KnownPair(task, kind, instruction, input, text) for kind, text in (("", better), (WORSE, worse))]


def _spaced(items: Sequence, limit: int) -> list:
    """Returns at most `limit` (0: all) of the items, evenly spaced."""
    count = min(limit or len(items), len(items))
    return [items[i * len(items) // count] for i in range(count)]


def check(reader: Reader, pairs: Sequence[KnownPair], *, bare: bool) -> Iterator[tuple[int, Checked]]:
    """Yields each pair with what the judge says of it, and the pair's index, in any order.

    bare: whether responses are read after bare text instead of a conversation.
    """
    for i, scores in read(reader, [_candidate(pair, pairs, bare) for pair in pairs]):
        pair = pairs[i]
        yield i, Checked(pair.id, pair.task, pair.kind, pair.instruction, pair.input, pair.response, scores)


def _candidate(pair: KnownPair, pairs: Sequence[KnownPair], bare: bool) -> Candidate:
    # The good response is compared with the damaged ones, and each of them with the good one.
    others = tuple(p.response for p in pairs if p.task == pair.task and bool(p.kind) != bool(pair.kind))
    return Candidate(
        pair.id,
        pair.instruction,
        pair.input,
        pair.response,
        prompt_for(pair.instruction, pair.input, bare=bare),
        prompt_for("", "", bare=bare),
        others=others,
    )


def measure(
    settings: SelectConfig,
    readings: Sequence[str],
    records: Sequence[Checked],
    counted: Sequence[str] = (),
) -> ReadingCheck:
    """Returns how well the order that the readings give finds the known one.

    Args:
        settings: How readings become an order.
        readings: Names of the readings, which all records have.
        records: The pairs of a check.
        counted: Kinds of damage that the mean is over; none: those of which no text rule finds most.
    """
    scores = _scores(readings, records)
    numbers = rank(settings, readings, records, scores).numbers
    values = [numbers.get(record.id, _LOWEST) for record in records]
    tasks = list(dict.fromkeys(record.task for record in records))
    row = {task: i for i, task in enumerate(tasks)}
    columns: dict[str, np.ndarray] = {}
    for record, value in zip(records, values, strict=True):
        columns.setdefault(record.kind, np.full(len(tasks), np.nan))[row[record.task]] = value
    good = columns.pop("")
    replicates = np.random.default_rng(0).multinomial(len(tasks), np.full(len(tasks), 1 / len(tasks)), _REPLICATES)
    # The tasks as they are, then as they are drawn anew.
    weights = np.concatenate([np.ones((1, len(tasks))), replicates])
    aucs = {kind: _aucs(good, bad, weights) for kind, bad in columns.items()}
    by_rule = _found_by_rule(records, scores)
    counted = counted or [kind for kind in aucs if kind not in by_rule] or list(aucs)
    paired = np.concatenate([_compare(good, bad)[~np.isnan(bad)] for bad in columns.values()])
    outputs = [(value, len(record.response)) for record, value in zip(records, values) if not record.kind]
    finite = [(value, length) for value, length in outputs if value > _LOWEST]
    length = spearman(*zip(*finite)) if finite else None
    return ReadingCheck(
        auc=_estimate(np.nanmean([aucs[kind] for kind in counted], axis=0)),
        kinds={kind: _estimate(values) for kind, values in aucs.items()},
        by_rule=by_rule,
        wins=round(float(paired.mean()), 4),
        ties=round(float((paired == 0.5).mean()), 4),
        length=None if length is None else round(length, 4),
        mass=median_mass([record.scores for record in records]) if "rubric" in readings else None,
        lost=_share(not s.verdict.kept and s.verdict.reason != UNSCORED for s, r in zip(scores, records) if not r.kind),
        unread=_share(s.verdict.reason == UNSCORED for s in scores),
    )


def result_of(config: Config, records: Sequence[Checked]) -> JudgeCheck:
    """Returns the figures of a check: of each reading alone, per token and in total, and of all of them together."""
    names, settings = config.assess.readings, config.select
    orders, chosen = {}, ""
    for name in names:
        for label, per in _orders(name, records).items():
            orders[label] = replace(settings, per=per, weights=()), [name]
            if per == settings.per or label == name:
                chosen = label
    if len(names) > 1:
        chosen = "together"
        orders[chosen] = settings, names
    # One mean for all: over what no text rule finds for the order that selection uses.
    by_rule = _found_by_rule(records, _scores(orders[chosen][1], records))
    kinds = dict.fromkeys(record.kind for record in records if record.kind)
    counted = tuple(kind for kind in kinds if kind not in by_rule) or tuple(kinds)
    readings = {label: measure(*order, records, counted) for label, order in orders.items()}
    agreements = {f"{a} and {b}": agreement(settings, a, b, records) for a, b in itertools.combinations(names, 2)}
    return JudgeCheck(len({r.task for r in records}), len(records), readings, chosen, counted, agreements)


def _orders(name: str, records: Sequence[Checked]) -> dict[str, str]:
    """Returns the values of select.per that make a difference for a reading, each by its label."""
    is_sum = any(r.scores.readings[name].tokens for r in records if name in (r.scores.readings or {}))
    return {f"{name} per token": "token", f"{name} in total": "total"} if is_sum else {name: "token"}


def agreement(settings: SelectConfig, a: str, b: str, records: Sequence[Checked]) -> float | None:
    """Returns the Spearman correlation of what two readings say of the pairs that both have a value for."""
    numbers = [rank(settings, [name], records, _scores([name], records)).numbers for name in (a, b)]
    known = [record.id for record in records if all(record.id in each for each in numbers)]
    correlation = spearman(*([each[id] for id in known] for each in numbers))
    return None if correlation is None else round(correlation, 4)


def _scores(readings: Sequence[str], records: Sequence[Checked]) -> list[Scores]:
    """Returns what some of the readings say, with the verdict that they alone would give."""
    unseen = frozenset().union(*(READINGS[name].blind_to for name in readings))

    def verdict(record: Checked) -> Verdict:
        if not all(_has_value(record.scores, name) for name in readings):
            return dropped(UNSCORED)
        reason = blind_spot(unseen, record.instruction, record.input, record.response)
        return dropped(reason) if reason else KEPT

    return [replace(record.scores, verdict=verdict(record)) for record in records]


def _found_by_rule(records: Sequence[Checked], scores: Sequence[Scores]) -> tuple[str, ...]:
    """Returns the kinds of damage most of which the text rules drop."""
    found: dict[str, list[bool]] = {}
    for record, score in zip(records, scores, strict=True):
        by_rule = not score.verdict.kept and score.verdict.reason != UNSCORED
        found.setdefault(record.kind, []).append(by_rule)
    return tuple(kind for kind, each in found.items() if kind and sum(each) > len(each) / 2)


def _share(flags: Iterable[bool]) -> float:
    flags = list(flags)
    return round(sum(flags) / len(flags), 4)


def _has_value(scores: Scores, name: str) -> bool:
    if name == "rubric":
        return all(score is None or score.value is not None for score in (scores.quality, scores.following))
    return scores.readings[name].value is not None


def _compare(good: np.ndarray, bad: np.ndarray) -> np.ndarray:
    """Returns 1 where the good value is above the other, 0.5 where they are equal, 0 where it is below."""
    return (good > bad) + 0.5 * (good == bad)


def _aucs(good: np.ndarray, bad: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Returns the AUC [R] of the values [N] of good responses against those of damaged ones, by weights of tasks.

    bad: [N], not a number where a damage does not apply to a task. weights: how often each task is drawn, [R, N].
    """
    there = ~np.isnan(bad)
    wins = _compare(good[:, None], bad[None, there])  # [N, M]
    drawn = weights[:, there]  # [R, M]
    total = weights.sum(axis=1) * drawn.sum(axis=1)
    with np.errstate(invalid="ignore"):
        return np.einsum("rn,nm,rm->r", weights, wins, drawn) / total


def _estimate(values: np.ndarray) -> Estimate:
    """Returns the first value with the interval of the others."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return Estimate(*(round(float(x), 4) for x in (values[0], low, high)))
