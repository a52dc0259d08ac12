"""The task `triviaqa`: questions of quizzes, answered from memory."""

from collections.abc import Sequence

from isheep_jax.evaluation.answers import (
    contains_answer,
    exact_match,
    f1,
    prompt_with_examples,
    short_answer,
    short_answers,
    triviaqa_normalized,
)
from isheep_jax.evaluation.questions import triviaqa_questions
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions

_INSTRUCTION = "Answer each question with a name, a number or a few words."
_EXAMPLES = (
    ("Question: Which metal is liquid at room temperature?", "Mercury"),
    ("Question: In which country is the city of Tampere?", "Finland"),
    ("Question: How many strings does a cello have?", "Four"),
    ("Question: Which planet has a moon called Titan?", "Saturn"),
    ("Question: Who wrote the novel 'Middlemarch'?", "George Eliot"),
)


def samples(options: TaskOptions) -> list[Sample]:
    """Returns a sample for each question of the validation set."""
    return [
        Sample(
            question.id,
            prompt_with_examples(_INSTRUCTION, _EXAMPLES, f"Question: {question.text}", options.chat),
            short_answers(options),
            reference={"answers": list(question.answers)},
            held_out=(question.text,),
        )
        for question in triviaqa_questions(options.settings)
    ]


def score(pairs: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Scores responses as the official script does, `em` and `f1`, against the normalized aliases.

    `contains` is the more lenient measure that harnesses publish for chat models: whether the first line has an alias.
    """
    return [_score(response, sample.reference["answers"]) for sample, response in pairs]


def _score(response: Response, right: Sequence[str]) -> Score:
    if response.error:
        return Score({"em": False, "f1": 0.0, "contains": False})
    answer = short_answer(response.text)
    measures = {"em": exact_match, "f1": f1, "contains": contains_answer}
    values = {name: measure(answer, right, triviaqa_normalized) for name, measure in measures.items()}
    return Score(values, {"answer": answer})


TASK = Task("TriviaQA", version=1, samples=samples, score=score, main="em", shown=("f1", "contains"))
