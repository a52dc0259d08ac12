"""What a plan says is loaded and saved between stages is what the loop loads, and what the hosts' memory spares it."""

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from scripted_backend import ScriptedBackend, SilentReporter, tiny_config

from isheep_jax.checkpoint.adapters import save_adapter
from isheep_jax.checkpoint.pretrained import open_model
from isheep_jax.checkpoint.safetensors_file import read_header
from isheep_jax.config import SFTConfig
from isheep_jax.loop.algorithm import run
from isheep_jax.model.lora import lora_table
from isheep_jax.named_configs import named_config
from isheep_jax.planning.demands import stage_demands
from isheep_jax.planning.lengths import Lengths
from isheep_jax.planning.transfers import (
    BASE,
    ENGRAVED,
    FOREIGN,
    HOST_LINK,
    MADE,
    MADE_BEFORE,
    READ_RATE,
    STREAM_RATE,
    WRITE_RATE,
    Hosts,
    adapter_bytes,
    at_end,
    at_first,
    between_stages,
    loads,
)
from isheep_jax.presets import replace_settings

CONFIG = named_config("llama_8b_v5e")  # saves adapters; the base judges and is trained on
STAGES = ("instructions", "responses", "scores", "model")
KNOWN = Hosts(count=4, devices=4, model_bytes=16e9, adapter_bytes=0.1e9, memory=96e9)


def planned(config, hosts, stages=STAGES):
    return {row.name: row.seconds for row in between_stages(config, hosts, stages)}


class Recording(ScriptedBackend):
    """Keeps who was loaded for decoding and trained on, and lets go of a model to train another, as devices must."""

    def __init__(self, judge):
        super().__init__(judge=judge)
        self.events = []

    def load(self, directory):
        before = len(self.loaded)
        model = super().load(directory)
        if len(self.loaded) > before:
            self.events.append((directory, "decode"))
        return model

    def fine_tune(self, job, progress):
        self.events.append((job.start, "train"))
        self._held = "nothing"
        return super().fine_tune(job, progress)


LOOPS = {
    "the base judges": {"assess.judge": "base"},
    "the writer judges": {"assess.judge": "current"},
    "an earlier model judges": {"assess.judge": "previous", "guard.judge": "warn"},
    "another model judges": {"assess.judge": "elsewhere"},
    "a second judge is asked": {"assess.judge": "base", "assess.agreement": 10},
    "a second turn": {"assess.judge": "base", "synthesize.turns": 2},
    "verbose cloning": {"assess.judge": "base", "clone.enabled": True},
    "training goes on": {"assess.judge": "current", "sft.start": "previous"},
    "vectors": {"assess.judge": "base", "select.rule": "density", "select.clusters": 4},
}


@pytest.mark.parametrize("settings", LOOPS.values(), ids=LOOPS)
def test_planned_loads_are_those_that_the_loop_asks_for(tmp_path, settings):
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "weights.json").write_text("[]")
    if settings["assess.judge"] == "elsewhere":
        settings = {**settings, "assess.judge": str(elsewhere)}
    few = {"synthesize.instructions": 12, "respond.samples": 1}
    config = replace_settings(tiny_config(tmp_path / "run", iterations=3), {**few, **settings})
    backend = Recording(elsewhere if settings["assess.judge"] == str(elsewhere) else None)
    run(config, backend, {}, frozenset(), SilentReporter())
    run_directory = tmp_path / "run"
    models = {
        None: BASE,
        elsewhere: FOREIGN,
        run_directory / "iteration_1" / "model": MADE_BEFORE,
        run_directory / "iteration_2" / "model": MADE,
        run_directory / "iteration_3" / "engraved" / "model": ENGRAVED,
    }
    trainings = 2 if config.clone.enabled else 1
    ends = [i for i, (_, layout) in enumerate(backend.events) if layout == "train"]
    third = backend.events[ends[2 * trainings - 1] + 1 :]
    expected = [(models[directory and type(run_directory)(directory)], layout) for directory, layout in third]
    stages = [stage for stage, _ in stage_demands(config, Lengths())]
    assert [(load.model, load.layout) for load in loads(config, stages)] == expected


