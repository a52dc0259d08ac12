"""A planned iteration takes as many steps as the config asks for."""

import dataclasses

import pytest

from isheep_jax.named_configs import named_config
from isheep_jax.planning import programs
from isheep_jax.planning.cost import Bound
from isheep_jax.planning.iteration import Lengths, as_dict, plan_iteration
from isheep_jax.planning.programs import Program
from isheep_jax.presets import replace_settings

CONFIG = named_config("llama_8b_v5e")
TOKENS = {programs.PREFILL: 8192, programs.DECODE: 384, programs.SCORE: 32768, programs.TRAIN: 16384}
MADE = {name: Program(name, None, 0.0, 0.0, 0.0, 1, tokens) for name, tokens in TOKENS.items()}
SECONDS = {programs.PREFILL: 1.0, programs.DECODE: 0.01, programs.SCORE: 2.0, programs.TRAIN: 3.0}
BOUNDS = {name: Bound(s, "compute", s, 0.0, 0.0) for name, s in SECONDS.items()}


def stages(config):
    return {stage.name: stage for stage in plan_iteration(config, MADE, BOUNDS)}


def test_every_token_of_response_is_step_of_one_slot():
    respond = stages(CONFIG)["respond"]
    assert respond.steps[programs.DECODE] == CONFIG.synthesize.instructions * Lengths().response / CONFIG.decode.slots
    assert respond.seconds == pytest.approx(
        respond.steps[programs.PREFILL] * 1.0 + respond.steps[programs.DECODE] * 0.01
    )


def test_writing_and_judging_take_time_in_proportion_to_instructions():
    double = dataclasses.replace(
        CONFIG, synthesize=dataclasses.replace(CONFIG.synthesize, instructions=2 * CONFIG.synthesize.instructions)
    )
    for name in ("synthesize", "respond", "assess"):
        assert stages(double)[name].seconds == pytest.approx(2 * stages(CONFIG)[name].seconds)


def test_fewer_prompts_than_slots_take_as_many_steps_as_one_prompt():
    few = dataclasses.replace(CONFIG, synthesize=dataclasses.replace(CONFIG.synthesize, instructions=10))
    assert stages(few)["respond"].steps[programs.DECODE] == Lengths().response


def test_expected_scores_are_prefilled_and_sampled_ones_decoded():
    expected = dataclasses.replace(CONFIG, assess=dataclasses.replace(CONFIG.assess, read="expected"))
    assert set(stages(expected)["assess"].steps) == {programs.SCORE}
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
    planned, whole = (stages(c)["assess"].seconds for c in (replace_settings(CONFIG, settings), CONFIG))
    assert planned == pytest.approx(share * whole)


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
    assert all(planned[name].seconds > 0 for name in names)


PREFILLS = {"likelihood": 1, "ending": 1, "lift": 2, "backward_lift": 2, "pairwise": 3}


@pytest.mark.parametrize("name", PREFILLS)
def test_reading_is_prefilled_so_often_per_response(name):
    one = replace_settings(CONFIG, {"assess.readings": ("likelihood",), "respond.samples": 4})
    other = replace_settings(CONFIG, {"assess.readings": (name,), "respond.samples": 4})
    longest = dataclasses.replace(Lengths(), instruction=0, template=128, judgment_prompt=0, backward_prompt=0)
    steps = [{s.name: s for s in plan_iteration(c, MADE, BOUNDS, longest)}["assess"].steps for c in (one, other)]
    assert [set(s) for s in steps] == [{programs.SCORE}] * 2
    tokens = 2 * 250 if name == "pairwise" else 250 + 128  # rounded up to 128 in the row
    assert steps[1][programs.SCORE] == pytest.approx(PREFILLS[name] * -(-tokens // 128) / 3 * steps[0][programs.SCORE])


def test_readings_add_up_and_one_without_a_model_takes_nothing():
    def seconds(*readings):
        planned = stages(replace_settings(CONFIG, {"assess.readings": readings, "respond.samples": 2}))
        return planned["assess"].seconds if "assess" in planned else 0

    assert seconds("self_consistency") == 0
    assert seconds("rubric", "lift") == pytest.approx(seconds("rubric") + seconds("lift"))
    assert seconds("likelihood", "lift", "ending") == seconds("lift")


def test_second_turn_is_answered_judged_and_learned_for_each_kept_pair():
    one, two = stages(CONFIG), stages(replace_settings(CONFIG, {"synthesize.turns": 2}))
    kept = CONFIG.select.max_pairs / CONFIG.synthesize.instructions
    assert two["respond (second turn)"].steps[programs.DECODE] == pytest.approx(
        kept * one["respond"].steps[programs.DECODE]
    )
    # The second turn is prefilled after the first one.
    assert two["respond (second turn)"].steps[programs.PREFILL] > kept * one["respond"].steps[programs.PREFILL]
    assert two["fine-tune"].steps[programs.TRAIN] == pytest.approx(2 * one["fine-tune"].steps[programs.TRAIN], abs=2)


def test_density_rules_learn_from_pair_per_cluster():
    few = replace_settings(CONFIG, {"select.rule": "density", "select.clusters": 160})
    assert stages(few)["fine-tune"].steps[programs.TRAIN] == 2 * 9


def test_chip_hours_are_seconds_on_all_chips():
    plan = plan_iteration(CONFIG, MADE, BOUNDS)
    result = as_dict(plan, chips=16)
    assert result["seconds"] == pytest.approx(sum(stage.seconds for stage in plan))
    assert result["chip_hours"] == pytest.approx(result["seconds"] * 16 / 3600)
    assert result["planned"] is True


def test_verbose_cloning_is_second_fine_tuning_after_answer_to_every_instruction():
    plain, cloned = (stages(replace_settings(CONFIG, {"clone.enabled": on})) for on in (False, True))
    assert cloned["engrave"].steps == plain["fine-tune"].steps
    assert cloned["fine-tune"].steps[programs.TRAIN] > plain["fine-tune"].steps[programs.TRAIN]
    steps = CONFIG.synthesize.instructions * Lengths().thorough / CONFIG.decode.slots
    assert cloned["answer again"].steps[programs.DECODE] == pytest.approx(steps)
    assert cloned["respond"] == plain["respond"]


def test_thoughts_are_written_before_response_by_principles():
    steps = stages(replace_settings(CONFIG, {"respond.method": "principles"}))["respond"].steps[programs.DECODE]
    written = Lengths().thoughts + Lengths().response
    assert steps == pytest.approx(CONFIG.synthesize.instructions * written / CONFIG.decode.slots)
