"""MT-Bench (Zheng et al., 2023, arXiv 2306.05685): 80 talks of two turns, each turn rated from 1 to 10 by a judge.

The responses are written as `model_answer/MODEL.jsonl`, which the official program judges. With a judge in the
settings, they are rated here as published: one response at a time, with the benchmark's own prompts and, for math,
reasoning and coding, its reference answers.
"""

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.evaluation.judging import Question, Verdict, ask_judge, check_judge
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.files import utf8, write_atomically
from isheep_jax.text.conversation import Message
from isheep_jax.text_files import read_objects

QUESTIONS = "mt_bench/question.jsonl"
REFERENCES = "mt_bench/reference_answer_gpt-4.jsonl"
PROMPTS = "mt_bench/judge_prompts.jsonl"
MAX_TOKENS = 1024
# Sampling temperatures, as published.
TEMPERATURES = {"writing": 0.7, "roleplay": 0.7, "stem": 0.1, "humanities": 0.1}
# Categories whose responses are compared with a reference.
WITH_REFERENCE = ("math", "reasoning", "coding")
TURNS = 2
LOWEST, HIGHEST = 1, 10
# What a local judge's probabilities are asked for: the form that the benchmark's prompts ask for.
CHOICES = tuple(f"Rating: [[{n}]]" for n in range(LOWEST, HIGHEST + 1))
_JUDGE_TOKENS = 2048
_DOUBLE, _SINGLE = re.compile(r"\[\[\s*(\d+(?:\.\d*)?)\s*\]\]"), re.compile(r"\[\s*(\d+(?:\.\d*)?)\s*\]")


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the 80 talks. Raises UserError for a model that holds no conversations."""
    if not options.chat:
        raise UserError(
            "mt_bench: its talks of two turns need a chat template; name one with --model.chat_template and let "
            "--evaluate.prompt_format be chat or auto"
        )
    return [_sample(row, options) for row in _rows(options.settings, QUESTIONS, ("question_id", "category", "turns"))]


def _sample(row: Mapping[str, Any], options: TaskOptions) -> Sample:
    first, second = row["turns"]
    category = row["category"]
    return Sample(
        id=str(row["question_id"]),
        prompt=(Message("user", first),),
        later_turns=(second,),
        sampling=SamplingParams(
            temperature=TEMPERATURES.get(category, 0.0), max_tokens=options.settings.max_tokens or MAX_TOKENS
        ),
        reference={"question_id": row["question_id"], "category": category},
        groups={"category": category},
        held_out=(first, second),
    )


def _rows(settings: EvaluateConfig, name: str, fields: Sequence[str]) -> list[dict[str, Any]]:
    """Returns the lines of a data file. Raises UserError where a field is missing."""
    path = task_file(settings, name)
    try:
        like = json.dumps(dict.fromkeys(fields, "..."))
        rows = [row for _, row in read_objects(path, "evaluate.task_data", like)]
        for row in rows:
            [row[field] for field in fields]
        return rows
    except (ValueError, LookupError, TypeError) as error:
        raise UserError(f"{path} is not MT-Bench's file ({error!r}): each line needs {', '.join(fields)}") from None


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Writes `model_answer/MODEL.jsonl` and returns, with a judge, the ratings of both turns of each response.

    A verdict that cannot be read is counted as "unparsed" and is in no mean but "rating_at_least", where it is a 1. A
    turn that could not be answered is a 1 without a question.
    """
    _write_answers(responses, scoring)
    if not scoring.settings.judge:
        return [Score({}) for _ in responses]
    material = _JudgePrompts.read(scoring.settings)
    asked = [(i, turn) for i, (_, response) in enumerate(responses) for turn in _answered_turns(response)]
    questions = [material.question(*responses[i], turn) for i, turn in asked]
    verdicts = ask_judge(questions, scoring, lambda _, verdict: rating(verdict) is not None)
    by_turn = dict(zip(asked, verdicts))
    return [_score([by_turn.get((i, turn)) for turn in range(TURNS)]) for i in range(len(responses))]


def _answered_turns(response: Response) -> list[int]:
    return [turn for turn, reason in enumerate(response.finish_reasons) if reason != "error"]


