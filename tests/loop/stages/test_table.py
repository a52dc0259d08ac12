"""The table of stages against the config and against itself."""

import dataclasses
import itertools

import pytest

from isheep_jax.config import Config
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.stages.table import LEVELS, STAGES, inputs_after, later_sections, templates_of
from isheep_jax.presets import replace_settings


def test_levels_name_sections_of_the_config_and_each_once():
    sections = [section for names in LEVELS.values() for section in names]
    assert len(sections) == len(set(sections))
    assert set(sections) <= {f.name for f in dataclasses.fields(Config)}


def test_every_section_of_the_config_has_a_level_or_is_read_from_the_start():
    sections = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
    # The model and how it is run count for every stage; the rest says how far a run goes and what is measured.
    without_level = {"model", "mesh", "decode", "retrieval", "guard", "stop", "evaluate"}
    assert sections == without_level | {section for names in LEVELS.values() for section in names}


def test_every_template_is_first_read_by_one_stage():
    templates = [name for spec in STAGES.values() for name in spec.templates]
    for name in ("standard", "tiny"):
        assert {path.stem for path in load(name).directory.glob("*.jinja")} <= set(templates)
    assert {path.stem for path in load("standard").directory.glob("*.jinja")} == set(templates)
    assert len(templates) == len(set(templates))


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        ({"synthesize.method": "topics"}, {"topics", "guided"}),
        ({"synthesize.method": "retrieved"}, {"retrieved"}),
        ({"respond.method": "retrieved"}, {"retrieved"}),
        ({"respond.method": "principles"}, {"principles"}),
        ({"assess.level": "both", "assess.prompt": "joint"}, {"joint"}),
        ({"assess.readings": ("rubric", "backward_lift")}, {"backward"}),
        ({"assess.readings": ("pairwise", "rubric")}, {"pairwise"}),
        ({"synthesize.turns": 2}, {"follow_up"}),
        ({"clone.enabled": True}, {"thorough"}),
    ],
)
def test_a_config_needs_the_templates_of_what_it_switches_on(settings, added):
    standard = ("synthesize", "quality", "following")
    assert templates_of(Config()) == standard
    needed = templates_of(replace_settings(Config(), settings))
    assert len(needed) == len(set(needed))
    assert set(needed) - set(standard) == added


def test_a_stage_reads_what_is_made_before_it_on_no_later_level():
    names, levels = list(STAGES), list(LEVELS)
    for name, spec in STAGES.items():
        for read in spec.reads:
            assert names.index(read) < names.index(name)
            if 1 in spec.turns:
                assert levels.index(STAGES[read].level) <= levels.index(spec.level) or name == "agreement"


def test_no_two_stages_of_a_turn_share_a_directory_or_a_title():
    for turn in (1, 2):
        specs = [s for s in STAGES.values() if turn in s.turns]
        assert len({s.directory for s in specs}) == len(specs)
    titles = [s.title_of(turn) for s in STAGES.values() for turn in s.turns]
    assert len(titles) == len(set(titles))


@pytest.mark.parametrize(("earlier", "later"), list(itertools.pairwise(LEVELS)))
def test_what_is_read_later_shrinks_from_level_to_level(earlier, later):
    assert later_sections(earlier) - later_sections(later) == set(LEVELS[later])
    assert set(inputs_after(later)) <= set(inputs_after(earlier))


def test_nothing_is_read_after_the_last_level():
    last = list(LEVELS)[-1]
    assert later_sections(last) == set()
    assert inputs_after(last) == ()
