"""Writes new instructions: the model continues a list of tasks that begins with a few seeds (I-SHEEP section 3.1).

Prompts go out in waves. A wave's size follows from what the waves before it gave, and a wave is one part of the stage,
so that a run that resumes sends exactly the prompts that it would have sent.
"""

import math
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop import guards
from isheep_jax.loop.context import OpenStage, StageContext
from isheep_jax.loop.filters.novelty import Pool, RestartingPool, normalize
from isheep_jax.loop.filters.text_rules import NO_INPUT, instruction_reason
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.similar import Questions
from isheep_jax.loop.prompting.topics import GUIDED_STOP, Guided, wanted
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import KEPT, Instruction, Verdict, dropped, kept

# Prompts of the first wave and of the largest. A kill costs at most one wave.
FIRST_WAVE = 64
LARGEST_WAVE = 256
SMALLEST_WAVE = 8
# The stage gives up when this many waves in a row gave less than one new instruction per hundred prompts.
PATIENCE = 6

# A task's number, which may stand before its labels. It is never checked: models miscount.
_NUMBER = r"(?:\d+\s*[.:)]\s*)"
# At the start of a line, or in front of a label: a task may be about "###".
_SEPARATOR = re.compile(rf"(?:^|\n)[ \t]*#{{3,}}|#{{3,}}(?=\s*{_NUMBER}?Instruction\s*:)", re.IGNORECASE)
_INSTRUCTION = re.compile(rf"\s*{_NUMBER}?Instruction\s*:", re.IGNORECASE)
_INPUT = re.compile(rf"\n\s*{_NUMBER}?Input\s*:", re.IGNORECASE)
# A label that no separator or line begins with.
_STRAY_LABEL = re.compile(rf"(?:\n\s*{_NUMBER}?|{_NUMBER})(?:Instruction|Input)\s*:", re.IGNORECASE)
_ONLY_NUMBER = re.compile(rf"\s*{_NUMBER}?")


@dataclass(frozen=True)
class Segment:
    """One task as it stands in a completion. reason: why it is none ("not in the form", "unfinished"), or "".

    hint: what it was asked for by, where it was.
    """

    instruction: str
    input: str
    reason: str = ""
    hint: str | None = None


def parse(text: str, finished: bool) -> list[Segment]:
    """The tasks of a completion: segments between "###", each an instruction and perhaps an input.

    finished: whether the completion ended by itself; otherwise its last segment may be cut off and does not count. The
    first segment needs no label, since the prompt may end with it. A segment with more than one task in it, or with a
    label in the wrong place, is none: nobody can tell what belongs together.
    """
    pieces = _SEPARATOR.split(text.replace("\r\n", "\n"))
    segments = []
    for index, piece in enumerate(pieces):
        labeled = _INSTRUCTION.match(piece)
        body = piece[labeled.end() :] if labeled else piece
        last = index == len(pieces) - 1
        if not piece.strip() or ((index == 0 or last) and _ONLY_NUMBER.fullmatch(piece)):
            continue
        if last and not finished:
            segments.append(Segment(piece.strip(), "", "unfinished"))
            continue
        # In front of the first line, so that an input label there counts as one.
        fields = _INPUT.split("\n" + body)
        stray = len(fields) > 2 or any(map(_STRAY_LABEL.search, fields))
        if stray or (not labeled and index > 0):
            segments.append(Segment(piece.strip(), "", "not in the form"))
            continue
        instruction, input = fields[0].strip(), fields[1].strip() if len(fields) == 2 else ""
        segments.append(Segment(instruction, "" if input.lower() == NO_INPUT else input))
    return segments


def shown_seeds(context: StageContext, prompt: int) -> list[Seed]:
    """Returns the seeds of the prompt with this index, drawn without replacement."""
    return context.random("synthesize", prompt).sample(list(context.seeds), context.config.synthesize.shots)


