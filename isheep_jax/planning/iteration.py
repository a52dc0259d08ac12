"""A whole iteration from the least times of its programs: how many steps of each, hours, and chip-hours."""

import dataclasses
import math
from dataclasses import dataclass

from isheep_jax.config import Config, is_server
from isheep_jax.loop.judging.judges import second_judge
from isheep_jax.loop.selection.rules import RULES, effective_rule, needs_clusters, needs_perplexities
from isheep_jax.loop.stages.assess import asked
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.programs import Program

# Tokens at whose multiples prompts begin in packed rows.
_ALIGNMENT = 128


@dataclass(frozen=True)
class Lengths:
    """What a plan supposes about texts (tokens), because only a run can tell. Instruction data of general questions."""

    shot: int = 130
    """A seed task in a prompt: instruction, input and output."""
    per_instruction: int = 250
    """New tokens for each instruction that the rules and novelty keep."""
    instruction: int = 30
    """An instruction with its input."""
    response: int = 250
    """A response."""
    judgment_prompt: int = 250
    """The judge's prompt without the pair."""
    follow_up_prompt: int = 80
    """The prompt for a second turn without the pair."""
    thoughts: int = 50
    """What is written before a response by principles."""
    thorough_prompt: int = 90
    """The wish for a thorough answer."""
    thorough: int = 400
    """A thorough answer."""
    template: int = 20
    """What the chat template adds to a pair."""


@dataclass(frozen=True)
class StagePlan:
    """One stage: seconds at the least, and the steps of each program that it takes."""

    name: str
    seconds: float
    steps: dict[str, float]


def plan_iteration(
    config: Config, made: dict[str, Program], bounds: dict[str, Bound], lengths: Lengths | None = None
) -> list[StagePlan]:
    """The stages of one iteration at the least times of their programs, no slot idle while a prompt waits.

    Loading, saving, compilation and measurements are not in it, nor what a server does as the judge.
    """
    n = lengths or Lengths()
    synthesize, respond, assess, sft = config.synthesize, config.respond, config.assess, config.sft
    completions = math.ceil(synthesize.instructions * n.per_instruction / synthesize.max_tokens)
    response = min(n.response, respond.max_tokens)
    thoughts = n.thoughts if respond.method == "principles" else 0
    pair = n.instruction + response
    criteria = len(asked(assess))

    def prefill(program: str, prompts: float, prompt: int) -> dict[str, float]:
        return {program: prompts * _packed(min(prompt, config.decode.max_length)) / made[program].tokens}

    def generation(prompts: float, prompt: int, new: int) -> dict[str, float]:
        # Prompts that are fewer than the slots leave some idle.
        steps = new * max(1.0, prompts / config.decode.slots)
        return {**prefill(programs.PREFILL, prompts, prompt), programs.DECODE: steps}

    def judging(judge: str, pairs: float, before: int) -> dict[str, float]:
        prompt = n.judgment_prompt + before + pair
        if is_server(judge) or not criteria * pairs:
            return {}
        if assess.read == "expected":
            return prefill(programs.SCORE, criteria * pairs, prompt)
        return generation(criteria * pairs * assess.samples, prompt, assess.max_tokens)

    def turn(instructions: float, before: int) -> dict[str, dict[str, float]]:
        """before: tokens that were said before each instruction."""
        pairs = instructions * respond.samples
        stages = {
            "respond": generation(pairs, before + n.instruction + n.template, thoughts + response),
            "assess": judging(assess.judge, pairs, before),
        }
        if needs_perplexities(config):
            stages["likelihood"] = prefill(programs.SCORE, pairs, before + pair + n.template)
        if needs_clusters(config):
            stages["embed"] = prefill(programs.SCORE, instructions, n.instruction)
        return stages

    share = RULES[effective_rule(config)].share(config)
    kept = min(config.select.max_pairs, share * synthesize.instructions)
    stages = {"synthesize": generation(completions, synthesize.shots * n.shot, synthesize.max_tokens)}
    stages |= turn(synthesize.instructions, 0)
    if assess.agreement:
        other = second_judge(config)
        drawn = min(assess.agreement, synthesize.instructions * respond.samples)
        stages[f"assess by {other}"] = judging(other, drawn, 0)
    examples = [(kept, pair + n.template)]
    if synthesize.turns == 2:
        stages["follow up"] = generation(kept, n.follow_up_prompt + pair, n.instruction)
        stages |= {f"{name} (second turn)": steps for name, steps in turn(kept, pair + n.template).items()}
        examples.append((min(config.select.max_pairs, share * kept), 2 * (pair + n.template)))

    def training(examples: list[tuple[float, int]]) -> dict[str, float]:
        """examples: how many of how many tokens."""
        longest = sft.sequence_length
        tokens = sum(count * (min(length, longest) if sft.packing else longest) for count, length in examples)
        trained = tokens * (1 - sft.validation_fraction)
        return {programs.TRAIN: float(sft.epochs * math.ceil(trained / made[programs.TRAIN].tokens))}

    if config.clone.enabled:
        stages["engrave"] = training(examples)
        prompt, answer = n.thorough_prompt + n.instruction + n.template, min(n.thorough, config.clone.max_tokens)
        stages["answer again"] = generation(synthesize.instructions, prompt, answer)
        examples = [(synthesize.instructions, n.instruction + answer + n.template)]
    stages["fine-tune"] = training(examples)
    return [
        StagePlan(name, sum(count * bounds[program].seconds for program, count in steps.items()), steps)
        for name, steps in stages.items()
        if steps
    ]


def _packed(length: int) -> int:
    """Tokens of a prompt with what lies between it and the next one in a packed row of a TPU."""
    return -(-length // _ALIGNMENT) * _ALIGNMENT


def as_dict(stages: list[StagePlan], chips: int) -> dict:
    """JSON of a planned iteration."""
    seconds = sum(stage.seconds for stage in stages)
    return {
        "planned": True,
        "seconds": seconds,
        "chip_hours": seconds * chips / 3600,
        "stages": [dataclasses.asdict(stage) for stage in stages],
        "supposed_lengths": dataclasses.asdict(Lengths()),
    }
