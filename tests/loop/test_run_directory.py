import errno
import json
import os
from dataclasses import replace

import pytest
from etils import epath
from scripted_backend import tiny_config

from isheep_jax import config as config_module
from isheep_jax.config import DecodeConfig, RespondConfig, SelectConfig, SFTConfig
from isheep_jax.errors import UserError
from isheep_jax.loop import run_directory
from isheep_jax.loop.records import KEPT, Pair
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.stages.table import STAGES

INPUTS = {"seeds": "1"}


def open_(config, inputs=INPUTS):
    return RunDirectory.open(config, inputs, {"python": "3"})


def pairs(n):
    return [Pair(f"1-{i:06d}-0", f"1-{i:06d}", "do", "", f"done {i}", KEPT) for i in range(n)]


def test_a_new_directory_gets_config_and_environment(tmp_path):
    open_(tiny_config(tmp_path / "a" / "b"))
    names = {p.name for p in (tmp_path / "a" / "b").iterdir()}
    assert names == {"config.json", "inputs.json", "environment.json"}


def test_a_log_and_compiled_programs_beside_the_run_are_no_obstacle(tmp_path):
    (tmp_path / "log.txt").write_text("hello")
    (tmp_path / run_directory.COMPILED).mkdir()
    open_(tiny_config(tmp_path))


