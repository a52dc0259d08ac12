"""A whole iteration from the least times of its programs: how many steps of each, hours, and chip-hours."""

import dataclasses
import math
from dataclasses import dataclass

from isheep_jax.config import Config
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
    judgement_prompt: int = 250
    """The judge's prompt without the pair."""
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

    Loading, saving, compilation and measurements are not in it.
    """
    n = lengths or Lengths()
    synthesize, respond, assess, sft = config.synthesize, config.respond, config.assess, config.sft
    completions = math.ceil(synthesize.instructions * n.per_instruction / synthesize.max_tokens)
    pairs = synthesize.instructions * respond.samples
    response = min(n.response, respond.max_tokens)
    judged = n.judgement_prompt + n.instruction + response

    def generation(prompts: int, prompt: int, new: int) -> dict[str, float]:
        padded = _packed(min(prompt, config.decode.context))
        return {
            programs.PREFILL: prompts * padded / made[programs.PREFILL].tokens,
            # Prompts that are fewer than the slots leave some idle.
            programs.DECODE: new * max(1.0, prompts / config.decode.slots),
        }

    if assess.read == "expected":
        padded = _packed(min(judged, config.decode.context))
        judging = {programs.SCORE: 2 * pairs * padded / made[programs.SCORE].tokens}
    else:
        judging = generation(2 * pairs, judged, assess.max_tokens)
    kept = synthesize.instructions * (config.select.fraction if config.select.rule in ("top_fraction", "random") else 1)
    examples = min(config.select.at_most, kept) * (1 - sft.validation_fraction)
    tokens = examples * min(n.instruction + response + n.template, sft.sequence_length)
    updates = sft.epochs * math.ceil(tokens / made[programs.TRAIN].tokens)
    stages = {
        "synthesize": generation(completions, synthesize.shots * n.shot, synthesize.max_tokens),
        "respond": generation(pairs, n.instruction + n.template, response),
        "assess": judging,
        "fine-tune": {programs.TRAIN: float(updates)},
    }
    return [
        StagePlan(name, sum(count * bounds[program].seconds for program, count in steps.items()), steps)
        for name, steps in stages.items()
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
