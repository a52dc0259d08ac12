"""The benchmark counts what it says, its least times are those by hand, and bad input is one line."""

import json
from typing import get_args, get_type_hints

import jax
import pytest
from architectures import small
from meshes import mesh_of

from isheep_jax import benchmark
from isheep_jax.config import DecodeConfig, MeshConfig
from isheep_jax.decode.engine import Engine
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import init_parameters
from isheep_jax.named_configs import named_config
from isheep_jax.presets import replace_settings
from isheep_jax.sharding import decode_mesh, make_mesh
from isheep_jax.speed import decoding
from isheep_jax.speed.ceilings import Ceilings, measure_ceilings
from isheep_jax.speed.shapes import SHAPES
from isheep_jax.speed.workloads import WORKLOADS, IdTokenizer, Workload

MINUTE = small(
    hidden_size=16, intermediate_size=32, head_dim=4, context_length=256, bos_token_id=None, eos_token_ids=()
)
# Weights of a layer: queries and outputs, keys and values, three of the feed-forward part.
LAYER = 2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32
HEAD = 64 * 16


@pytest.fixture(scope="module")
def engine() -> Engine:
    params = init_parameters(MINUTE, jax.random.key(0))
    config = DecodeConfig(slots=2, steps_per_call=4)
    return Engine(params, MINUTE, IdTokenizer(64), config, mesh=mesh_of(), seed=0, compute_dtype="float32")


def test_least_time_is_what_arithmetic_and_memory_take_by_hand(engine):
    workload = Workload("some", "generate", prompt_lengths=(8, 4), new_tokens=(2, 6))
    prompts = sum(2 * 2 * LAYER * n + 4 * 2 * 4 * 4 * n * n / 2 for n in (8, 4))
    steps = (2 * 2 * LAYER + 2 * HEAD) * 8
    scores = 4 * 2 * 4 * 4 * (2 * 9 + 6 * 7)
    # With little bandwidth: six steps read all weights, and each token its own past, 2 layers of keys and values.
    weights = 4 * (2 * LAYER + HEAD + 5 * 16)
    past = (2 * 9 + 6 * 7) * 2 * 2 * 8 * 4
    limit = decoding.least_time(engine, workload, 2, Ceilings(flops=1e3, bandwidth=1e12))
    assert (limit.prompts, limit.steps, limit.cache) == pytest.approx((prompts / 1e3, steps / 1e3, scores / 1e3))
    limit = decoding.least_time(engine, workload, 2, Ceilings(flops=1e12, bandwidth=1e3))
    assert (limit.prompts, limit.steps, limit.cache) == pytest.approx((prompts / 1e12, 6 * weights / 1e3, past / 1e3))
    # Eight slots change nothing where the longest completion takes six steps; one slot takes eight.
    assert decoding.least_time(engine, workload, 8, Ceilings(1e12, 1e3)).steps == limit.steps
    assert decoding.least_time(engine, workload, 1, Ceilings(1e12, 1e3)).steps == pytest.approx(8 * weights / 1e3)


def test_scoring_is_bound_by_prompts_alone_and_prefix_counts_once(engine):
    workload = Workload("some", "score", prompt_lengths=(8, 4), prefix_length=40, choices=3)
    operations = sum(2 * 2 * LAYER * n for n in (40, 8, 4)) + 2 * 2 * HEAD
    operations += 4 * 2 * 4 * 4 * (40 * 20 + 8 * 44 + 4 * 42)
    limit = decoding.least_time(engine, workload, 0, Ceilings(1e3, 1e3))
    assert (limit.prompts, limit.steps, limit.cache) == pytest.approx((operations / 1e3, 0, 0))


def test_the_measured_run_compiles_nothing_and_is_counted(engine):
    workload = Workload("some", "generate", prompt_lengths=(8, 4, 6), new_tokens=(2, 6, 3))
    speed = decoding.measure_speed(engine, workload, Ceilings(1e9, 1e9))
    assert (speed.compilations, speed.requests, speed.slots, speed.statistics.sampled_tokens) == (0, 3, 2, 11)
    assert speed.fraction == pytest.approx(speed.limit.seconds / speed.seconds)


@pytest.fixture
def small_products(monkeypatch):
    """Ceilings are measured in an instant, on arrays that are too small for good figures."""
    monkeypatch.setattr("isheep_jax.speed.ceilings._COPIED", {"cpu": 2**16})
    monkeypatch.setattr("isheep_jax.speed.ceilings._ROWS", {"cpu": 8})


def test_ceilings_are_of_all_devices_together(small_products, monkeypatch):
    monkeypatch.setattr("isheep_jax.speed.ceilings._fastest", lambda work, *arguments: 1.0)
    mesh = decode_mesh(make_mesh(MeshConfig()), 1)
    ceilings = measure_ceilings(MINUTE, mesh, jax.numpy.dtype("float32"))
    # Seven products of a second each.
    assert ceilings.flops == pytest.approx(2 * mesh.size * 8 * LAYER / 7)
    assert ceilings.bandwidth > 0


def test_choices_of_command_are_those_of_tables():
    hints = get_type_hints(benchmark.BenchmarkOptions)
    assert benchmark.BenchmarkOptions().workload == get_args(get_args(hints["workload"])[0]) == tuple(WORKLOADS)
    assert get_args(hints["shape"]) == ("", *SHAPES)


def test_seeds_that_come_with_prompts_are_found_by_name():
    config = replace_settings(named_config("tiny_domain"), {"decode.weights_dtype": "int8", "decode.max_length": 64})
    model = benchmark._Model(config)
    mesh = decode_mesh(make_mesh(config.mesh), 1)
    dtype = jax.numpy.dtype("float32")
    error = model.quantization_error(model.parameters(mesh, dtype), mesh, dtype)
    assert error.agreement > 0.9


def test_command_measures_each_workload_and_what_int8_changes(small_products, tmp_path, capsys):
    file = tmp_path / "speed.json"
    options = ["--requests=3", "--workload=respond,assess", f"--output={file}"]
    benchmark.main(["decode", "--config=tiny", *options, "--decode.slots=8", "--decode.weights_dtype=int8"])
    report = json.loads(file.read_text())
    assert [w["workload"] for w in report["workloads"]] == ["respond", "assess"]
    assert all(w["requests_per_second"] > 0 and w["fraction_of_limit"] > 0 for w in report["workloads"])
    assert 0.9 < report["quantization_error"]["agreement"] <= 1
    printed = capsys.readouterr().out
    assert "the same most probable token" in printed
    assert "\nrespond " in printed


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--config=tiny"], "--measure is missing"),
        (["decode"], "--config is missing"),
        (["decode", "--config=tiny", "--workload=respond,nothing"], "--workload: 'respond,nothing' is not a list"),
        (["decode", "--config=tiny", "--shape=huge"], "--shape: 'huge' is not one of llama_100m; for example"),
        (["nothing", "--config=tiny"], "--measure: 'nothing' is not one of decode; for example: --measure=decode"),
        (["decode", "--config=tiny", "--requests=0"], "--requests: 0 is out of range"),
        (["decode", "--config=tiny", "--output"], "--output needs a string"),
        (["decode", "--config=tiny", "--output=/no/such/file.json"], "no directory /no/such"),
        (["decode", "--config=tiny", "--random", "--model.path=nobody/nothing"], "--model.path: nobody/nothing"),
    ],
)
def test_bad_input_is_one_line_that_names_option(arguments, words):
    with pytest.raises(UserError) as error:
        benchmark.main(arguments)
    assert words in str(error.value)
    assert "\n" not in str(error.value)
