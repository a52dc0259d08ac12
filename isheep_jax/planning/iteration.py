"""Adds up an iteration from the least times of its programs: steps per stage, seconds and chip-hours."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

from isheep_jax.config import Config, is_server
from isheep_jax.loop.judging.judges import second_judge
from isheep_jax.loop.judging.scores import criteria_of
from isheep_jax.loop.prompting.ways import ways_of
from isheep_jax.loop.selection.rules import needs_clusters, share_of
from isheep_jax.loop.stages.table import STAGES
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.programs import Program

# Stages of the loop that a plan leaves out: they take little time or none on the devices.
NOT_PLANNED = ("judge_check", "topics", "pool", "examples", "selected", "evaluation")
# Prompts begin at multiples of this many tokens in packed rows.
_ALIGNMENT = 128

Steps = dict[str, float]  # steps by program


@dataclass(frozen=True)
class Lengths:
    """Assumed lengths of texts in tokens, for general instruction data; only a run can tell the real ones."""

    shot: int = 130
    """A seed task in a prompt: instruction, input and output."""
    per_instruction: int = 250
    """New tokens for each instruction that passes the rules and the novelty filter."""
    instruction: int = 30
    """An instruction with its input."""
    response: int = 250
    """A response."""
    judgment_prompt: int = 250
    """The judge's prompt without the pair."""
    backward_prompt: int = 50
    """The prompt for an instruction by its response, without the pair."""
    follow_up_prompt: int = 80
    """The prompt for a second turn without the pair."""
    thoughts: int = 50
    """Thoughts that precede a response by principles."""
    thorough_prompt: int = 90
    """The request for a thorough answer."""
    thorough: int = 400
    """A thorough answer."""
    template: int = 20
    """Tokens that the chat template adds to a pair."""


@dataclass(frozen=True)
class StagePlan:
    """A stage by its title in the loop's table: the least seconds that it takes, and its steps of each program."""

    name: str
    seconds: float
    steps: Steps


def plan_iteration(
    config: Config, by_name: dict[str, Program], bounds: dict[str, Bound], lengths: Lengths | None = None
) -> list[StagePlan]:
    """Returns the stages of an iteration at the least times of their programs, with no slot idle while a prompt waits.

    Loading, saving, compilation and `NOT_PLANNED` are left out, and so is the time of a server that judges.

    Args:
        config: settings.
        by_name: the programs, by name.
        bounds: the least time of a step of each program, by name.
        lengths: of texts; None: the assumed ones.
    """
    tokens = {name: program.tokens for name, program in by_name.items()}
    lengths = lengths or Lengths()
    counter = _StepCounter(config, tokens, lengths)
    return [
        StagePlan(
            STAGES[stage].title_of(turn), sum(count * bounds[name].seconds for name, count in steps.items()), steps
        )
        for (stage, turn), steps in _steps(config, counter, lengths).items()
        if steps
    ]


def _steps(config: Config, counter: "_StepCounter", lengths: Lengths) -> dict[tuple[str, int], Steps]:
    """Returns the steps of each stage and turn."""
    synthesize, clone = config.synthesize, config.clone
    share = share_of(config)
    share = 1.0 if share is None else share  # at most
    pair = lengths.instruction + counter.response
    kept = min(config.select.max_pairs, share * synthesize.instructions)
    completions = math.ceil(synthesize.instructions * lengths.per_instruction / synthesize.max_tokens)
    shots = max(way.shots for way in ways_of(synthesize))
    writing = counter.generate(completions, shots * lengths.shot, synthesize.max_tokens)
    stages = {("instructions", 1): writing, **_turn(config, counter, lengths, 1, synthesize.instructions, 0)}
    if config.assess.agreement:
        pairs = min(config.assess.agreement, synthesize.instructions * config.respond.samples)
        stages["agreement", 1] = counter.judge(second_judge(config), pairs, 0)
    examples = [(kept, pair + lengths.template)]
    if synthesize.turns == 2:
        stages["follow_ups", 2] = counter.generate(kept, lengths.follow_up_prompt + pair, lengths.instruction)
        stages |= _turn(config, counter, lengths, 2, kept, pair + lengths.template)
        examples.append((min(config.select.max_pairs, share * kept), 2 * (pair + lengths.template)))
    if clone.enabled:
        stages["engraved", 1] = counter.train(examples)
        tokens, answer = (
            lengths.thorough_prompt + lengths.instruction + lengths.template,
            min(lengths.thorough, clone.max_tokens),
        )
        stages["thorough", 1] = counter.generate(synthesize.instructions, tokens, answer)
        examples = [(synthesize.instructions, lengths.instruction + answer + lengths.template)]
    stages["model", 1] = counter.train(examples)
    return stages


