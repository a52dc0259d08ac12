"""The command that measures models on benchmarks (a checkpoint, or the models of a run), and compares what it measured.

python -m isheep_jax.evaluate --model runs/tiny --all_iterations --tasks tiny
python -m isheep_jax.evaluate --compare runs/tiny/iteration_0 runs/tiny/iteration_2
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Literal

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.errors import report_error, run_command, without_sections
from isheep_jax.cli.output import show
from isheep_jax.cli.settings import WITHOUT_PREFIX
from isheep_jax.config import ChatTemplate, DecodeConfig, EvaluateConfig
from isheep_jax.config_checks import RANGES
from isheep_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath

    from isheep_jax.cli.console import Console
    from isheep_jax.loop.protocols import OpenProgress


@dataclass(frozen=True)
class EvaluateOptions:
    """Options of the command."""

    model: str = ""
    """Model directory in Hugging Face format (local or gs://), a run's directory (its newest model), a hub id (org/name
    or org/name@revision), or 'tiny' (the embedded base)."""
    iteration: int = -1
    """Iteration of a run to measure (0: the base model). -1: the newest that is finished."""
    all_iterations: bool = False
    """Measure the base model and every finished iteration of a run."""
    output: str = ""
    """Directory for the results, evaluation.json and evaluation/. Empty: those of a run go to its iterations, those of
    another model to evaluations/NAME. With --compare it gets comparison.json, which has every sample that changed."""
    compare: tuple[str, ...] = ()
    """Two evaluated models to compare, instead of measuring any: directories with an evaluation.json, such as
    runs/NAME/iteration_2, or runs (their newest iteration that is evaluated). --tasks chooses among the tasks that both
    have."""
    inspect_log: str = ""
    """Directory for logs in the format of inspect_ai (extra 'inspect'), one per model and task: `inspect view
    --log-dir DIRECTORY` shows every sample. Empty: none are written."""
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig, metadata=WITHOUT_PREFIX)
    chat_template: ChatTemplate = "auto"
    """Chat template. 'auto': the tokenizer's own, or the run's."""
    compute_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """dtype of weights and activations. 'auto': the run's, or float32 on CPUs and bfloat16 elsewhere."""
    seed: int = 0
    """Seed of the random numbers of sampled responses. 0: the run's."""
    decode: DecodeConfig = field(default_factory=DecodeConfig, metadata=WITHOUT_PREFIX)
    decode_tensor: int = 1
    """Shards of heads and feed-forward units (count); the other devices hold replicas of the weights."""


# Sections of the settings of a run that have no prefix here.
_SECTIONS = ("evaluate", "decode", "mesh", "model")

COMMAND = Command(
    module="isheep_jax.evaluate",
    options=EvaluateOptions,
    usage=(
        "--model DIRECTORY --tasks ifeval,triviaqa [--limit N]",
        "--model RUN --all_iterations --tasks ifeval",
        "--compare DIRECTORY DIRECTORY [--tasks ifeval]",
    ),
    about="Measures models on benchmarks, keeps every sample, and prints a table. The same command again goes on.",
    example="--model runs/tiny --tasks tiny",
    everyday=(
        "model",
        "iteration",
        "all_iterations",
        "tasks",
        "limit",
        "output",
        "task_data",
        "allow_code_execution",
        "judge",
        "judge_model",
        "max_tokens",
        "compare",
    ),
    ranges={
        "iteration": "[-1, inf)",
        **{name: RANGES[f"evaluate.{name}"] for name in ("limit", "max_tokens", "attempts", "judge_requests")},
        "slots": RANGES["decode.slots"],
        "max_length": RANGES["decode.max_length"],
    },
)


def main(arguments: Sequence[str]) -> None:
    """Measures the chosen models on the chosen tasks. Raises `UserError` for bad input, before a model is loaded."""
    options = COMMAND.parse(arguments)
    if options.compare:
        _compare(options)
        return
    if not options.model:
        raise UserError(f"--model is missing; for example: python -m {COMMAND.module} {COMMAND.example}")
    if not options.evaluate.tasks:
        from isheep_jax.evaluation.tasks import TASKS

        raise UserError(f"--tasks is missing: name some of {', '.join(TASKS)}, or lm_eval:NAME")
    if options.all_iterations and options.iteration != -1:
        raise UserError("--iteration: it names one iteration; leave it or --all_iterations out")

    # Imported here so that --help and misspelled settings answer at once: these bring in jax.
    from isheep_jax import distributed

    with distributed.distributed_session(lambda error: report_error(error, COMMAND.module, arguments)):
        try:
            _run(options)
        except UserError as error:
            raise UserError(without_sections(str(error), *_SECTIONS)) from error


