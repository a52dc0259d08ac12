"""The time of a step is the sum of what its schedule runs one after the other."""

import pytest

from isheep_jax.planning.hardware import Chip
from isheep_jax.planning.module import Module
from isheep_jax.planning.step_time import KERNEL_SHARE, READ_SHARE, SAMPLING_TRIES, SCATTER_ROW, Replay
from isheep_jax.planning.torus import HOP, Torus

CHIP = Chip("test", flops=1e12, hbm=1e9, hbm_bandwidth=1e9, interconnect=2e9, links=2, clock=1e6)
PAIR = Torus(coordinates=((0,), (1,)), slices=(0, 0), shape=(2,), wrap=(False,), link=1e9, network=1e6)
ALL_REDUCE = "bf16[{size}]{{0}} all-reduce(%x), channel_id={channel}, replica_groups=[1,2]<=[2], to_apply=%add"


def cycles(count: int) -> str:
    return f'backend_config={{"window_config":{{"estimated_cycles":"{count}"}}}}'


def entry(*lines: str, others: str = "") -> Replay:
    text = "\n".join([others, "ENTRY %main (x: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"])
    return Replay(Module(text), CHIP, PAIR)


def computation(name: str, *lines: str) -> str:
    return "\n".join([f"%{name} (p: f32[8]) -> f32[8] {{", *(f"  {line}" for line in lines), "}"])


def test_cycles_and_synchronous_collectives_are_added():
    time = entry(
        f"%a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f, {cycles(3000)}",
        f"%r = {ALL_REDUCE.format(size=1_000_000, channel=1)}",
        f"%b = f32[8]{{0}} fusion(%a), kind=kLoop, calls=%f, {cycles(2000)}",
    ).step()
    assert time.compute == pytest.approx(5e-3)
    # Two times half of 2 MB over the one link of 1 GB/s, and a hop there and back.
    assert time.collectives == pytest.approx(2e-3 + 2 * HOP)
    assert time.seconds == pytest.approx(time.compute + time.collectives)


def test_cycles_in_fused_computations_are_those_of_fusion():
    fused = computation("f", f"ROOT %a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%g, {cycles(99)}")
    assert (
        entry(f"%a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f, {cycles(10)}", others=fused).step().compute == 1e-5
    )


@pytest.mark.parametrize(("between", "left"), [(500, 0.5e-3), (5000, 0.0)])
def test_asynchronous_collective_costs_what_nothing_runs_beside(between, left):
    time = entry(
        "%s = (bf16[500000]{0}, bf16[500000]{0}) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
        f"%a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f, {cycles(between)}",
        "%d = bf16[500000]{0} collective-permute-done(%s)",
    ).step()
    assert time.collectives == pytest.approx(left + (HOP if left else 0))


def test_collective_that_starts_and_ends_in_fusions_runs_beside_what_is_between():
    piece = ALL_REDUCE.format(size=1_000_000, channel=7)
    others = "\n".join(
        [
            computation(
                "start", f"%r = {piece}", 'ROOT %c = s32[] custom-call(%r), custom_call_target="AsyncCollectiveStart"'
            ),
            computation("piece", f"ROOT %r = {piece}"),
            computation(
                "end", f"%r = {piece}", 'ROOT %c = s32[] custom-call(%r), custom_call_target="AsyncCollectiveDone"'
            ),
        ]
    )
    time = entry(
        "%s = s32[] fusion(%x), kind=kCustom, calls=%start",
        f"%a = f32[8]{{0}} fusion(%s), kind=kOutput, calls=%piece, {cycles(1500)}",
        "%d = s32[] fusion(%s), kind=kCustom, calls=%end",
        others=others,
    ).step()
    assert (time.compute, time.collectives) == pytest.approx((1.5e-3, 0.5e-3 + 2 * HOP))


@pytest.mark.parametrize(("kind", "whole"), [("copy", "f32[500000]{0}"), ("slice", "(f32[8,500000]{1,0})")])
def test_copy_from_memory_costs_what_is_left_of_it(kind, whole):
    time = entry(
        f"%s = ({whole}, f32[500000]{{0}}, u32[]) {kind}-start(%x)",
        f"%a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f, {cycles(1500)}",
        f"%d = f32[500000]{{0}} {kind}-done(%s)",
    ).step()
    assert (time.compute, time.copies) == pytest.approx((1.5e-3, 0.5e-3))


