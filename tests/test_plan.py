"""python -m isheep_jax.plan: what it prints and writes, its exit codes, and the named configs on their hardware."""

import importlib.util
import json
import os
import subprocess
import sys

import pytest

from isheep_jax import plan
from isheep_jax.config import config_description, config_names, named_config
from isheep_jax.errors import UserError
from isheep_jax.planning import programs
from isheep_jax.planning.hardware import parse_topology

NAMED = [name for name in config_names() if name != "tiny"]
TPU = [name for name in NAMED if named_config(name).mesh.topology]
SMALL = ["--config=tiny", "--mesh.fsdp=4", "--mesh.tensor=2", "--mesh.decode_tensor=2"]


@pytest.fixture(scope="module")
def planned(tmp_path_factory):
    """(what it prints, its JSON) of a small model on the eight virtual devices."""
    output = tmp_path_factory.mktemp("plan") / "plan.json"
    printed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.print", lambda *words, **_: printed.append(" ".join(map(str, words))))
        plan.main([*SMALL, f"--output={output}"])
    return "\n".join(printed), json.loads(output.read_text())


def test_all_four_programs_are_compiled_and_counted(planned):
    _, result = planned
    assert list(result["programs"]) == list(programs.NAMES)
    for program in result["programs"].values():
        parts = dict(program["gib_per_chip"])
        assert parts.pop("total") == pytest.approx(sum(parts.values()))
        assert program["fits"]
        assert program["compile_seconds"] > 0
        assert program["cost_per_chip_and_step"]["flops"] > 0
        assert program["cost_per_chip_and_step"]["interconnect_bytes"] > 0
    assert result["fits"]
    assert result["programs"][programs.TRAIN]["gib_per_chip"]["optimizer"] > 0
    assert result["programs"][programs.DECODE]["gib_per_chip"]["cache"] > 0


def test_without_a_chips_peaks_no_time_is_told(planned):
    printed, result = planned
    assert "no public peaks" in printed
    assert "iteration" not in result


def test_the_report_has_a_row_of_memory_and_of_collectives_for_each_program(planned):
    printed, _ = planned
    for name in programs.NAMES:
        assert sum(line.startswith(name) for line in printed.splitlines()) == 2


def test_a_config_that_does_not_fit_exits_with_one_and_names_the_setting(monkeypatch, capsys):
    monkeypatch.setattr("isheep_jax.planning.plan.local_memory", lambda device: 1e6)
    with pytest.raises(SystemExit) as end:
        plan.main(SMALL)
    assert end.value.code == 1
    assert "DOES NOT FIT: --" in capsys.readouterr().out


def test_fit_finds_more_slots_where_there_is_room(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("isheep_jax.planning.fit._MOST_PER_SHARD", 64)
    plan.main([*SMALL, "--fit", "--decode.slots=128", "--sft.batch_rows=128", f"--output={tmp_path / 'plan.json'}"])
    assert "--decode.slots=256" in json.loads((tmp_path / "plan.json").read_text())["fit"]
    assert "the largest that fits: --decode.slots=256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=tiny", "--mesh.topology=v9-8"], "--mesh.topology"),
        (["--config=tiny", "--output"], "--output needs a file"),
        (["--config=tiny", "--output=/no/such/place.json"], "no directory /no/such"),
        (["--config=tiny", "--model.path=nobody/nothing"], "--model.path"),
        (["--config=tiny", "--mesh.slices=0"], "mesh.slices"),
        ([*SMALL, "--mesh.fsdp=3"], "mesh.fsdp=3"),
        ([*SMALL, "--decode.slots=3"], "decode.slots=3"),
    ],
)
def test_bad_input_is_told_before_anything_is_compiled(arguments, words, monkeypatch):
    monkeypatch.setattr("isheep_jax.planning.plan.compile_program", None)
    with pytest.raises(UserError) as error:
        plan.main(arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("name", NAMED)
def test_the_docstring_of_a_named_config_tells_command_hardware_memory_and_speed(name):
    text = config_description(name)
    assert f"python -m isheep_jax.train --config={name}" in text
    for title in ("Hardware:", "Memory:", "Speed:"):
        assert title in text
    assert "planned" in text or "measured" in text
    topology = named_config(name).mesh.topology
    if topology:
        described = parse_topology(topology)
        assert topology in text
        assert f"{described.chips} chips of {described.chip.hbm / 2**30:.2f} GiB" in text


@pytest.mark.parametrize("name", NAMED)
def test_named_configs_follow_the_paper(name):
    config = named_config(name)
    assert (config.assess.read, config.assess.judge) == ("sampled", "base")
    assert (config.select.rule, config.select.threshold, config.select.at_most) == ("threshold", 8.0, 3000)
    assert config.select.at_most_order == "first"
    assert (config.sft.method, config.sft.lora_rank, config.sft.sequence_length) == ("lora", 8, 1024)
    assert (config.synthesize.instructions, config.synthesize.shots, config.respond.samples) == (10_000, 5, 1)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("arguments", [[name] for name in TPU], ids=TPU)
def test_a_named_config_fits_its_slice(arguments, tmp_path):
    assert_it_fits(arguments, tmp_path)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("length", [1024, 4096])
def test_the_70b_fits_v4_256_by_either_method_at_either_length(method, length, tmp_path):
    assert_it_fits(["llama_70b_v4", f"--sft.method={method}", f"--sft.sequence_length={length}"], tmp_path)


def assert_it_fits(arguments, tmp_path):
    """The command exits with 0; the decode chunk moves no weights and no logits, and needs few temporaries."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the extra [plan] brings it")
    output = tmp_path / "plan.json"
    command = [sys.executable, "-m", "isheep_jax.plan", f"--config={arguments[0]}", *arguments[1:]]
    # The virtual devices of the tests are not for a TPU's compiler.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    done = subprocess.run([*command, f"--output={output}"], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert set(result["programs"]) == set(programs.NAMES)
    assert all(p["gib_per_chip"]["total"] <= 0.95 * result["hbm_gib"] for p in result["programs"].values())
    assert result["iteration"]["chip_hours"] > 0
    decode = result["programs"][programs.DECODE]
    assert decode["gib_per_chip"]["temporaries"] < 0.05 * result["hbm_gib"]
    largest = decode["largest_collective"]
    weights = result["smallest_matrix_bytes"]
    assert largest["bytes"] < weights, largest
