"""A run that is killed anywhere and started again with the same command ends with the same bytes.

This is the home of that property for the whole loop: two configs which together have every stage, and every write.
"""

import json
import os

import pytest
from scripted_backend import (
    NOUNS,
    VERBS,
    Fuse,
    Killed,
    ScriptedBackend,
    SilentReporter,
    evaluator,
    snapshot,
    tiny_config,
)

from isheep_jax.config import (
    AssessConfig,
    CloneConfig,
    Config,
    GuardConfig,
    RespondConfig,
    RetrievalConfig,
    SelectConfig,
    SFTConfig,
    SynthesizeConfig,
)
from isheep_jax.loop import context
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.stages import synthesize
from isheep_jax.loop.stages.table import STAGES

# The best of several ways of prompting, conversations of two turns, a second judge, perplexities, clusters, training on
# all pairs so far; all readings.
TWO_TURNS = {
    "synthesize": SynthesizeConfig(
        instructions=30,
        shots=3,
        other_shots=(2,),
        other_temperatures=(0.5,),
        trial_prompts=3,
        choose="diverse",
        drop_lowest=0.2,
        novelty=0.9,
        turns=2,
    ),
    "assess": AssessConfig(
        readings=("rubric", "lift", "backward_lift", "likelihood", "self_consistency", "pairwise"),
        **{"judge": "current", "read": "sampled", "samples": 2, "agreement": 9},
    ),
    "select": SelectConfig(
        rule="density_perplexity", clusters=9, buckets="clusters", bucket_share=0.5, perplexity=20.0, max_pairs=8
    ),
    "sft": SFTConfig(start="previous", data="all"),
}
# A judge that is checked, instructions about topics, responses after similar pairs, and thorough answers of an engraved
# model; adapters are stored in place of models.
METHODS = {
    "respond": RespondConfig(method="retrieved", samples=2, rules="basic"),
    "retrieval": RetrievalConfig(examples=3, pool="seeds_and_kept"),
    "assess": AssessConfig(read="expected"),
    "guard": GuardConfig(judge="warn"),
    "clone": CloneConfig(enabled=True),
    "sft": SFTConfig(save="adapter"),
}


def go(config: Config, fuse: Fuse | None = None) -> ScriptedBackend:
    backend = ScriptedBackend(fuse, save=config.sft.save)
    run(config, backend, {"fake": evaluator}, frozenset(), SilentReporter())
    return backend


def differing(found: dict[str, bytes], expected: dict[str, bytes]) -> list[str]:
    """Names of files that differ; config.json names the working directory."""
    names = found.keys() | expected.keys()
    return [name for name in names if name != "config.json" and found.get(name) != expected.get(name)]


@pytest.fixture
def small_parts(monkeypatch):
    """A kill then finds stages with some of their parts in place."""
    monkeypatch.setattr(context, "PART", 7)
    monkeypatch.setattr(context, "BLOCK", 21)
    monkeypatch.setattr(synthesize, "PART_PROMPTS", 5)


def config_of(name: str, root, workdir: str) -> Config:
    if name == "two turns":
        return tiny_config(root / workdir, **TWO_TURNS)
    seeds = root / "seeds.jsonl"
    tasks = [{"instruction": f"{verb} {n} {noun}.", "output": noun} for n, (verb, noun) in enumerate(zip(VERBS, NOUNS))]
    seeds.write_text("".join(json.dumps(task) + "\n" for task in tasks))
    synthesize = SynthesizeConfig(
        method="topics", topic_share=0.4, instructions=30, shots=3, novelty=0.9, rules="basic", seeds=str(seeds)
    )
    return tiny_config(root / workdir, synthesize=synthesize, **METHODS)


@pytest.mark.parametrize("name", ["two turns", "methods"])
def test_killed_anywhere_it_resumes_to_the_same_bytes(tmp_path, small_parts, name):
    fuse = Fuse()
    whole = config_of(name, tmp_path, "whole")
    go(whole, fuse)
    expected = snapshot(tmp_path / "whole")
    stages = {path.split("/")[-2] for path in expected if path.endswith("/DONE")}
    assert stages <= {spec.directory for spec in STAGES.values()}
    assert ("vectors" if name == "two turns" else "topics") in stages
    assert f"iteration_2/{'vectors' if name == 'two turns' else 'examples'}/part-00001.jsonl" in expected
    for n in range(1, fuse.count, fuse.count // 8):
        config = config_of(name, tmp_path, str(n))
        with pytest.raises(Killed):
            go(config, Fuse(n))
        go(config)
        assert differing(snapshot(tmp_path / str(n)), expected) == []
    backend = go(whole)
    assert (backend.loaded, backend.calls) == ([], [])


def test_the_two_configs_have_every_stage(tmp_path):
    done = set()
    for name in ("two turns", "methods"):
        go(config_of(name, tmp_path, name))
        done |= {path.split("/")[-2] for path in snapshot(tmp_path / name) if path.endswith("/DONE")}
    assert done == {spec.directory for spec in STAGES.values() if spec.record}


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_any_write_it_resumes_to_the_same_bytes(tmp_path, monkeypatch, when):
    go(tiny_config(tmp_path / "whole"))
    expected = snapshot(tmp_path / "whole")
    replace = os.replace
    fuse = Fuse()

    def replacing(path, target):
        if when == "before":
            fuse.tick()
        replace(path, target)
        if when == "after":
            fuse.tick()

    monkeypatch.setattr(os, "replace", replacing)
    go(tiny_config(tmp_path / "counted"))
    # Killed before writes 1, 3, ... an even number of files is in place, after them an odd number: together, any.
    for n in range(1, fuse.count + 1, 2):
        config = tiny_config(tmp_path / str(n))
        fuse.at, fuse.count = n, 0
        with pytest.raises(Killed):
            go(config)
        fuse.at = None
        go(config)
        assert differing(snapshot(tmp_path / str(n)), expected) == []


def test_parts_commit_while_others_are_still_being_written(tmp_path, small_parts):
    go(tiny_config(tmp_path / "whole"))
    config = tiny_config(tmp_path / "cut")
    with pytest.raises(Killed):
        go(config, Fuse(78))
    assert not (tmp_path / "cut" / "iteration_1" / "responses" / "DONE").exists()
    assert len(list((tmp_path / "cut" / "iteration_1" / "responses").glob("part-*"))) >= 2
    go(config)
    assert differing(snapshot(tmp_path / "cut"), snapshot(tmp_path / "whole")) == []
