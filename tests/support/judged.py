"""Tasks with a judge at small size: data files in the published form, a model to be judged and one that judges."""

import json
from pathlib import Path

from isheep_jax.decode.requests import ChoiceLogprobs, Completion

INSTRUCTIONS = ["Name a river.", "Praise the {moon}.", "Count to three."]
TALKS = {
    81: ("writing", "Write about {rain}.", "Now in one line.", None),
    111: ("math", "What is 2 + 3?", "And twice that?", ["It is 5.", "It is 10."]),
    150: ("stem", "Why is ice slippery?", "And glass?", None),
}


def write_data(directory: Path) -> Path:
    """Writes the files of both benchmarks as `evaluate.task_data` has them."""
    rows = [
        {"dataset": "koala" if n else "oasst", "instruction": text, "output": f"Reference {n}.", "generator": "other"}
        for n, text in enumerate(INSTRUCTIONS)
    ]
    _write(directory / "alpaca_eval" / "gpt4_1106_preview_outputs.json", json.dumps(rows))
    talks = [{"question_id": n, "category": c, "turns": [a, b]} for n, (c, a, b, _) in TALKS.items()]
    references = [
        {"question_id": n, "choices": [{"index": 0, "turns": answers}]} for n, (*_, answers) in TALKS.items() if answers
    ]
    prompts = [
        {"name": f"single{kind}-v1{turns}", "system_prompt": f"Judge{turns}{kind}.", "prompt_template": template}
        for kind, reference in (("", ""), ("-math", " right: {ref_answer_1}"))
        for turns, template in (
            ("", "one: {question}" + reference + " answer: {answer}"),
            ("-multi-turn", "two: {question_1} {question_2}" + reference + " answers: {answer_1} | {answer_2}"),
        )
    ]
    for name, lines in (("question", talks), ("reference_answer_gpt-4", references), ("judge_prompts", prompts)):
        _write(directory / "mt_bench" / f"{name}.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
    return directory


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


class Writer:
    """A model that answers with the id of the request; it cannot answer those in `too_long`."""

    def __init__(self, too_long=()):
        self.too_long, self.asked = too_long, []

    def generate(self, requests, sampling):
        for request in requests:
            self.asked.append((request, sampling))
            if request.id in self.too_long:
                yield Completion(request.id, "", finish_reason="error", error="too long")
            else:
                yield Completion(request.id, f"  answer to {request.id}\n")


class LocalJudge:
    """A judge whose log-probabilities of the choices `prefer(prompt, choices)` gives."""

    def __init__(self, prefer, has_template=True):
        self.prefer, self.has_template, self.prompts = prefer, has_template, []

    def choice_logprobs(self, requests, choices):
        for request in reversed(requests):
            if isinstance(request.prompt, tuple) and not self.has_template:
                yield ChoiceLogprobs(request.id, error="it has no chat template")
                continue
            self.prompts.append(request.prompt)
            yield ChoiceLogprobs(request.id, tuple(self.prefer(request.prompt, choices)))
