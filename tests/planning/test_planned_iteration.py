"""A planned iteration takes as many steps as the config asks for."""

import dataclasses
import functools

import numpy as np
import pytest

from isheep_jax.decode.cache import Sizing
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.planning import programs, replay
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.forecast import StepTimes
from isheep_jax.planning.iteration import (
    COMPILE_SECONDS,
    SECOND_PASS,
    Bounds,
    Machine,
    as_dict,
    plan_iteration,
)
from isheep_jax.planning.lengths import Lengths, mean_endless
from isheep_jax.planning.programs import Program
from isheep_jax.planning.replay import SupposedModel
from isheep_jax.planning.step_time import StepTime
from isheep_jax.planning.transfers import Hosts, between_stages
from isheep_jax.presets import replace_settings

# Fewer instructions than the config's, because the schedule of each is replayed.
CONFIG = replace_settings(named_config("llama_8b_v5e"), {"synthesize.instructions": 4000})
TOKENS = {programs.PREFILL: 8192, programs.DECODE: 384, programs.SCORE: 32768, programs.TRAIN: 16384}
MADE = {name: Program(name, None, 0.0, 0.0, 0.0, 1, tokens) for name, tokens in TOKENS.items()}
SECONDS = {programs.PREFILL: 1.0, programs.DECODE: 0.01, programs.SCORE: 2.0, programs.TRAIN: 3.0}
BOUNDS = Bounds(
    {name: Bound(s, "compute", s, s / 10, 0.0) for name, s in SECONDS.items()},
    lambda positions: SECONDS[programs.DECODE] * (1 + positions / 2048),
)
TIMES = StepTimes(
    block=512,
    decode={768: [StepTime(compute=0.03 + 0.01 * b) for b in range(1, 5)]},
    prefill={512: StepTime(compute=0.6), 2048: StepTime(compute=2.2)},
    score={512: StepTime(compute=0.5), 2048: StepTime(compute=1.8)},
    train=StepTime(compute=7.0),
)


HOSTS = Hosts(count=4, devices=4, model_bytes=16e9, adapter_bytes=0.1e9, memory=96e9)


