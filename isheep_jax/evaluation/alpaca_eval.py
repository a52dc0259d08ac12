"""AlpacaEval 2 (Dubois et al., 2024): how often a judge prefers the responses to those of GPT-4 Turbo.

The responses are written as `model_outputs.json`, which the official program judges. The figures here come from the
judge that the settings name, with a prompt of this project's own, so that they compare models with one another and not
with the official leaderboard.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

from isheep_jax.decode.requests import SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.evaluation.figures import Figure
from isheep_jax.evaluation.judging import Question, Verdict, ask_judge, check_judge
from isheep_jax.evaluation.length_control import length_controlled_win_rate
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.files import write_json
from isheep_jax.text.conversation import Message
from isheep_jax.text_files import read_objects

DATA = "alpaca_eval/gpt4_1106_preview_outputs.json"
_LIKE = '{"instruction": "...", "output": "...", "dataset": "..."}'
MAX_TOKENS = 2048
CHOICES = ("A", "B")
_PROMPT = """Two assistants, A and B, were given the same instruction. Which of their responses would the person who \
wrote the instruction rather have? A good response does what was asked, is true, is easy to follow and is as long as \
is useful, no longer. It does not matter which response comes first.

# Instruction
{instruction}

# Response of assistant A
{a}

# Response of assistant B
{b}

# Your choice
Answer with a single letter, A or B."""
# The letter alone, or with a word that names what it is and the beginning of a reason.
_LETTER = re.compile(
    r"\W*(?:(?:assistant|response|answer|choice|verdict)\b\W*(?:is\b\W*)?)*([AB])(?!\w)(?=\s*$|\s*[^\w\s]|\s*\n|\s+is\b)",
    re.IGNORECASE,
)
# Share of the probability that A and B must have for a token to be the choice.
_LEAST_MASS = 0.5


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the 805 instructions: a user's turn, or a text that ends where the response begins."""
    path = task_file(options.settings, DATA)
    try:
        rows = read_objects(path, "evaluate.task_data", _LIKE)
        return [_sample(index, row, options) for index, (_, row) in enumerate(rows)]
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not AlpacaEval's reference outputs ({error!r}): a list with instruction, output and dataset"
        ) from None


def _sample(index: int, row: dict[str, Any], options: TaskOptions) -> Sample:
    instruction = row["instruction"]
    text = f"Instruction:\n{instruction}\n\nResponse:\n"
    return Sample(
        id=str(index),
        prompt=(Message("user", instruction),) if options.chat else text,
        sampling=SamplingParams(
            temperature=0.0,
            max_tokens=options.settings.max_tokens or MAX_TOKENS,
            stop=() if options.chat else ("\nInstruction:",),
        ),
        reference={"instruction": instruction, "output": row["output"], "dataset": row["dataset"]},
        groups={"dataset": row["dataset"]},
        held_out=(instruction,),
    )


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Writes `model_outputs.json` and returns for each response its length and, with a judge, how far it is preferred.

    The judge sees each pair in both orders; the preference (0 to 1) is the mean of the two. A verdict that cannot be
    read counts as a draw, and is counted. A prompt that could not be answered has lost without a question.
    """
    outputs = [_output(sample, response, scoring.model_name) for sample, response in responses]
    write_json(scoring.directory / "model_outputs.json", outputs)
    if not scoring.settings.judge:
        return [Score(_length(response)) for _, response in responses]
    answered = [index for index, (_, response) in enumerate(responses) if not response.error]
    questions = [q for index in answered for q in _both_orders(*responses[index])]
    verdicts = ask_judge(questions, scoring, lambda _, verdict: probability_of_a(verdict) is not None)
    by_index = {index: verdicts[2 * n : 2 * n + 2] for n, index in enumerate(answered)}
    return [_score(response, by_index.get(index)) for index, (_, response) in enumerate(responses)]


def _output(sample: Sample, response: Response, generator: str) -> dict[str, str]:
    """Returns a row of the official file."""
    return {
        "dataset": sample.reference["dataset"],
        "instruction": sample.reference["instruction"],
        "output": response.text.strip(),
        "generator": generator,
    }


def _both_orders(sample: Sample, response: Response) -> list[Question]:
    """Returns the questions with the response as A, and as B."""
    own, other = response.text.strip(), sample.reference["output"]
    return [_question(sample.reference["instruction"], a, b) for a, b in ((own, other), (other, own))]


def _question(instruction: str, a: str, b: str) -> Question:
    text = _PROMPT.format(instruction=instruction, a=a, b=b)
    return Question((Message("user", text),), CHOICES, max_tokens=16, first_token=True)


def probability_of_a(verdict: Verdict) -> float | None:
    """Returns the probability (0 to 1) that a verdict gives to A, out of A and B; None if it says neither.

    From probabilities where the judge gives some, else 1 or 0 by the letter in its text.
    """
    if verdict.logprobs:
        return _softmax_first(*verdict.logprobs)
    for tokens in verdict.alternatives:
        a, b = (sum(math.exp(p) for t, p in tokens.items() if t.strip() == letter) for letter in CHOICES)
        if a + b >= _LEAST_MASS:
            return a / (a + b)
    match = _LETTER.match(verdict.text)
    return float(match.group(1).upper() == "A") if match else None


def _softmax_first(a: float, b: float) -> float:
    return 0.5 * (1 + math.tanh((a - b) / 2))


def _score(response: Response, verdicts: Sequence[Verdict] | None) -> Score:
    """verdicts: with the response as A, and as B; None where there is no response."""
    if verdicts is None:
        return Score({"win_rate": 0.0, **_length(response)}, {"error": response.error})
    as_a, as_b = (probability_of_a(verdict) for verdict in verdicts)
    preferences = [as_a, None if as_b is None else 1 - as_b]
    return Score(
        {
            "win_rate": sum(0.5 if p is None else p for p in preferences) / 2,
            "unparsed": [float(p is None) for p in preferences],
            **_length(response),
        },
        {"preferences": preferences, "verdicts": [verdict.error or verdict.text for verdict in verdicts]},
    )


def _length(response: Response) -> dict[str, float]:
    return {"length": float(len(response.text.strip()))}


def figures(results: Sequence[tuple[Sample, Response, Score]]) -> dict[str, Figure]:
    """Returns the length-controlled win rate, where there is a judge."""
    judged = [(sample, score.values) for sample, _, score in results if "win_rate" in score.values]
    if not judged:
        return {}
    return {
        "lc_win_rate": length_controlled_win_rate(
            [values["win_rate"] for _, values in judged],
            [values["length"] for _, values in judged],
            [len(sample.reference["output"]) for sample, _ in judged],
        )
    }


TASK = Task(
    title="AlpacaEval 2",
    version=1,
    samples=samples,
    score=score,
    main="win_rate",
    shown=("lc_win_rate", "length", "unparsed"),
    figures=figures,
    scoring_settings=("judge", "judge_model"),
    check=check_judge,
)
