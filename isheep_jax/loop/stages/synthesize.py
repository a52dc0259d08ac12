"""Writes new instructions until there are enough (I-SHEEP section 3.1); `prompting` says what the prompts are.

Prompt k follows from the run's seed, the iteration and k alone. Prompts are a stream: as many are with the model as may
still be needed, they finish in any order, and their tasks are taken in the order of k until enough are kept. So the
records do not depend on how many prompts the model works on at a time, and a run that resumes goes on with the first
prompt that is in no part.
"""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop import guards
from isheep_jax.loop.context import OpenStage, StageContext
from isheep_jax.loop.filters.held_out import is_held_out
from isheep_jax.loop.filters.junk import junk_reason
from isheep_jax.loop.filters.novelty import Pool, RestartingPool
from isheep_jax.loop.filters.text_rules import instruction_reason
from isheep_jax.loop.filters.verdicts import EMPTY, IN_EVALUATION_SET, NOT_DECODED, NOT_NEW, UNFINISHED, not_decoded
from isheep_jax.loop.prompting.own_lift import lowest, own_lifts
from isheep_jax.loop.prompting.protocols import ParsedInstruction, PromptSource
from isheep_jax.loop.prompting.topics import instructions_from_topics
from isheep_jax.loop.prompting.ways import MORE_THAN_NEEDED, Trial, Way, Yield, ways_of
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Instruction, Verdict, dropped, kept

# Prompts of a part of the stage: what a kill costs, besides those that are with the model.
PART_PROMPTS = 64
# Fewest prompts that are with the model at a time.
FEWEST_PROMPTS = 8
# The stage gives up when this many parts in a row gave less than one new instruction per hundred prompts.
PATIENCE = 6
LOW_LIFT = "among the lowest lifts"
# What helps where one of these is the commonest reason.
_REMEDIES = {
    NOT_DECODED: "raise decode.max_length, which must hold the prompt with its examples",
    UNFINISHED: "raise synthesize.max_tokens",
}


def synthesize(
    context: StageContext,
    writer: Model,
    pool: Pool | RestartingPool,
    sources: Sequence[PromptSource],
) -> list[Instruction]:
    """Writes instructions until `synthesize.instructions` are kept; returns all of them, dropped ones too.

    pool: seeds and what earlier iterations kept; what is kept here joins it.
    sources: where the prompts come from, used one after the other (see `PromptSource`).
    Raises NothingLeftError when the model has stopped writing new ones.
    """
    with context.open("instructions", context.config.synthesize.instructions) as stage:
        if stage.fresh:
            _write(context, writer, _State(context, pool, sources), stage)
    records = stage.records
    _warn_of_missing_topics(context, records, fresh=stage.fresh)
    hint = "more seeds or a higher synthesize.temperature help"
    context.guard("min_novelty", guards.novelty(records), hint=hint, fresh=stage.fresh)
    return records


def _write(context: StageContext, writer: Model, state: "_State", stage: OpenStage[Instruction]) -> None:
    for part in stage.parts:
        state.replay(part)
        stage.advance(len(kept(part)))
    while state.needed:
        state.check_progress()
        for part in _round(state, writer, stage):
            stage.write_part(part)
            state.check_progress()
    stage.summary |= {
        "prompts": state.prompts,
        "tokens": state.total.tokens,
        "per_thousand_tokens": state.total.per_thousand_tokens,
    }
    if len(state.trial.yields) > 1:
        stage.summary["ways"] = {str(way): gave.as_dict() for way, gave in state.trial.yields.items()}
        best = state.trial.best
        context.reporter.note(
            f"iteration {context.iteration}: {best} write the most instructions per token "
            f"({state.trial.yields[best].per_thousand_tokens or 0:g} per thousand)"
        )
    if instructions_from_topics(context.config):
        stage.summary["from topics"] = _count_from_topics(state.all)


