"""Measures a model on a task of the harness, and turns its results into ours."""

import contextlib
import io
import json
import os
import random
from collections import defaultdict
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from typing import Any

import numpy as np
from etils import epath

from isheep_jax import distributed
from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.figures import Figure, mean_figure
from isheep_jax.evaluation.harness import PREFIX
from isheep_jax.evaluation.harness.definitions import data_digest, load_task
from isheep_jax.evaluation.runner import holds_conversations
from isheep_jax.evaluation.task import Response
from isheep_jax.files import utf8, write_atomically, write_with_digest
from isheep_jax.loop.protocols import ExampleAnswer, OpenProgress, TaskResult, TokenModel

# Resamplings for the standard error of figures that are not means; the harness takes 100 for slow ones.
_BOOTSTRAPS = 1000
_SLOW_BOOTSTRAPS = 100
# Seeds of the harness's own command, from which it draws worked examples.
_SEED, _OTHER_SEED = 0, 1234
_EXAMPLES = 3
# While the harness runs: no process is forked, which a process with JAX's threads may not survive.
_ENVIRONMENT = {"DISABLE_MULTIPROC": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class HarnessEvaluator:
    """Measures models on one task of the harness; an `Evaluator`.

    name: of the task, with the prefix.
    settings: of the evaluation. A limit takes the first documents of each task, as the harness's own does.
    decoding: what responses depend on besides weights and prompts, see `Backend.decoding`; may have "weights".
    """

    name: str
    settings: EvaluateConfig
    decoding: Mapping[str, Any]

    def is_current(self, result: TaskResult) -> bool:
        now = self._settings()
        return {name: result["settings"].get(name) for name in now} == now

    def check_data(self) -> None:
        with _undisturbed():
            load_task(self.name, self.settings.task_data)

    def __call__(
        self, model: TokenModel, directory: epath.Path, progress: OpenProgress, earlier: TaskResult | None = None
    ) -> TaskResult:
        from isheep_jax.evaluation.harness.language_model import HarnessModel

        weights = self.decoding.get("weights") or model.weights_digest()
        with _undisturbed() as log:
            loaded = load_task(self.name, self.settings.task_data)
            harness_model = HarnessModel(
                model,
                directory / "answers",
                task=self.name,
                facts={**self.decoding, "weights": weights},
                max_tokens=self.settings.max_tokens,
                progress=progress,
            )
            results = _evaluate(harness_model, loaded, self.settings, self._is_chat)
        settings = {**self._settings(), "weights": weights, "prompts": harness_model.digests}
        report = _Report(self.name.removeprefix(PREFIX), results, loaded, harness_model.cut_off)
        lines = "".join(json.dumps(_line(sample), ensure_ascii=False) + "\n" for sample in report.samples())
        write_with_digest(directory / "samples.jsonl", utf8(lines))
        write_atomically(directory / "harness.log", utf8(log.getvalue()))
        # One process's figures for all: bootstraps of another processor may differ in their last digits.
        return distributed.from_primary(lambda: _result(report, harness_model, settings))

    @property
    def _is_chat(self) -> bool:
        return holds_conversations(self.settings, self.decoding)

    def _settings(self) -> dict[str, Any]:
        """Returns what the answers depend on and can be said without loading the task."""
        data = data_digest(self.name, self.settings.task_data)
        distributed.check_agreement({f"the data of {self.name}": data})
        return {
            "task": self.name,
            "lm_eval": version("lm_eval"),
            "data": data,
            "prompt_format": "chat" if self._is_chat else "completion",
            "limit": self.settings.limit,
            "max_tokens": self.settings.max_tokens,
            **self.decoding,
        }


def held_out_texts(name: str, settings: EvaluateConfig) -> frozenset[str]:
    """Returns the texts by which the harness itself looks for a task's documents in training data."""
    with _undisturbed():
        tasks = load_task(name, settings.task_data)["tasks"].values()
        return frozenset(
            str(task.doc_to_decontamination_query(doc))
            for task in tasks
            if getattr(task, "should_decontaminate", bool)()
            for doc in task.eval_docs
        )


def _evaluate(model: Any, loaded: dict[str, Any], settings: EvaluateConfig, is_chat: bool) -> dict[str, Any]:
    """Returns the harness's results. It is called as its own command does, but asks git and torch for nothing."""
    from lm_eval.evaluator import evaluate

    for task in loaded["tasks"].values():
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
        task.set_fewshot_seed(seed=_OTHER_SEED)
    return evaluate(
        lm=model,
        task_dict=loaded,
        limit=settings.limit or None,
        bootstrap_iters=_BOOTSTRAPS,
        apply_chat_template=is_chat,
        fewshot_as_multiturn=is_chat,
    )


@contextlib.contextmanager
def _undisturbed() -> Iterator[io.StringIO]:
    """Yields a text that gets what the harness prints; leaves random numbers and environment as they were."""
    import datasets

    state, numpy_state = random.getstate(), np.random.get_state()
    environment = {name: os.environ.get(name) for name in _ENVIRONMENT}
    has_bars = datasets.is_progress_bar_enabled()
    log = io.StringIO()
    try:
        os.environ.update(_ENVIRONMENT)
        random.seed(_SEED)
        np.random.seed(_OTHER_SEED)
        datasets.disable_progress_bars()
        with contextlib.redirect_stdout(log), contextlib.redirect_stderr(log):
            yield log
    finally:
        if has_bars:
            datasets.enable_progress_bars()
        for name, value in environment.items():
            os.environ.pop(name)
            if value is not None:
                os.environ[name] = value
        random.setstate(state)
        np.random.set_state(numpy_state)


@dataclass(frozen=True)
class _Report:
    """What the harness returned.

    name: of the task or group. loaded: its parts, see `load_task`. cut_off: prompts and completions that were.
    """

    name: str
    results: Mapping[str, Any]
    loaded: Mapping[str, Any]
    cut_off: Container[tuple[str, str]]

    def figures(self, name: str) -> dict[str, Figure]:
        """Returns the figures of a task or group by the harness's names, "acc" for "acc,none"."""
        values = self.results["results"][name]
        keys = [key for key in values if "," in key and not key.partition(",")[0].endswith("_stderr")]
        return {_figure_name(key): self._figure(name, key, values) for key in keys if _is_number(values[key])}

    def _figure(self, name: str, key: str, values: Mapping[str, Any]) -> Figure:
        metric, _, filter_name = key.partition(",")
        stderr = values.get(f"{metric}_stderr,{filter_name}")
        task = self.loaded["tasks"].get(name)
        units = self._units(name, metric, filter_name) if task else []
        if not _is_number(stderr):
            stderr = _stderr(units, task.aggregation().get(metric, np.mean)) if task else 0.0
        count = sum(len(u) if _are_flags(u) else 1 for u in units) if task else int(values["sample_len"])
        return Figure(float(values[key]), float(stderr), count)

    def _units(self, name: str, metric: str, filter_name: str) -> list[Any]:
        """Returns the value of each document."""
        logged = self.results["samples"][name]
        return [s[metric] for s in logged if s["filter"] == filter_name and metric in s]

    def samples(self) -> Iterator[tuple[Response, dict[str, Any], dict[str, Any]]]:
        """Yields a response for each document, its values by figure, and details. Documents are in their order.

        The response to a choice is the most probable continuation.
        """
        for name, logged in self.results["samples"].items():
            by_document = defaultdict(list)
            for sample in logged:
                by_document[sample["doc_id"]].append(sample)
            for document in sorted(by_document):
                yield self._sample(name, document, by_document[document])

    def _sample(self, name: str, document: int, logged: Sequence[Mapping[str, Any]]) -> tuple:
        first, aggregation = logged[0], self.loaded["tasks"][name].aggregation()
        arguments = first["arguments"]
        values, others = {}, {}
        for sample in logged:
            for metric in sample["metrics"]:
                value, key = sample[metric], _figure_name(f"{metric},{sample['filter']}")
                is_mean = getattr(aggregation.get(metric), "__name__", "") in ("mean", "nanmean")
                (values if _are_flags(value) or (is_mean and _is_number(value)) else others)[key] = value
        answers = [answer for request in first["resps"] for answer in request]
        texts = tuple(answer for answer in answers if isinstance(answer, str))
        continuations = [a[1] for a in arguments if len(a) > 1 and isinstance(a[1], str)]
        if not texts and len(continuations) == len(answers):
            logprobs = [logprob for logprob, _ in answers]
            texts = (continuations[logprobs.index(max(logprobs))],)
        response = Response(
            sample=f"{name}/{document}",
            attempt=0,
            prompts=(str(arguments[0][0]),),
            texts=texts[:1] or ("",),
            finish_reasons=("length" if (arguments[0][0], *texts[:1]) in self.cut_off else "stop",),
        )
        details = {
            "target": first["target"],
            "answers": answers,
            "filtered": {sample["filter"]: sample["filtered_resps"] for sample in logged},
            **({"continuations": continuations} if continuations else {}),
            **({"other_values": others} if others else {}),
        }
        return response, values, details


def _result(report: _Report, model: Any, settings: Mapping[str, Any]) -> TaskResult:
    figures = report.figures(report.name)
    if not figures:
        raise UserError(f"{settings['task']} gave no figure; see harness.log in its directory")
    main = next(iter(figures))
    parts = [name for name in report.loaded["tasks"] if name != report.name]
    samples = list(report.samples())
    counts = [report.results["n-samples"][name] for name in report.loaded["tasks"]]
    shares = [values[main] for _, values, _ in samples if main in values]
    is_accuracy = len(shares) == len(samples) and all(value in (0, 1) for value in shares)
    return _as_json(
        {
            **({"accuracy": figures[main].value, "stderr": figures[main].stderr} if is_accuracy else {}),
            "count": sum(count["effective"] for count in counts),
            "of": sum(count["original"] for count in counts),
            "title": f"{report.name} (lm-evaluation-harness)",
            "version": _version(report.results["versions"].get(report.name)),
            "main": main,
            "figures": {name: figure.as_dict() for name, figure in figures.items()},
            "groups": {"task": {p: _main_of(report.figures(p), main).as_dict() for p in parts}} if parts else {},
            "unfinished": model.finish_reasons.count("length") / max(len(model.finish_reasons), 1),
            "unanswered": 0,
            "settings": dict(settings),
            "scoring": {},
            "examples": _examples(samples, main),
        }
    )


def _version(version: Any) -> int | float:
    """Returns the version of a task or group; 0 for a group without one."""
    return version if isinstance(version, int | float) else 0


def _main_of(figures: Mapping[str, Figure], main: str) -> Figure:
    """Returns the figure of a part of a group; where it has another one, its first."""
    return figures.get(main) or next(iter(figures.values()))


def _examples(samples: Sequence[tuple[Response, dict, dict]], main: str) -> list[ExampleAnswer]:
    """Returns the responses to a few documents, the same ones for every model."""
    step = max(len(samples) // _EXAMPLES, 1)
    return [
        {
            "instruction": response.prompts[0],
            "response": response.text,
            "correct": bool(values[main]) if values.get(main) in (0, 1) else None,
        }
        for response, values, _ in samples[::step][:_EXAMPLES]
    ]


def _line(sample: tuple[Response, dict, dict]) -> dict[str, Any]:
    """Returns a line of samples.jsonl, as the tasks of our own write it."""
    response, values, details = sample
    return _as_json(asdict(response) | {"values": values, "details": details})


def _figure_name(key: str) -> str:
    return key.removesuffix(",none")


def _stderr(units: Sequence[Any], aggregate: Callable[[Sequence[Any]], float]) -> float:
    """Returns the standard error of a figure of documents, for one that the harness has none for."""
    if len(units) < 2:
        return 0.0
    if all(_are_flags(unit) for unit in units):
        return mean_figure(units).stderr
    draw = random.Random(_SEED)
    return float(np.std([aggregate(draw.choices(units, k=len(units))) for _ in range(_SLOW_BOOTSTRAPS)], ddof=1))


def _are_flags(value: Any) -> bool:
    """Returns whether a document's value is several answers to "is it right?", such as one per instruction."""
    return isinstance(value, list | tuple) and all(isinstance(v, bool | np.bool_) for v in value) and len(value) > 0


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float | np.number | np.bool_) and bool(np.isfinite(value))


def _as_json(value: Any) -> Any:
    """Returns JSON values; arrays and numbers of numpy become plain ones, other things their text."""
    return json.loads(json.dumps(value, default=_plain))


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else str(value)
