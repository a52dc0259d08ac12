"""I-SHEEP, Algorithm 1: an iteration from top to bottom, and the loop over iterations.

Every stage leaves its results in the run directory and is skipped when they are there, so the same call resumes.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from isheep_jax.config import OWN_JUDGES, Config
from isheep_jax.directory_lock import owned
from isheep_jax.files import write_json
from isheep_jax.loop import guards, made_models
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters.normalization import normalize
from isheep_jax.loop.filters.novelty import Pool, RestartingPool
from isheep_jax.loop.filters.verdicts import NOT_DECODED, UNFINISHED
from isheep_jax.loop.inputs import environment, read_inputs
from isheep_jax.loop.judging.agreement import measure_agreement, sample_candidates
from isheep_jax.loop.judging.judges import framing_of, own_model, second_judge
from isheep_jax.loop.judging.reader import Candidate
from isheep_jax.loop.judging.scores import median_mass
from isheep_jax.loop.models import DeferredModel, judge_of, writer_of
from isheep_jax.loop.prompting import similar
from isheep_jax.loop.prompting.methods import RESPOND_METHODS, SYNTHESIZE_METHODS
from isheep_jax.loop.prompting.ways import Yield
from isheep_jax.loop.prompting.zero_shot import is_bare, prompt_for
from isheep_jax.loop.protocols import Backend, Evaluator, Model, Reporter
from isheep_jax.loop.records import Instruction, Scores, Selected, kept
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.stages.assess import Asked, assess, candidates
from isheep_jax.loop.stages.clone import answer_thoroughly
from isheep_jax.loop.stages.evaluate import evaluate
from isheep_jax.loop.stages.fine_tune import fine_tune, write_whole_model
from isheep_jax.loop.stages.follow_up import first_turn, write_follow_ups
from isheep_jax.loop.stages.judge_check import judge_check, read_material
from isheep_jax.loop.stages.respond import respond
from isheep_jax.loop.stages.select import select_pairs
from isheep_jax.loop.stages.synthesize import synthesize
from isheep_jax.loop.summary import IterationSummary, best_iteration, has_stopped_improving, headline, mean
from isheep_jax.text.conversation import Conversation


def run(
    config: Config,
    backend: Backend,
    evaluators: Mapping[str, Evaluator],
    held_out: frozenset[str],
    reporter: Reporter,
) -> list[IterationSummary]:
    """Runs all iterations, or resumes after those that are there.

    Args:
        config: The settings of the run.
        backend: Gives models and makes new ones.
        evaluators: Measures of a model, by task.
        held_out: Instructions of evaluation sets, never to be learned from; seeds that repeat one are left out.
        reporter: Shows the user what happens.

    Returns a summary of the base model (iteration 0) and one of each iteration, which are also in `summary.json` of
    each; `best.json` names the best iteration so far. Raises UserError for bad input: before anything is written where
    it can be known before; and where another process is at work in the directory.
    """
    with owned("workdir", config.directory):
        return _run(config, backend, evaluators, held_out, reporter)


def _run(
    config: Config,
    backend: Backend,
    evaluators: Mapping[str, Evaluator],
    held_out: frozenset[str],
    reporter: Reporter,
) -> list[IterationSummary]:
    held_out = frozenset(normalize(text) for text in held_out)
    inputs = read_inputs(config, backend.judge, held_out)
    read_material(config, inputs)
    directory = RunDirectory.open(config, inputs.digests, environment(), backend.files())
    for warning in (*inputs.warnings, *directory.warnings):
        reporter.warn(warning)
    context = StageContext(
        config, inputs.templates, inputs.seeds, held_out, directory, reporter, iteration=0, meter=backend.meter
    )
    summaries: list[IterationSummary] = []
    for number in range(config.iterations + 1):
        context = dataclasses.replace(context, iteration=number)
        summaries.append((iterate if number else measure_base)(context, backend, evaluators))
        write_json(directory.iteration(number) / "summary.json", summaries[-1].as_dict())
        if best := best_iteration(summaries, config.stop):
            write_json(directory.path / "best.json", best)
        reporter.row(summaries[-1])
        if 0 < number < config.iterations and has_stopped_improving(summaries, config.stop):
            reporter.note(f"iteration {number} is the last: {config.stop.measure} has not improved (--stop.patience)")
            break
    last = summaries[-1].iteration
    # Nothing has read it where the run was finished before.
    if last:
        made_models.check(directory.model(last))
    for number in sorted({last, best["iteration"] if best else last} - {0}) if directory.made == "adapter" else ():
        write_whole_model(dataclasses.replace(context, iteration=number), backend)
    if best:
        reporter.note(f"best: iteration {best['iteration']}, {best['measure']} {best['value']:.3f}")
    return summaries


def measure_base(context: StageContext, backend: Backend, evaluators: Mapping[str, Evaluator]) -> IterationSummary:
    """Measures the base model like the others."""
    return IterationSummary(0, evaluation=headline(evaluate(context, backend, evaluators)))


def iterate(context: StageContext, backend: Backend, evaluators: Mapping[str, Evaluator]) -> IterationSummary:
    """Runs one iteration (number 1 and on): makes `model/` from the model before it."""
    config = context.config
    writer, judge = writer_of(context, backend), judge_of(context, backend, config.assess.judge)

    checked = judge_check(context, judge)
    neighbors = similar.embed_pool(context, writer, backend) if _needs_neighbors(context) else None
    sources = SYNTHESIZE_METHODS[config.synthesize.method].sources(context, writer, neighbors)
    instructions = synthesize(context, writer, novelty_pool(context), sources)
    new = kept(instructions)
    first = answer(context, writer, judge, new, neighbors=neighbors)
    agreement = compare_judges(context, backend, first) if config.assess.agreement else None

    second_turn = None
    if config.synthesize.turns == 2:
        follow_ups = kept(write_follow_ups(context.second_turn(), writer, kept(first.selected)))
        second = answer(context.second_turn(), writer, judge, follow_ups, after=kept(first.selected))
        second_turn = {"instructions": len(follow_ups), "kept": len(kept(second.selected))}

    engraved = thorough = None
    if config.clone.enabled:
        fine_tune(context, backend, len(new), stage="engraved")
        engraved = headline(evaluate(context, backend, evaluators, model="engraved"))
        cloned = DeferredModel(
            backend, context.directory.iteration(context.iteration) / "engraved" / context.directory.made
        )
        thorough = len(kept(answer_thoroughly(context, cloned, new)))

    training = fine_tune(context, backend, len(new))
    evaluation = evaluate(context, backend, evaluators)
    selected = kept(first.selected)
    return IterationSummary(
        iteration=context.iteration,
        instructions=len(new),
        kept=len(selected),
        mean_quality=mean(s.quality.value for s in first.scores if s.quality),
        mean_following=mean(s.following.value for s in first.scores if s.following),
        kept_quality=mean(s.quality for s in selected),
        kept_following=mean(s.following for s in selected),
        readings=_means(first.selected),
        kept_characters=mean(float(len(s.response)) for s in selected),
        ended=mean(float(s.verdict.reason != UNFINISHED) for s in first.selected if s.verdict.reason != NOT_DECODED),
        train_loss=training.get("train_loss"),
        validation_loss=training.get("validation_loss"),
        novelty=guards.novelty(instructions),
        per_thousand_tokens=Yield.of(instructions).per_thousand_tokens,
        score_mass=median_mass(first.scores),
        judge_check=checked and checked.as_dict(),
        evaluation=headline(evaluation),
        agreement=agreement,
        second_turn=second_turn,
        engraved=engraved,
        thorough=thorough,
    )


def _means(records: Sequence[Selected]) -> dict[str, dict[str, float]] | None:
    """Returns the mean of each reading over all pairs and over the kept ones; None where the scores say it all."""
    read = [record for record in records if record.readings]
    return {
        name: {"mean": mean(r.readings[name] for r in read), "kept": mean(r.readings[name] for r in kept(read))}
        for name in (read[0].readings if read else ())
    } or None


@dataclass(frozen=True)
class Answered:
    """The result of one turn. candidates, scores: pairs that the text rules kept. selected: all, with last verdicts."""

    candidates: list[Candidate]
    scores: list[Scores]
    selected: list[Selected]


def answer(
    context: StageContext,
    writer: Model,
    judge: Model,
    instructions: Sequence[Instruction],
    *,
    after: Sequence[Selected] = (),
    neighbors: similar.Neighbors | None = None,
) -> Answered:
    """Answers the (kept) instructions of one turn, scores the answers and selects among them.

    after: in the second turn, the pairs that the instructions follow.
    neighbors: the pairs that prompts show by similarity, if they do.
    """
    by_id = {pair.id: pair for pair in after}
    history = {x.id: first_turn(by_id[x.seeds[0]]) if after else () for x in instructions}
    bare = is_bare(context)
    prompts = {x.id: prompt_for(x.instruction, x.input, bare=bare, history=history[x.id]) for x in instructions}
    method = RESPOND_METHODS[context.config.respond.method]
    pairs = respond(context, writer, instructions, method.prompts(context, writer, instructions, prompts, neighbors))
    name = context.config.assess.judge
    # The judge sees what was answered, unless it is to be asked in a user's turn, or is another model without turns.
    text = framing_of(context.config, name, context.iteration) == "text"
    bare = text and (bare or name not in OWN_JUDGES)
    read = candidates(pairs, {x.id: _asked(x, history[x.id], bare=bare) for x in instructions})
    scores = assess(context, judge, name, read)
    return Answered(read, scores, select_pairs(context, judge, pairs, scores))


def _asked(instruction: Instruction, history: Conversation, *, bare: bool) -> Asked:
    texts = {"prompt": (instruction.instruction, instruction.input), "empty": ("", "")}
    return Asked(
        **{name: prompt_for(*text, bare=bare, history=history) for name, text in texts.items()}, history=history
    )


def compare_judges(context: StageContext, backend: Backend, first: Answered) -> dict | None:
    """Returns how far the judge and a second one agree on some of the pairs; None where they are the same model."""
    config = context.config
    names = config.assess.judge, second_judge(config)
    own = [own_model(context.directory, name, context.iteration) for name in names if name in OWN_JUDGES]
    if len(own) == 2 and own[0] == own[1]:
        return None
    sample = sample_candidates(config, context.iteration, first.candidates)
    second = assess(context, judge_of(context, backend, names[1]), names[1], sample, stage="agreement")
    return measure_agreement(config, sample, first.scores, second)


def novelty_pool(context: StageContext) -> Pool | RestartingPool:
    """Returns the seeds, and what earlier iterations kept as far as `synthesize.novelty_scope` counts it."""
    settings = context.config.synthesize

    def seeds() -> Pool:
        pool = Pool(settings.novelty)
        for seed in context.seeds:
            pool.add(seed.id, seed.instruction, seed.input)
        return pool

    if settings.novelty_scope == "hundred":
        return RestartingPool(seeds, every=100)
    pool = seeds()
    for earlier in range(1, context.iteration) if settings.novelty_scope == "run" else ():
        for record in kept(context.files("instructions", earlier).records()):
            pool.add(record.id, record.instruction, record.input)
    return pool


def _needs_neighbors(context: StageContext) -> bool:
    return similar.is_used(context.config) and not context.is_done("responses")