def _round(state: "_State", writer: Model, stage: OpenStage[Instruction]) -> Iterator[list[Instruction]]:
    """Yields the parts that the next prompts give: until enough are kept, or as far as prompts are known by now."""
    source, end = state.source, state.round_end
    prompts = _Prompts(state, end)
    finished: dict[int, Completion] = {}

    def take() -> Iterator[list[Instruction]]:
        while state.source is source and state.needed and all(k in finished for k in state.unit):
            before, unit = state.accepted, state.unit
            state.take([finished.pop(k) for k in unit], [prompts.ways[k] for k in unit], writer)
            per_thousand = state.total.per_thousand_tokens or "-"
            dropped = len(state.all) - state.accepted
            stage.advance(state.accepted - before, dropped=dropped, per_1k_tokens=per_thousand)
            if part := state.whole_part():
                yield part

    for temperature in prompts.temperatures:
        sampling = SamplingParams(temperature, state.settings.top_p, state.settings.max_tokens, source.stop)
        with contextlib.closing(writer.generate(prompts.stream(temperature), sampling)) as completions:
            for completion in completions:
                finished[prompts.numbers.pop(completion.id)] = completion
                stage.advance(0, prompts=f"{state.prompts + len(finished)}")
                # What decides tasks together asks the model, which is busy.
                if not state.decides_together:
                    yield from take()
                    if state.source is not source or not state.needed:
                        return
    yield from take()


class _Prompts:
    """The prompts of a round, from the first that is in no part.

    numbers: of those that are with the model, by the request's id. ways: of all that were requested, by number.
    """

    def __init__(self, state: "_State", end: int | None):
        """Takes the numbers up to `end`, without it; None: there is always another one."""
        self.numbers: dict[str, int] = {}
        self.ways: dict[int, Way] = {}
        self._state, self._source = state, state.source
        self._first, self._end = state.prompts, end
        # Of an endless round, the way of all.
        self._ways = state.ways_of_next(1 if end is None else end - state.prompts)

    @property
    def temperatures(self) -> list[float]:
        """The temperatures of the prompts."""
        return list(dict.fromkeys(way.temperature for way in self._ways))

    def stream(self, temperature: float) -> Iterator[Request | None]:
        """Yields the requests at a temperature, and None while enough are with the model."""
        # Where there are several, none can be taken before all are finished.
        waits = len(self.temperatures) == 1 and not self._state.decides_together
        for first in itertools.count(self._first, PART_PROMPTS):
            numbers = range(first, first + PART_PROMPTS if self._end is None else min(first + PART_PROMPTS, self._end))
            if not numbers:
                return
            ways = [self._ways[0 if self._end is None else number - self._first] for number in numbers]
            own = [(number, way) for number, way in zip(numbers, ways, strict=True) if way.temperature == temperature]
            self.ways.update(own)
            requests = self._source.requests([number for number, _ in own], [way for _, way in own])
            for (number, _), request in zip(own, requests, strict=True):
                while waits and number - self._state.prompts >= self._state.prompts_needed:
                    yield None
                self.numbers[request.id] = number
                yield request


def _warn_of_missing_topics(context: StageContext, records: Sequence[Instruction], *, fresh: bool) -> None:
    count, target = _count_from_topics(records), instructions_from_topics(context.config)
    if fresh and count < target:
        context.reporter.warn(
            f"iteration {context.iteration}: {count} of {target} instructions are about topics; the others come from "
            "seeds (reasons are in topics/ and instructions/)"
        )


def _count_from_topics(records: Sequence[Instruction]) -> int:
    return sum(record.hint is not None for record in kept(records))


class _Task(NamedTuple):
    """A task of a completion.

    prompt: number of the prompt. verdict: None while it is undecided. tokens: of the completion, with its first task.
    """

    prompt: int
    parsed: ParsedInstruction
    verdict: Verdict | None
    tokens: int | None