def synthesize(
    context: StageContext,
    writer: Model,
    pool: Pool | RestartingPool,
    *,
    guided: Guided | None = None,
    questions: Questions | None = None,
) -> list[Instruction]:
    """Writes instructions until `synthesize.instructions` are kept; returns all of them, dropped ones too.

    pool: seeds and what earlier iterations kept; what is kept here joins it.
    guided: prompts about topics, which come first, until their share is there or all have been asked.
    questions: prompts that show similar pairs, in the place of seeds.
    Raises NothingLeftError when the model has stopped writing new ones.
    """
    with context.open("instructions", context.config.synthesize.instructions) as stage:
        if stage.fresh:
            _write(context, writer, _State(context, pool, guided, questions), stage)
    records = stage.records
    _warn_of_missing_topics(context, records, fresh=stage.fresh)
    context.guard("min_novelty", guards.novelty(records), fresh=stage.fresh)
    return records


def _write(context: StageContext, writer: Model, state: "_State", stage: OpenStage[Instruction]) -> None:
    for part in stage.parts:
        state.replay(part)
        stage.advance(len(kept(part)))
    while state.needed:
        state.check_progress()
        requests = state.requests()
        completions = {}
        for completion in writer.generate(requests, state.sampling()):
            completions[completion.id] = completion
            stage.advance(0, prompts=f"{state.prompts + len(completions)}")
        part = state.records([completions[r.id] for r in requests])
        stage.write_part(part)
        state.count(part)
        stage.advance(len(kept(part)), dropped=len(state.all) - state.accepted)
    stage.summary["prompts"] = state.prompts
    if state.guided is not None:
        stage.summary["from topics"] = sum(r.hint is not None for r in kept(state.all))


def _warn_of_missing_topics(context: StageContext, records: Sequence[Instruction], *, fresh: bool) -> None:
    about, share = sum(r.hint is not None for r in kept(records)), wanted(context.config)
    if fresh and about < share:
        context.reporter.warn(
            f"iteration {context.iteration}: {about} of {share} instructions are about topics; the others come from "
            "seeds (reasons are in topics/ and instructions/)"
        )


