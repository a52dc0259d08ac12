"""A model that the run made is used as it was made, or refused by the name of the file that has changed."""

import json

import pytest
from etils import epath

from isheep_jax.errors import UserError
from isheep_jax.loop import made_models


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The directory of an iteration with a model and an adapter, as another process sees it."""
    for directory in ("model", "adapter"):
        (tmp_path / directory).mkdir()
        (tmp_path / directory / "weights").write_bytes(bytes(range(100)))
        (tmp_path / directory / "README.md").write_text("card")
    made_models.record(epath.Path(tmp_path), {"metrics": {"loss": 0.5}, "seconds": 1.0})
    monkeypatch.setattr(made_models, "_known", set())
    return epath.Path(tmp_path)


def flip(path, at):
    data = path.read_bytes()
    path.write_bytes(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :])


@pytest.mark.parametrize("directory", ["model", "adapter"])
@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted"])
def test_damaged_file_is_refused_by_name(place, directory, damage):
    made_models.check(place / directory)
    made_models._known.clear()
    path = place / directory / "weights"
    if damage == "flipped":
        flip(path, 50)
    elif damage == "cut":
        path.write_bytes(path.read_bytes()[:-1])
    else:
        path.unlink()
    with pytest.raises(UserError, match=rf"{directory}/weights (has changed|is missing)") as error:
        made_models.check(place / directory)
    assert "\n" not in str(error.value)
    assert "fine_tune.json" in str(error.value)


def test_card_may_be_edited(place):
    (place / "model" / "README.md").write_text("mine")
    made_models.check(place / "model")


def test_directories_that_no_run_made_pass(tmp_path):
    (tmp_path / "model").mkdir()
    made_models.check(epath.Path(tmp_path / "model"))
    (tmp_path / "fine_tune.json").write_text('{"metrics": {}}')
    made_models.check(epath.Path(tmp_path / "model"))


def test_every_bit_of_the_manifest_counts_but_for_the_seconds(place):
    path = place / "fine_tune.json"
    whole = path.read_bytes()
    for at in range(whole.index(b'"metrics"'), whole.index(b"seconds") - 1):
        flip(path, at)
        with pytest.raises(UserError, match=r"fine_tune\.json"):
            made_models.read(place)
        path.write_bytes(whole)
    path.write_text(json.dumps(json.loads(whole) | {"seconds": 2.0}))
    assert made_models.read(place)["metrics"] == {"loss": 0.5}
