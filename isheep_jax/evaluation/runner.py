"""Runs a task on a model: asks for every response, keeps them as they come, scores them, and sums up.

evaluation/TASK/settings.json   what the responses depend on; other settings are refused
evaluation/TASK/partial/        responses so far, while they are being made
evaluation/TASK/samples.jsonl   every response with its scores, in the order of the samples
"""

import contextlib
import dataclasses
import hashlib
import json
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax import distributed
from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import Completion, Request
from isheep_jax.errors import UserError
from isheep_jax.evaluation.figures import Figure, figures_of
from isheep_jax.evaluation.task import JudgeModel, Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.files import read_json_if_there, read_with_digest, utf8, write_json, write_with_digest
from isheep_jax.loop.context import by_request
from isheep_jax.loop.protocols import ExampleAnswer, Model, OpenProgress, TaskResult, TokenModel, is_fuller
from isheep_jax.loop.records import from_line
from isheep_jax.loop.stage_files import StageFiles
from isheep_jax.text.conversation import Message, Prompt

# Responses per part: what a kill can cost.
_PART = 32
_ANEW = "remove it to make it anew"
_EXAMPLES = 3  # of a task without groups
_LOGPROB_PLACES = 4  # above the noise of another device count


@dataclass(frozen=True)
class TaskEvaluator:
    """Measures models on one task; an `Evaluator`.

    name: key of the task.
    task: what to do.
    settings: of the evaluation.
    decoding: what responses depend on besides weights and prompts, for the record; "chat_template" is "" for a model
        that holds no conversations.
    judge: the model that `settings.judge` names, for tasks that need one.
    """

    name: str
    task: Task
    settings: EvaluateConfig
    decoding: Mapping[str, Any]
    judge: JudgeModel | None = None

    def check_data(self) -> None:
        self._all_samples()

    def is_current(self, result: TaskResult) -> bool:
        every = self._all_samples()
        settings = {"weights": result["settings"].get("weights"), **self._settings(every)}
        same = not _differences(result["settings"], settings) and result["scoring"] == self._scoring()
        return same and result["count"] == len(self._limited(every))

    def __call__(
        self, model: TokenModel, directory: epath.Path, progress: OpenProgress, earlier: TaskResult | None = None
    ) -> TaskResult:
        every = self._all_samples()
        weights = self.decoding.get("weights") or model.weights_digest()
        samples, settings = self._limited(every), {**self._settings(every), "weights": weights}
        distributed.check_agreement({f"the samples of {self.name}": settings["prompts"]})
        _check_same_settings(directory, settings)
        responses = self._respond(model, directory, samples, progress)
        pairs = [(s, responses[s.id, attempt]) for s in samples for attempt in range(s.attempts)]
        scoring = Scoring(self.settings, directory, progress, self.judge)
        scores = list(self.task.score(pairs, scoring))
        if len(scores) != len(pairs):
            raise RuntimeError(f"{self.name}: {len(scores)} scores for {len(pairs)} responses")
        result = self._result(pairs, scores, settings, len(every))
        if not is_fuller(earlier, result):
            self._write_samples(directory, every, responses, pairs, scores)
        return result

    def _all_samples(self) -> list[Sample]:
        return self.task.samples(TaskOptions(self.settings, self._is_chat))

    @property
    def _is_chat(self) -> bool:
        return holds_conversations(self.settings, self.decoding)

    def _limited(self, samples: Sequence[Sample]) -> list[Sample]:
        """Returns the samples that the limit leaves, in their order: always the same ones."""
        limit = self.settings.limit
        if not limit or limit >= len(samples):
            return list(samples)
        if self.task.random_order:
            return list(samples[:limit])
        drawn = set(sorted((s.id for s in samples), key=lambda id: hashlib.sha256(id.encode()).digest())[:limit])
        return [s for s in samples if s.id in drawn]

    def _settings(self, every: Sequence[Sample]) -> dict[str, Any]:
        """Returns what the responses depend on, as JSON values.

        The limit is not among them: a response depends on its own sample alone, so that those to fewer samples are kept
        when the limit rises.
        """
        sampling = {json.dumps(dataclasses.asdict(s.sampling), sort_keys=True) for s in every if s.given is None}
        return {
            "task": self.name,
            "version": self.task.version,
            "prompt_format": "chat" if self._is_chat else "completion",
            "attempts": max((s.attempts for s in every), default=0),
            "sampling": [json.loads(s) for s in sorted(sampling)],
            "prompts": _digest([[s.id, _as_json(s.prompt), s.later_turns] for s in every]),
            "references": _digest([[s.id, s.reference, *([] if s.given is None else [s.given])] for s in every]),
            **self.decoding,
        }

    def _scoring(self) -> dict[str, Any]:
        """Returns what the scores depend on besides the responses."""
        settings = {name: getattr(self.settings, name) for name in self.task.scoring_settings}
        if self.judge and "judge" in settings:
            settings["judge_weights"] = self.judge.digest
        return settings

    def _respond(
        self, model: Model, directory: epath.Path, samples: Sequence[Sample], progress: OpenProgress
    ) -> dict[tuple[str, int], Response]:
        """Returns all known responses by sample and attempt: those that are kept, and the others from the model."""
        files = StageFiles(directory / "partial", Response, "")
        parts = files.parts()
        kept = [*_kept_responses(directory / "samples.jsonl"), *(response for part in parts for response in part)]
        responses = {(r.sample, r.attempt): r for r in kept}
        wanted = [(s, a) for s in samples for a in range(s.attempts)]
        todo = [(s, a) for s, a in wanted if (s.id, a) not in responses]
        if not todo:
            return responses
        total = sum(1 + len(s.later_turns) for s, _ in wanted)
        with progress("", total, "responses") as bar:
            if len(todo) < len(wanted):
                bar.advance(total - sum(1 + len(s.later_turns) for s, _ in todo))
            waiting: list[Response] = []
            for response in self._ask(model, todo, bar.advance):
                waiting.append(response)
                responses[response.sample, response.attempt] = response
                if len(waiting) == _PART:
                    files.write_part(len(parts), waiting)
                    parts.append(waiting)
                    waiting = []
            if waiting:
                files.write_part(len(parts), waiting)
        return responses

    def _write_samples(
        self,
        directory: epath.Path,
        every: Sequence[Sample],
        responses: Mapping[tuple[str, int], Response],
        pairs: Sequence[tuple[Sample, Response]],
        scores: Sequence[Score],
    ) -> None:
        """Writes all known responses, in the order of the samples; those outside the limit have no scores."""
        by_key = {(response.sample, response.attempt): score for (_, response), score in zip(pairs, scores)}
        lines = []
        for key in ((s.id, a) for s in every for a in range(s.attempts)):
            if key in responses:
                score = by_key.get(key, Score({}))
                scored = {"values": dict(score.values), "details": dict(score.details)}
                lines.append(json.dumps(dataclasses.asdict(responses[key]) | scored, ensure_ascii=False) + "\n")
        write_with_digest(directory / "samples.jsonl", utf8("".join(lines)))
        if distributed.is_primary():
            # Another process may be writing there; what remains is read again, and says the same.
            with contextlib.suppress(OSError):
                (directory / "partial").rmtree(missing_ok=True)

    def _ask(
        self, model: Model, todo: Sequence[tuple[Sample, int]], advance: Callable[[int], None]
    ) -> Iterator[Response]:
        """Yields a response to each attempt as it is finished, turn after turn."""
        by_sampling = defaultdict(list)
        for sample, attempt in todo:
            if sample.given is None:
                by_sampling[sample.sampling].append((sample, attempt))
        if given := [(sample, attempt) for sample, attempt in todo if sample.given is not None]:
            for response in self._read(model, given):
                advance(1)
                yield response
        for sampling, group in by_sampling.items():
            talks = {f"evaluate/{self.name}/{s.id}/{a}": _Talk(s, a) for s, a in group}
            for turn in range(1 + max(len(sample.later_turns) for sample, _ in group)):
                requests = [Request(f"{id}/{turn}", talk.next_prompt()) for id, talk in talks.items() if not talk.ended]
                for completion in model.generate(requests, sampling):
                    talk = talks[completion.id.rpartition("/")[0]]
                    advance(talk.take(completion))
                    if talk.ended:
                        yield talk.response()

    def _read(self, model: Model, given: Sequence[tuple[Sample, int]]) -> Iterator[Response]:
        """Yields the given response to each attempt, with the probabilities that the model gives to its tokens."""
        requests = [Request(f"evaluate/{self.name}/{s.id}/{a}", s.prompt) for s, a in given]
        for index, read in by_request(requests, model.text_logprobs(requests, [s.given for s, _ in given])):
            sample, attempt = given[index]
            yield Response(
                sample=sample.id,
                attempt=attempt,
                prompts=(_last_message(sample.prompt),),
                texts=("" if read.error else sample.given,),
                finish_reasons=("error" if read.error else "given",),
                error=read.error,
                logprobs=tuple(round(x, _LOGPROB_PLACES) for x in read.logprobs),
            )

    def _result(
        self, pairs: Sequence[tuple[Sample, Response]], scores: Sequence[Score], settings: Mapping[str, Any], of: int
    ) -> TaskResult:
        task = self.task
        triples = [(sample, response, score) for (sample, response), score in zip(pairs, scores)]
        figures = figures_of((sample.id, score.values) for sample, _, score in triples)
        if task.figures:
            figures |= task.figures(triples)
        main = figures.get(task.main)
        finishes = [reason for _, response in pairs for reason in response.finish_reasons]
        headline = {task.measures: main.value, "stderr": main.stderr} if task.measures and main else {}
        return {
            **headline,
            "count": len({sample.id for sample, _ in pairs}),
            "of": of,
            "title": task.title,
            "version": task.version,
            "main": task.main,
            "figures": {name: figure.as_dict() for name, figure in figures.items()},
            "groups": _groups(triples, task.main),
            "unfinished": finishes.count("length") / max(len(finishes), 1),
            "unanswered": sum(bool(response.error) for _, response in pairs),
            "settings": dict(settings),
            "scoring": self._scoring(),
            "examples": _examples(triples, task.main),
        }


