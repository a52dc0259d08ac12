import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from letter_tokenizer import LetterTokenizer
from meshes import mesh_of
from small_model import LLAMA, SETTINGS, copying, example, on_host, same_bits, tune, weights

from isheep_jax import stopping
from isheep_jax.errors import UserError
from isheep_jax.sft import data
from isheep_jax.sft.train_step import TrainSetup, TrainState, build_train_programs, learning_rates
from isheep_jax.sharding import put


class Killed(Exception):
    pass


def kill_after(step: int):
    def on_step(done, total, metrics):
        assert total > step
        if done == step:
            raise Killed

    return on_step


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("killed_after", [2, 3])
def test_killed_run_ends_with_same_bits(tmp_path, method, killed_after):
    settings = {"method": method, "checkpoint_every": 2, "validation_fraction": 0.1}
    straight, expected = tune(tmp_path / "straight", **settings)
    with pytest.raises(Killed):
        tune(tmp_path / "killed", on_step=kill_after(killed_after), **settings)
    steps = []
    resumed, result = tune(tmp_path / "killed", on_step=lambda step, *_: steps.append(step), **settings)
    assert steps == list(range(3, expected.steps + 1))
    assert len(steps) >= 2
    assert result == expected
    assert same_bits(resumed, straight)


# After the fourth update there is a checkpoint in any case.
@pytest.mark.parametrize(("method", "stopped_after"), [("full", 3), ("lora", 4)])
def test_run_that_a_signal_ends_has_a_checkpoint_of_its_last_update_and_ends_with_same_bits(
    tmp_path, monkeypatch, method, stopped_after
):
    settings = {"method": method, "checkpoint_every": 4, "validation_fraction": 0.1}
    straight, expected = tune(tmp_path / "straight", **settings)
    steps = []

    def on_step(step, *_):
        steps.append(step)
        if step == stopped_after:
            stopping.note()

    with monkeypatch.context() as context:
        context.setattr(stopping, "_steps", stopping._Steps())
        with pytest.raises(stopping.Stopped):
            tune(tmp_path / "stopped", on_step=on_step, **settings)
        assert not stopping.is_deferred()
    resumed, result = tune(tmp_path / "stopped", on_step=lambda step, *_: steps.append(step), **settings)
    assert steps == list(range(1, expected.steps + 1))
    assert expected.steps > 4
    assert result == expected
    assert same_bits(resumed, straight)


def test_finished_run_gives_its_result_again_without_update(tmp_path):
    first, expected = tune(tmp_path)
    again, result = tune(tmp_path, on_step=kill_after(0))
    assert result == expected
    assert same_bits(first, again)


def test_best_validation_loss_decides_which_weights_are_returned(tmp_path):
    settings = {"learning_rate": 0.1, "epochs": 6, "validation_fraction": 0.2, "checkpoint_every": 1}
    tuned, result = tune(tmp_path, **settings)
    assert result.best_step == min(result.validation_losses, key=lambda v: v[1])[0] < result.steps
    assert result.validation_loss == dict(result.validation_losses)[result.best_step]
    run = build_train_programs(TrainSetup.from_config(LLAMA, SETTINGS, mesh_of(), jnp.float32))
    _, held_out = data.split_examples(copying(40), 0.2, seed=0)
    columns = data.tokenize(LetterTokenizer(), held_out, SETTINGS.sequence_length).columns
    (batch,) = data.batches(columns, sequence_length=SETTINGS.sequence_length, batch_size=SETTINGS.batch_size)
    total, count = run.validation_loss(tuned, {}, put(batch, run.batch_sharding))
    np.testing.assert_allclose(total / count, result.validation_loss, rtol=1e-6)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_learns_and_leaves_starting_weights_alone(tmp_path, method):
    before = on_host(weights())
    tuned, result = tune(tmp_path, method=method, epochs=8, learning_rate=0.01)
    assert result.losses[-1] < result.losses[0] - 0.1
    assert same_bits(weights(), before)
    assert not same_bits(tuned["layers"], before["layers"])
    assert same_bits(tuned["embed"], before["embed"]) == (method == "lora")


def test_result_is_json_and_counts_what_was_learned(tmp_path):
    examples = [*copying(10), example("cut", "abc", "d" * 40), example("lost", "a" * 40, "b")]
    _, result = tune(tmp_path, examples, epochs=3)
    assert json.loads(json.dumps(dataclasses.asdict(result)))["steps"] == result.steps == len(result.losses)
    assert (result.examples, result.cut_examples, result.left_out_examples) == (11, 1, 1)
    answers = sum(len(e.response) + 1 for e in copying(10)) + SETTINGS.sequence_length - len("abc") - 1
    assert result.tokens == 3 * answers
    assert result.validation_loss is None
    assert result.best_step == result.steps


@pytest.mark.parametrize(("method", "dtype"), [("lora", jnp.bfloat16), ("full", jnp.float32)])
def test_weights_under_adapters_keep_their_format_and_trained_ones_are_float32(tmp_path, method, dtype):
    params = jax.tree.map(lambda p: p.astype(jnp.bfloat16), weights())
    tuned, _ = tune(tmp_path, params=params, method=method, epochs=1)
    assert {leaf.dtype for leaf in jax.tree.leaves(tuned)} == {jnp.dtype(dtype)}


