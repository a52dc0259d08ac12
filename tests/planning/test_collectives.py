"""Collectives are found in compiled modules with their size, group and how often they run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from isheep_jax.planning.collectives import by_kind, collectives
from isheep_jax.planning.module import Module, array_bytes

# A scan over 5 matrices [512, 512] split over 4 chips, a loop whose end depends on data with a sum over all chips in
# it, and a sum at the end; compiled for a v5e-4, metadata taken out.
MODULE = Module((Path(__file__).parent / "module_v5e_4.txt").read_text())


def module(*lines: str) -> Module:
    return Module("\n".join(["ENTRY %main (x: f32[8]) -> f32[8] {", *(f"  {line}" for line in lines), "}"]))


def test_loop_of_known_length_counts_each_of_its_rounds():
    gather = next(c for c in collectives(MODULE) if c.kind == "all-gather")
    assert (gather.count, gather.group, gather.size) == (5, 4, 512 * 512 * 2)
    assert gather.wire_bytes == 5 * 512 * 512 * 2 * 3 / 4


def test_loop_whose_end_depends_on_data_counts_one_round():
    assert [c.count for c in collectives(MODULE) if c.kind == "all-reduce"] == [1, 1]


def test_kinds_are_summed_most_bytes_first():
    table = by_kind(collectives(MODULE))
    assert list(table) == ["all-gather", "all-reduce"]
    assert table["all-reduce"] == {"count": 2, "wire_bytes": 2 * 2 * 2 * 3 / 4}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[8]", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=4,'b'=2] {'a'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'a'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_groups_are_read_in_every_notation(text, groups):
    (found,) = collectives(module(f"%r = f32[8]{{0}} all-reduce(%x), channel_id=1, replica_groups={text}, to_apply=%a"))
    assert (found.groups, found.group) == (groups, 4)


@pytest.mark.parametrize(
    ("line", "kind", "wire_bytes"),
    [
        ("%r = bf16[16,8]{1,0} all-gather(%x), replica_groups=[1,4]<=[4], dimensions={0}", "all-gather", 256 * 3 / 4),
        ("%r = f32[4]{0} reduce-scatter(%x), replica_groups=[1,4]<=[4], to_apply=%a", "reduce-scatter", 64 * 3 / 4),
        ("%r = f32[16]{0} all-reduce(%x), replica_groups=[1,4]<=[4], to_apply=%a", "all-reduce", 2 * 64 * 3 / 4),
        ("%r = (f32[8]{0}, s8[8]{0}) all-to-all(%x, %y), replica_groups=[1,4]<=[4]", "all-to-all", 40 * 3 / 4),
        (
            "%r = (bf16[4]{0}, bf16[16]{0}) all-gather-start(%x), replica_groups=[1,4]<=[4], dimensions={0}",
            "all-gather",
            32 * 3 / 4,
        ),
        (
            "%r = (f32[8]{0}, f32[8]{0}, u32[], u32[]) collective-permute-start(%x), source_target_pairs={{0,1},{1,0}}",
            "collective-permute",
            32,
        ),
    ],
)
def test_bytes_on_wire_follow_kind(line, kind, wire_bytes):
    (found,) = collectives(module(line))
    assert (found.kind, found.wire_bytes) == (kind, wire_bytes)


def test_pieces_of_one_asynchronous_collective_count_once():
    line = "all-gather(%x), channel_id=7, replica_groups=[1,4]<=[4], dimensions={0}"
    assert len(collectives(module(f"%a = f32[8]{{0}} {line}", f"%b = f32[8]{{0}} {line}"))) == 1


def test_collective_of_one_device_is_none():
    assert collectives(module("%r = f32[8]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%a")) == []


def test_sizes_of_types():
    assert array_bytes("(bf16[2,3]{1,0:T(8,128)(2,1)}, pred[5], s32[], f8e4m3fn[4], u4[3])") == [12, 5, 4, 4, 2]


def test_program_compiled_here_has_collectives_that_it_was_written_with():
    mesh = Mesh(np.array(jax.devices()), ("x",), axis_types=(AxisType.Auto,))

    def step(x):
        def body(x, _):
            return jax.lax.pmean(x, "x") * 0.5, None

        return jax.lax.all_gather(jax.lax.scan(body, x, length=7)[0], "x")

    program = jax.jit(jax.shard_map(step, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False))
    x = jax.ShapeDtypeStruct((128,), jnp.float32, sharding=NamedSharding(mesh, P()))
    found = {c.kind: c for c in collectives(Module(program.lower(x).compile().as_text()))}
    assert (found["all-reduce"].count, found["all-reduce"].size, found["all-reduce"].group) == (7, 512, 8)
    assert (found["all-gather"].count, found["all-gather"].size, found["all-gather"].group) == (1, 8 * 512, 8)