def test_something_else_in_the_directory_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(UserError, match=r"workdir: .* holds something else \(thesis.tex\)"):
        open_(tiny_config(tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


def test_a_file_is_not_a_directory(tmp_path):
    (tmp_path / "run").write_text("")
    with pytest.raises(UserError, match="is a file; name a directory"):
        open_(tiny_config(tmp_path / "run"))


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def refuse(self, data):
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(type(epath.Path(tmp_path)), "write_bytes", refuse)
    with pytest.raises(UserError, match=r"workdir: cannot write in .*Permission denied"):
        open_(tiny_config(tmp_path))


def test_a_path_below_a_file_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="workdir: cannot write in"):
        open_(tiny_config(tmp_path / "file" / "run"))


def test_the_same_config_resumes_wherever_the_directory_is_now(tmp_path):
    open_(tiny_config(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    open_(tiny_config(tmp_path / "b", name="other"))


def test_other_settings_are_refused_by_name_and_nothing_changes(tmp_path):
    config = tiny_config(tmp_path)
    open_(config)
    before = (tmp_path / "config.json").read_bytes()
    with pytest.raises(UserError, match=r"seed was 0, now 1; synthesize.shots was 3, now 4; name another") as e:
        open_(replace(config, seed=1, synthesize=replace(config.synthesize, shots=4)))
    assert "\n" not in str(e.value)
    assert (tmp_path / "config.json").read_bytes() == before


def test_iterations_may_grow_but_not_shrink(tmp_path):
    open_(tiny_config(tmp_path, iterations=2))
    open_(tiny_config(tmp_path, iterations=4))
    with pytest.raises(UserError, match=r"iterations was 4, now 3 \(it may only grow\)"):
        open_(tiny_config(tmp_path, iterations=3))


def test_where_and_how_fast_it_computes_may_change(tmp_path):
    open_(tiny_config(tmp_path))
    open_(tiny_config(tmp_path, decode=DecodeConfig(slots=8, steps_per_call=4)))
    run = open_(tiny_config(tmp_path))
    run.stage(1, STAGES["selected"]).write_part(0, pairs(1))
    open_(replace(tiny_config(tmp_path), select=replace(tiny_config(tmp_path).select, min_pairs=0)))
    with pytest.raises(UserError, match=r"decode\.max_length"):
        open_(tiny_config(tmp_path, decode=DecodeConfig(max_length=64)))


def test_settings_of_a_stage_may_change_until_it_has_begun(tmp_path):
    open_(tiny_config(tmp_path))
    open_(tiny_config(tmp_path, select=SelectConfig(threshold=3), respond=RespondConfig(samples=5)))
    run = open_(tiny_config(tmp_path))
    run.stage(1, STAGES["responses"]).write_part(0, pairs(1))
    open_(tiny_config(tmp_path, select=SelectConfig(threshold=3)))
    with pytest.raises(UserError, match=r"respond\.samples was 2, now 5"):
        open_(tiny_config(tmp_path, respond=RespondConfig(samples=5)))


def test_other_seeds_or_prompts_are_refused(tmp_path):
    open_(tiny_config(tmp_path))
    with pytest.raises(UserError, match="made with other files: seeds changed"):
        open_(tiny_config(tmp_path), {"seeds": "2"})


@pytest.mark.parametrize(
    "name",
    ["lost+found/", ".snapshot/", ".DS_Store", "slurm-1.out", "slurm-1.err", "nohup.out", "job.o123", "train.log"],
)
def test_harmless_files_beside_a_new_run_are_no_obstacle_and_stay(tmp_path, name):
    if name.endswith("/"):
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_text("kept")
    open_(tiny_config(tmp_path))
    assert (tmp_path / name).exists()


def test_hidden_remainders_of_others_stay_in_a_directory_that_is_refused(tmp_path):
    (tmp_path / "thesis.tex").touch()
    (tmp_path / ".thesis.tex.tmp").touch()
    with pytest.raises(UserError, match="something else"):
        open_(tiny_config(tmp_path))
    assert len(list(tmp_path.iterdir())) == 2


def forget(directory, *names):
    """Leaves settings out of config.json, as an earlier version that did not have them."""
    tree = json.loads((directory / "config.json").read_text())
    for name in names:
        section, _, field = name.rpartition(".")
        del (tree[section] if section else tree)[field]
    (directory / "config.json").write_text(json.dumps(tree, indent=2) + "\n")


def finished_stage(run):
    files = run.stage(1, STAGES["instructions"])
    files.write_part(0, [])
    files.finish({})


def test_settings_that_came_later_are_no_obstacle_at_the_values_that_change_nothing(tmp_path):
    config = tiny_config(tmp_path)
    open_(config)
    forget(tmp_path, "synthesize.drop_lowest", "decode.kv_cache_dtype", "select.weights", "seed")
    old = open_(config)
    finished_stage(old)
    without = (tmp_path / "config.json").read_bytes()
    for _ in range(2):
        assert open_(config).stage(1, STAGES["instructions"]).done()
    assert (tmp_path / "config.json").read_bytes() == without
    other = replace(config, synthesize=replace(config.synthesize, drop_lowest=0.5))
    with pytest.raises(UserError, match=r"synthesize\.drop_lowest was 0\.0, now 0\.5"):
        open_(other)


def test_stages_keep_their_digests_when_the_stored_settings_are_fewer_or_more(tmp_path):
    config = tiny_config(tmp_path)
    finished_stage(open_(config))
    forget(tmp_path, "synthesize.drop_lowest", "decode.kv_cache_dtype")
    assert open_(config).stage(1, STAGES["instructions"]).done()


def test_setting_whose_default_changed_what_runs_do_has_its_former_value_in_earlier_runs(tmp_path, monkeypatch):
    config = tiny_config(tmp_path)
    open_(config)
    forget(tmp_path, "synthesize.drop_lowest")
    monkeypatch.setitem(config_module.BEFORE_THEY_CAME, "synthesize.drop_lowest", 0.25)
    with pytest.raises(UserError, match=r"synthesize\.drop_lowest was 0\.25, now 0\.0"):
        open_(config)
    open_(replace(config, synthesize=replace(config.synthesize, drop_lowest=0.25)))


def test_later_setting_that_no_stage_has_used_may_be_set_in_an_earlier_run(tmp_path):
    config = tiny_config(tmp_path)
    finished_stage(open_(config))
    forget(tmp_path, "select.weights")
    other = replace(config, select=replace(config.select, weights=(1.0,)))
    assert open_(other).stage(1, STAGES["instructions"]).done()
    assert json.loads((tmp_path / "config.json").read_text())["select"]["weights"] == [1.0]


def test_rematerialization_is_no_setting_of_the_result(tmp_path):
    open_(tiny_config(tmp_path)).stage(1, STAGES["thorough"]).write_part(0, pairs(1))
    open_(tiny_config(tmp_path, sft=SFTConfig(remat="none")))


def model(directory, **files):
    directory.mkdir(exist_ok=True)
    for name, content in files.items():
        (directory / name).write_text(content)
    return {f"model.path/{path.name}": epath.Path(path) for path in sorted(directory.iterdir())}


def test_other_files_of_the_base_model_are_refused_by_name(tmp_path):
    config, base = tiny_config(tmp_path / "run"), tmp_path / "base"
    files = model(base, **{"config.json": "{}", "model.safetensors": "weights"})
    RunDirectory.open(config, INPUTS, {}, files)
    RunDirectory.open(config, INPUTS, {}, files)
    before = (base / "model.safetensors").stat()
    (base / "model.safetensors").write_text("WEIGHTS")
    os.utime(base / "model.safetensors", ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(UserError, match=r"other files: model\.path/model\.safetensors changed since it began") as error:
        RunDirectory.open(config, INPUTS, {}, files)
    assert "\n" not in str(error.value)
    (base / "model.safetensors").write_text("weights")
    RunDirectory.open(config, INPUTS, {}, files)
    (base / "config.json").unlink()
    with pytest.raises(UserError, match=r"model\.path/config\.json changed"):
        RunDirectory.open(config, INPUTS, {}, model(base))


def test_base_model_that_was_copied_elsewhere_is_the_same(tmp_path):
    config = tiny_config(tmp_path / "run")
    RunDirectory.open(config, INPUTS, {}, model(tmp_path / "a", weights="w"))
    RunDirectory.open(config, INPUTS, {}, model(tmp_path / "b", weights="w"))


def test_files_of_the_base_model_are_read_once(tmp_path, monkeypatch):
    config, files = tiny_config(tmp_path / "run"), model(tmp_path / "base", weights="w")
    RunDirectory.open(config, INPUTS, {}, files)
    monkeypatch.setattr(run_directory, "file_digests", lambda paths: [1 / 0 for _ in paths])
    RunDirectory.open(config, INPUTS, {}, files)


@pytest.mark.parametrize("content", ["", "[]", "{", '{"model.path/weights": 1}'])
def test_damaged_stamps_are_no_obstacle(tmp_path, content):
    config, files = tiny_config(tmp_path / "run"), model(tmp_path / "base", weights="w")
    RunDirectory.open(config, INPUTS, {}, files)
    (tmp_path / "run" / "model_files.json").write_text(content)
    RunDirectory.open(config, INPUTS, {}, files)


def test_earlier_run_that_did_not_record_its_models_goes_on_and_records_them(tmp_path):
    config = tiny_config(tmp_path / "run")
    open_(config)
    RunDirectory.open(config, INPUTS, {}, model(tmp_path / "base", weights="w"))
    with pytest.raises(UserError, match=r"model\.path/weights changed"):
        RunDirectory.open(config, INPUTS, {}, model(tmp_path / "base", weights="v"))


def test_judge_may_change_until_it_has_been_asked(tmp_path):
    config = tiny_config(tmp_path / "run")
    judge = {"assess.judge/weights": model(tmp_path / "judge", weights="w")["model.path/weights"]}
    run = RunDirectory.open(config, INPUTS, {}, judge)
    (tmp_path / "judge" / "weights").write_text("v")
    run = RunDirectory.open(config, INPUTS, {}, judge)
    run.stage(1, STAGES["scores"]).write_part(0, [])
    (tmp_path / "judge" / "weights").write_text("u")
    with pytest.raises(UserError, match=r"assess\.judge/weights changed"):
        RunDirectory.open(config, INPUTS, {}, judge)


def test_other_versions_are_a_warning_of_one_line(tmp_path):
    def versions(jax):
        return {"python": "3.11.1", "packages": {"jax": jax, "flax": "1"}}

    config = tiny_config(tmp_path)
    assert RunDirectory.open(config, INPUTS, versions("0.1")).warnings == []
    assert RunDirectory.open(config, INPUTS, versions("0.1")).warnings == []
    (warning,) = RunDirectory.open(config, INPUTS, versions("0.2")).warnings
    assert warning.startswith("the run began with jax 0.1 (now 0.2): ")


@pytest.mark.parametrize("name", ["config.json", "inputs.json"])
@pytest.mark.parametrize("content", ["", "{", "[]", "1", "null", '"x"', "[[]]", "\ufffd"])
def test_damaged_files_are_refused_by_name_in_one_line(tmp_path, name, content):
    open_(tiny_config(tmp_path))
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=name) as error:
        open_(tiny_config(tmp_path))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"packages": 1}'])
def test_damaged_versions_are_written_anew_with_a_warning(tmp_path, content):
    open_(tiny_config(tmp_path))
    (tmp_path / "environment.json").write_text(content)
    (warning,) = open_(tiny_config(tmp_path)).warnings
    assert "environment.json" in warning
    assert open_(tiny_config(tmp_path)).warnings == []


def test_iterations_of_another_type_are_no_crash(tmp_path):
    open_(tiny_config(tmp_path))
    tree = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(tree | {"iterations": "3"}))
    open_(tiny_config(tmp_path))
