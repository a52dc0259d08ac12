"""Compares two evaluated models sample by sample: differences with intervals, and the samples that changed.

A figure of both models is a mean over the same samples, so their difference is far more certain than the two standard
errors say. Intervals come from the bootstrap over samples: all attempts and instructions of a sample stay together.
"""

import math
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from isheep_jax.errors import UserError
from isheep_jax.evaluation.saved import Answer, Attempt, Evaluation
from isheep_jax.evaluation.task import Response

RESAMPLES = 4000
LEVEL = 0.95
# Elements of one block of resampled indices (about 32 MB).
BLOCK = 4_000_000

# Settings whose difference is the point, or told in another way: the samples that only one has, or with other prompts.
ASIDE = ("weights", "limit", "samples", "of", "prompts")


@dataclass(frozen=True)
class Difference:
    """The difference of a score between two models over the samples that both have it for.

    a, b: mean of each model over these samples. difference: b - a.
    low, high: 95 % interval of the difference (percentile bootstrap, clustered by sample).
    p: of the two-sided sign test on the samples that changed; for scores of 0 and 1 that is McNemar's exact test.
    better, worse: samples whose mean score is better or worse in b; of a loss, lower is better.
    samples: how many were compared.
    """

    a: float
    b: float
    difference: float
    low: float
    high: float
    p: float
    better: int
    worse: int
    samples: int


@dataclass(frozen=True)
class Change:
    """A sample whose main score differs.

    score_a, score_b: means of the attempts. gain: how much better b is; negative where it is worse. The rest is of the
    first attempt: response_a, response_b: all turns; details_a, details_b: what the scorer says.
    """

    sample: str
    prompt: str
    score_a: float
    score_b: float
    gain: float
    response_a: str
    response_b: str
    details_a: Mapping[str, Any]
    details_b: Mapping[str, Any]


@dataclass(frozen=True)
class TaskComparison:
    """Two models on one task.

    task, title: its name here and as published. main: the score by which samples count as changed.
    samples: how many both models have. only_a, only_b: how many only one of them has.
    notes: what differs between the two evaluations, a line each.
    differences: by name of the score.
    changed: those that got worse first, then those that got better; each in the task's order.
    """

    task: str
    title: str
    main: str
    samples: int
    only_a: int
    only_b: int
    notes: tuple[str, ...]
    differences: Mapping[str, Difference]
    changed: tuple[Change, ...]

    def as_dict(self) -> dict[str, Any]:
        """Returns the comparison as JSON values."""
        return asdict(self)


def compare(
    a: Evaluation,
    b: Evaluation,
    tasks: Sequence[str] = (),
) -> tuple[list[TaskComparison], list[str]]:
    """Returns the comparison of each task that both models have (of `tasks`, if any), and why others have none.

    Raises UserError where no task can be compared.
    """
    common = [task for task in a.results if task in b.results and (not tasks or task in tasks)]
    if not common:
        wanted = f" of {','.join(tasks)}" if tasks else ""
        has_a, has_b = (f"{model.name} has {','.join(model.results) or 'none'}" for model in (a, b))
        raise UserError(f"no task{wanted} was evaluated for both: {has_a}, {has_b}")
    comparisons, refused = [], []
    for task in common:
        try:
            comparisons.append(compare_task(a, b, task))
        except UserError as error:
            refused.append(f"{task} is not compared: {error}")
    if not comparisons:
        raise UserError("; ".join(refused))
    return comparisons, refused


def compare_task(a: Evaluation, b: Evaluation, task: str) -> TaskComparison:
    """Compares the samples that both models have for a task.

    Raises UserError where the task's version or scoring differs, where no sample or score is common, or for damaged
    files.
    """
    check_scoring(a, b, task)
    answers_a, answers_b = a.answers(task), b.answers(task)
    ids_a, ids_b = _samples(answers_a), _samples(answers_b)
    common = [sample for sample in ids_a if sample in ids_b]
    settings_a, settings_b = (evaluation.results[task].get("settings", {}) for evaluation in (a, b))
    notes, compared = setting_notes(settings_a, settings_b), common
    if settings_a.get("prompt_format") == settings_b.get("prompt_format"):
        compared = [sample for sample in common if _prompts(answers_a, sample) == _prompts(answers_b, sample)]
    if len(compared) < len(common):
        notes.append(f"left out because their prompts differ: {len(common) - len(compared)} of {len(common)} samples")
    units_a, units_b = _units(answers_a), _units(answers_b)
    sign = -1 if "loss" in a.results[task] else 1
    paired = {
        name: paired_difference(units_a[name], units_b[name], compared, sign) for name in units_a if name in units_b
    }
    differences = {name: difference for name, difference in paired.items() if difference}
    if not differences:
        raise UserError(f"{a.name} and {b.name} have no sample with the same prompt and a score in common")
    main = next((name for name in (a.results[task].get("main"),) if name in differences), next(iter(differences)))
    return TaskComparison(
        task,
        title=a.results[task].get("title", task),
        main=main,
        samples=len(compared),
        only_a=len(ids_a) - len(common),
        only_b=len(ids_b) - len(common),
        notes=tuple(notes),
        differences=differences,
        changed=_changes(units_a[main], units_b[main], compared, answers_a, answers_b, sign),
    )


def check_scoring(a: Evaluation, b: Evaluation, task: str) -> None:
    """Raises UserError where the two were evaluated with other versions of the task or scored with other settings."""
    result_a, result_b = a.results[task], b.results[task]
    version_a, version_b = result_a.get("version"), result_b.get("version")
    if version_a != version_b:
        raise UserError(
            f"{a.name} has version {version_a} of the task and {b.name} version {version_b}, "
            "whose prompts or scoring differ; evaluate the older one again"
        )
    differ = _different(result_a.get("scoring", {}), result_b.get("scoring", {}))
    if differ:
        raise UserError(
            f"{a.name} and {b.name} were scored differently ({'; '.join(differ.values())}); "
            "evaluate one again with the settings of the other: its responses are kept"
        )


