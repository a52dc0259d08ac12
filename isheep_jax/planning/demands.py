"""What each stage of an iteration asks of decoding and training, on texts of the assumed lengths."""

import itertools
import math
from collections.abc import Callable

import numpy as np

from isheep_jax.config import Config, is_server
from isheep_jax.loop.judging.judges import second_judge
from isheep_jax.loop.judging.scores import criteria_of
from isheep_jax.loop.prompting.ways import ways_of
from isheep_jax.loop.selection.rules import needs_clusters, share_of
from isheep_jax.planning.lengths import Lengths, draw, draw_endless, mean_endless
from isheep_jax.planning.schedule import Demand, Generation, Scoring, Training

# Stages of the loop that a plan leaves out: they take little time or none on the devices.
NOT_PLANNED = ("judge_check", "topics", "pool", "examples", "selected", "evaluation")
# Choices of a score, 1 to 10.
_SCORES = 10

Stage = tuple[str, int]  # its name in the loop's table, and the turn


def stage_demands(config: Config, lengths: Lengths) -> dict[Stage, list[Demand]]:
    """Returns what each stage and turn asks for, in the order of the loop; stages that ask for nothing are left out."""
    demands = _Demands(config, lengths)
    synthesize, clone = config.synthesize, config.clone
    share = share_of(config)
    share = 1.0 if share is None else share  # at most
    pair = lengths.instruction + demands.response
    kept = min(config.select.max_pairs, share * synthesize.instructions)
    stages: dict[Stage, list[Demand]] = {
        ("instructions", 1): [demands.synthesize()],
        **_turn(config, demands, lengths, 1, synthesize.instructions, 0),
    }
    if config.assess.agreement:
        pairs = min(config.assess.agreement, synthesize.instructions * config.respond.samples)
        stages["agreement", 1] = demands.judge(second_judge(config), pairs, 0)
    examples = [(kept, pair + lengths.template)]
    if synthesize.turns == 2:
        stages["follow_ups", 2] = [
            demands.generate(kept, lengths.follow_up_prompt + pair, lengths.instruction, config.respond.max_tokens)
        ]
        stages |= _turn(config, demands, lengths, 2, kept, pair + lengths.template)
        examples.append((min(config.select.max_pairs, share * kept), 2 * (pair + lengths.template)))
    if clone.enabled:
        stages["engraved", 1] = [demands.train(examples)]
        answer = min(lengths.thorough, clone.max_tokens)
        stages["thorough", 1] = [
            demands.generate(
                synthesize.instructions,
                lengths.instruction + lengths.template,
                answer,
                clone.max_tokens,
                prefix=lengths.thorough_prompt,
            )
        ]
        examples = [(synthesize.instructions, lengths.instruction + answer + lengths.template)]
    stages["model", 1] = [demands.train(examples)]
    return {stage: asked for stage, asked in stages.items() if asked}


def _turn(
    config: Config, demands: "_Demands", lengths: Lengths, turn: int, instructions: float, before: int
) -> dict[Stage, list[Demand]]:
    """Returns what the stages of a turn ask for, from respond to embed.

    Args:
        config: settings.
        demands: makes the demands.
        lengths: assumed lengths of texts.
        turn: 1 or 2.
        instructions: number of instructions of the turn.
        before: tokens of the conversation before each instruction.
    """
    pairs = instructions * config.respond.samples
    thoughts = lengths.thoughts if config.respond.method == "principles" else 0
    stages = {
        "responses": [
            demands.generate(
                pairs,
                before + lengths.instruction + lengths.template,
                thoughts + demands.response,
                config.respond.max_tokens,
            )
        ],
        "scores": demands.judge(config.assess.judge, pairs, before),
    }
    if needs_clusters(config):
        stages["vectors"] = [demands.score(instructions, lengths.instruction)]
    return {(name, turn): asked for name, asked in stages.items()}


