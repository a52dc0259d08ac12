"""The plan's stages are the loop's."""

from test_planned_iteration import CONFIG, stages

from isheep_jax.loop.stages.table import STAGES
from isheep_jax.planning.demands import NOT_PLANNED
from isheep_jax.presets import replace_settings

EVERY_STAGE = {
    "synthesize.turns": 2,
    "assess.agreement": 100,
    "select.rule": "density",
    "clone.enabled": True,
}


def test_plan_has_every_stage_of_the_loop_but_those_that_it_says_it_leaves_out():
    planned = set(stages(replace_settings(CONFIG, EVERY_STAGE)))
    expected = {spec.title_of(turn) for name, spec in STAGES.items() if name not in NOT_PLANNED for turn in spec.turns}
    assert planned == expected


def test_stages_that_the_plan_leaves_out_are_stages():
    assert set(NOT_PLANNED) < set(STAGES)
