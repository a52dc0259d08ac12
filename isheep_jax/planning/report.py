"""Formats plans for the user: one plan as lines and small tables, several as a table in Markdown."""

import dataclasses
from typing import Any

from isheep_jax.model.architecture import parameter_count
from isheep_jax.planning import gpu_time, programs, step_time
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.hardware import GIB
from isheep_jax.planning.iteration import IterationPlan
from isheep_jax.planning.plan import Plan, ProgramPlan, as_dict
from isheep_jax.planning.serving import FLOOR_SHAPE, FLOORS, Throughput
from isheep_jax.planning.step_time import StepTime

_COLUMNS = ("weights", "optimizer", "cache", "temporaries", "other")


def lines(plan: Plan) -> list[str]:
    """Returns the report of a plan."""
    hardware = plan.hardware
    train = " x ".join(f"{size} {axis}" for axis, size in plan.meshes.train.shape.items())
    decode = " x ".join(f"{size} {axis}" for axis, size in plan.meshes.decode.shape.items() if axis != "fsdp")
    out = [
        f"{plan.config.name}: {plan.config.model.path} ({parameter_count(plan.architecture) / 1e9:.3g} billion "
        f"parameters) on {hardware.name}, {hardware.hbm / GIB:.2f} GiB each",
        f"mesh {train}; while decoding {decode}",
        "",
        "GiB per chip   " + "".join(f"{c:>12}" for c in (*_COLUMNS, "total", "compile s")),
    ]
    for name, p in plan.programs.items():
        memory = p.compiled.memory
        cells = [getattr(memory, column) / GIB for column in _COLUMNS] + [memory.total / GIB]
        row = f"{name:<15}" + "".join(f"{cell:12.2f}" for cell in cells) + f"{p.compiled.seconds:12.0f}"
        out.append(row if p.fits else f"{row}   DOES NOT FIT: {p.advice}")
    if hardware.is_here:
        out += ["", *_collective_lines(plan)]
    else:
        out += ["", "nothing is compiled for a device that is not here: temporaries are not known"]
    if hardware.chip is None:
        out += ["", "no public peaks of this device are known: no least times"]
        return out
    chip = hardware.chip
    out += [
        "",
        f"bound: least possible seconds per step (planned; peaks of a chip: {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s HBM, {chip.interconnect / 1e9:.0f} GB/s interconnect)",
        f"{'':<15}{'seconds':>12}{'bound by':>14}{'compute':>12}{'memory':>12}{'interconnect':>14}"
        f"{'tokens/s/chip':>15}",
    ]
    for name, p in plan.programs.items():
        out.append(f"{name:<15}{_bound_cells(p, len(hardware.devices))}")
    if plan.times:
        out += ["", *_forecast_lines(plan.times)]
    if len(plan.programs) == len(programs.NAMES):
        out += ["", *_iteration_lines(plan.iteration, len(hardware.devices))]
        if plan.times:
            assumptions = step_time.ASSUMPTIONS if hardware.tpu_slice else gpu_time.ASSUMPTIONS
            out += ["", "the forecast assumes:", *(f"  {line}" for line in assumptions)]
    return out


def _forecast_lines(times: StepTimes) -> list[str]:
    """Returns the forecast times of steps, by their parts."""
    names = [field.name for field in dataclasses.fields(StepTime)]
    out = [
        "forecast: expected seconds per step (planned)",
        f"{'':<32}{'seconds':>12}" + "".join(f"{name:>14}" for name in names),
    ]

    def row(label: str, time: StepTime) -> str:
        return f"{label:<32}{time.seconds:12.5f}" + "".join(f"{part:14.5f}" for part in time)

    for slots, blocks in sorted(times.decode.items(), reverse=True):
        for count, time in enumerate(blocks, start=1):
            out.append(row(f"decode {slots:,} slots, {count * times.block:,} keys", time))
    for name, by_tokens in ((programs.PREFILL, times.prefill), (programs.SCORE, times.score)):
        for tokens, time in sorted(by_tokens.items()):
            out.append(row(f"{name} {tokens:,} tokens per row", time))
    return [*out, row(programs.TRAIN, times.train)]


