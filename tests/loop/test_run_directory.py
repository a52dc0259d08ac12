import errno
from dataclasses import replace

import pytest
from etils import epath
from scripted_backend import tiny_config

from isheep_jax.config import DecodeConfig, RespondConfig, SelectConfig
from isheep_jax.errors import UserError
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


def test_a_log_beside_the_run_is_no_obstacle(tmp_path):
    (tmp_path / "log.txt").write_text("hello")
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
