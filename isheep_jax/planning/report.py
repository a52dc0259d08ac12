"""Formats plans for the user: one plan as lines and small tables, several as a table in Markdown."""

from typing import Any

from isheep_jax.model.architecture import parameter_count
from isheep_jax.planning import programs
from isheep_jax.planning.hardware import GIB
from isheep_jax.planning.plan import Plan, ProgramPlan, as_dict

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
    out += ["", *_collective_lines(plan)]
    if hardware.chip is None:
        out += ["", "no public peaks of this device are known: no least times"]
        return out
    chip = hardware.chip
    out += [
        "",
        f"least possible seconds per step (planned; peaks of a chip: {chip.flops / 1e12:.0f} TFLOP/s, "
        f"{chip.hbm_bandwidth / 1e9:.0f} GB/s HBM, {chip.interconnect / 1e9:.0f} GB/s interconnect)",
        f"{'':<15}{'seconds':>12}{'bound by':>14}{'compute':>12}{'memory':>12}{'interconnect':>14}"
        f"{'tokens/s/chip':>15}",
    ]
    for name, p in plan.programs.items():
        out.append(f"{name:<15}{_bound_cells(p, len(hardware.devices))}")
    result = as_dict(plan).get("iteration")
    if result:
        out += ["", "one iteration at those times (planned; without loading, saving, compiling and measuring)"]
        out += [f"  {stage['name']:<13}{stage['seconds']:10.0f} s" for stage in result["stages"]]
        out.append(f"  {'all':<13}{result['seconds']:10.0f} s, {result['chip_hours']:.2f} chip-hours")
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
        seconds = {name: p["least_seconds_per_step"]["seconds"] for name, p in programs_json.items()}
        times = (
            f"{1000 * seconds[programs.DECODE]:.1f}",
            f"{seconds[programs.TRAIN]:.2f}",
            f"{plan['iteration']['seconds'] / 60:.1f}",
            f"{plan['iteration']['chip_hours']:.1f}",
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