def _turn(
    config: Config, counter: "_StepCounter", lengths: Lengths, turn: int, instructions: float, before: int
) -> dict[tuple[str, int], Steps]:
    """Returns the steps of the stages of a turn, from respond to embed.

    Args:
        config: settings.
        counter: counts the steps.
        lengths: assumed lengths of texts.
        turn: 1 or 2.
        instructions: number of instructions of the turn.
        before: tokens of the conversation before each instruction.
    """
    pairs = instructions * config.respond.samples
    thoughts = lengths.thoughts if config.respond.method == "principles" else 0
    stages = {
        "responses": counter.generate(
            pairs, before + lengths.instruction + lengths.template, thoughts + counter.response
        ),
        "scores": counter.judge(config.assess.judge, pairs, before),
    }
    if needs_clusters(config):
        stages["vectors"] = counter.prefill(programs.SCORE, instructions, lengths.instruction)
    return {(name, turn): steps for name, steps in stages.items()}


class _StepCounter:
    """Counts the steps of programs.

    tokens: tokens of a step, by program.
    """

    def __init__(self, config: Config, tokens: dict[str, int], lengths: Lengths):
        self._config, self._tokens, self._lengths = config, tokens, lengths
        self.response = min(lengths.response, config.respond.max_tokens)

    def prefill(self, program: str, prompts: float, tokens: int) -> Steps:
        """Counts the steps for a number of prompts of `tokens` tokens each."""
        return {program: prompts * _packed(min(tokens, self._config.decode.max_length)) / self._tokens[program]}

    def generate(self, prompts: float, tokens: int, new: int) -> Steps:
        """Counts the steps for a number of prompts of `tokens` tokens with `new` new tokens each."""
        # Fewer prompts than slots leave slots idle.
        steps = new * max(1.0, prompts / self._config.decode.slots)
        return {**self.prefill(programs.PREFILL, prompts, tokens), programs.DECODE: steps}

    def judge(self, judge: str, pairs: float, before: int) -> Steps:
        """Counts the steps for judging pairs that follow `before` tokens of conversation; none for a server."""
        readings = () if is_server(judge) else self._config.assess.readings
        steps: Counter[str] = Counter()
        # What two readings ask alike is asked once.
        for count in dict.fromkeys(count for name in readings for count in _READINGS[name]):
            steps.update(count(self, pairs, before))
        return dict(steps)

    def rubric(self, pairs: float, before: int) -> Steps:
        """Counts the steps for the scores of pairs."""
        assess, lengths = self._config.assess, self._lengths
        tokens = lengths.judgment_prompt + before + lengths.instruction + self.response
        judgments = len(criteria_of(assess)) * pairs
        if assess.read == "expected":
            return self.prefill(programs.SCORE, judgments, tokens)
        return self.generate(judgments * assess.samples, tokens, assess.max_tokens)

    def response_after_prompt(self, pairs: float, before: int) -> Steps:
        """Counts the steps for the log-probability of each response after its prompt."""
        return self.prefill(programs.SCORE, pairs, before + self._pair)

    def response_alone(self, pairs: float, before: int) -> Steps:
        """Counts the steps for the log-probability of each response after an empty turn."""
        return self.prefill(programs.SCORE, pairs, before + self._pair)

    def backward_lift(self, pairs: float, before: int) -> Steps:
        """Counts the steps for the log-probability of each instruction after two prompts."""
        return self.prefill(programs.SCORE, 2 * pairs, self._lengths.backward_prompt + self._pair)

    def pairwise(self, pairs: float, before: int) -> Steps:
        """Counts the steps for comparing each response with all others to its instruction, in both orders."""
        tokens = self._lengths.judgment_prompt + self._lengths.instruction + 2 * self.response
        return self.prefill(programs.SCORE, pairs * (self._config.respond.samples - 1), tokens)

    @property
    def _pair(self) -> int:
        return self._lengths.instruction + self.response + self._lengths.template

    def train(self, examples: list[tuple[float, int]]) -> Steps:
        """Counts the updates for examples, given as (count, tokens of each)."""
        sft, row = self._config.sft, self._config.sft.sequence_length
        tokens = sum(count * (min(length, row) if sft.packing else row) for count, length in examples)
        trained = tokens * (1 - sft.validation_fraction)
        return {programs.TRAIN: float(sft.epochs * math.ceil(trained / self._tokens[programs.TRAIN]))}


# What each reading takes, for a number of pairs after so many tokens of conversation.
_READINGS: dict[str, tuple[Callable[[_StepCounter, float, int], Steps], ...]] = {
    "rubric": (_StepCounter.rubric,),
    "likelihood": (_StepCounter.response_after_prompt,),
    "ending": (_StepCounter.response_after_prompt,),
    "lift": (_StepCounter.response_after_prompt, _StepCounter.response_alone),
    "backward_lift": (_StepCounter.backward_lift,),
    "self_consistency": (),
    "pairwise": (_StepCounter.pairwise,),
}


def _packed(length: int) -> int:
    """Returns the tokens that a prompt takes in a packed row on TPU, including the gap to the next prompt."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def as_dict(stages: list[StagePlan], chips: int) -> dict:
    """Returns a planned iteration as JSON."""
    seconds = sum(stage.seconds for stage in stages)
    return {
        "planned": True,
        "seconds": seconds,
        "chip_hours": seconds * chips / 3600,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "assumed_lengths": dataclasses.asdict(Lengths()),
    }
