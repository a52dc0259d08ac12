"""Writes model cards: one for each iteration's model in the run, and one with the whole lineage for an export."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from isheep_jax.config import OWN_JUDGES, AssessConfig, Config, is_server
from isheep_jax.errors import quoted
from isheep_jax.loop.judging.judges import judging_iteration
from isheep_jax.loop.judging.readings import READINGS
from isheep_jax.loop.judging.scores import SINGLE
from isheep_jax.loop.prompting.methods import RESPOND_METHODS, SYNTHESIZE_METHODS
from isheep_jax.loop.selection.select import describe

_ORIGIN = """\
Made by isheep_jax, iterative self-alignment: a language model learned from its own instructions and responses, chosen
by its own scores. No person and no other model wrote or judged any of them, apart from the seed tasks."""
_ORIGIN_UNSCORED = """\
Made by isheep_jax, self-alignment: a language model learned from its own instructions and responses, which no score
chose. No person and no other model wrote any of them, apart from the seed tasks and the prompts."""
_ORIGIN_JUDGED = """\
Made by isheep_jax, iterative alignment: a language model learned from its own instructions and responses, chosen by the
scores of another model, {judge}. No person wrote or judged any of them, apart from the seed tasks."""
_LIMITS = """\
## Limits

The pairs can carry the base model's errors and biases on and strengthen them: the scores are the model's own. Nothing
was filtered for safety."""
_LIMITS_UNSCORED = """\
## Limits

The pairs can carry the base model's errors and biases on and strengthen them. Nothing was filtered for safety."""
_LIMITS_JUDGED = """\
## Limits

The pairs can carry on the errors and biases of the base model and of the judge. Nothing was filtered for safety."""


def model_card(
    config: Config,
    iteration: int,
    instructions: int,
    pairs: int,
    thorough: bool = False,
    check: Mapping[str, Any] | None = None,
) -> str:
    """Returns the README.md of an iteration's model. It depends on the arguments alone.

    Args:
        config: The run's settings.
        iteration: Number of the iteration.
        instructions: Number of instructions that passed the rules.
        pairs: Number of pairs that the model was trained on.
        thorough: Whether these are the thorough answers of the engraved model.
        check: Of the judge, as JSON values (`JudgeCheck.as_dict`).
    """
    respond, assess, sft = config.respond, config.assess, config.sft
    writer = "the base model" if iteration == 1 else f"the model of iteration {iteration - 1}"
    start = "the base model" if sft.start == "base" or iteration == 1 else writer
    selected = describe(config)
    data = " of all iterations so far" if sft.data == "all" and iteration > 1 else ""
    synthesize_method = SYNTHESIZE_METHODS[config.synthesize.method].describe(config)
    respond_method = RESPOND_METHODS[respond.method].describe(config)
    kept = f"{pairs} pairs{data}: {selected}"
    if sft.seeds != "none":
        kept = "the seed tasks alone" if sft.seeds == "alone" else f"{kept}; among them the seed tasks"
    if thorough:
        kept = f"{pairs} pairs{data}: thorough answers by a model that was fine-tuned on the responses ({selected})"
    turns = "; a second turn to those that are kept" if config.synthesize.turns == 2 else ""
    method = f"LoRA of rank {sft.lora_rank}, merged" if sft.method == "lora" else "all weights"
    external = _external(assess.judge, assess.judge_model, assess.readings)
    return f"""---
library_name: transformers
pipeline_tag: text-generation
---

# {config.name}, iteration {iteration}

{_origin(external, assess.readings)}

| | |
| --- | --- |
| base model | {config.model.path} |
| instructions | {instructions}, written by {writer}{synthesize_method}{turns} |
| responses | {respond.samples} per instruction, written by {writer}{respond_method} |
| scores | {_scores(config, iteration)} |
| kept | {kept} |
| fine-tuning | from {start}: {method}, {sft.epochs} epochs, learning rate {sft.learning_rate:g} |
| seed | {config.seed} |
{_judge_check(check)}
{_limits(external, assess.readings)}
"""


def _judge_check(check: Mapping[str, Any] | None) -> str:
    """Returns the section on the judge's check with an empty line before and after it; "" without a check."""
    if check is None:
        return ""
    order = check["readings"][check["chosen"]]
    rows = {"mean": order["auc"], **order["kinds"]}
    found = {kind: ", by rules" for kind in order["by_rule"]}
    lines = [
        f"| {name} | {e['value']:.2f} ({e['low']:.2f} to {e['high']:.2f}){found.get(name, '')} |"
        for name, e in rows.items()
    ]
    return f"""
## Check of the judge

The chance that the judge puts a good response above a damaged one, by {check["chosen"]}, with its interval of 95 %;
0.5 is a coin. The mean is over {", ".join(check["counted"])}. {check["tasks"]} tasks, {check["pairs"]} responses.

| damage | AUC |
| --- | --- |
{chr(10).join(lines)}
"""


def _scores(config: Config, iteration: int) -> str:
    assess = config.assess
    if not assess.readings:
        return "none"
    number = judging_iteration(assess.judge, iteration) if assess.judge in OWN_JUDGES else 0
    judge = _external(assess.judge, assess.judge_model, assess.readings) or (
        f"the model of iteration {number}" if number else "the base model"
    )
    what = "; ".join(_rubric(assess) if name == "rubric" else READINGS[name].describe for name in assess.readings)
    return f"{what}, by {judge}" + (f" ({assess.read})" if "rubric" in assess.readings else "")


def _rubric(assess: AssessConfig) -> str:
    criteria = {"both": "quality and following the instruction", "following": "following the instruction"}
    what = "one for all" if assess.prompt in SINGLE else criteria.get(assess.level, assess.level)
    return f"{what}, 1 to 10"


