"""Adds up an iteration twice: its bound, from the least times of its programs, and the forecast of what it takes."""

import dataclasses
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from isheep_jax.config import Config
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
from isheep_jax.planning.transfers import Between, Hosts, at_end, at_first, between_stages

Steps = dict[str, float]  # steps by program

# Second passes over choices, which read the weights but compute little.
SECOND_PASS = f"{programs.SCORE}, choices"

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
    hosts: what loads and saves weights.
    """

    model: SupposedModel
    hosts: Hosts


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
class IterationPlan:
    """An iteration after the first.

    first: what the first one does besides.
    end: what is done as the run ends.
    """

    stages: list[StagePlan]
    between: list[Between]
    first: list[Between]
    end: list[Between]

    @property
    def bound(self) -> float:
        return sum(stage.bound for stage in self.stages)

    @property
    def forecast(self) -> float | None:
        """Seconds of stages and what is between them; None where no times are known."""
        if any(stage.forecast is None for stage in self.stages):
            return None
        return sum(stage.forecast.seconds for stage in self.stages) + sum(row.seconds for row in self.between)

    @property
    def first_forecast(self) -> float | None:
        """The same of the first iteration, at most: its writer is the base, which may judge as well."""
        return None if self.forecast is None else self.forecast + sum(row.seconds for row in self.first)


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
    stages, asked = [], stage_demands(config, lengths or Lengths())
    for (stage, turn), demands in asked.items():
        steps: Counter[str] = Counter()
        seconds = 0.0
        for demand in demands:
            own, least = _least(demand, config, tokens, bounds, machine.model.sizing)
            steps.update(own)
            seconds += least
        schedule = schedule_of(demands, machine.model)
        forecast = times.stage(schedule) if times else None
        stages.append(StagePlan(STAGES[stage].title_of(turn), seconds, dict(steps), schedule, forecast))
    return IterationPlan(
        stages,
        between=between_stages(config, machine.hosts, [stage for stage, _ in asked]),
        first=[*at_first(machine.hosts), compilation(config, stages)],
        end=at_end(config, machine.hosts),
    )


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


def compilation(config: Config, stages: Sequence[StagePlan]) -> Between:
    """Returns what the programs of the stages take to compile; later iterations find them in the cache."""
    shapes: set[tuple[str, object]] = set()
    for stage in stages:
        schedule = stage.schedule
        shapes |= {(programs.DECODE, slots) for slots, _ in schedule.decode}
        shapes |= {(programs.PREFILL, tokens) for tokens in schedule.prefill}
        shapes |= {(programs.SCORE, tokens) for tokens in schedule.score}
        if schedule.updates:
            shapes |= {(programs.TRAIN, "update"), (programs.TRAIN, "loss")}
            shapes |= {(programs.TRAIN, "merge")} if config.sft.save == "model" else set()
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
        "first": [dataclasses.asdict(row) for row in plan.first],
        "end": [dataclasses.asdict(row) for row in plan.end],
        "assumed_lengths": dataclasses.asdict(Lengths()),
    }
    if plan.forecast is not None:
        result["forecast"] = {
            "seconds": plan.forecast,
            "chip_hours": plan.forecast * chips / 3600,
            "first_seconds": plan.first_forecast,
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