@pytest.fixture(autouse=True, scope="module")
def equal_demands_are_replayed_once():
    """Most settings change the demands of one stage, and a replay takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("replay_generation", "replay_scoring"):
            patch.setattr(replay, name, remembered(getattr(replay, name)))
        yield


def remembered(function):
    known = {}

    def call(demand, model):
        values = [x.tobytes() if isinstance(x, np.ndarray) else x for x in vars(demand).values()]
        key = (*values, model.sizing, model.slots, model.max_length)
        if key not in known:
            known[key] = function(demand, model)
        return known[key]

    return call


def machine(config):
    decode = config.decode
    model = SupposedModel(Sizing("tpu", 2), decode.max_length, decode.slots, decode.steps_per_call, (2e9, 8192.0))
    return Machine(model, HOSTS)


@functools.cache
def plan(config, lengths=None):
    return plan_iteration(config, MADE, BOUNDS, machine(config), TIMES, lengths)


def stages(config, lengths=None):
    return {stage.name: stage for stage in plan(config, lengths).stages}


def test_every_token_of_response_is_step_of_one_slot():
    respond = stages(CONFIG)["respond"]
    steps = CONFIG.synthesize.instructions * Lengths().response / CONFIG.decode.slots
    assert respond.steps[programs.DECODE] == pytest.approx(steps, rel=0.01)


def test_bound_reads_keys_that_rows_need_and_no_others():
    # Two tokens after a prompt of ten: the first is sampled with 11 keys, the second with 12. All slots are idle but
    # one, so that a step reads 11.5 keys for 768 rows.
    one = replace_settings(CONFIG, {"synthesize.instructions": 1, "respond.max_tokens": 2})
    respond = stages(one, dataclasses.replace(Lengths(), spread=0.0, instruction=6, template=4, response=2))["respond"]
    assert respond.steps == {programs.PREFILL: 32 / 8192, programs.DECODE: 2}
    assert respond.bound == pytest.approx(32 / 8192 * 1.0 + 2 * 0.01 * (1 + 11.5 / 768 / 2048))


def test_writing_and_judging_take_time_in_proportion_to_instructions():
    double = dataclasses.replace(
        CONFIG, synthesize=dataclasses.replace(CONFIG.synthesize, instructions=2 * CONFIG.synthesize.instructions)
    )
    for name in ("synthesize", "respond", "assess"):
        assert stages(double)[name].bound == pytest.approx(2 * stages(CONFIG)[name].bound, rel=0.02)


def test_fewer_prompts_than_slots_take_as_many_steps_as_longest_completion():
    few = replace_settings(CONFIG, {"synthesize.instructions": 10, "respond.max_tokens": 250})
    assert stages(few)["respond"].steps[programs.DECODE] == 250


def test_lists_of_instructions_are_written_until_there_are_enough():
    synthesize = stages(CONFIG)["synthesize"]
    completions = CONFIG.synthesize.instructions * Lengths().per_instruction / mean_endless(1000, Lengths())
    assert synthesize.schedule.busy_slot_steps == pytest.approx(completions * mean_endless(1000, Lengths()), rel=0.01)


def test_expected_scores_are_prefilled_and_sampled_ones_decoded():
    expected = dataclasses.replace(CONFIG, assess=dataclasses.replace(CONFIG.assess, read="expected"))
    assert set(stages(expected)["assess"].steps) == {programs.SCORE, SECOND_PASS}
    assert set(stages(CONFIG)["assess"].steps) == {programs.PREFILL, programs.DECODE}


def test_updates_follow_from_kept_pairs():
    fewer = replace_settings(CONFIG, {"select.max_pairs": 300, "sft.packing": True})
    tokens = 300 * 0.9 * (30 + 250 + 20)
    assert stages(fewer)["fine-tune"].steps[programs.TRAIN] == 2 * -(-tokens // 16384)


def test_without_packing_update_takes_pair_per_row():
    # The paper's own count: 2,700 pairs, sixteen at a time, twice.
    assert stages(CONFIG)["fine-tune"].steps[programs.TRAIN] == 2 * -(-2700 // 16)


@pytest.mark.parametrize(
    ("settings", "share"),
    [
        ({"assess.level": "quality"}, 1 / 2),
        ({"assess.prompt": "joint"}, 1 / 2),
        ({"assess.samples": 3}, 3),
        ({"respond.samples": 2}, 2),
    ],
)
def test_only_judgments_that_are_asked_for_are_planned(settings, share):
    # 256 judgments and more fill the slots, so that the steps are in proportion.
    planned, whole = (stages(c)["assess"].bound for c in (replace_settings(CONFIG, settings), CONFIG))
    assert planned == pytest.approx(share * whole, rel=0.01)


@pytest.mark.parametrize("settings", [{"assess.readings": ()}, {"assess.judge": "http://localhost:1/v1"}])
def test_what_models_own_devices_do_not_judge_takes_none_of_their_time(settings):
    assert "assess" not in stages(replace_settings(CONFIG, settings))


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"select.rule": "density"}, {"embed"}),
        ({"assess.agreement": 100}, {"second judge"}),
        ({"synthesize.turns": 2}, {"follow up", "respond (second turn)", "assess (second turn)"}),
    ],
)
def test_what_settings_add_is_planned(settings, names):
    planned = stages(replace_settings(CONFIG, settings))
    assert set(planned) - set(stages(CONFIG)) == names
    assert all(planned[name].bound > 0 for name in names)


PREFILLS = {"likelihood": 1, "ending": 1, "lift": 2, "backward_lift": 2, "pairwise": 3}


@pytest.mark.parametrize("name", PREFILLS)
def test_reading_is_prefilled_so_often_per_response(name):
    one = replace_settings(CONFIG, {"assess.readings": ("likelihood",), "respond.samples": 4})
    other = replace_settings(CONFIG, {"assess.readings": (name,), "respond.samples": 4})
    alike = {"instruction": 0, "template": 128, "judgment_prompt": 0, "backward_prompt": 0, "spread": 0.0}
    steps = [stages(c, dataclasses.replace(Lengths(), **alike))["assess"].steps for c in (one, other)]
    assert [set(s) for s in steps] == [{programs.SCORE}] * 2
    tokens = 2 * 250 if name == "pairwise" else 250 + 128  # rounded up to 128 in the row
    assert steps[1][programs.SCORE] == pytest.approx(PREFILLS[name] * -(-tokens // 128) / 3 * steps[0][programs.SCORE])


def test_readings_add_up_and_one_without_a_model_takes_nothing():
    def seconds(*readings):
        planned = stages(replace_settings(CONFIG, {"assess.readings": readings, "respond.samples": 2}))
        return planned["assess"].bound if "assess" in planned else 0

    assert seconds("self_consistency") == 0
    assert seconds("rubric", "lift") == pytest.approx(seconds("rubric") + seconds("lift"), rel=0.001)
    assert seconds("likelihood", "lift", "ending") == seconds("lift")


def test_second_turn_is_answered_judged_and_learned_for_each_kept_pair():
    one, two = stages(CONFIG), stages(replace_settings(CONFIG, {"synthesize.turns": 2}))
    kept = CONFIG.select.max_pairs / CONFIG.synthesize.instructions
    # The longest answer has 1,000 tokens.
    steps = max(kept * one["respond"].steps[programs.DECODE], 1000)
    assert two["respond (second turn)"].steps[programs.DECODE] == pytest.approx(steps)
    # The second turn is prefilled after the first one.
    assert two["respond (second turn)"].steps[programs.PREFILL] > kept * one["respond"].steps[programs.PREFILL]
    assert two["fine-tune"].steps[programs.TRAIN] == pytest.approx(2 * one["fine-tune"].steps[programs.TRAIN], abs=2)


def test_density_rules_learn_from_pair_per_cluster():
    few = replace_settings(CONFIG, {"select.rule": "density", "select.clusters": 160})
    assert stages(few)["fine-tune"].steps[programs.TRAIN] == 2 * 9


def test_iteration_is_sum_of_stages_and_of_what_is_between_them():
    planned = plan(CONFIG)
    assert planned.bound == pytest.approx(sum(stage.bound for stage in planned.stages))
    assert planned.between == between_stages(CONFIG, HOSTS, ["instructions", "responses", "scores", "model"])
    forecast = sum(row.seconds for row in planned.between) + sum(stage.forecast.seconds for stage in planned.stages)
    assert planned.forecast == pytest.approx(forecast)
    result = as_dict(planned, chips=16)
    assert result["bound"]["chip_hours"] == pytest.approx(planned.bound * 16 / 3600)
    assert result["forecast"]["chip_hours"] == pytest.approx(forecast * 16 / 3600)
    assert result["forecast"]["first_seconds"] - forecast == pytest.approx(sum(row.seconds for row in planned.first))
    assert [row["name"] for row in result["first"]] == ["read and keep", "compile"]
    assert [row["name"] for row in result["end"]] == ["merge and save"]
    # What merges an adapter with all weights is compiled only where they are saved.
    compiled = planned.first[-1]
    whole = plan(replace_settings(CONFIG, {"sft.save": "model"})).first[-1]
    assert compiled.seconds % COMPILE_SECONDS == 0
    assert int(whole.assumption.split()[0]) == int(compiled.assumption.split()[0]) + 1


@pytest.mark.parametrize("name", [name for name in config_names() if named_config(name).mesh.topology])
def test_forecast_is_never_below_bound(name):
    # Steps that take exactly their bounds: what remains is how the loop makes them.
    config = replace_settings(named_config(name), {"synthesize.instructions": 1000})
    times = StepTimes(
        block=512,
        decode={
            config.decode.slots: [StepTime(compute=BOUNDS.decode(512 * b)) for b in range(1, 5)],
        },
        prefill={512: StepTime(compute=2 * 512 / 8192)},
        score={512: StepTime(compute=2 * 512 / 32768 * 2.0)},
        train=StepTime(compute=3.0),
    )
    planned = plan_iteration(config, MADE, BOUNDS, machine(config), times)
    for stage in planned.stages:
        assert stage.forecast.seconds >= stage.bound * (1 - 1e-9), stage.name


def test_without_times_there_is_a_bound_and_no_forecast():
    planned = plan_iteration(CONFIG, MADE, BOUNDS, machine(CONFIG))
    assert planned.forecast is None
    assert "forecast" not in as_dict(planned, 16)


def test_verbose_cloning_is_second_fine_tuning_after_answer_to_every_instruction():
    plain, cloned = (stages(replace_settings(CONFIG, {"clone.enabled": on})) for on in (False, True))
    assert cloned["engrave"].steps == plain["fine-tune"].steps
    assert cloned["fine-tune"].steps[programs.TRAIN] > plain["fine-tune"].steps[programs.TRAIN]
    steps = CONFIG.synthesize.instructions * Lengths().thorough / CONFIG.decode.slots
    assert cloned["answer again"].steps[programs.DECODE] == pytest.approx(steps, rel=0.01)
    assert cloned["respond"].bound == plain["respond"].bound


def test_thoughts_are_written_before_response_by_principles():
    steps = stages(replace_settings(CONFIG, {"respond.method": "principles"}))["respond"].steps[programs.DECODE]
    written = Lengths().thoughts + Lengths().response
    assert steps == pytest.approx(CONFIG.synthesize.instructions * written / CONFIG.decode.slots, rel=0.01)