def _iteration_lines(iteration: IterationPlan, chips: int) -> list[str]:
    """Returns the sum of an iteration: its bound and its forecast, what remains in each stage, and what is between."""
    out = [
        "one iteration (planned; without evaluation): seconds",
        f"  {'':<20}{'bound':>10}{'forecast':>10}{'slots busy':>12}{'padding':>9}",
    ]

    def row(name: str, bound: float | None, forecast: float | None, rest: str = "") -> str:
        cells = ("-" if seconds is None else f"{seconds:,.0f}" for seconds in (bound, forecast))
        return "  " + f"{name:<20}" + "".join(f"{cell:>10}" for cell in cells) + rest

    for stage in iteration.stages:
        seconds = stage.forecast.seconds if stage.forecast else None
        schedule = stage.schedule
        busy = f"{schedule.slots_busy:12.0%}" if schedule.decode else f"{'':12}"
        padding = f"{schedule.padding:8.2f}x" if schedule.row_tokens else ""
        out.append(row(stage.name, stage.bound, seconds, busy + padding))
    if iteration.forecast is None:
        return [*out, row("all", iteration.bound, None)]
    out += [row(b.name, None, b.seconds, f"  {b.assumption}") for b in iteration.between]
    hours = [f"{seconds * chips / 3600:.2f}" for seconds in (iteration.bound, iteration.forecast)]
    return [
        *out,
        row("all", iteration.bound, iteration.forecast, f"  {hours[0]} and {hours[1]} chip-hours"),
        *(row(b.name, None, b.seconds, f"  {b.assumption}") for b in (*iteration.first, *iteration.end)),
    ]


def throughput_lines(throughput: Throughput, chips: int) -> list[str]:
    """Returns the requests per second of a shape, beside the floors of others where the shape is theirs."""
    forecast = "-" if throughput.forecast is None else f"{throughput.forecast:.2f}"
    out = [
        f"requests of {throughput.shape} tokens per second (planned): at most {throughput.bound:.2f}, "
        f"forecast {forecast}, on {chips} chip{'s' if chips > 1 else ''}",
    ]
    if str(throughput.shape) == FLOOR_SHAPE:
        out += [
            f"  vLLM's checks on TPUs demand {rate} of {model} on a {name}: {rate / count:.2f} per chip"
            for model, name, count, rate in FLOORS
        ]
    return out


def _collective_lines(plan: Plan) -> list[str]:
    out = ["collectives per step: count, MiB sent by each chip"]
    for name, p in as_dict(plan)["programs"].items():
        kinds = [
            f"{kind} {v['count']} ({v['wire_bytes'] / 2**20:,.1f})" for kind, v in p["collectives_per_step"].items()
        ]
        out.append(f"{name:<15}{', '.join(kinds) or 'none'}")
    return out


def _bound_cells(p: ProgramPlan, chips: int) -> str:
    b = p.bound
    rate = p.compiled.program.tokens / b.seconds / chips
    return f"{b.seconds:12.5f}{b.by:>14}{b.compute:12.5f}{b.memory:12.5f}{b.interconnect:14.5f}{rate:15,.0f}"


TABLE_HEADS = (
    "config",
    "slice",
    "SFT: method, tokens",
    "decode slots",
    *(f"{name}, GiB" for name in programs.NAMES),
    "of GiB per chip",
    "decode step, ms",
    "train step, s",
    "iteration, minutes",
    "chip-hours",
)


def table(plans: list[dict[str, Any]]) -> list[str]:
    """Formats plans in JSON (`plan.as_dict`) as a table in Markdown, with memory per chip and least times."""
    rows = [TABLE_HEADS, ("---",) * len(TABLE_HEADS), *map(_table_row, plans)]
    return [f"| {' | '.join(row)} |" for row in rows]


def _table_row(plan: dict[str, Any]) -> tuple[str, ...]:
    settings, programs_json = plan["settings"], plan["programs"]
    total = {name: p["gib_per_chip"]["total"] for name, p in programs_json.items()}
    memory = [f"{total[name]:.1f}" + ("" if programs_json[name]["fits"] else " (too much)") for name in programs.NAMES]
    times = ("-",) * 4
    if "iteration" in plan:
        least = {name: p["least_seconds_per_step"]["seconds"] for name, p in programs_json.items()}
        forecast = plan.get("forecast_seconds_per_step", {})
        decode = forecast.get(programs.DECODE, {}).get(str(settings["decode.slots"]), [{}])[-1]
        bound, expected = (plan["iteration"].get(kind, {}) for kind in ("bound", "forecast"))
        times = (
            _both(1000, least[programs.DECODE], decode.get("seconds"), ".1f"),
            _both(1, least[programs.TRAIN], forecast.get(programs.TRAIN, {}).get("seconds"), ".2f"),
            _both(1 / 60, bound["seconds"], expected.get("seconds"), ".1f"),
            _both(1, bound["chip_hours"], expected.get("chip_hours"), ".1f"),
        )
    return (
        plan["config"],
        plan["hardware"],
        f"{settings['sft.method']}, {settings['sft.sequence_length']:,}",
        f"{settings['decode.slots']:,}",
        *memory,
        f"{plan['hbm_gib']:.2f}",
        *times,
    )


def _both(factor: float, bound: float, forecast: float | None, format: str) -> str:
    """Returns a bound and its forecast in a cell."""
    return f"{factor * bound:{format}} / " + ("-" if forecast is None else f"{factor * forecast:{format}}")
