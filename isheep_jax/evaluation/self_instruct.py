"""The held-out loss on people's answers: Self-Instruct's 175 seed tasks (Wang et al., 2023), each written by a person.

The model writes nothing. The loss is the mean negative log-probability of a token of the answer given the instruction
(nats), as in fine-tuning, so that figures of models with one tokenizer can be compared.
"""

from collections.abc import Sequence
from typing import Any

from isheep_jax.errors import UserError
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.loop.records import user_text
from isheep_jax.text.conversation import Message
from isheep_jax.text_files import read_objects

DATA = "self_instruct/seed_tasks.jsonl"
_LIKE = '{"id": "...", "instruction": "...", "instances": [...], "is_classification": false}'


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the tasks with their answers: a user's turn, or a text that ends where the answer begins."""
    path = task_file(options.settings, DATA)
    try:
        return [_sample(row, options) for _, row in read_objects(path, "evaluate.task_data", _LIKE)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not Self-Instruct's seed tasks ({error!r}): each line needs id, instruction, instances and "
            "is_classification"
        ) from None


def _sample(row: dict[str, Any], options: TaskOptions) -> Sample:
    instance = row["instances"][0]
    asked = user_text(row["instruction"], instance["input"])
    return Sample(
        id=row["id"],
        prompt=(Message("user", asked),) if options.chat else f"Instruction:\n{asked}\n\nResponse:\n",
        given=instance["output"].strip(),
        groups={"kind": "classification" if row["is_classification"] else "generation"},
        held_out=(row["instruction"], asked),
    )


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns the loss of each token of each answer; nothing for an answer that does not fit into the context."""
    return [Score({"loss": [-x for x in response.logprobs]} if response.logprobs else {}) for _, response in responses]


TASK = Task(
    title="Self-Instruct's answers by people",
    version=1,
    samples=samples,
    score=score,
    main="loss",
    measures="loss",
)
