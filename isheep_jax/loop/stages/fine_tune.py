"""Supervised fine-tuning on what an iteration selected: what the new model learns from, and the stage that makes it."""

import time

from etils import epath

from isheep_jax import distributed
from isheep_jax.loop import made_models
from isheep_jax.loop.card import model_card
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.prompting.zero_shot import prompt_for
from isheep_jax.loop.protocols import Backend, FineTuneJob
from isheep_jax.loop.records import kept
from isheep_jax.loop.stages.follow_up import first_turn
from isheep_jax.loop.stages.judge_check import last_check
from isheep_jax.loop.stages.table import STAGES
from isheep_jax.sft.examples import Example


def training_examples(context: StageContext, *, thorough: bool = False) -> list[Example]:
    """Returns what the iteration learns from: single turns, and second turns with the first turn as their context.

    thorough: learn from the thorough answers of the engraved model instead.
    """
    sft, examples = context.config.sft, []
    if sft.seeds != "none":
        examples += [Example(s.id, prompt_for(s.instruction, s.input), s.output) for s in context.seeds]
    if sft.seeds == "alone":
        return examples
    for number in range(1 if sft.data == "all" else context.iteration, context.iteration + 1):
        if thorough:
            pairs = kept(context.files("thorough", number).records())
        else:
            pairs = kept(context.files("selected", number).records())
        examples += [Example(p.id, prompt_for(p.instruction, p.input), p.response) for p in pairs]
        if context.config.synthesize.turns == 2:
            history = {f"{p.id}.2": first_turn(p) for p in pairs}
            for p in kept(context.second_turn().files("selected", number).records()):
                prompt = prompt_for(p.instruction, p.input, history=history[p.instruction_id])
                examples.append(Example(p.id, prompt, p.response))
    return examples


def write_whole_model(context: StageContext, backend: Backend) -> None:
    """Writes `model/` of an iteration that has only an adapter so far; see `sft.save`.

    Raises UserError when the model, or the adapter that it is made of, has been damaged.
    """
    directory = context.directory.iteration(context.iteration)
    if distributed.from_primary(lambda: made_models.has_model(directory)):
        return made_models.check(directory / "model")
    adapter = context.directory.model(context.iteration)
    made_models.check(adapter)
    context.reporter.note(
        f"iteration {context.iteration}: {adapter} and its base are merged into {directory / 'model'}"
    )
    # An earlier attempt may have ended before the manifest.
    distributed.from_primary(lambda: (directory / "model").rmtree(missing_ok=True))
    card = distributed.from_primary(lambda: _read_card(adapter / "README.md"))
    backend.write_model(adapter, directory / "model", card)
    made_models.record(directory, made_models.read(directory))


def _read_card(path: epath.Path) -> str | None:
    """Returns a card as it is by now: people may have written in it, in any encoding, or removed it."""
    return path.read_bytes().decode("utf-8", "replace") if path.exists() else None


def fine_tune(context: StageContext, backend: Backend, instructions: int, *, stage: str = "model") -> dict:
    """Makes the iteration's model. Returns what the backend says of the training.

    The model is in `model/` of the stage's directory, and what LoRA added in `adapter/`, when `fine_tune.json` is
    there.

    instructions: how many were kept, for the model card.
    stage: "model", or "engraved" for the model that verbose cloning learns from, which has a directory of its own.
    """
    iteration, number = context.directory.iteration(context.iteration), context.iteration
    directory = iteration if stage == "model" else iteration / STAGES[stage].directory
    thorough = context.config.clone.enabled and stage == "model"
    if finished := made_models.read(directory):
        return finished["metrics"]
    begun, speed = time.monotonic(), context.meter()
    examples = training_examples(context, thorough=thorough)
    check = last_check(context)
    job = FineTuneJob(
        iteration=number,
        start=context.directory.model(number - 1) if context.config.sft.start == "previous" else None,
        examples=examples,
        directory=directory,
        card=model_card(context.config, number, instructions, len(examples), thorough, check and check.as_dict()),
    )
    if job.start is not None:
        made_models.check(job.start)
    # An earlier attempt may have left a model and ended before its manifest.
    distributed.from_primary(lambda: job.model.rmtree(missing_ok=True))
    with context.reporter.stage(number, STAGES[stage].title, None, STAGES[stage].unit) as progress:
        metrics = backend.fine_tune(job, progress)
    warmup, steps = context.config.sft.warmup_steps, metrics.get("steps")
    if steps is not None and warmup >= steps:
        context.reporter.warn(
            f"iteration {number}: sft.warmup_steps={warmup}, but the fine-tuning has only {steps} updates: the "
            "learning rate rises until the end and never falls; lower sft.warmup_steps, or keep more pairs"
        )
    if left_out := metrics.get("left_out_examples"):
        context.reporter.warn(
            f"iteration {number}: {left_out} of {len(examples)} pairs were not trained on: nothing of the response "
            "fits into sft.sequence_length, or the chat template does not write the pair as it is"
        )
    seconds = round(time.monotonic() - begun, 3)
    digest = context.directory.digest(STAGES[stage].level)
    made_models.record(directory, {"metrics": metrics, "config": digest, "seconds": seconds, "speed": speed()})
    return metrics