def _compare(options: EvaluateOptions) -> None:
    """Prints how two evaluated models differ, and writes it to --output."""
    from etils import epath

    from isheep_jax.cli.comparison_lines import comparison_lines
    from isheep_jax.evaluation.comparison import compare
    from isheep_jax.evaluation.saved import find_evaluation
    from isheep_jax.files import check_writable, write_json

    if len(options.compare) != 2:
        raise UserError(f"--compare needs two evaluated models, not {len(options.compare)}: --compare A B")
    if options.model:
        raise UserError("--model: --compare measures nothing; leave one of them out")
    directory = epath.Path(options.output).expanduser() if options.output else None
    a, b = map(find_evaluation, options.compare)
    if directory:
        check_writable("--output", directory)
    comparisons, refused = compare(a, b, options.evaluate.tasks)
    show("\n".join(comparison_lines(a.name, b.name, comparisons, refused)))
    if directory:
        path = directory / "comparison.json"
        tasks = {comparison.task: comparison.as_dict() for comparison in comparisons}
        write_json(path, {"a": a.name, "b": b.name, "tasks": tasks, "refused": refused})
        show(f"\nevery sample that changed: {path}")


def _run(options: EvaluateOptions) -> None:
    from etils import epath

    from isheep_jax import distributed
    from isheep_jax.checkpoint.pretrained import weights_digest
    from isheep_jax.cli.console import Console
    from isheep_jax.cli.evaluation_table import evaluation_lines
    from isheep_jax.directory_lock import owned
    from isheep_jax.evaluation.inspect_log import inspect_ai_package
    from isheep_jax.evaluation.reference import base_of
    from isheep_jax.evaluation.task import JudgeModel
    from isheep_jax.evaluation.tasks import check_tasks, evaluators
    from isheep_jax.files import check_writable
    from isheep_jax.loop.models import DeferredModel
    from isheep_jax.loop.stages.evaluate import measure
    from isheep_jax.runtime.locate import locate_evaluation_judge
    from isheep_jax.runtime.subjects import Decoding, OneModel, subjects
    from isheep_jax.text.json_files import read_json_object

    settings = options.evaluate
    check_tasks(settings)
    if distributed.is_distributed() and not options.decode.slots:
        raise UserError("--slots: 0 (as many as fit in memory) is for one process; with several it must be positive")
    if options.inspect_log:
        inspect_ai_package()
        logs = epath.Path(options.inspect_log)
        distributed.from_primary(lambda: check_writable("--inspect_log", logs, make=False))
    iterations = "all" if options.all_iterations else "newest" if options.iteration < 0 else str(options.iteration)
    decoding = Decoding(
        options.chat_template, options.compute_dtype, options.seed, options.decode_tensor, options.decode
    )
    chosen = subjects(options.model, iterations, options.output, decoding)
    models = OneModel(chosen[0].decoding)
    judge_directory = locate_evaluation_judge(settings, "--judge")
    for subject in chosen:
        distributed.from_primary(partial(_check_output, subject.output))
    judge = None
    if judge_directory:
        digest = distributed.from_primary(lambda: weights_digest(judge_directory))
        judge = JudgeModel(lambda: models.load(judge_directory, "auto"), digest)
    measured = []
    with Console(None) as console, owned("--output", chosen[0].owned):
        evaluators_of = [evaluators(settings, subject.facts(), judge) for subject in chosen]
        # Hours may pass before a later task would miss its data.
        for evaluator in evaluators_of[0].values():
            evaluator.check_data()
        for subject, measures in zip(chosen, evaluators_of):
            model = DeferredModel(models, subject.directory)
            results = measure(model, measures, subject.output, partial(_progress_of, console, subject.label))
            measured.append((subject.label, results))
        base = base_of(read_json_object(chosen[0].directory / "config.json"))
        for line in evaluation_lines(measured, base):
            console.note(line)
        console.note(f"results: {', '.join(str(subject.output) for subject in chosen)}")
        if options.inspect_log:
            _write_logs([subject.output for subject in chosen], options)
            console.note(f"see every sample:  inspect view --log-dir {options.inspect_log}")


def _check_output(directory: "epath.Path") -> None:
    """Raises `UserError` for a directory that cannot be written, or whose results are damaged."""
    from isheep_jax.evaluation.saved import read_results
    from isheep_jax.files import check_writable

    # Nothing is made before the data is known to be good.
    check_writable("--output", directory, make=False)
    if (directory / "evaluation.json").exists():
        read_results(directory / "evaluation.json")


def _progress_of(console: "Console", label: str, task: str) -> "OpenProgress":
    return lambda what, total, unit: console.progress(f"{label} · {task}" + (f", {what}" if what else ""), total, unit)


def _write_logs(evaluated: "Sequence[epath.Path]", options: EvaluateOptions) -> None:
    from isheep_jax import distributed
    from isheep_jax.evaluation.inspect_log import write_inspect_logs
    from isheep_jax.evaluation.saved import find_evaluation

    def write() -> None:
        for path in evaluated:
            write_inspect_logs(find_evaluation(path), options.evaluate.tasks, options.inspect_log)

    distributed.from_primary(write)


if __name__ == "__main__":
    sys.exit(run_command(main, COMMAND.module))
