"""python -m isheep_jax.plan: what it prints and writes, its exit codes, and the named configs on their hardware."""

import importlib.util
import json
import os
import re
import subprocess
import sys

import pytest

from isheep_jax import plan
from isheep_jax.errors import UserError
from isheep_jax.named_configs import config_description, config_names, named_config
from isheep_jax.planning import programs
from isheep_jax.planning.hardware import parse_topology
from isheep_jax.planning.models import planned_architecture

NAMED = [name for name in config_names() if not name.startswith("tiny")]
PAPERS = [name for name in NAMED if named_config(name).assess.readings == ("rubric",)]
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


def test_json_says_which_settings_it_is_of(planned):
    settings = planned[1]["settings"]
    assert (settings["mesh.fsdp"], settings["decode.slots"], settings["sft.method"]) == (4, 128, "full")


def test_plans_become_rows_of_table(planned, tmp_path, capsys):
    _, result = planned
    on_a_chip = json.loads(json.dumps(result)) | {
        "iteration": {
            "bound": {"seconds": 5400.0, "chip_hours": 12.0},
            "forecast": {"seconds": 7200.0, "chip_hours": 16.0},
        },
        "forecast_seconds_per_step": {
            programs.DECODE: {"128": [{"seconds": 0.3}, {"seconds": 0.5}], "32": [{"seconds": 0.1}]},
            programs.TRAIN: {"seconds": 0.75},
        },
    }
    for program in on_a_chip["programs"].values():
        program["least_seconds_per_step"] = {"seconds": 0.25}
        program["gib_per_chip"]["total"] = 7.25
    on_a_chip["programs"][programs.TRAIN]["fits"] = False
    for name, plan_of in {"a": result, "b": on_a_chip}.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(plan_of))
    plan.main(["--table", str(tmp_path / "a.json"), str(tmp_path / "b.json")])
    heads, _, here, chip = [line.strip("| ").split(" | ") for line in capsys.readouterr().out.splitlines()]
    assert len(heads) == len(here) == len(chip)
    assert here[-4:] == ["-"] * 4
    cells = dict(zip(heads, chip))
    assert cells["config"] == "tiny"
    assert (cells["decode, GiB"], cells["train step, GiB"]) == ("7.2", "7.2 (too much)")
    # All slots at the full length of the cache, as for the bound.
    assert (cells["decode step, ms"], cells["train step, s"]) == ("250.0 / 500.0", "0.25 / 0.75")
    assert (cells["iteration, minutes"], cells["chip-hours"]) == ("90.0 / 120.0", "12.0 / 16.0")


def test_gpu_that_is_not_here_is_counted_and_not_compiled(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("isheep_jax.planning.plan.compile_program", None)
    plan.main(["--config=llama_8b_gpu", "--gpu=h100", "--shape=1800/128", f"--output={tmp_path / 'plan.json'}"])
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "one NVIDIA H100" in printed
    assert "temporaries are not known" in printed
    assert result["fits"]
    for stage in result["iteration"]["stages"]:
        assert stage["forecast_seconds"] > stage["bound_seconds"]
    throughput = result["requests_per_second"]
    assert 0 < throughput["forecast"] < throughput["bound"]
    # Both floors of others are of this shape.
    assert all(f"demand {rate}" in printed for rate in ("10.77", "7.0"))


@pytest.mark.parametrize("text", [None, "", "[]", "{}", '{"programs": {}}'])
def test_table_of_something_else_names_file(text, tmp_path):
    if text is not None:
        (tmp_path / "a.json").write_text(text)
    with pytest.raises(UserError, match=r"--table: .*a\.json"):
        plan.main(["--table", str(tmp_path / "a.json")])


def test_table_needs_files():
    with pytest.raises(UserError, match="--table needs files"):
        plan.main(["--table"])


def test_without_peaks_of_chip_there_are_no_times(planned):
    printed, result = planned
    assert "no public peaks" in printed
    assert "iteration" not in result


def test_report_has_row_of_memory_and_of_collectives_for_each_program(planned):
    printed, _ = planned
    for name in programs.NAMES:
        assert sum(line.startswith(name) for line in printed.splitlines()) == 2


def test_config_that_does_not_fit_exits_with_one_and_names_setting(monkeypatch, capsys):
    monkeypatch.setattr("isheep_jax.planning.plan.local_memory", lambda device: 1e6)
    with pytest.raises(SystemExit) as end:
        plan.main(SMALL)
    assert end.value.code == 1
    assert "DOES NOT FIT: --" in capsys.readouterr().out


def test_fit_finds_more_slots_where_there_is_room(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("isheep_jax.planning.fit._MAX_PER_SHARD", 64)
    plan.main([*SMALL, "--fit", "--decode.slots=128", "--sft.batch_size=128", f"--output={tmp_path / 'plan.json'}"])
    assert "--decode.slots=256" in json.loads((tmp_path / "plan.json").read_text())["fit"]
    assert "the largest that fits: --decode.slots=256" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=tiny", "--mesh.topology=v9-8"], "--mesh.topology"),
        (["--config=tiny", "--output"], "--output needs a string"),
        (["--config=tiny", "--output=/no/such/place.json"], "no directory /no/such"),
        (["--config=tiny", "--model.path=nobody/nothing"], "--model.path"),
        (["--config=tiny", "--mesh.slices=0"], "mesh.slices"),
        ([*SMALL, "--mesh.fsdp=3"], "mesh.fsdp=3"),
        ([*SMALL, "--decode.slots=3"], "decode.slots=3"),
        ([*SMALL, "--gpu=H1000"], "--gpu: 'H1000' is not known; known: A100, H100, H200"),
        ([*SMALL, "--gpu=H100", "--fit"], "--gpu: goes neither"),
        ([*SMALL, "--shape=1800"], "--shape: '1800' is not PROMPT/NEW"),
        ([*SMALL, "--shape=0/128"], "--shape: '0/128' is not PROMPT/NEW"),
        ([*SMALL, "--shape=100/60"], "--shape: 100/60 takes 160 tokens, more than decode.max_length="),
    ],
)
def test_bad_input_is_reported_before_anything_is_compiled(arguments, words, monkeypatch):
    monkeypatch.setattr("isheep_jax.planning.plan.compile_program", None)
    with pytest.raises(UserError) as error:
        plan.main(arguments)
    assert words in str(error.value)