class _State:
    """State of the stage between two waves; all of it follows from the records of the waves before."""

    def __init__(
        self,
        context: StageContext,
        pool: Pool | RestartingPool,
        guided: Guided | None,
        questions: Questions | None,
    ):
        self.settings = context.config.synthesize
        self.all: list[Instruction] = []
        self.accepted = self.prompts = self.waves = 0
        self.guided = guided
        self._context, self._templates, self._pool = context, context.templates, pool
        self._recent: list[tuple[int, int]] = []
        self._share, self._questions = wanted(context.config), questions
        # Prompts and kept instructions since the last change from topics to seeds: they tell the yield.
        self._tried = self._gained = 0

    @property
    def needed(self) -> int:
        """Instructions that are still missing, of topics' share as long as these are asked about."""
        return (self._share if self.about_topics else self.settings.instructions) - self.accepted

    @property
    def about_topics(self) -> bool:
        """Whether the next wave asks about topics."""
        return self.guided is not None and self.accepted < self._share and self.prompts < len(self.guided)

    @property
    def wave(self) -> int:
        """Prompts of the next wave: what is still needed at the yield so far."""
        if not self._gained:
            wave = min(FIRST_WAVE, max(self.needed, SMALLEST_WAVE))
        else:
            wave = min(LARGEST_WAVE, max(SMALLEST_WAVE, math.ceil(self.needed * self._tried / self._gained)))
        return min(wave, len(self.guided) - self.prompts) if self.about_topics else wave

    def replay(self, part: Sequence[Instruction]) -> None:
        for record in kept(part):
            self._pool.add(record.id, record.instruction, record.input)
        self.count(part)

    def count(self, part: Sequence[Instruction]) -> None:
        new, wave, about_topics = len(kept(part)), self.wave, self.about_topics
        self._recent = [*self._recent[-PATIENCE + 1 :], (wave, new)]
        self.prompts += wave
        self._tried += wave
        self.waves += 1
        self.accepted += new
        self._gained += new
        if about_topics != self.about_topics:
            self._tried = self._gained = 0
            self._recent = []
        self.all.extend(part)

    def check_progress(self) -> None:
        asked, new = (sum(column) for column in zip(*self._recent)) if self._recent else (0, 0)
        if len(self._recent) == PATIENCE and new * 100 < asked:
            reasons = Counter(r.verdict.reason for r in self.all if not r.verdict.kept)
            most = ", ".join(f"{reason}: {n}" for reason, n in reasons.most_common(3)) or "completions held no task"
            raise NothingLeftError(
                f"synthesize: the last {asked} prompts gave {new} new instructions, {self.accepted} of "
                f"{self.settings.instructions} are there (dropped so far: {most}); in a new run lower "
                "synthesize.instructions, raise synthesize.novelty or temperature, or use synthesize.rules=basic"
                + (" or method=few_shot" if self.guided else "")
            )

    def sampling(self) -> SamplingParams:
        """That of the next wave."""
        s = self.settings
        stop = GUIDED_STOP if self.about_topics else self._templates.synthesize_stop
        stop = self._questions.stop if self._questions else stop
        return SamplingParams(s.temperature, s.top_p, s.max_tokens, stop)

    def requests(self) -> list[Request]:
        def request(k: int) -> Request:
            id = self._context.request_id("synthesize", k)
            if self.about_topics:
                return Request(id, self.guided.prompt(k), self._templates.prefix("guided"))
            examples = [{"instruction": s.instruction, "input": s.input, "output": s.output} for s in self._shown(k)]
            prompt = self._templates.synthesize(examples)
            return Request(id, prompt, self._templates.prefix("synthesize"))

        numbers = range(self.prompts, self.prompts + self.wave)
        if self._questions:
            prompts = self._questions.prompts(numbers)
            return [Request(self._context.request_id("synthesize", k), prompt) for k, prompt in zip(numbers, prompts)]
        return [request(k) for k in numbers]

    def records(self, completions: Sequence[Completion]) -> list[Instruction]:
        """All tasks of a wave, in order, with their verdicts."""
        found: list[tuple[int, Segment, Verdict | None]] = []
        for k, completion in enumerate(completions, start=self.prompts):
            if completion.finish_reason == "error":
                found.append((k, Segment("", ""), dropped("not decoded", completion.error)))
                continue
            for segment in self._parse(k, completion):
                reason = segment.reason or instruction_reason(self.settings.rules, segment.instruction, segment.input)
                if not reason and self._is_held_out(segment):
                    reason = "in an evaluation set"
                found.append((k, segment, dropped(reason) if reason else None))
        ids = [f"{self._context.iteration}-{len(self.all) + i:06d}" for i in range(len(found))]
        verdicts = self._novel(ids, found)
        return [
            Instruction(id, s.instruction, s.input, k, self._seed_ids(k), v, s.hint)
            for id, (k, s, _), v in zip(ids, found, verdicts)
        ]

    def _novel(self, ids: list[str], found: list[tuple[int, Segment, Verdict | None]]) -> list[Verdict]:
        """Verdicts of a wave; once enough are kept, the pool is not touched any more."""
        verdicts = [verdict for _, _, verdict in found]
        open_ = [i for i, verdict in enumerate(verdicts) if verdict is None]
        while open_:
            # No more than are needed at a time: an instruction beyond the last must not join the pool.
            missing = self.needed - sum(v is not None and v.kept for v in verdicts)
            block, open_ = open_[:missing], open_[missing:]
            if not block:
                break
            neighbors = self._pool.admit(
                [ids[i] for i in block], [found[i][1].instruction for i in block], [found[i][1].input for i in block]
            )
            for i, near in zip(block, neighbors):
                verdicts[i] = dropped("not new", f"{near.similarity:.3f} to {near.id}") if near else KEPT
        return [verdict or dropped("more than needed") for verdict in verdicts]

    def _is_held_out(self, segment: Segment) -> bool:
        both = f"{segment.instruction}\n{segment.input}"
        return normalize(segment.instruction) in self._context.held_out or normalize(both) in self._context.held_out

    def _parse(self, prompt: int, completion: Completion) -> list[Segment]:
        finished = completion.finish_reason == "stop"
        if self._questions:
            return [Segment(completion.text.strip(), "", "" if finished else "unfinished")]
        if not self.about_topics:
            return parse(completion.text, finished)
        return [
            Segment(text, "", reason, str(hint) if hint else None)
            for text, hint, reason in self.guided.read(prompt, completion.text, finished)
        ]

    def _seed_ids(self, prompt: int) -> tuple[str, ...]:
        if self._questions:
            return self._questions.shown(prompt)
        return self.guided.seeds(prompt) if self.about_topics else tuple(x.id for x in self._shown(prompt))

    def _shown(self, prompt: int) -> list[Seed]:
        return shown_seeds(self._context, prompt)
