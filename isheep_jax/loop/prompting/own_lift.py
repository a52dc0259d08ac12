"""How much likelier a text is as a task than as any text: what is likely everywhere, or nowhere, is a poor task."""

import math
from collections.abc import Sequence

from isheep_jax.decode.requests import Request
from isheep_jax.loop.context import StageContext, by_request
from isheep_jax.loop.prompting.protocols import ParsedInstruction
from isheep_jax.loop.protocols import Model
from isheep_jax.loop.records import Instruction, user_text

# What precedes the text: a line that announces a task, and nothing but the start of a line.
_AS_TASK = "A task for a helpful assistant.\n\nInstruction:"
_AS_TEXT = "\n"


def own_lifts(
    context: StageContext, model: Model, purpose: str, tasks: Sequence[Instruction | ParsedInstruction]
) -> list[float | None]:
    """Returns how much the announcement of a task raises the log-probability of each task, per token (nats).

    None where a task does not fit the model's context. purpose: beginning of the ids of the requests.
    """
    # The space belongs to the first word, as in running text.
    texts = [f" {user_text(task.instruction, task.input)}" for task in tasks]
    as_task, as_text = (_means(context, model, (purpose, prompt), prompt, texts) for prompt in (_AS_TASK, _AS_TEXT))
    return [None if a is None or b is None else round(a - b, 4) for a, b in zip(as_task, as_text, strict=True)]


def lowest(lifts: Sequence[float | None], share: float) -> set[int]:
    """Returns the indices of a share of the lifts: the lowest ones that are known, the earlier of equal ones."""
    known = sorted((lift, i) for i, lift in enumerate(lifts) if lift is not None)
    return {i for _, i in known[: math.floor(share * len(known))]}


def _means(
    context: StageContext, model: Model, purpose: tuple[str, str], prompt: str, texts: Sequence[str]
) -> list[float | None]:
    """Returns the mean log-probability per token of each text after the prompt; None where there is none."""
    means: list[float | None] = [None] * len(texts)
    requests = [Request(context.request_id(*purpose, i), prompt) for i in range(len(texts))]
    for i, result in by_request(requests, model.text_logprobs(requests, texts)):
        if not result.error and result.tokens and not math.isnan(result.logprob):
            means[i] = result.logprob / result.tokens
    return means
