"""The table of stages against the config and against itself."""

import dataclasses
import itertools

import pytest

from isheep_jax.config import Config
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.stages.table import LEVELS, STAGES, inputs_after, later_sections


def test_levels_name_sections_of_the_config_and_each_once():
    sections = [section for names in LEVELS.values() for section in names]
    assert len(sections) == len(set(sections))
    assert set(sections) <= {f.name for f in dataclasses.fields(Config)}


def test_every_section_of_the_config_has_a_level_or_is_read_from_the_start():
    sections = {f.name for f in dataclasses.fields(Config) if dataclasses.is_dataclass(f.default_factory)}
    # The model and how it is run count for every stage; the rest says how far a run goes and what is measured.
    without_level = {"model", "mesh", "decode", "retrieval", "guard", "stop", "evaluate"}
    assert sections == without_level | {section for names in LEVELS.values() for section in names}


def test_every_template_that_not_all_runs_read_belongs_to_a_stage():
    prefixes = tuple(prefix.removeprefix("prompts/") for spec in STAGES.values() for prefix in spec.inputs)
    templates = {path.stem for path in load("standard").directory.glob("*.jinja")}
    # Templates of the first level, which nothing is made before.
    assert {t for t in templates if not t.startswith(prefixes)} == {
        "synthesize",
        "topics",
        "guided",
        "retrieved",
        "follow_up",
    }


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
