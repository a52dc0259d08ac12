"""Any file of a run that is cut, changed or deleted is made again as it was, or refused by its name; none is used."""

import re
import shutil

import pytest
from scripted_backend import ScriptedBackend, SilentReporter, evaluator, snapshot, tiny_config

from isheep_jax.config import CloneConfig
from isheep_jax.errors import UserError
from isheep_jax.loop import made_models
from isheep_jax.loop.algorithm import run


def config_of(directory, iterations):
    return tiny_config(directory, iterations=iterations, clone=CloneConfig(enabled=True))


def go(directory, iterations):
    run(config_of(directory, iterations), ScriptedBackend(), {"fake": evaluator}, frozenset(), SilentReporter())


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of one iteration, and what it leaves after a second one."""
    place = tmp_path_factory.mktemp("damage")
    go(place / "one", 1)
    shutil.copytree(place / "one", place / "two")
    go(place / "two", 2)
    return place / "one", {name: data for name, data in snapshot(place / "two").items() if name != "config.json"}


def cut(path):
    path.write_bytes(path.read_bytes()[:-7])


def flip(path):
    data = path.read_bytes()
    at = len(data) // 3
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


def delete(path):
    path.unlink()


# What the second iteration does not look at: versions, of which a run only warns, and models that have done their work.
UNUSED = ("environment.json", "iteration_1/adapter/", "iteration_1/engraved/model/", "iteration_1/engraved/adapter/")


def one_of_each_kind(names):
    return list({name.rpartition("/")[2]: name for name in names}.values())


@pytest.mark.parametrize("damage", [cut, flip, delete])
@pytest.mark.parametrize("chosen", [one_of_each_kind, pytest.param(list, marks=pytest.mark.chaos)])
def test_run_goes_on_to_the_same_bytes_or_names_the_damaged_file(finished, tmp_path, monkeypatch, damage, chosen):
    source, expected = finished
    names = chosen(name for name in snapshot(source) if not name.startswith(UNUSED))
    assert len(names) > 12
    wrong = []
    for name in names:
        monkeypatch.setattr(made_models, "_known", set())
        directory = tmp_path / "run"
        shutil.rmtree(directory, ignore_errors=True)
        shutil.copytree(source, directory)
        if not (directory / name).read_bytes():
            continue
        damage(directory / name)
        try:
            go(directory, 2)
        except UserError as error:
            if "\n" in str(error) or name.rpartition("/")[2] not in str(error):
                wrong.append((name, str(error)))
        else:
            found = {n: data for n, data in snapshot(directory).items() if n != "config.json"}
            differ = sorted(n for n in found.keys() | expected.keys() if found.get(n) != expected.get(n))
            if differ:
                wrong.append((name, differ))
    assert wrong == []


@pytest.mark.parametrize("damage", [cut, flip, delete])
def test_finished_run_whose_last_model_is_damaged_says_so(finished, tmp_path, monkeypatch, damage):
    source, _ = finished
    shutil.copytree(source, tmp_path / "run")
    (model,) = (path for path in (tmp_path / "run" / "iteration_1" / "model").iterdir() if path.name != "config.json")
    damage(model)
    monkeypatch.setattr(made_models, "_known", set())
    with pytest.raises(UserError, match=rf"iteration_1/model/{re.escape(model.name)} (is missing|has changed)"):
        go(tmp_path / "run", 1)
