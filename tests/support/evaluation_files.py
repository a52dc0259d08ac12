"""Writes evaluated models by hand, like the runner, for tests of what reads them."""

import json
from pathlib import Path


def write_evaluation(
    directory: Path,
    scores: dict[str, list[dict]],
    task: str = "ifeval",
    responses: dict[str, str] | None = None,
    prompts: dict[str, str] | None = None,
    **result,
) -> Path:
    """Writes `evaluation.json` and the samples of a task, and returns the directory.

    scores: the values of each attempt, by sample.
    responses, prompts: texts by sample that differ from the usual ones.
    result: of the task in `evaluation.json`, in place of the usual.
    """
    attempts = [(sample, n, values) for sample, all_values in scores.items() for n, values in enumerate(all_values)]
    lines = [
        {
            "sample": sample,
            "attempt": n,
            "prompts": [(prompts or {}).get(sample, f"Question {sample}?")],
            "texts": [(responses or {}).get(sample, f"Answer {sample}.")],
            "finish_reasons": ["stop"],
            "error": "",
            "values": values,
            "details": {"n": n},
        }
        for sample, n, values in attempts
    ]
    samples = directory / "evaluation" / task / "samples.jsonl"
    samples.parent.mkdir(parents=True)
    samples.write_text("".join(json.dumps(line) + "\n" for line in lines))
    path = directory / "evaluation.json"
    results = json.loads(path.read_text()) if path.exists() else {}
    results[task] = {
        **{"count": len(scores), "of": len(scores), "title": task, "version": 1, "main": "prompt_strict"},
        **{"figures": {}, "groups": {}, "unfinished": 0.0, "unanswered": 0},
        **{"settings": {"prompt_format": "chat"}, "scoring": {}},
        **result,
    }
    path.write_text(json.dumps(results))
    return directory