@pytest.mark.parametrize("name", NAMED)
def test_docstring_of_named_config_tells_command_hardware_memory_and_speed(name):
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


@pytest.mark.parametrize("name", TPU)
def test_figures_of_docstring_agree_with_each_other_and_with_settings(name):
    config, documented = named_config(name), figures(name)
    chips = parse_topology(config.mesh.topology).chips
    assert documented["decode_rate"] * documented["decode_ms"] / 1000 * chips == pytest.approx(
        config.decode.slots, rel=0.02
    )
    tokens = config.sft.batch_size * config.sft.sequence_length
    assert documented["train_rate"] * documented["train_s"] * chips == pytest.approx(tokens, rel=0.02)
    assert documented["chip_hours"] == pytest.approx(documented["minutes"] * chips / 60, rel=0.02)
    if "forecast_minutes" in documented:
        hours = documented["forecast_minutes"] * chips / 60
        assert documented["forecast_chip_hours"] == pytest.approx(hours, rel=0.02)
        assert all(documented[f"forecast_{x}"] > documented[x] for x in ("decode_ms", "train_s", "minutes"))


def figures(name):
    """Returns the figures of a docstring by name; those of a forecast only where there is one."""
    text = " ".join(config_description(name).split())
    patterns = {
        "decode_gib": r"decoding ([\d.]+) GiB per chip",
        "train_gib": r"train step ([\d.]+) GiB",
        "decode_ms": r"decode step at least ([\d.]+) ms",
        "decode_rate": r"decode step at least [\d.]+ ms \(([\d,]+) tokens/s per chip\)",
        "train_s": r"train step at least ([\d.]+) s",
        "train_rate": r"train step at least [\d.]+ s \(([\d,]+) tokens/s per chip\)",
        "minutes": r"an iteration at least ([\d.]+) minutes",
        "chip_hours": r"([\d.]+) chip-hours",
    }
    if "forecast:" in text:
        patterns |= {
            "forecast_decode_ms": r"forecast: decode step ([\d.]+) ms",
            "forecast_train_s": r"forecast: .*?train step ([\d.]+) s",
            "forecast_minutes": r"forecast: .*?an iteration ([\d.]+) minutes",
            "forecast_chip_hours": r"forecast: .*?([\d.]+) chip-hours",
        }
    return {key: float(re.search(pattern, text)[1].replace(",", "")) for key, pattern in patterns.items()}


@pytest.mark.parametrize("name", PAPERS)
def test_named_configs_with_judge_of_paper_follow_paper(name):
    config = named_config(name)
    assert (config.assess.read, config.assess.judge) == ("sampled", "base")
    assert (config.select.rule, config.select.threshold, config.select.max_pairs) == ("threshold", 8.0, 3000)
    assert config.select.max_pairs_order == "first"
    assert (config.sft.method, config.sft.lora_rank, config.sft.sequence_length) == ("lora", 8, 1024)
    assert (config.synthesize.instructions, config.synthesize.shots, config.respond.samples) == (10_000, 5, 1)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("name", TPU)
def test_named_config_fits_its_slice_as_its_docstring_says(name, tmp_path):
    result = assert_it_fits([f"--config={name}"], tmp_path)
    chips, made, documented = result["chips"], result["programs"], figures(name)
    seconds = {program: made[program]["least_seconds_per_step"]["seconds"] for program in made}
    forecast, slots = result["forecast_seconds_per_step"], result["settings"]["decode.slots"]
    planned = {
        "decode_gib": max(p["gib_per_chip"]["total"] for name, p in made.items() if name != programs.TRAIN),
        "train_gib": made[programs.TRAIN]["gib_per_chip"]["total"],
        "decode_ms": 1000 * seconds[programs.DECODE],
        "decode_rate": made[programs.DECODE]["tokens"] / seconds[programs.DECODE] / chips,
        "train_s": seconds[programs.TRAIN],
        "train_rate": made[programs.TRAIN]["tokens"] / seconds[programs.TRAIN] / chips,
        "minutes": result["iteration"]["bound"]["seconds"] / 60,
        "chip_hours": result["iteration"]["bound"]["chip_hours"],
        "forecast_decode_ms": 1000 * forecast[programs.DECODE][str(slots)][-1]["seconds"],
        "forecast_train_s": forecast[programs.TRAIN]["seconds"],
        "forecast_minutes": result["iteration"]["forecast"]["seconds"] / 60,
        "forecast_chip_hours": result["iteration"]["forecast"]["chip_hours"],
    }
    assert documented == pytest.approx({key: planned[key] for key in documented}, rel=0.05)