def _write_answers(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> None:
    """Writes the official answer file, one line per talk."""
    model, now = scoring.model_name, time.time()
    rows = [
        {
            "question_id": sample.reference["question_id"],
            "answer_id": hashlib.sha256(f"{model}/{sample.id}/{response.texts}".encode()).hexdigest()[:22],
            "model_id": model,
            "choices": [{"index": 0, "turns": [text.strip() for text in response.texts]}],
            "tstamp": now,
        }
        for sample, response in responses
    ]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(scoring.directory / "model_answer" / f"{model}.jsonl", utf8(text))


@dataclass(frozen=True)
class _JudgePrompts:
    """The benchmark's prompts for its judge, and reference answers: the turns by id of the question."""

    templates: Mapping[str, Mapping[str, str]]
    references: Mapping[int, Sequence[str]]

    @classmethod
    def read(cls, settings: EvaluateConfig) -> "_JudgePrompts":
        """Reads the published files. Raises UserError where they are missing or damaged."""
        prompts = _rows(settings, PROMPTS, ("name", "system_prompt", "prompt_template"))
        references = _rows(settings, REFERENCES, ("question_id", "choices"))
        return cls(
            {row["name"]: row for row in prompts},
            {row["question_id"]: row["choices"][0]["turns"] for row in references},
        )

    def question(self, sample: Sample, response: Response, turn: int) -> Question:
        """Returns the request to rate one turn; the second turn is shown after the first."""
        with_reference = sample.reference["category"] in WITH_REFERENCE
        name = f"single{'-math' if with_reference else ''}-v1{'-multi-turn' if turn else ''}"
        first, second = sample.prompt[-1].content, sample.later_turns[0]
        values = {"question": first, "question_1": first, "question_2": second, "answer": response.text}
        values |= {f"answer_{n}": text for n, text in enumerate(response.texts, start=1)}
        if with_reference:
            answers = self.references.get(sample.reference["question_id"])
            if not answers:
                raise UserError(f"{REFERENCES} has no answers to question {sample.id}; it should be the published file")
            values |= {f"ref_answer_{n}": text for n, text in enumerate(answers, start=1)}
        template = self.templates[name]
        messages = (
            Message("system", template["system_prompt"]),
            Message("user", template["prompt_template"].format(**values)),
        )
        return Question(messages, CHOICES, max_tokens=_JUDGE_TOKENS)


def rating(verdict: Verdict) -> float | None:
    """Returns the rating (1 to 10) in a verdict, None if there is none.

    A server's rating is the first number in double brackets, or else in single ones; a local judge's is the mean under
    its probabilities.
    """
    if verdict.logprobs:
        top = max(verdict.logprobs)
        weights = [math.exp(p - top) for p in verdict.logprobs]
        return sum(n * w for n, w in enumerate(weights, start=LOWEST)) / sum(weights)
    match = _DOUBLE.search(verdict.text) or _SINGLE.search(verdict.text)
    value = float(match.group(1)) if match else 0.0
    return value if LOWEST <= value <= HIGHEST else None


def _score(verdicts: Sequence[Verdict | None]) -> Score:
    """verdicts: by turn; None where there is no response."""
    ratings = [float(LOWEST) if verdict is None else rating(verdict) for verdict in verdicts]
    read = [value for value in ratings if value is not None]
    values = {f"turn_{n}": value for n, value in enumerate(ratings, start=1) if value is not None}
    return Score(
        {
            **({"rating": read} if read else {}),
            **values,
            "unparsed": [float(value is None) for value in ratings],
            "rating_at_least": [LOWEST if value is None else value for value in ratings],
        },
        {
            "ratings": ratings,
            "verdicts": ["no response" if v is None else v.error or v.text for v in verdicts],
        },
    )


def check(settings: EvaluateConfig) -> None:
    """Raises `UserError` for settings of the judge that do not go together, or where its prompts are missing."""
    check_judge(settings)
    if settings.judge:
        _check_prompts(settings)


def _check_prompts(settings: EvaluateConfig) -> None:
    prompts = _JudgePrompts.read(settings)
    wanted = {f"single{kind}-v1{turn}" for kind in ("", "-math") for turn in ("", "-multi-turn")}
    if missing := sorted(wanted - prompts.templates.keys()):
        raise UserError(f"{task_file(settings, PROMPTS)} has no prompt named {missing[0]}")


TASK = Task(
    title="MT-Bench",
    version=1,
    samples=samples,
    score=score,
    main="rating",
    shown=("turn_1", "turn_2", "unparsed"),
    measures="",
    scoring_settings=("judge", "judge_model"),
    check=check,
)
