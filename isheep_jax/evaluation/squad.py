"""The tasks `squad` and `squad_v2`: questions about a passage, answered in its words, or in 2.0 not at all."""

import re
from collections.abc import Sequence

from isheep_jax.errors import UserError
from isheep_jax.evaluation.answers import (
    exact_match,
    f1,
    prompt_with_examples,
    short_answer,
    short_answers,
    squad_normalized,
)
from isheep_jax.evaluation.questions import Question, squad_questions
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions

_INSTRUCTION = "Answer each question with the fewest words of its passage that answer it."
# How a model says that the passage has no answer: a reply whose first line has this word.
_ABSTENTION = "unanswerable"
_ABSTAIN = f" If the passage does not say the answer, reply with the word: {_ABSTENTION}"
_ABSTAINS = re.compile(rf"\b{_ABSTENTION}\b", re.IGNORECASE)

_BRIDGE = (
    "The Holm bridge was opened in 1931 after four years of work. It carries a road and two railway tracks over the "
    "strait, and until 1958 drivers paid a toll of two crowns to cross it. Its designer, Astrid Lund, had already "
    "built the lighthouse at Norvik."
)
_MUSEUM = (
    "The town museum keeps about nine thousand objects, most of them tools of weavers. It moved from the old school to "
    "a former mill in 2004, because the school's cellar had been flooded twice. Entry is free on the first Sunday of "
    "each month."
)
_EXAMPLES = (
    Question("", "Who designed the Holm bridge?", ("Astrid Lund",), _BRIDGE),
    Question("", "Why did the museum leave the old school?", ("the school's cellar had been flooded twice",), _MUSEUM),
    Question("", "What did drivers pay for crossing the bridge in 1950?", ("two crowns",), _BRIDGE),
    Question("", "On which day is entry to the museum free?", ("the first Sunday of each month",), _MUSEUM),
)
_EXAMPLES_V2 = (
    _EXAMPLES[0],
    Question("", "Who gave the mill to the museum?", (_ABSTENTION,), _MUSEUM),
    Question("", "How long is the Holm bridge?", (_ABSTENTION,), _BRIDGE),
    _EXAMPLES[1],
)


def samples(options: TaskOptions) -> list[Sample]:
    """Returns a sample for each question of the development set of SQuAD 1.1."""
    questions = squad_questions(options.settings, "squad/dev-v1.1.json", "squad/v1.1")
    for question in questions:
        if not question.answers:
            raise UserError(f"squad: question {question.id} has no answer; questions without are for the task squad_v2")
    return [_sample(question, options, _INSTRUCTION, _EXAMPLES) for question in questions]


def samples_v2(options: TaskOptions) -> list[Sample]:
    """Returns a sample for each question of the development set of SQuAD 2.0."""
    questions = squad_questions(options.settings, "squad_v2/dev-v2.0.json", "squad/v2.0")
    return [_sample(question, options, _INSTRUCTION + _ABSTAIN, _EXAMPLES_V2) for question in questions]


def _sample(
    question: Question,
    options: TaskOptions,
    instruction: str,
    examples: Sequence[Question],
) -> Sample:
    worked = [(_asked(example), example.answers[0]) for example in examples]
    return Sample(
        question.id,
        prompt_with_examples(instruction, worked, _asked(question), options.chat),
        short_answers(options),
        reference={"answers": list(question.answers)},
        held_out=(question.text,),
    )


def _asked(question: Question) -> str:
    return f"Passage: {question.passage}\nQuestion: {question.text}"


def score(pairs: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Scores responses as the official script of SQuAD 1.1 does: `em` and `f1`."""
    return [_score(response, sample.reference["answers"]) for sample, response in pairs]


def _score(response: Response, right: Sequence[str]) -> Score:
    if response.error:
        return Score({"em": False, "f1": 0.0})
    answer = short_answer(response.text)
    em, overlap = exact_match(answer, right, squad_normalized), f1(answer, right, squad_normalized)
    return Score({"em": em, "f1": overlap}, {"answer": answer})


def score_v2(pairs: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Scores responses as the official script of SQuAD 2.0 does, where the empty answer says that there is none.

    Besides `em` and `f1` there are `has_answer_em`, `has_answer_f1` and `no_answer_em` of the questions with and
    without answers (on those without, F1 equals EM).
    """
    return [_score_v2(response, sample.reference["answers"]) for sample, response in pairs]


def _score_v2(response: Response, answers: Sequence[str]) -> Score:
    answer = "" if response.error else short_answer(response.text)
    if _ABSTAINS.search(answer):
        answer = ""
    right = [gold for gold in answers if squad_normalized(gold)] or [""]
    if response.error:  # a prompt that could not be answered is no abstention
        em, overlap = False, 0.0
    else:
        em = exact_match(answer, right, squad_normalized)
        overlap = f1(answer, right, squad_normalized, empty_is_answer=True)
    part = {"has_answer_em": em, "has_answer_f1": overlap} if answers else {"no_answer_em": em}
    return Score({"em": em, "f1": overlap, **part}, {} if response.error else {"answer": answer})


SQUAD = Task("SQuAD 1.1", version=1, samples=samples, score=score, main="em", shown=("f1",))
SQUAD_V2 = Task(
    "SQuAD 2.0",
    version=1,
    samples=samples_v2,
    score=score_v2,
    main="em",
    shown=("f1", "has_answer_em", "has_answer_f1", "no_answer_em"),
)