def setting_notes(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Returns a line for what differs between the settings of two evaluations; none where nothing does."""
    differ = _different(_flat(a), _flat(b))
    if "prompts" in differ:
        differ.pop("references", None)
    told = [text for name, text in differ.items() if name not in ASIDE]
    return [f"evaluated with different settings: {'; '.join(told)}"] if told else []


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with the sampling parameters among them, if all samples have the same ones."""
    sampling = settings.get("sampling", ())
    if len(sampling) != 1:
        return dict(settings)
    return {name: value for name, value in settings.items() if name != "sampling"} | sampling[0]


def _different(a: Mapping[str, Any], b: Mapping[str, Any]) -> dict[str, str]:
    """Returns what differs, in words, by name."""
    names = [name for name in {**a, **b} if a.get(name) != b.get(name)]
    return {name: f"{name} {_short(a.get(name))} and {_short(b.get(name))}" for name in names}


def _short(value: Any, most: int = 40) -> str:
    text = str(value)
    if value in ("", None, []):
        return "none"
    if re.fullmatch("[0-9a-f]{64}", text):  # a digest
        return text[:8]
    return text if len(text) <= most else f"{text[: most - 3]}..."


def _samples(answers: Mapping[Attempt, Answer]) -> dict[str, None]:
    """Returns the ids in the order of the answers."""
    return dict.fromkeys(sample for sample, _ in answers)


def _prompts(answers: Mapping[Attempt, Answer], sample: str) -> tuple[str, ...]:
    return answers[sample, 0].response.prompts


def _units(answers: Mapping[Attempt, Answer]) -> dict[str, dict[str, list[float]]]:
    """Returns the values of each score by sample, of all attempts."""
    units: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for (sample, _), answer in answers.items():
        for name, value in answer.score.values.items():
            units[name][sample] += [float(v) for v in value] if isinstance(value, list | tuple) else [float(value)]
    return units


def paired_difference(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    samples: Iterable[str],
    sign: int = 1,
) -> Difference | None:
    """Returns the difference of two models' means over the samples for which both have values; None without any.

    Args:
        a: Values of each sample.
        b: Those of the other model.
        samples: The samples to compare.
        sign: 1 where a higher value is better, -1 where a lower one is.
    """
    samples = [sample for sample in samples if a.get(sample) and b.get(sample)]
    if not samples:
        return None
    # [samples, 2]: sum and count of the values.
    table_a, table_b = (np.array([[sum(model[s]), len(model[s])] for s in samples], np.float64) for model in (a, b))
    mean_a, mean_b = float(_mean(table_a.sum(0))), float(_mean(table_b.sum(0)))
    low, high = np.quantile(_resampled_differences(table_a, table_b), [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    gains = sign * (_mean(table_b) - _mean(table_a))
    better, worse = int((gains > 0).sum()), int((gains < 0).sum())
    return Difference(
        mean_a,
        mean_b,
        mean_b - mean_a,
        low=float(low),
        high=float(high),
        p=sign_test(better, worse),
        better=better,
        worse=worse,
        samples=len(samples),
    )


def _mean(sums: np.ndarray) -> np.ndarray:
    """Returns the means [...] of sums and counts [..., 2]; like the figures, of all values and not of samples."""
    return sums[..., 0] / sums[..., 1]


def _resampled_differences(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Returns b's mean minus a's in each of `RESAMPLES` draws of rows with replacement, the same at every call."""
    rng, n = np.random.default_rng(0), len(a)
    block = max(1, BLOCK // n)
    differences = []
    for start in range(0, RESAMPLES, block):
        draws = min(block, RESAMPLES - start)
        drawn = rng.integers(n, size=(draws, n)) + n * np.arange(draws)[:, None]
        times = np.bincount(drawn.ravel(), minlength=draws * n).reshape(draws, n).astype(np.float64)
        differences.append(_mean(times @ b) - _mean(times @ a))
    return np.concatenate(differences)


def sign_test(better: int, worse: int) -> float:
    """Returns the two-sided p-value of so many changes for the better and the worse if both were equally likely."""
    n, fewer = better + worse, min(better, worse)
    term, total = 1, 0
    for k in range(fewer + 1):
        total += term
        term = term * (n - k) // (k + 1)
    return min(1.0, 2 * total / 2**n)


def _changes(
    a: Mapping[str, Sequence[float]],
    b: Mapping[str, Sequence[float]],
    samples: Iterable[str],
    answers_a: Mapping[Attempt, Answer],
    answers_b: Mapping[Attempt, Answer],
    sign: int,
) -> tuple[Change, ...]:
    """Returns the samples whose main score changed, those that got worse first; sign: as for `paired_difference`."""
    changes = []
    for sample in samples:
        if not (a.get(sample) and b.get(sample)):
            continue
        score_a, score_b = math.fsum(a[sample]) / len(a[sample]), math.fsum(b[sample]) / len(b[sample])
        if score_a != score_b:
            first = answers_a[sample, 0], answers_b[sample, 0]
            prompt = "\n\n".join(first[1].response.prompts)
            texts, details = (_text(answer.response) for answer in first), (answer.score.details for answer in first)
            gain = sign * (score_b - score_a)
            changes.append(Change(sample, prompt, score_a, score_b, gain, *texts, *details))
    return tuple(sorted(changes, key=lambda change: change.gain > 0))


def _text(response: Response) -> str:
    return response.error or "\n\n".join(response.texts)
