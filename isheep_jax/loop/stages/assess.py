"""Reads the judge's opinion of each pair (I-SHEEP section 3.2)."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isheep_jax.config import is_server
from isheep_jax.loop.context import SERVER_PART, StageContext
from isheep_jax.loop.judging.judges import framing_of
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.judging.readings import UNSCORED, read
from isheep_jax.loop.judging.scores import median_mass
from isheep_jax.loop.judging.unread import Unread
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Pair, Scores, kept
from isheep_jax.text.conversation import Conversation, Prompt

# Share of unscored pairs above which the user is warned: the readings then mean little.
UNSCORED_SHARE = 0.05


@dataclass(frozen=True)
class Asked:
    """What an instruction's responses answer, as the judge sees it.

    prompt: with the instruction. empty: the same without it. history: earlier turns of the conversation.
    """

    prompt: Prompt
    empty: Prompt
    history: Conversation = ()


def candidates(pairs: Sequence[Pair], asked: Mapping[str, Asked]) -> list[Candidate]:
    """Returns the (kept) pairs to be read; the other responses to their instruction count whatever their verdict.

    asked: by the instruction's id.
    """
    responses: dict[str, list[Pair]] = {}
    for pair in pairs:
        responses.setdefault(pair.instruction_id, []).append(pair)

    def candidate(pair: Pair) -> Candidate:
        others = (other.response for other in responses[pair.instruction_id] if other.id != pair.id)
        return Candidate(
            id=pair.id,
            instruction=pair.instruction,
            input=pair.input,
            response=pair.response,
            others=tuple(filter(None, others)),
            **vars(asked[pair.instruction_id]),
        )

    return [candidate(pair) for pair in kept(pairs)]


def assess(
    context: StageContext, judge: Model, name: str, candidates: Sequence[Candidate], *, stage: str = "scores"
) -> list[Scores]:
    """Returns what the judge says of each pair.

    name: of the judge, as in `assess.judge`. stage: "scores", or "agreement" for those of a second judge.
    """
    settings = context.config.assess
    framing = framing_of(context.config, name, context.iteration)
    reader = Reader(settings, context.templates, judge, framing, context.request_id("assess"))
    unread = Unread(
        lambda text: context.reporter.warn(f"iteration {context.iteration}: {text}"), server=is_server(name)
    )
    with context.open(stage, len(candidates), part=SERVER_PART if is_server(name) else 0) as open_stage:
        # Log-probabilities need no slots that could run empty, and are kept from time to time.
        decodes = settings.readings == ("rubric",) and settings.read == "sampled"
        for block in open_stage.blocks(candidates if settings.readings else [], whole=decodes):
            for i, scores in read(reader, block):
                unread.take(scores)
                open_stage.put(i, scores)
        unread.end()
        if (mass := median_mass(open_stage.records)) is not None:
            open_stage.summary["median_mass"] = mass
    scores = open_stage.records
    unscored = sum(record.verdict.reason == UNSCORED for record in scores)
    if stage == "scores":
        if open_stage.fresh and unscored > UNSCORED_SHARE * len(scores):
            text = f"iteration {context.iteration}: {unscored} of {len(scores)} pairs got no score"
            context.reporter.warn(text)
        hint = "the scoring prompts may not suit it"
        context.guard("min_score_mass", median_mass(scores), hint=hint, fresh=open_stage.fresh)
    return scores