def _external(judge: str, judge_model: str, readings: Sequence[str]) -> str:
    """Returns the name of a judge that is not one of the run's own models; "" if there is none."""
    if judge in OWN_JUDGES or not readings:
        return ""
    return judge_model if is_server(judge) else judge


def _origin(external: str, readings: Sequence[str]) -> str:
    if not readings:
        return _ORIGIN_UNSCORED
    return _ORIGIN_JUDGED.format(judge=external) if external else _ORIGIN


def _limits(external: str, readings: Sequence[str]) -> str:
    if not readings:
        return _LIMITS_UNSCORED
    return _LIMITS_JUDGED if external else _LIMITS


@dataclass(frozen=True)
class Step:
    """Counts and evaluation of one iteration, for the lineage."""

    iteration: int
    instructions: int = 0
    """Instructions that passed the rules (count)."""
    responses: int = 0
    """Responses that passed the rules (count)."""
    pairs: int = 0
    """Pairs that it was trained on (count)."""
    evaluation: dict[str, dict[str, Any]] = field(default_factory=dict)
    """Measured {task: {"accuracy" or "loss", "stderr", "count"}}; empty if nothing was measured."""


def lineage_card(
    settings: dict[str, Any],
    digest: str,
    environment: dict[str, Any],
    steps: Sequence[Step],
    adapter: bool,
    check: Mapping[str, Any] | None = None,
) -> str:
    """Returns the README.md of an exported model, or of its adapter.

    Args:
        settings: The run's config.json.
        digest: Its sha256.
        environment: The run's environment.json.
        steps: The base model (iteration 0) and all iterations up to the exported one.
        adapter: Whether the adapter is exported.
        check: The last one of the judge, as JSON values (`JudgeCheck.as_dict`).
    """
    base, last = settings["model"]["path"], steps[-1]
    sft, name = settings["sft"], f"{settings['name']}, iteration {last.iteration}"
    previous = sft["start"] == "previous"
    chained = previous and last.iteration > 1
    start = f"the model of iteration {last.iteration - 1}" if chained else "the base model"
    if adapter:
        what = f"a LoRA adapter of rank {sft['lora_rank']} (alpha {sft['lora_alpha']:g}) for {start}"
    elif sft["method"] == "lora":
        what = f"a whole model: {start} with a LoRA of rank {sft['lora_rank']} merged"
    else:
        what = f"a whole model: {start} with all weights trained"
    packages = {"python": environment.get("python"), **environment.get("packages", {})}
    versions = ", ".join(f"{package} {quoted(version, 40)}" for package, version in packages.items() if version)
    trained = f"Training began from the {'model before, too' if previous else 'base model each time'}."
    if sft.get("data") == "all":
        trained += " It was on the kept pairs of all iterations so far."
    if settings.get("respond", {}).get("method") == "principles":
        trained += " Responses were written after rules of good answers, which were not trained on."
    if settings.get("clone", {}).get("enabled"):
        trained += " The kept pairs are thorough answers, written by a model that had been fine-tuned on the responses."
    assess = settings.get("assess", {})
    readings = assess.get("readings", ("rubric",))
    external = _external(assess.get("judge", "current"), assess.get("judge_model", ""), readings)
    rows = [f"| {s.iteration} | {s.instructions} | {s.responses} | {s.pairs} |" for s in steps[1:]]
    return f"""---
{_front_matter(base, adapter, chained)}
---

# {name}{", adapter" if adapter else ""}

{_origin(external, readings)}

| | |
| --- | --- |
| base model | {"tiny, which comes with isheep_jax" if base == "tiny" else base} |
| this is | {what} |
| seed | {settings["seed"]} |
| sha256 of config.json | {digest} |
| versions | {versions} |

## Lineage

Each iteration's instructions and responses were written by the model before it, the first iteration's by the base
model. {trained}
Counts are of what passed the rules; the kept pairs were trained on.

| iteration | instructions | responses | kept pairs |
| --- | --- | --- | --- |
{chr(10).join(rows)}

## Evaluation

{_evaluation(steps[0], last)}
{_judge_check(check)}
{_limits(external, readings)}
"""


def _front_matter(base: str, adapter: bool, chained: bool) -> str:
    lines = [f"library_name: {'peft' if adapter else 'transformers'}", "pipeline_tag: text-generation"]
    # The hub accepts as base_model only models on the hub, so no local directory and no iteration's model.
    if re.fullmatch(r"[\w.-]+/[\w.-]+(@.+)?", base) and not (adapter and chained):
        lines.append(f"base_model: {json.dumps(base.partition('@')[0])}")
        lines.append(f"base_model_relation: {'adapter' if adapter else 'finetune'}")
    tags = ["self-alignment", "synthetic-data", "jax", *(["lora"] if adapter else [])]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags)])


def _evaluation(base: Step, last: Step) -> str:
    measures = {**base.evaluation, **last.evaluation}
    names = [name for name, result in measures.items() if _measure(result)]
    if not names:
        return "The run measured neither the base model nor this one."

    def measured(step: Step, name: str) -> str:
        result = step.evaluation.get(name)
        if not result:
            return "not measured"
        return f"{result[_measure(result)]:.3f} ± {result['stderr']:.3f} of {result['count']} prompts"

    rows = [
        f"| {name} ({_measure(measures[name])}) | {measured(base, name)} | {measured(last, name)} |" for name in names
    ]
    return "\n".join(
        [
            "Accuracies, or losses in nats per token, with their standard errors.",
            "",
            f"| task | base model | iteration {last.iteration} |",
            "| --- | --- | --- |",
            *rows,
        ]
    )


def _measure(result: Mapping[str, Any]) -> str:
    """Returns which of its figures stands for a task's result; "" where none does."""
    return next((name for name in ("accuracy", "loss") if name in result), "")
