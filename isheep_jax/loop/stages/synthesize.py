"""Writes new instructions until there are enough (I-SHEEP section 3.1); `prompting` says what the prompts are.

Prompts go out in waves. A wave's size follows from what the waves before it gave, and a wave is one part of the stage,
so that a run that resumes sends exactly the prompts that it would have sent.
"""

import math
from collections import Counter
from collections.abc import Sequence
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

# Prompts of the first wave and of the largest. A kill costs at most one wave.
FIRST_WAVE = 64
LARGEST_WAVE = 256
SMALLEST_WAVE = 8
# The stage gives up when this many waves in a row gave less than one new instruction per hundred prompts.
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
        requests, ways = state.requests()
        completions = {}
        for batch, sampling in state.batches(requests, ways):
            for completion in writer.generate(batch, sampling):
                completions[completion.id] = completion
                stage.advance(0, prompts=f"{state.prompts + len(completions)}")
        part = state.records([completions[r.id] for r in requests], writer)
        stage.write_part(part)
        state.count(part)
        per_thousand = Yield.of(state.all).per_thousand_tokens
        stage.advance(len(kept(part)), dropped=len(state.all) - state.accepted, per_1k_tokens=per_thousand or "-")
    total = Yield.of(state.all)
    stage.summary |= {
        "prompts": state.prompts,
        "tokens": total.tokens,
        "per_thousand_tokens": total.per_thousand_tokens,
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
    """State of the stage between two waves. It depends only on the records of the waves so far."""

    def __init__(self, context: StageContext, pool: Pool | RestartingPool, sources: Sequence[PromptSource]):
        self.settings = context.config.synthesize
        self.all: list[Instruction] = []
        self.accepted = self.prompts = self.waves = 0
        self._context, self._pool, self._sources = context, pool, sources
        self.trial = Trial(self.settings)
        self._recent: list[tuple[int, int]] = []
        # Prompts and kept instructions of the present source, from which the yield is estimated.
        self._tried = self._gained = 0

    @property
    def source(self) -> PromptSource:
        """The source of the next wave: the first that has not reached its target and has prompts left."""
        for source in self._sources[:-1]:
            if self.accepted < source.target and (source.limit is None or self.prompts < source.limit):
                return source
        return self._sources[-1]

    @property
    def needed(self) -> int:
        """Number of instructions that the present source has yet to give."""
        return self.source.target - self.accepted

    @property
    def wave(self) -> int:
        """Number of prompts of the next wave: enough for what is needed at the yield so far."""
        if not self._gained:
            wave = min(FIRST_WAVE, max(self.needed, SMALLEST_WAVE))
        else:
            wave = min(LARGEST_WAVE, max(SMALLEST_WAVE, math.ceil(self.needed * self._tried / self._gained)))
        limit = self.source.limit
        if limit is not None:
            return min(wave, limit - self.prompts)
        return min(wave, self.trial.prompts or wave)

    @property
    def ways(self) -> list[Way]:
        """The ways of the prompts of the next wave. They are tried where the prompts do not run out: with seeds."""
        if self.source.limit is None:
            return self.trial.choose(self.wave)
        return ways_of(self.settings)[:1] * self.wave

    def replay(self, part: Sequence[Instruction]) -> None:
        for record in kept(part):
            self._pool.add(record.id, record.instruction, record.input)
        self.count(part)

    def count(self, part: Sequence[Instruction]) -> None:
        new, wave, source, ways = len(kept(part)), self.wave, self.source, self.ways
        if source.limit is None:
            for way in dict.fromkeys(ways):
                self.trial.add(way, [r for r in part if ways[r.prompt - self.prompts] == way])
        self._recent = [*self._recent[-PATIENCE + 1 :], (wave, new)]
        self.prompts += wave
        self._tried += wave
        self.waves += 1
        self.accepted += new
        self._gained += new
        if source is not self.source:
            self._tried = self._gained = 0
            self._recent = []
        self.all.extend(part)

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

    def requests(self) -> tuple[list[Request], list[Way]]:
        """Returns the prompts of the next wave, and the way of each."""
        return self.source.requests(range(self.prompts, self.prompts + self.wave), self.ways), self.ways

    def batches(self, requests: Sequence[Request], ways: Sequence[Way]) -> list[tuple[list[Request], SamplingParams]]:
        """Returns the prompts with their sampling parameters, those of the same temperature together."""
        settings = self.settings
        return [
            (
                [request for request, way in zip(requests, ways, strict=True) if way.temperature == temperature],
                SamplingParams(temperature, settings.top_p, settings.max_tokens, self.source.stop),
            )
            for temperature in dict.fromkeys(way.temperature for way in ways)
        ]

    def records(self, completions: Sequence[Completion], writer: Model) -> list[Instruction]:
        """Returns all tasks of a wave, in order, with their verdicts."""
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
        """Returns the verdicts of a wave; once enough are kept, the pool does not change any more."""
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
