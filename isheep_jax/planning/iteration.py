"""Adds up an iteration twice: its bound, from the least times of its programs, and the forecast of what it takes."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isheep_jax.checkpoint.hf_save import STREAMS
from isheep_jax.config import Config, is_server
from isheep_jax.decode.cache import Sizing
from isheep_jax.loop.stages.table import STAGES
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.demands import stage_demands
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.lengths import Lengths
from isheep_jax.planning.programs import Program
from isheep_jax.planning.replay import SupposedModel, schedule_of
from isheep_jax.planning.schedule import Demand, Generation, StageSchedule, Training
from isheep_jax.planning.step_time import StepTime

Steps = dict[str, float]  # steps by program

# Second passes over choices, which read the weights but compute little.
SECOND_PASS = f"{programs.SCORE}, choices"

# Bytes per second that a host reads from a bucket with many ranges at once, and that one stream writes to it. Writing
# is what others measured: 100 to 200 GB at 141 to 148 MB/s (epam/cloud-pipeline#1374). Reading is assumed.
READ_RATE = 1e9
STREAM_RATE = 145e6
WRITE_RATE = STREAMS * STREAM_RATE
# Seconds to compile a program, assumed, and how many are compiled at once.
COMPILE_SECONDS, COMPILE_THREADS = 60.0, 4


@dataclass(frozen=True)
class Bounds:
    """Least times of the programs.

    steps: of a step of each program, by name; decoding reads the whole cache.
    decode: seconds of a decode step that reads so many cache positions of each slot on average.
    """

    steps: dict[str, Bound]
    decode: Callable[[float], float]


@dataclass(frozen=True)
class Machine:
    """What the schedule and the transfers of weights depend on.

    model: as the schedule sees it.
    hosts: machines that read and write.
    model_bytes: of the weights in files.
    """

    model: SupposedModel
    hosts: int
    model_bytes: float


@dataclass(frozen=True)
class StagePlan:
    """A stage by its title in the loop's table.

    bound: the least seconds that it takes, with no slot idle while a prompt waits and no key read that no row needs.
    steps: its steps of each program, for the bound.
    schedule: its calls as the loop makes them.
    forecast: the time of these calls by what takes it; None where no times are known.
    """

    name: str
    bound: float
    steps: Steps
    schedule: StageSchedule
    forecast: StepTime | None


@dataclass(frozen=True)
class Between:
    """What an iteration does between its stages. assumption: how the seconds come about."""

    name: str
    seconds: float
    assumption: str


@dataclass(frozen=True)
class IterationPlan:
    """An iteration after the first.

    compilation: what the first one does besides.
    """

    stages: list[StagePlan]
    between: list[Between]
    compilation: Between

    @property
    def bound(self) -> float:
        return sum(stage.bound for stage in self.stages)

    @property
    def forecast(self) -> float | None:
        """Seconds of stages and what is between them; None where no times are known."""
        if any(stage.forecast is None for stage in self.stages):
            return None
        return sum(stage.forecast.seconds for stage in self.stages) + sum(row.seconds for row in self.between)


def plan_iteration(
    config: Config,
    by_name: dict[str, Program],
    bounds: Bounds,
    machine: Machine,
    times: StepTimes | None = None,
    lengths: Lengths | None = None,
) -> IterationPlan:
    """Returns the stages of an iteration with their bounds and forecasts, and what is between them.

    What `demands.NOT_PLANNED` names is left out, and so is the time of a server that judges.

    Args:
        config: settings.
        by_name: the programs, by name.
        bounds: their least times.
        machine: what the schedule and the transfers depend on.
        times: forecast times of the programs; None: there is no forecast.
        lengths: of texts; None: the assumed ones.
    """
    tokens = {name: program.tokens for name, program in by_name.items()}
    stages = []
    for (stage, turn), demands in stage_demands(config, lengths or Lengths()).items():
        steps: Counter[str] = Counter()
        seconds = 0.0
        for demand in demands:
            own, least = _least(demand, config, tokens, bounds, machine.model.sizing)
            steps.update(own)
            seconds += least
        schedule = schedule_of(demands, machine.model)
        forecast = times.stage(schedule) if times else None
        stages.append(StagePlan(STAGES[stage].title_of(turn), seconds, dict(steps), schedule, forecast))
    return IterationPlan(stages, between_stages(config, machine), compilation(stages))


def _least(
    demand: Demand, config: Config, tokens: dict[str, int], bounds: Bounds, sizing: Sizing
) -> tuple[Steps, float]:
    """Returns the steps of a demand, and the least seconds that they take.

    Args:
        demand: what is asked for.
        config: settings.
        tokens: of a step, by program.
        bounds: least times of the programs.
        sizing: what decides the sizes of arrays.
    """
    if isinstance(demand, Training):
        return {programs.TRAIN: demand.updates}, demand.updates * bounds.steps[programs.TRAIN].seconds
    program = programs.PREFILL if isinstance(demand, Generation) else programs.SCORE
    steps: Steps = {program: sum(map(sizing.aligned, demand.prompts.tolist())) / tokens[program]}
    seconds = steps[program] * bounds.steps[program].seconds
    if isinstance(demand, Generation):
        new = demand.completions
        # Fewer prompts than slots leave slots idle.
        steps[programs.DECODE] = max(float(new.sum()) / config.decode.slots, float(new.max()))
        keys = float((new * (demand.prompts + (new + 1) / 2)).sum())
        positions = keys / steps[programs.DECODE] / config.decode.slots
        seconds += steps[programs.DECODE] * bounds.decode(positions)
    elif demand.branch:
        steps[SECOND_PASS] = steps[program]
        seconds += steps[program] * bounds.steps[program].memory
    return steps, seconds


def between_stages(config: Config, machine: Machine) -> list[Between]:
    """Returns what an iteration after the first does between its stages: it loads models and saves the new one."""
    share = machine.model_bytes / machine.hosts
    judge = config.assess.judge
    loads = {"writer": True, "judge": not is_server(judge) and judge != "current", "training": True}
    names = [name for name, is_loaded in loads.items() if is_loaded]
    hosts = f"{machine.hosts} host{'s' if machine.hosts > 1 else ''}"
    return [
        Between(
            "load weights",
            len(names) * share / READ_RATE,
            f"{len(names)} times ({', '.join(names)}) {share / 1e9:.1f} GB for each of {hosts} at an assumed "
            f"{READ_RATE / 1e9:.0f} GB/s",
        ),
        Between(
            "save the model",
            share / WRITE_RATE,
            f"{share / 1e9:.1f} GB from each of {hosts} in {STREAMS} streams of {STREAM_RATE / 1e6:.0f} MB/s "
            "(epam/cloud-pipeline#1374)",
        ),
    ]


def compilation(stages: Sequence[StagePlan]) -> Between:
    """Returns what the programs of the stages take to compile; later iterations find them in the cache."""
    shapes: set[tuple[str, object]] = set()
    for stage in stages:
        schedule = stage.schedule
        shapes |= {(programs.DECODE, slots) for slots, _ in schedule.decode}
        shapes |= {(programs.PREFILL, tokens) for tokens in schedule.prefill}
        shapes |= {(programs.SCORE, tokens) for tokens in schedule.score}
        if schedule.updates:
            shapes |= {(programs.TRAIN, "update"), (programs.TRAIN, "loss"), (programs.TRAIN, "merge")}
    seconds = math.ceil(len(shapes) / COMPILE_THREADS) * COMPILE_SECONDS
    return Between(
        "compile",
        seconds,
        f"{len(shapes)} programs, {COMPILE_THREADS} at a time, at an assumed {COMPILE_SECONDS:.0f} s; the first "
        "iteration only, and not while weights are loaded",
    )


def as_dict(plan: IterationPlan, chips: int) -> dict[str, Any]:
    """Returns a planned iteration as JSON."""
    result: dict[str, Any] = {
        "planned": True,
        "bound": {"seconds": plan.bound, "chip_hours": plan.bound * chips / 3600},
        "stages": [_stage_dict(stage) for stage in plan.stages],
        "between": [dataclasses.asdict(row) for row in plan.between],
        "compilation": dataclasses.asdict(plan.compilation),
        "assumed_lengths": dataclasses.asdict(Lengths()),
    }
    if plan.forecast is not None:
        result["forecast"] = {
            "seconds": plan.forecast,
            "chip_hours": plan.forecast * chips / 3600,
            "first_seconds": plan.forecast + plan.compilation.seconds,
        }
    return result


def _stage_dict(stage: StagePlan) -> dict[str, Any]:
    schedule = stage.schedule
    return {
        "name": stage.name,
        "bound_seconds": stage.bound,
        "steps": stage.steps,
        "forecast_seconds": stage.forecast.seconds if stage.forecast else None,
        "forecast_parts": dataclasses.asdict(stage.forecast) if stage.forecast else None,
        "decode_steps": [
            {"slots": slots, "cache_positions": positions, "steps": steps}
            for (slots, positions), steps in sorted(schedule.decode.items())
        ],
        "prefill_calls": dict(sorted(schedule.prefill.items())),
        "score_calls": dict(sorted(schedule.score.items())),
        "updates": schedule.updates,
        "slots_busy": schedule.slots_busy,
        "padding": schedule.padding,
    }