def test_judge_at_the_models_own_path_is_the_base():
    own = replace_settings(CONFIG, {"assess.judge": CONFIG.model.path})
    assert loads(own, STAGES) == loads(CONFIG, STAGES)


def test_base_in_the_hosts_memory_is_placed_and_not_read():
    seconds = planned(CONFIG, KNOWN)
    assert seconds == pytest.approx(
        {
            "read weights": 0.1e9 / READ_RATE,  # the writer's adapter
            "place weights": 3 * 1e9 / HOST_LINK,  # of each of 16 devices: writer, judge, training
            "save the adapter": 0.1e9 / STREAM_RATE,  # one process
        }
    )
    assert [row.seconds for row in at_first(KNOWN)] == pytest.approx([2 * 4e9 / READ_RATE])
    assert [row.seconds for row in at_end(CONFIG, KNOWN)] == pytest.approx([4e9 / WRITE_RATE])


@pytest.mark.parametrize(
    ("memory", "one_layout", "read", "first"),
    [
        (0, False, 12.1e9, 0),  # not known: writer, judge and training read their shares
        (3e9, False, 6.1e9, 3e9),  # a part of what decoding needs, twice, and nothing of what training needs
        (6e9, False, 2.1e9, 6e9),  # all of the one, half of the other
        (6e9, True, 0.1e9, 4e9),  # one copy for both
    ],
)
def test_what_does_not_fit_into_the_hosts_memory_is_read_each_time(memory, one_layout, read, first):
    hosts = Hosts(4, 4, 16e9, 0.1e9, memory, one_layout)
    assert planned(CONFIG, hosts)["read weights"] == pytest.approx(read / READ_RATE)
    assert sum(row.seconds for row in at_first(hosts)) == pytest.approx(first / READ_RATE)


def test_whole_models_are_saved_read_back_and_nothing_is_left_for_the_end():
    whole = replace_settings(CONFIG, {"sft.save": "model"})
    seconds = planned(whole, KNOWN)
    assert seconds["read weights"] == pytest.approx(4e9 / READ_RATE)  # the writer
    assert seconds["save the model"] == pytest.approx(4e9 / WRITE_RATE)
    assert seconds["save the adapter"] == pytest.approx(0.1e9 / STREAM_RATE)
    assert at_end(whole, KNOWN) == []


def test_each_of_two_fine_tunings_is_saved():
    cloned = ("instructions", "responses", "scores", "engraved", "thorough", "model")
    one, two = (planned(CONFIG, KNOWN, stages) for stages in (STAGES, cloned))
    assert two["save the adapter"] == pytest.approx(2 * one["save the adapter"])
    assert two["place weights"] == pytest.approx(5 / 3 * one["place weights"])


def test_foreign_judge_and_adapters_of_all_earlier_trainings_are_read():
    foreign = replace_settings(CONFIG, {"assess.judge": "some/model"})
    assert planned(foreign, KNOWN)["read weights"] == pytest.approx(4.1e9 / READ_RATE)
    # Iteration 3 writes with two adapters, and trains on what they make of the base.
    chained = replace_settings(CONFIG, {"sft.start": "previous", "iterations": 3})
    assert planned(chained, KNOWN)["read weights"] == pytest.approx(4 * 0.1e9 / READ_RATE)


def test_adapter_is_as_large_as_the_file_of_one(small_checkpoint, tmp_path):
    base, sft = open_model(small_checkpoint), SFTConfig(lora_rank=2)
    lora = jax.tree.map(lambda spec: jnp.zeros(spec.shape), lora_table(base.architecture, 2))
    place = epath.Path(tmp_path / "adapter")
    save_adapter(place, lora, base.architecture, sft, "base", dtype=jnp.float32, tokenizer=base.tokenizer)
    stored = read_header(place / "adapter_model.safetensors").values()
    numbers = sum(tensor.shape[0] * tensor.shape[1] for tensor in stored)
    assert {tensor.dtype.itemsize for tensor in stored} == {4}
    assert adapter_bytes(base.architecture, sft) == 4 * numbers
    assert adapter_bytes(base.architecture, SFTConfig(method="full")) == 0
