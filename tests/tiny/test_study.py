"""The study's variants change what they say, and its table and picture hold what was measured."""

import xml.etree.ElementTree as ElementTree

import pytest

from isheep_jax.config import flatten, named_config
from isheep_jax.tiny import study, study_table


def changed(variant: str) -> dict:
    before = named_config("tiny")
    after = flatten(study.VARIANTS[variant][1](before))
    return {name: value for name, value in after.items() if value != flatten(before)[name]}


def test_each_control_changes_only_what_it_is_about():
    assert changed("loop") == {}
    assert changed("random") == {"select.rule": "random", "respond.samples": 1}
    assert changed("unfiltered") == {"select.rule": "none", "respond.samples": 1}
    instructions = 3 * named_config("tiny").synthesize.instructions
    assert changed("once_fraction") == {"iterations": 1, "synthesize.instructions": instructions}
    assert changed("once_pairs") == {
        "iterations": 1,
        "synthesize.instructions": instructions,
        "select.fraction": pytest.approx(0.1),
    }
    reference = changed("reference")
    assert reference["assess.read"] == "sampled"
    assert reference["select.rule"] == "threshold"


def rows(*accuracies: float) -> list[dict]:
    return [{"accuracy": a, "content": 1 - a / 10, "count": 100} for a in accuracies]


RESULTS = {
    "base_x": {"loop": {1: rows(0.1, 0.5, 0.7, 0.9), 2: rows(0.1, 0.7, 0.9, 0.9)}, "once_pairs": {1: rows(0.1, 0.6)}}
}


def test_the_table_gives_mean_interval_and_every_run():
    text = study_table.table(RESULTS, {"loop": "the loop", "once_pairs": "one round"})
    assert "Base `base_x`, 100 prompts" in text
    # Student's t for two values is 12.706; the standard error of 0.5 and 0.7 is 0.1.
    assert "| the loop | 2 | 0.100 | 0.600 ± 1.271 | 0.800 ± 1.271 | 0.900 ± 0.000 | 0.990 → 0.910 ± 0.000 |" in text
    assert "| one round | 1 | 0.100 | 0.600 |  |  | 0.990 → 0.940 |" in text
    assert "- the loop: 1: 0.500 0.700 0.900; 0.910 | 2: 0.700 0.900 0.900; 0.910" in text


def test_the_picture_is_xml_with_a_curve_for_each_variant():
    picture = ElementTree.fromstring(study_table.figure(RESULTS))
    curves = picture.findall("{http://www.w3.org/2000/svg}polyline")
    # The mean of each variant, and the two seeds of the loop.
    assert len(curves) == 4
