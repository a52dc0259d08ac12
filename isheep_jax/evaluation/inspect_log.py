"""Writes evaluations as logs of inspect_ai, so that its viewer shows their samples: `inspect view --log-dir DIR`."""

import datetime
import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.evaluation.saved import Answer, Evaluation
from isheep_jax.evaluation.task import Response

if TYPE_CHECKING:
    from inspect_ai.log import EvalLog, EvalResults, EvalSample, EvalSpec
    from inspect_ai.model import ChatMessage, ModelOutput
    from inspect_ai.scorer import Score

_STOP_REASONS = {"stop": "stop", "length": "max_tokens"}
# Sampling parameters by their names in inspect_ai.
_GENERATE_CONFIG = {
    "temperature": "temperature",
    "top_p": "top_p",
    "top_k": "top_k",
    "max_tokens": "max_tokens",
    "stop": "stop_seqs",
    "presence_penalty": "presence_penalty",
}


def write_inspect_logs(evaluation: Evaluation, tasks: Iterable[str], directory: epath.PathLike) -> list[epath.Path]:
    """Writes one log per task of an evaluation into the directory, and returns their paths.

    A log's name follows from the evaluation: writing it again replaces it. Raises UserError where inspect_ai is not
    installed or the evaluation's files are damaged.
    """
    write_eval_log = inspect_ai_package().log.write_eval_log
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    paths = []
    for task in tasks:
        log = inspect_log(evaluation, task)
        created = log.eval.created.replace(":", "-")
        # Its readers take a name apart at underscores.
        path = directory / f"{created}_{re.sub('[^A-Za-z0-9.]', '-', task)}_{log.eval.eval_id}.eval"
        write_eval_log(log, str(path), format="eval")
        paths.append(path)
    return paths


def inspect_log(evaluation: Evaluation, task: str) -> "EvalLog":
    """Returns a task of an evaluation as a log."""
    log = inspect_ai_package().log
    result, answers = evaluation.results[task], evaluation.answers(task)
    written = (evaluation.directory / "evaluation.json").stat().mtime
    created = datetime.datetime.fromtimestamp(written, datetime.UTC).isoformat(timespec="seconds")
    scores = {name: None for answer in answers.values() for name in answer.score.values}
    # The viewer shows the first score in its list of samples.
    names = sorted(scores, key=lambda name: name != result["main"])
    return log.EvalLog(
        status="success",
        eval=_spec(evaluation, task, created, list(dict.fromkeys(sample for sample, _ in answers))),
        results=_results(result, answers),
        stats=log.EvalStats(started_at=created, completed_at=created),
        samples=[_sample(evaluation.name, answer, names) for answer in answers.values()],
    )


def inspect_ai_package() -> Any:
    """Imports inspect_ai. Raises UserError where that is not installed."""
    try:
        import inspect_ai.log
        import inspect_ai.model
        import inspect_ai.scorer
    except ImportError as error:
        raise UserError('--inspect_log needs the package inspect_ai: pip install "isheep_jax[inspect]"') from error
    return inspect_ai


def _spec(evaluation: Evaluation, task: str, created: str, samples: Sequence[str]) -> "EvalSpec":
    """Returns what was evaluated: task, model, data set, decoding."""
    inspect_ai = inspect_ai_package()
    log, result = inspect_ai.log, evaluation.results[task]
    settings = result["settings"]
    return log.EvalSpec(
        eval_id=_id(evaluation.name, task),
        run_id=_id(evaluation.name),
        created=created,
        task=task,
        task_id=_id(task),
        task_version=str(result["version"]),
        task_display_name=result["title"],
        dataset=log.EvalDataset(name=result["title"], samples=result["of"], sample_ids=list(samples), shuffled=False),
        model=evaluation.name,
        model_generate_config=inspect_ai.model.GenerateConfig(**_generate_config(settings.get("sampling", []))),
        config=log.EvalConfig(
            limit=result["count"] if result["count"] < result["of"] else None, epochs=settings.get("attempts")
        ),
        metadata={"settings": settings, "scoring": result.get("scoring", {})},
    )


def _id(*names: str) -> str:
    return hashlib.sha256("\n".join(names).encode()).hexdigest()[:22]


def _generate_config(samplings: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the sampling parameters; none if the samples have several."""
    if len(samplings) != 1:
        return {}
    sampling = samplings[0]
    # A temperature of 0 is greedy; other zeros switch a parameter off.
    used = {ours: sampling[ours] for ours in _GENERATE_CONFIG if sampling.get(ours) or ours == "temperature"}
    return {_GENERATE_CONFIG[ours]: value for ours, value in used.items()}


def _results(result: Mapping[str, Any], answers: Mapping[Any, Answer]) -> "EvalResults":
    log = inspect_ai_package().log
    figures = sorted(result["figures"].items(), key=lambda item: item[0] != result["main"])
    answered = sum(not answer.response.error for answer in answers.values())
    return log.EvalResults(
        total_samples=len(answers),
        completed_samples=answered,
        scores=[
            log.EvalScore(
                name=name,
                scorer=name,
                scored_samples=figure["count"],
                metrics={key: log.EvalMetric(name=key, value=figure[value]) for key, value in _METRICS.items()},
            )
            for name, figure in figures
        ],
    )


# Metrics of inspect_ai, and where figures have them.
_METRICS = {"mean": "value", "stderr": "stderr"}


def _sample(model: str, answer: Answer, names: Sequence[str]) -> "EvalSample":
    log, response = inspect_ai_package().log, answer.response
    error = log.EvalError(message=response.error, traceback="", traceback_ansi="") if response.error else None
    return log.EvalSample(
        id=response.sample,
        epoch=response.attempt + 1,
        input=response.prompts[0],
        # Right answers stay with the task's data.
        target="",
        messages=_messages(model, response),
        output=_output(model, response),
        scores={name: _score(answer, name) for name in names if name in answer.score.values},
        metadata=dict(answer.score.details),
        error=error,
    )


def _messages(model: str, response: Response) -> "list[ChatMessage]":
    classes = inspect_ai_package().model
    messages: list[ChatMessage] = []
    for prompt, text in zip(response.prompts, response.texts, strict=True):
        messages.append(classes.ChatMessageUser(content=prompt, source="input"))
        messages.append(classes.ChatMessageAssistant(content=text, model=model, source="generate"))
    return messages


def _output(model: str, response: Response) -> "ModelOutput":
    classes = inspect_ai_package().model
    reason = _STOP_REASONS.get(response.finish_reasons[-1], "unknown")
    message = classes.ChatMessageAssistant(content=response.texts[-1], model=model, source="generate")
    return classes.ModelOutput(
        model=model,
        choices=[classes.ChatCompletionChoice(message=message, stop_reason=reason)],
        error=response.error or None,
    )


def _score(answer: Answer, name: str) -> "Score":
    value = answer.score.values[name]
    return inspect_ai_package().scorer.Score(
        value=value if isinstance(value, float) else list(value), answer=answer.response.texts[-1]
    )