class _Demands:
    """Makes demands with lengths that are drawn.

    response: mean tokens of a response.
    """

    def __init__(self, config: Config, lengths: Lengths):
        self._config, self._lengths = config, lengths
        self._purposes = itertools.count()
        self.response = min(lengths.response, config.respond.max_tokens)

    def synthesize(self) -> Generation:
        """Asks for as many completions of a list of instructions as give enough that are kept."""
        synthesize, lengths = self._config.synthesize, self._lengths
        tokens = synthesize.instructions * lengths.per_instruction
        count = math.ceil(tokens / mean_endless(synthesize.max_tokens, lengths))
        shots = max(way.shots for way in ways_of(synthesize))
        # Shots are drawn one by one, so that their sum varies less than one of them.
        one = {"spread": lengths.shot_spread}
        prompts = sum((self._draw(lengths.shot, count, **one) for _ in range(shots)), np.ones(count, np.int64))
        completions = draw_endless(synthesize.max_tokens, count, lengths, purpose=next(self._purposes))
        return self._generation(prompts, completions, synthesize.max_tokens, stream=True)

    def generate(self, prompts: float, tokens: int, new: int, most: int, *, prefix: int = 0) -> Generation:
        """Asks for completions.

        Args:
            prompts: how many.
            tokens: mean of a prompt after the prefix.
            new: mean of a completion.
            most: at which completions are cut.
            prefix: tokens that all prompts begin with.
        """
        count = max(1, math.ceil(prompts))
        completions = self._draw(new, count, most)
        return self._generation(self._draw(tokens, count), completions, most, prefix=prefix)

    def score(self, prompts: float, tokens: int, *, prefix: int = 0, branch: int = 0) -> Scoring:
        """Asks for log-probabilities; arguments as those of `generate` and `Scoring`."""
        count = max(1, math.ceil(prompts))
        most = self._config.decode.max_length - prefix
        return Scoring(np.minimum(self._draw(tokens, count), most), prefix, branch)

    def judge(self, judge: str, pairs: float, before: int) -> list[Demand]:
        """Asks for judgments of pairs that follow `before` tokens of conversation; for none of a server."""
        readings = () if is_server(judge) else self._config.assess.readings
        # What two readings ask alike is asked once.
        asked = dict.fromkeys(ask for name in readings for ask in _READINGS[name])
        return [demand for ask in asked for demand in ask(self, pairs, before)]

    def rubric(self, pairs: float, before: int) -> list[Demand]:
        """Asks for the scores of pairs, one criterion after the other, each with a prefix of its own."""
        assess, lengths = self._config.assess, self._lengths
        tokens = before + lengths.instruction + self.response + lengths.judgment_prompt
        criteria, prefix = len(criteria_of(assess)), lengths.judgment_prefix
        if assess.read == "expected":
            branch = _SCORES * lengths.choice
            return [self.score(pairs, tokens, prefix=prefix, branch=branch) for _ in range(criteria)]
        new = assess.max_tokens
        return [self.generate(pairs * assess.samples, tokens, new, new, prefix=prefix) for _ in range(criteria)]

    def response_after_prompt(self, pairs: float, before: int) -> list[Demand]:
        """Asks for the log-probability of each response after its prompt."""
        return [self.score(pairs, before + self._pair)]

    def response_alone(self, pairs: float, before: int) -> list[Demand]:
        """Asks for the log-probability of each response after an empty turn."""
        return [self.score(pairs, before + self._pair)]

    def backward_lift(self, pairs: float, before: int) -> list[Demand]:
        """Asks for the log-probability of each instruction after two prompts."""
        return [self.score(2 * pairs, self._lengths.backward_prompt + self._pair)]

    def pairwise(self, pairs: float, before: int) -> list[Demand]:
        """Asks to compare each response with all others to its instruction, in both orders."""
        lengths = self._lengths
        tokens = lengths.judgment_prompt + lengths.instruction + 2 * self.response
        comparisons = pairs * (self._config.respond.samples - 1)
        return [self.score(comparisons, tokens, prefix=lengths.judgment_prefix)] if comparisons else []

    def train(self, examples: list[tuple[float, int]]) -> Training:
        """Asks for the updates for examples, given as (count, tokens of each)."""
        sft, row = self._config.sft, self._config.sft.sequence_length
        tokens = sum(count * (min(length, row) if sft.packing else row) for count, length in examples)
        batch = sft.batch_size * row
        updates = sft.epochs * math.ceil(tokens * (1 - sft.validation_fraction) / batch)
        measured = math.ceil(updates / sft.checkpoint_every)
        return Training(updates, measured * math.ceil(tokens * sft.validation_fraction / batch))

    @property
    def _pair(self) -> int:
        return self._lengths.instruction + self.response + self._lengths.template

    def _draw(self, mean: float, count: int, most: float = math.inf, spread: float | None = None) -> np.ndarray:
        return draw(mean, count, self._lengths, most=most, spread=spread, purpose=next(self._purposes))

    def _generation(
        self, prompts: np.ndarray, completions: np.ndarray, most: int, *, prefix: int = 0, stream: bool = False
    ) -> Generation:
        """Returns a demand whose prompts and completions fit into `decode.max_length`."""
        room = self._config.decode.max_length - prefix
        prompts = np.minimum(prompts, room - 1)
        return Generation(prompts, np.minimum(completions, room - prompts), most, prefix, stream)


# What each reading takes, for a number of pairs after so many tokens of conversation.
_READINGS: dict[str, tuple[Callable[[_Demands, float, int], list[Demand]], ...]] = {
    "rubric": (_Demands.rubric,),
    "likelihood": (_Demands.response_after_prompt,),
    "ending": (_Demands.response_after_prompt,),
    "lift": (_Demands.response_after_prompt, _Demands.response_alone),
    "backward_lift": (_Demands.backward_lift,),
    "self_consistency": (),
    "pairwise": (_Demands.pairwise,),
}