class _State:
    """The stage so far, which follows from the records alone, in the order of their prompts.

    all: the records. accepted: how many are kept. prompts: how many prompts they come from. total: what these gave.
    decides_together: whether the tasks of a part are compared with each other.
    """

    def __init__(self, context: StageContext, pool: Pool | RestartingPool, sources: Sequence[PromptSource]):
        self.settings = context.config.synthesize
        self.all: list[Instruction] = []
        self.accepted = self.prompts = 0
        self.total = Yield()
        self.decides_together = self.settings.drop_lowest > 0
        self._context, self._pool, self._sources = context, pool, sources
        self.trial = Trial(self.settings)
        # Where the open part begins among the records, and its prompts among all.
        self._part_start = self._part_prompts = 0
        # Prompts and kept instructions of the present source: of the last parts, and of all.
        self._recent: list[tuple[int, int]] = []
        self._tried = self._gained = 0
        self._part_end = self._end_of_part()

    @property
    def source(self) -> PromptSource:
        """The source of the next prompt: the first that has not reached its target and has prompts left."""
        for source in self._sources[:-1]:
            if self.accepted < source.target and (source.limit is None or self.prompts < source.limit):
                return source
        return self._sources[-1]

    @property
    def needed(self) -> int:
        """Number of instructions that the present source has yet to give."""
        return self.source.target - self.accepted

    @property
    def prompts_needed(self) -> int:
        """Number of prompts that may give what is needed: at the yield so far; before any is known, one for each."""
        estimated = math.ceil(self.needed * self._tried / self._gained) if self._gained else self.needed
        return max(FEWEST_PROMPTS, estimated)

    @property
    def unit(self) -> range:
        """The numbers of the next prompts that are decided at the same time."""
        return range(self.prompts, self._part_end if self.decides_together else self.prompts + 1)

    @property
    def round_end(self) -> int | None:
        """The number after the last prompt that can be asked for by now; None: any can."""
        ends = [self._trial_end, self.source.limit]
        if self.decides_together:
            parts = math.ceil(self.prompts_needed / PART_PROMPTS)
            ends.append(self.prompts + parts * PART_PROMPTS)
        return min((end for end in ends if end is not None), default=None)

    def ways_of_next(self, count: int) -> list[Way]:
        """Returns the ways of the next prompts. They are tried where the prompts do not run out: with seeds."""
        if self.source.limit is None:
            return self.trial.choose(count)
        return ways_of(self.settings)[:1] * count

    def replay(self, part: Sequence[Instruction]) -> None:
        """Takes in a part that an earlier process wrote."""
        for record in kept(part):
            self._pool.add(record.id, record.instruction, record.input)
        for _, records in itertools.groupby(part, key=lambda record: record.prompt):
            self._count(list(records), *self.ways_of_next(1))
        self._close_part()

    def take(self, completions: Sequence[Completion], ways: Sequence[Way], writer: Model) -> None:
        """Takes in the completions of the next prompts, all of the present source."""
        records = self._records(completions, writer)
        by_prompt = (list(own) for _, own in itertools.groupby(records, key=lambda record: record.prompt))
        for own, way in zip(by_prompt, ways, strict=True):
            self._count(own, way)

    def whole_part(self) -> list[Instruction]:
        """Returns the records of the open part and closes it, if it is whole; none otherwise."""
        if self.prompts < self._part_end and self.needed and self._part_source is self.source:
            return []
        return self._close_part()

    def _close_part(self) -> list[Instruction]:
        part = self.all[self._part_start :]
        source_is_new = self._part_source is not self.source
        self._recent = [*self._recent[-PATIENCE + 1 :], (self.prompts - self._part_prompts, len(kept(part)))]
        if source_is_new:
            self._tried = self._gained = 0
            self._recent = []
        self._part_start, self._part_prompts = len(self.all), self.prompts
        self._part_end = self._end_of_part()
        return part

    def _end_of_part(self) -> int:
        """Returns the number after the last prompt of the part that begins now, unless enough are kept before."""
        self._part_source = self.source
        ends = (self.prompts + PART_PROMPTS, self._trial_end, self.source.limit)
        return min(end for end in ends if end is not None)

    @property
    def _trial_end(self) -> int | None:
        """The number after the last prompt of the trial; None where there is none or it is over."""
        if self.source.limit is None and self.trial.prompts:
            return self.prompts + self.trial.prompts
        return None

    def _count(self, records: Sequence[Instruction], way: Way) -> None:
        """Counts the records of the next prompt."""
        if self.source.limit is None:
            self.trial.add(way, records)
        new = len(kept(records))
        self.total += Yield.of(records)
        self.prompts += 1
        self.accepted += new
        self._tried += 1
        self._gained += new
        self.all.extend(records)

    def check_progress(self) -> None:
        prompts, new = (sum(column) for column in zip(*self._recent)) if self._recent else (0, 0)
        if len(self._recent) == PATIENCE and new * 100 < prompts:
            reasons = Counter(r.verdict.reason for r in self.all if not r.verdict.kept)
            most = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common(3))
            remedy = (
                "lower synthesize.instructions, raise synthesize.novelty or temperature, or use synthesize.rules=basic"
                + (" or method=few_shot" if len(self._sources) > 1 else "")
            )
            remedy = _REMEDIES.get(max(reasons, key=reasons.get, default=""), remedy)
            raise NothingLeftError(
                f"synthesize: the last {prompts} prompts gave {new} new instructions, {self.accepted} of "
                f"{self.settings.instructions} are there (dropped so far: {most}); in a new run {remedy}"
            )

    def _records(self, completions: Sequence[Completion], writer: Model) -> list[Instruction]:
        """Returns all tasks of the next prompts, in order, with their verdicts."""
        tasks = [t for n, completion in enumerate(completions, self.prompts) for t in self._tasks(n, completion)]
        lifts = self._lifts(tasks, writer)
        for i in lowest(lifts, self.settings.drop_lowest):
            tasks[i] = tasks[i]._replace(verdict=dropped(LOW_LIFT))
        ids = [f"{self._context.iteration}-{len(self.all) + i:06d}" for i in range(len(tasks))]
        verdicts = self._novel(ids, tasks)
        return [
            Instruction(
                id,
                task.parsed.instruction,
                task.parsed.input,
                task.prompt,
                self.source.shown(task.prompt),
                verdict,
                task.parsed.hint,
                task.tokens,
                lift,
            )
            for id, task, verdict, lift in zip(ids, tasks, verdicts, lifts, strict=True)
        ]

    def _tasks(self, number: int, completion: Completion) -> list["_Task"]:
        """Returns the tasks of a completion, at least one: a completion without any is an empty one."""
        if verdict := not_decoded(completion):
            return [_Task(number, ParsedInstruction("", ""), verdict, len(completion.tokens))]
        parsed = self.source.parse(number, completion) or [ParsedInstruction("", "", EMPTY)]
        reasons = [task.reason or self._reason(task) for task in parsed]
        tokens = [len(completion.tokens), *[None] * (len(parsed) - 1)]
        return [_Task(number, p, dropped(r) if r else None, n) for p, r, n in zip(parsed, reasons, tokens, strict=True)]

    def _lifts(self, tasks: Sequence["_Task"], writer: Model) -> list[float | None]:
        """Returns the lifts of the undecided tasks, where they decide."""
        lifts: list[float | None] = [None] * len(tasks)
        if self.settings.drop_lowest:
            undecided = [i for i, task in enumerate(tasks) if task.verdict is None]
            found = own_lifts(self._context, writer, f"own_lift/{self.prompts}", [tasks[i].parsed for i in undecided])
            for i, lift in zip(undecided, found, strict=True):
                lifts[i] = lift
        return lifts

    def _reason(self, task: ParsedInstruction) -> str | None:
        """Returns why an instruction is dropped for what it is by itself, or None."""
        if reason := instruction_reason(self.settings.rules, task.instruction, task.input):
            return reason
        if self.settings.rules == "strict" and (reason := junk_reason(task.instruction, task.input)):
            return reason
        return IN_EVALUATION_SET if is_held_out(task.instruction, task.input, self._context.held_out) else None

    def _novel(self, ids: Sequence[str], tasks: Sequence["_Task"]) -> list[Verdict]:
        """Returns the verdicts of tasks; once enough are kept, the pool does not change any more."""
        verdicts = [task.verdict for task in tasks]
        undecided = [i for i, verdict in enumerate(verdicts) if verdict is None]
        while undecided:
            # At most as many as needed at a time: an instruction beyond the last must not join the pool.
            missing = self.needed - sum(v is not None and v.kept for v in verdicts)
            block, undecided = undecided[:missing], undecided[missing:]
            if not block:
                break
            repeated = self._pool.admit(
                [ids[i] for i in block],
                [tasks[i].parsed.instruction for i in block],
                [tasks[i].parsed.input for i in block],
            )
            for i, near in zip(block, repeated):
                verdicts[i] = dropped(NOT_NEW, f"{near.similarity:.3f} to {near.id}") if near else KEPT
        return [verdict or dropped(MORE_THAN_NEEDED) for verdict in verdicts]