def test_second_run_with_other_examples_and_rates_compiles_nothing(tmp_path):
    tune(tmp_path / "first", validation_fraction=0.1)
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if event.endswith("backend_compile_duration") else None
    )
    jax.jit(lambda x: x + 1)(1.0)
    assert len(compiled) == 1
    other = {"learning_rate": 1e-3, "epochs": 3, "warmup_steps": 1, "validation_fraction": 0.2}
    tune(tmp_path / "second", copying(55), seed=7, **other)
    assert len(compiled) == 1


def test_run_continues_on_another_number_of_devices_with_same_losses(tmp_path):
    settings = {"checkpoint_every": 2, "validation_fraction": 0.1}
    _, expected = tune(tmp_path / "straight", **settings)
    with pytest.raises(Killed):
        tune(tmp_path / "moved", on_step=kill_after(2), **settings)
    tuned, moved = tune(tmp_path / "moved", mesh=mesh_of((2, 2, 2)), **settings)
    np.testing.assert_allclose(moved.losses, expected.losses, rtol=1e-5)
    np.testing.assert_allclose(moved.validation_loss, expected.validation_loss, rtol=1e-5)
    assert tuned["layers"]["wq"].sharding.spec == PartitionSpec(None, "fsdp", "tensor", None)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_transfers_between_host_and_devices_are_explicit(tmp_path, method):
    params = jax.tree.map(jnp.copy, weights())
    # Building the programs makes constants, once per process; the updates that follow are what must not stall.
    settings = dataclasses.replace(SETTINGS, method=method)
    build_train_programs(TrainSetup.from_config(LLAMA, settings, mesh_of(), jnp.float32))
    with jax.transfer_guard("disallow"):
        _, result = tune(tmp_path, params=params, method=method, epochs=1, validation_fraction=0.1)
    assert result.validation_loss is not None


def test_dropout_is_for_training_only():
    setup = TrainSetup.from_config(LLAMA, dataclasses.replace(SETTINGS, method="lora"), mesh_of(), jnp.float32)
    run = build_train_programs(setup)
    without = build_train_programs(dataclasses.replace(setup, lora_dropout=0.0))
    columns = data.tokenize(LetterTokenizer(), copying(8), SETTINGS.sequence_length).columns
    (batch,) = data.batches(columns, sequence_length=SETTINGS.sequence_length, batch_size=SETTINGS.batch_size)
    batch = put(batch, run.batch_sharding)
    state = run.init_state(weights(), np.uint32(0))
    adapters = jax.tree.map(lambda x: x + 0.05, state.weights)

    total, count = run.validation_loss(adapters, weights(), batch)
    assert total == without.validation_loss(adapters, weights(), batch)[0]
    losses = []
    for step in (1, 2):
        copied = TrainState(jax.tree.map(jnp.copy, adapters), run.init_state(weights(), np.uint32(0)).optimizer)
        _, metrics = run.train_step(copied, weights(), batch, np.float32(0), np.uint32(step), np.uint32(0))
        losses.append(float(metrics["loss"]))
    assert len({*losses, float(total / count)}) == 3


def test_another_learning_rate_is_refused_on_resume(tmp_path):
    tune(tmp_path)
    with pytest.raises(UserError, match=r"sft.learning_rate is 0.003 in this checkpoint and 0.001 now"):
        tune(tmp_path, learning_rate=1e-3)


def test_other_examples_are_refused_on_resume(tmp_path):
    tune(tmp_path)
    with pytest.raises(UserError, match="training examples"):
        tune(tmp_path, copying(39))


def test_rate_rises_to_its_peak_and_falls_to_zero():
    rates = learning_rates(0.5, 4, 100)
    np.testing.assert_allclose(rates[:5], [0.125, 0.25, 0.375, 0.5, 0.5])
    assert (np.diff(rates[4:]) < 0).all()
    assert rates[-1] < 1e-3
    np.testing.assert_allclose(learning_rates(0.5, 0, 10)[0], 0.5)
    assert len(learning_rates(0.5, 20, 5)) == 5


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lora_rank": 0}, "sft.lora_rank: 0 is out of range; it must be at least 1"),
        ({"learning_rate": 0.0}, "sft.learning_rate: 0.0 is out of range; it must be above 0"),
        (
            {"validation_fraction": 1.0},
            "sft.validation_fraction: 1.0 is out of range; it must be at least 0 and below 1",
        ),
        ({"warmup_steps": -1}, "sft.warmup_steps: -1 is out of range"),
        ({"sequence_length": 65}, "65 tokens are more than the model's context of 64"),
        ({"sequence_length": 2}, "sft.sequence_length: at 2 tokens nothing is left"),
        ({"examples": []}, "there are no examples to learn from"),
        ({"batch_size": 6, "mesh": (2, 2, 1)}, "6 rows do not divide .* 4 devices; nearest that do: 4 or 8"),
        ({"mesh": (1, 1, 4)}, "mesh.tensor=4 does not divide the model's key-value heads of 2"),
        ({"learning_rate": 1.0, "weight_decay": 1e30}, "sft.learning_rate: the loss is not finite at update 2"),
    ],
)
def test_settings_that_do_not_fit_are_named(tmp_path, settings, message):
    settings = {**settings, "mesh": mesh_of(settings.get("mesh", (1, 1, 1)))}
    with pytest.raises(UserError, match=message):
        tune(tmp_path, **settings)


def test_fine_tune_is_deterministic_in_its_seed(tmp_path):
    results = [tune(tmp_path / name, seed=seed)[1] for name, seed in (("a", 1), ("b", 1), ("c", 2))]
    assert results[0] == results[1]
    assert results[0].losses != results[2].losses