def holds_conversations(settings: EvaluateConfig, decoding: Mapping[str, Any]) -> bool:
    """Returns whether prompts are conversations. Raises `UserError` where the model has no template for them."""
    form = settings.prompt_format
    if form == "chat" and not decoding["chat_template"]:
        raise UserError("--evaluate.prompt_format: chat needs a chat template; name one with --model.chat_template")
    return form == "chat" or (form == "auto" and bool(decoding["chat_template"]))


class _Talk:
    """An attempt at a sample that is going on: what the user said and what the model answered."""

    def __init__(self, sample: Sample, attempt: int):
        self.sample, self.attempt = sample, attempt
        self.completions: list[Completion] = []

    @property
    def ended(self) -> bool:
        failed = self.completions and self.completions[-1].finish_reason == "error"
        return failed or len(self.completions) > len(self.sample.later_turns)

    def next_prompt(self) -> Prompt:
        prompt = self.sample.prompt
        for completion, turn in zip(self.completions, self.sample.later_turns):
            prompt = (*prompt, Message("assistant", completion.text.strip()), Message("user", turn))
        return prompt

    def take(self, completion: Completion) -> int:
        """Takes the completion of a turn; returns how many turns are finished with it."""
        self.completions.append(completion)
        turns = 1 + len(self.sample.later_turns)
        return turns - len(self.completions) + 1 if completion.finish_reason == "error" else 1

    def response(self) -> Response:
        sample, turns = self.sample, 1 + len(self.sample.later_turns)
        missing = turns - len(self.completions)
        is_text = isinstance(sample.prompt, str)
        texts = [c.text if is_text else c.text.strip() for c in self.completions]
        return Response(
            sample=sample.id,
            attempt=self.attempt,
            prompts=(_last_message(sample.prompt), *sample.later_turns),
            texts=(*texts, *[""] * missing),
            finish_reasons=(*(c.finish_reason for c in self.completions), *["error"] * missing),
            error=next((c.error for c in self.completions if c.error), ""),
        )


