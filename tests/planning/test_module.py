"""Loops of a compiled module turn as often as their conditions say."""

import pytest

from isheep_jax.planning.module import Module


def loop(limit: str, body: list[str], attributes: str = "") -> Module:
    return Module(
        "\n".join(
            [
                "%cond (p: (s32[], f32[8])) -> pred[] {",
                "  %p = (s32[], f32[8]{0}) parameter(0)",
                "  %i = s32[] get-tuple-element(%p), index=0",
                *(
                    [f"  %limit = s32[] constant({limit})"]
                    if limit
                    else ["  %limit = s32[] get-tuple-element(%p), index=1"]
                ),
                "  ROOT %less = pred[] compare(%i, %limit), direction=LT",
                "}",
                "%body (p: (s32[], f32[8])) -> (s32[], f32[8]) {",
                "  %p = (s32[], f32[8]{0}) parameter(0)",
                "  %one = s32[] constant(1)",
                "  %two = s32[] constant(2)",
                "  %i = s32[] get-tuple-element(%p), index=0",
                *(f"  {line}" for line in body),
                "}",
                "ENTRY %main (x: f32[8]) -> (s32[], f32[8]) {",
                f"  ROOT %loop = (s32[], f32[8]{{0}}) while(%t), condition=%cond, body=%body{attributes}",
                "}",
            ]
        )
    )


ONCE = ["%next = s32[] add(%i, %one)", "ROOT %out = (s32[], f32[8]{0}) tuple(%next, %x)"]
# As the TPU compiler unrolls a loop over the shards of a gathered matrix.
TWICE = [
    "%half = s32[] add(%i, %one)",
    "%next = s32[] add(%half, %one)",
    "ROOT %out = (s32[], f32[8]{0}) tuple(%next, %x)",
]


@pytest.mark.parametrize(
    ("module", "turns"),
    [
        (loop("80", ONCE), 80),
        (loop("8", TWICE), 4),
        (loop("7", ["%next = s32[] add(%i, %two)", ONCE[1]]), 4),
        (loop("", ONCE), None),
        (loop("", ONCE, ', backend_config={"known_trip_count":{"n":"5"}}'), 5),
    ],
)
def test_loop_turns_until_its_counter_reaches_its_limit(module, turns):
    (instruction,) = module.computations["main"]
    assert module.trip_count(instruction) == turns


def test_instruction_names_its_operands_operation_and_computations():
    module = Module(
        "ENTRY %main (x: f32[8]) -> f32[4,2] {\n"
        "  ROOT %f = f32[4,2]{1,0:T(8,128)} fusion(%x, /*index=1*/%y.1), kind=kLoop, calls=%fused.1, "
        'metadata={op_name="jit(f)/while/add"}\n}'
    )
    (instruction,) = module.computations[module.entry]
    assert (instruction.operands, instruction.called, instruction.op) == (["x", "y.1"], ["fused.1"], "jit(f)/while/add")
    assert instruction.dimensions == [(4, 2)]