def test_scatter_takes_time_per_row():
    fused = computation(
        "f",
        "%i = s32[144,3]{1,0} parameter(1)",
        "%u = bf16[144,128]{1,0} parameter(2)",
        "ROOT %s = bf16[80,144,2048,128]{3,2,1,0} scatter(%p, %i, %u), index_vector_dim=1, to_apply=%add",
    )
    assert entry("%a = bf16[8]{0} fusion(%x), kind=kCustom, calls=%f", others=fused).step().scatters == pytest.approx(
        144 * SCATTER_ROW
    )


def test_what_has_no_estimate_takes_its_arithmetic_at_share_of_peak():
    product = computation(
        "f",
        "%a = bf16[1024,512]{1,0} parameter(1)",
        "%b = bf16[512,256]{1,0} parameter(2)",
        "ROOT %c = bf16[1024,256]{1,0} convolution(%a, %b), dim_labels=bf_io->bf",
    )
    unknown = entry(f"%a = bf16[8]{{0}} fusion(%x), kind=kOutput, calls=%f, {cycles(2**63 - 1)}", others=product).step()
    assert unknown.compute == 0
    assert unknown.kernels == pytest.approx(2 * 1024 * 512 * 256 / KERNEL_SHARE / CHIP.flops)
    kernel = entry(
        '%k = bf16[4,64,128]{2,1,0} custom-call(%q, %k, %v), custom_call_target="tpu_custom_call", '
        "operand_layout_constraints={s8[1,4]{1,0}, bf16[4,64,128]{2,1,0}, bf16[96,128]{1,0}, bf16[96,128]{1,0}}, x={}"
    ).step()
    assert kernel.kernels == pytest.approx(4 * (4 * 64 * 128) * 96 / 2 / KERNEL_SHARE / CHIP.flops)


def test_kernel_of_decode_steps_reads_positions_of_each_row_at_share_of_bandwidth():
    kernel = entry(
        "%ragged_decode_attention.3 = (f32[144,8,128]{2,1,0}) custom-call(%l, %q, %k, %c), "
        'custom_call_target="tpu_custom_call", operand_layout_constraints={s32[2]{0}, bf16[144,8,128]{2,1,0}, '
        "bf16[144,1,128]{2,1,0}, bf16[80,144,2048,128]{3,2,1,0}, bf16[80,144,2048,128]{3,2,1,0}}, x={}"
    )
    keys_and_values = 2 * 144 * 640 * 128 * 2
    assert kernel.step(640).kernels == pytest.approx(keys_and_values / READ_SHARE / CHIP.hbm_bandwidth)


def decode_module() -> Replay:
    """Three layers with a loop over cache blocks, then sampling with top-p, in a loop over decode steps."""
    turn = computation("turn", f"ROOT %a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, {cycles(100)}")
    layer = computation(
        "layer",
        f"%a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, {cycles(1000)}",
        "%w = f32[8]{0} while(%a), condition=%c, body=%turn, "
        'metadata={op_name="jit(decode_steps)/while/body/while/body/attention_block/attention/while"}',
    )
    draw = computation("draw", f"ROOT %a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, {cycles(7)}")
    sampled = computation(
        "sampled",
        '%w = f32[8]{0} while(%p), condition=%c, body=%draw, metadata={op_name="jit(decode_steps)/while/body/cond/'
        'branch_1_fun/while"}',
    )
    greedy = computation("greedy", f"ROOT %a = f32[8]{{0}} fusion(%p), kind=kLoop, calls=%f, {cycles(1)}")
    step = computation(
        "step",
        '%w = f32[8]{0} while(%p), condition=%c, body=%layer, backend_config={"known_trip_count":{"n":"3"}}',
        '%s = f32[8]{0} conditional(%i, %w, %w), branch_computations={%greedy, %sampled}, metadata={op_name="cond"}',
    )
    return entry(
        f"%a = f32[8]{{0}} fusion(%x), kind=kLoop, calls=%f, {cycles(320)}",
        '%w = f32[8]{0} while(%a), condition=%c, body=%step, metadata={op_name="jit(decode_steps)/while"}',
        others="\n".join([turn, layer, draw, sampled, greedy, step]),
    )


@pytest.mark.parametrize("blocks", [1, 4])
def test_decode_step_reads_blocks_in_each_layer_and_shares_beginning_of_call(blocks):
    replay = decode_module()
    expected = 320 / 32 + 3 * (1000 + blocks * 100) + SAMPLING_TRIES * 7
    assert replay.step(blocks, steps=32).compute == pytest.approx(expected * 1e-6)