def _groups(
    triples: Sequence[tuple[Sample, Response, Score]], main: str
) -> dict[str, dict[str, dict[str, float | int]]]:
    scores: dict[str, dict[str, list]] = defaultdict(lambda: defaultdict(list))
    for sample, _, score in triples:
        for group, value in sample.groups.items():
            if main in score.values:
                scores[group][value].append((sample.id, {main: score.values[main]}))
    figures: dict[str, dict[str, Figure]] = {
        group: {value: figures_of(by_value[value])[main] for value in sorted(by_value)}
        for group, by_value in sorted(scores.items())
    }
    return {group: {v: figure.as_dict() for v, figure in by_value.items()} for group, by_value in figures.items()}


def _examples(triples: Sequence[tuple[Sample, Response, Score]], main: str) -> list[ExampleAnswer]:
    """Returns a few answers: to the first sample of each group, or to samples that are spread over all of them.

    They are the same samples for every model; those with a given response show nothing of it.
    """
    triples = [triple for triple in triples if triple[0].given is None]
    first: dict[str, tuple[Sample, Response, Score]] = {}
    for triple in triples:
        first.setdefault(next(iter(triple[0].groups.values()), ""), triple)
    step = max(len(triples) // _EXAMPLES, 1)
    shown = [first[value] for value in sorted(first)] if len(first) > 1 else triples[::step][:_EXAMPLES]
    return [
        {
            "instruction": response.prompts[0],
            "response": response.text,
            "correct": bool(score.values[main]) if isinstance(score.values.get(main), bool | int) else None,
        }
        for _, response, score in shown
    ]


def _check_same_settings(directory: epath.Path, settings: dict[str, Any]) -> None:
    """Writes the settings of the responses; raises `UserError` where there are responses with other ones."""
    path = directory / "settings.json"
    before = read_json_if_there(path)
    if before is None:
        if distributed.from_primary(lambda: any((directory / name).exists() for name in ("samples.jsonl", "partial"))):
            raise UserError(f"{directory} has responses, but {path.name} is missing, which says to what; remove them")
        write_json(path, settings)
        return
    if not isinstance(before, dict):
        raise UserError(f"{path} is damaged: it should be an object; remove {directory} to make it anew")
    if differ := _differences(before, settings):
        raise UserError(
            f"{directory} was evaluated with other settings: {'; '.join(differ)}; remove it, or name another directory "
            "with --output"
        )


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Returns a phrase for each setting that differs."""
    before, now = (_flat(json.loads(json.dumps(settings))) for settings in (before, now))
    return [
        f"{name} was {json.dumps(before.get(name))[:60]}, now {json.dumps(now.get(name))[:60]}"
        for name in sorted(before.keys() | now.keys())
        if before.get(name) != now.get(name)
    ]


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the settings with those of the sampling as their own: {"max_tokens": [40]}, one value per kind."""
    kinds = settings.get("sampling", [])
    sampling = {name: [kind.get(name) for kind in kinds] for name in (kinds[0] if kinds else {})}
    return {**{name: value for name, value in settings.items() if name != "sampling"}, **sampling}


def _kept_responses(path: epath.Path) -> list[Response]:
    """Reads the responses of `samples.jsonl`; none if it is not there. Raises `UserError` for a damaged one."""
    try:
        text = distributed.from_primary(lambda: read_with_digest(path, _ANEW).decode() if path.exists() else "")
        return [from_line(Response, line) for line in text.split("\n") if line]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{path} is damaged ({error!r}); {_ANEW}") from error


def _last_message(prompt: Prompt) -> str:
    """Returns the prompt as the user wrote it: the text, or the user's last message."""
    return prompt if isinstance(prompt, str) else prompt[-1].content


def _as_json(prompt: Prompt) -> Any:
    return prompt if isinstance(prompt, str) else [[m.role, m.content] for m in prompt]


def _digest(value: Any) -> str:
    return hashlib.sha256(utf8(json.dumps(value, sort_keys=True, ensure_ascii=False))).hexdigest()