@pytest.mark.tpu_compile
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("length", [1024, 4096])
def test_70b_fits_v4_256_by_either_method_at_either_length(method, length, tmp_path):
    larger = config_description("llama_70b_v4").partition("Larger:")[2].partition("Smaller:")[0]
    full = re.findall(r"--sft.method=full(?: --[.\w]+=\w+)+", larger)[0].split()
    settings = [*(full if method == "full" else ["--sft.remat=full"]), f"--sft.sequence_length={length}"]
    assert_it_fits(["--config=llama_70b_v4", *settings], tmp_path)


@pytest.mark.tpu_compile
def test_70b_fits_smaller_slice_that_its_docstring_names(tmp_path):
    settings = re.findall(r"--\S+=\S+", config_description("llama_70b_v4").partition("Smaller:")[2])
    result = assert_it_fits(["--config=llama_70b_v4", *settings], tmp_path)
    assert result["chips"] < parse_topology(named_config("llama_70b_v4").mesh.topology).chips


@pytest.mark.tpu_compile
def test_layers_with_and_without_window_and_capped_scores_never_hold_scores(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(GEMMA_2))
    length, rows = 16384, 4
    result = assert_it_fits(
        [
            "--config=llama_8b_v5e",
            f"--model.path={tmp_path}",
            "--mesh.topology=v5e-8",
            "--mesh.data=1",
            "--mesh.fsdp=4",
            "--mesh.tensor=2",
            "--mesh.decode_tensor=2",
            "--decode.slots=32",
            f"--decode.max_length={length}",
            f"--sft.sequence_length={length}",
            "--sft.remat=full",
            f"--sft.batch_size={rows}",
        ],
        tmp_path,
    )
    # Attention scores of one layer in float32 on one chip, in GiB.
    scores = 4 * (rows / 4) * (GEMMA_2["num_attention_heads"] / 2) * length**2 / 2**30
    assert result["programs"][programs.TRAIN]["gib_per_chip"]["temporaries"] < scores
    assert result["programs"][programs.PREFILL]["gib_per_chip"]["temporaries"] < scores / 2


# Four layers with the sizes of Gemma 2 2B, but for a smaller vocabulary and a longer context.
GEMMA_2 = {
    "architectures": ["Gemma2ForCausalLM"],
    "model_type": "gemma2",
    "vocab_size": 32000,
    "hidden_size": 2304,
    "intermediate_size": 9216,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "query_pre_attn_scalar": 256,
    "attn_logit_softcapping": 50.0,
    "final_logit_softcapping": 30.0,
    "sliding_window": 4096,
    "max_position_embeddings": 16384,
    "hidden_activation": "gelu_pytorch_tanh",
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "bos_token_id": 2,
    "eos_token_id": 1,
}


def assert_it_fits(arguments, tmp_path):
    """Returns the plan as JSON; the command exits with 0, and decoding moves and copies neither weights nor logits."""
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed; the extra [plan] brings it")
    output = tmp_path / "plan.json"
    # The compiler for TPUs must not get the virtual devices of the tests.
    environment = {key: value for key, value in os.environ.items() if key != "XLA_FLAGS"}
    command = [sys.executable, "-m", "isheep_jax.plan", *arguments, f"--output={output}"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    result = json.loads(output.read_text())
    assert set(result["programs"]) == set(programs.NAMES)
    assert all(p["gib_per_chip"]["total"] <= 0.95 * result["hbm_gib"] for p in result["programs"].values())
    assert result["iteration"]["bound"]["chip_hours"] > 0
    for stage in result["iteration"]["stages"]:
        assert stage["forecast_seconds"] > stage["bound_seconds"], stage["name"]
    decode = result["programs"][programs.DECODE]
    assert decode["gib_per_chip"]["temporaries"] < 0.05 * result["hbm_gib"]
    settings = result["settings"]
    architecture = planned_architecture(result["model"], tmp_path)
    rows = settings["decode.slots"] / result["decode_mesh"]["data"]
    for kind, largest in decode["largest_collectives"].items():
        # An array as large as a matrix belongs to the batch: its first axis has the rows of a shard.
        small = largest["bytes"] < result["smallest_matrix_bytes"]
        assert small or int(re.search(r"\[(\d+)", largest["shape"])[1]) == rows, (kind, largest)
        assert largest["bytes"] < 2 * rows * architecture.vocab_size, (kind, largest)
    return result
