"""Programs that are compiled ahead: those of the stages' settings, and then nothing is left to compile."""

import shutil
import threading
import time
from pathlib import Path

import jax
import pytest
from accelerator_sizes import accelerator_sizes

from isheep_jax.decode.lowering import Program
from isheep_jax.decode.programs import clear_programs
from isheep_jax.errors import UserError
from isheep_jax.named_configs import named_config
from isheep_jax.presets import replace_settings
from isheep_jax.runtime import backend as backend_module
from isheep_jax.runtime import precompile
from isheep_jax.runtime.backend import JaxBackend
from isheep_jax.runtime.compilations import compilations
from isheep_jax.runtime.run import run
from isheep_jax.train import main

ROOT = Path(__file__).parents[2]
LARGE = {
    f"jit({name})"
    for name in (
        *("decode_steps", "prefill", "make_prefix", "allocate_cache", "packed_logprobs", "second_logprobs"),
        *("token_logprobs", "segment_means", "init_state", "train_step", "loss", "export_params"),
    )
}
SMALL = {
    "iterations": 1,
    "synthesize.instructions": 8,
    "respond.samples": 2,
    "select.fraction": 1.0,
    "evaluate.limit": 16,
    "sft.epochs": 1,
    "sft.batch_size": 8,
    "decode.slots": 16,
    # No test has decoded so before.
    "decode.steps_per_call": 11,
    "guard.judge": "off",
}


@pytest.fixture
def accelerator(monkeypatch):
    """Sizes are those of an accelerator, on this CPU."""
    accelerator_sizes(monkeypatch, row=512)
    monkeypatch.setattr(backend_module, "platform_of", lambda mesh: "gpu")


def small(workdir, **settings):
    return replace_settings(named_config("tiny"), {**SMALL, "workdir": str(workdir), **settings})


def names(config) -> set[str]:
    return {program.name for program in JaxBackend(config, weights=False)._decoding_programs()}


def test_programs_follow_the_settings(accelerator, tmp_path):
    plain = names(small(tmp_path / "run"))
    # In the tiny world the beginnings of prompts are too short to be shared, and all numbers are single tokens.
    assert plain == {
        "decode 16 slots of 512 tokens, 512 of them in use",
        "cache of 16 slots of 512 tokens",
        "prefill rows of 512 tokens for 16 slots of 512 tokens",
        "score 10 choices, rows of 512 tokens",
    }
    sampled = names(small(tmp_path / "run", **{"assess.read": "sampled"}))
    assert sampled == {name for name in plain if not name.startswith("score")}
    read = names(small(tmp_path / "run", **{"assess.readings": ("lift",), "select.buckets": "clusters"}))
    texts = {f"score texts of {n} tokens, rows of 512" for n in (128, 512)}
    assert read == sampled | texts | {"embed, rows of 512 tokens"}
    prompts = shutil.copytree(ROOT / "isheep_jax" / "tiny" / "prompts", tmp_path / "prompts")
    rubric = prompts / "quality.jinja"
    rubric.write_text("good or bad " * 4 + rubric.read_text())
    shared = names(small(tmp_path / "run", prompts=str(prompts)))
    assert shared - plain == {"prefix of 128 tokens", "score 10 choices, rows of 512 tokens after 128"}
    rubric.write_text("good or bad " * 99 + rubric.read_text())  # nothing fits after it
    assert names(small(tmp_path / "run", prompts=str(prompts))) == plain


def test_the_first_load_compiles_what_most_prompts_need(accelerator, tmp_path, small_checkpoint):
    config = small(tmp_path / "run", **{"model.path": str(small_checkpoint), "decode.max_length": 512})
    before = compilations()
    engine = JaxBackend(config).load(None)
    new = compilations() - before
    made = new.compiled + new.cached
    assert made["jit(decode_steps)"] == made["jit(prefill)"] == made["jit(packed_logprobs)"] == 1
    assert engine.config.slots == 16


def test_where_loading_fails_no_further_program_is_compiled(monkeypatch):
    monkeypatch.setattr(precompile, "_THREADS", 1)
    begun, done = [], threading.Event()

    def compile_one():
        begun.append(1)
        done.wait(10)

    def load():
        with precompile.compiling([Program(str(number), compile_one) for number in range(9)]) as compiling:
            futures.extend(future for _, future in compiling)
            while not begun:
                time.sleep(0.01)
            raise UserError("the weights are damaged")

    futures = []
    with pytest.raises(UserError):
        load()
    done.set()
    futures[0].result()
    assert len(begun) == 1
    assert all(future.cancelled() for future in futures[1:])


def test_the_command_keeps_programs_and_needs_no_weights(tmp_path, small_checkpoint, capsys):
    model = tmp_path / "model"
    model.mkdir()
    for path in small_checkpoint.iterdir():
        if path.suffix != ".safetensors":
            (model / path.name).write_bytes(path.read_bytes())
    settings = [f"--{name}={value}" for name, value in SMALL.items()]
    arguments = ["--config=tiny", f"--workdir={tmp_path}/run", f"--model.path={model}", *settings, "--precompile"]
    main(arguments)
    lines = capsys.readouterr().out.splitlines()
    assert "  train step" in lines
    assert "  decode 16 slots of 128 tokens" in lines
    assert lines[-1].startswith("4 programs in ")
    assert not (tmp_path / "run").exists()  # of a run on a disk of this machine, they are in the user's cache


@pytest.fixture
def kept():
    """Every program is kept, however fast it compiles."""
    name = "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, name)
    jax.config.update(name, 0)
    yield
    jax.config.update(name, before)


@pytest.mark.slow
def test_a_start_after_it_compiles_none_of_them_again(accelerator, kept, tmp_path):
    config = small(tmp_path / "run", **{"decode.steps_per_call": 13, "sft.weight_decay": 0.0321})
    before = compilations()
    result = JaxBackend(config, weights=False).precompile(lambda name: None)
    ahead = compilations() - before
    assert result.programs == 4 + 3
    # As in another process, nothing is left in memory.
    clear_programs()
    jax.clear_caches()
    before = compilations()
    run(config)
    new = compilations() - before
    assert not LARGE & new.compiled.keys(), new.compiled
    assert new.cached.keys() >= LARGE & (ahead.compiled + ahead.cached).keys() >= {"jit(prefill)", "jit(train_step)"}
