"""Every form of a model argument resolves to a directory, or is one line that says why not."""

import os
import re
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub.errors import GatedRepoError, LocalEntryNotFoundError, RepositoryNotFoundError

from isheep_jax.errors import UserError
from isheep_jax.files import write_json
from isheep_jax.runtime.locate import finished_models, locate_model
from isheep_jax.tiny import CHECKPOINT


def make_model(directory):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def test_tiny_is_embedded_model():
    assert str(locate_model("tiny")) == str(CHECKPOINT)


def test_run_directory_means_its_newest_finished_model(tmp_path):
    models = {number: make_model(tmp_path / f"iteration_{number}" / "model") for number in (10, 1, 2, 11)}
    for number in (1, 2, 10):
        write_json(tmp_path / f"iteration_{number}" / "fine_tune.json", {"metrics": {}})
    # Nobody can check what has no digests.
    assert models.pop(11).is_dir()
    (tmp_path / "iteration_12" / "checkpoints").mkdir(parents=True)
    assert str(locate_model(str(tmp_path))) == str(models[10])
    assert list(finished_models(tmp_path)) == [1, 2, 10]


def test_run_without_finished_model_says_to_go_on(tmp_path):
    (tmp_path / "iteration_0").mkdir()
    with pytest.raises(UserError, match="no finished model yet"):
        locate_model(str(tmp_path))


def test_model_directory_means_itself(tmp_path, monkeypatch):
    assert str(locate_model(str(make_model(tmp_path / "org" / "model")))) == str(tmp_path / "org" / "model")
    # Also where it looks like a hub id.
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    assert str(locate_model("org/model")) == "org/model"


@pytest.mark.parametrize("path", ["/nowhere", "nowhere", "./org/name", "org/name/more", "~/nowhere"])
def test_what_is_no_directory_and_no_hub_id_is_refused_without_asking_hub(path, monkeypatch, pytestconfig):
    monkeypatch.chdir(pytestconfig.rootpath)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", None)
    with pytest.raises(UserError, match=rf"--model\.path: {path} is no directory"):
        locate_model(path, "--model.path")


def refusal(path) -> str:
    with pytest.raises(UserError) as error:
        locate_model(str(path))
    assert "\n" not in str(error.value)
    return str(error.value)


def test_directory_of_something_else_is_refused(tmp_path):
    assert "no config.json" in (message := refusal(tmp_path))
    assert message.endswith("; it is empty")
    (tmp_path / "notes.txt").touch()
    assert refusal(tmp_path).endswith("nor a run's directory")


def test_directory_around_models_names_one_of_them(tmp_path):
    make_model(tmp_path / "converted")
    assert refusal(tmp_path).endswith(f"did you mean {tmp_path}/converted?")
    (tmp_path / "files").mkdir()
    (tmp_path / "files" / "model.Q8_0.gguf").touch()
    assert refusal(tmp_path / "files").endswith(f"did you mean {tmp_path}/files/model.Q8_0.gguf?")


def test_file_of_model_is_refused_in_favor_of_its_directory(tmp_path):
    (make_model(tmp_path / "model") / "model.safetensors").touch()
    assert "is a file; give the directory" in refusal(tmp_path / "model" / "model.safetensors")


def test_misspelled_directory_is_answered_with_nearest_name(tmp_path):
    make_model(tmp_path / "qwen-small")
    assert f"did you mean '{tmp_path}/qwen-smal" in refusal(tmp_path / "qwen-smull")


@pytest.mark.parametrize(
    ("settings", "base"),
    [
        ('{"base_model_name_or_path": "org/base"}', "of 'org/base'"),
        ("{}", "of a base that it does not name"),
        ('{"base_model_name_or_path": ["a"]}', "of a base that it does not name"),
        ("not JSON", "of a base that it does not name"),
        ('{"base_model_name_or_path": "a\\u001b[2Jb\\n' + "c" * 10_000 + '"}', r"of 'a\x1b[2Jb\nccc"),
    ],
)
def test_adapter_is_refused_with_its_base(settings, base, tmp_path):
    (tmp_path / "adapter_config.json").write_text(settings)
    message = refusal(tmp_path)
    assert f"is a LoRA adapter {base}" in message
    assert "merge" in message
    assert len(message) < 500


def test_model_with_adapter_beside_it_is_refused_rather_than_one_of_them_ignored(tmp_path):
    make_model(tmp_path / "both")
    for name in ("model.safetensors", "adapter_config.json"):
        (tmp_path / "both" / name).write_text("{}")
    assert "a model and a LoRA adapter" in refusal(tmp_path / "both")
    # Without weights, config.json is that of the base.
    (tmp_path / "both" / "model.safetensors").unlink()
    assert "is a LoRA adapter" in refusal(tmp_path / "both")


def test_hub_cache_of_model_means_its_revision(tmp_path):
    cache = tmp_path / "models--org--name"
    one = make_model(cache / "snapshots" / "aaa")
    assert str(locate_model(str(cache))) == str(one)
    two = make_model(cache / "snapshots" / "bbb")
    assert "2 revisions, aaa and bbb" in refusal(cache)
    (cache / "refs").mkdir()
    (cache / "refs" / "main").write_text("bbb\n")
    assert str(locate_model(str(cache))) == str(two)
    assert "no revision" in refusal_of_empty(tmp_path / "models--org--other")


def refusal_of_empty(cache) -> str:
    (cache / "snapshots").mkdir(parents=True)
    return refusal(cache)


def test_hub_is_asked_although_directory_of_organisation_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "name-1").mkdir(parents=True)
    downloaded = make_model(tmp_path / "downloaded")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(downloaded))
    assert str(locate_model("org/name-2")) == str(downloaded)
    # A directory of the same name comes first, and is named as the reason why the hub is not asked.
    message = refusal("org/name-1")
    assert "org/name-1 is neither a model directory" in message
    assert "the hub is not asked for a model of this name while the directory is here" in message


def test_adapter_on_hub_is_refused_with_its_base(tmp_path, monkeypatch):
    (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "org/base"}')
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *_, **__: str(tmp_path))
    assert "org/adapter is a LoRA adapter of 'org/base'" in refusal("org/adapter")


def test_hub_id_is_downloaded_without_other_formats(tmp_path, monkeypatch):
    requested = {}
    make_model(tmp_path / "downloaded")

    def download(**options):
        requested.update(options)
        return str(tmp_path / "downloaded")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    assert str(locate_model("Org-1/Name.2@refs/pr/3")) == str(tmp_path / "downloaded")
    assert (requested["repo_id"], requested["revision"]) == ("Org-1/Name.2", "refs/pr/3")
    assert locate_model("Org-1/Name.2")
    assert requested["revision"] is None
    expected = ["config.json", "tokenizer.json", "tokenizer.model", "chat_template.jinja", "vocab.json", "merges.txt"]
    expected += ["model-00001-of-00002.safetensors", "model.safetensors", "model.safetensors.index.json"]
    others = ["pytorch_model.bin", "consolidated.safetensors", "original/consolidated.00.pth", "training_args.bin"]
    filtered = huggingface_hub.utils.filter_repo_objects(expected + others, allow_patterns=requested["allow_patterns"])
    assert list(filtered) == expected


class Response:
    """The response that errors of the hub hold."""

    headers: dict = {}  # noqa: RUF012
    status_code = 404
    request = None
    url = ""


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (RepositoryNotFoundError("404", response=Response()), "neither a directory here nor a model on the Hugging"),
        (GatedRepoError("403", response=Response()), "gated: accept its terms at https://huggingface.co/org/name"),
        (LocalEntryNotFoundError("offline"), "cannot be reached to download"),
        (OSError(28, "No space left on device"), "cannot be downloaded"),
    ],
)
def test_trouble_with_hub_is_one_line(error, words, monkeypatch):
    def download(*_, **__):
        raise error

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    with pytest.raises(UserError, match=words) as caught:
        locate_model("org/name")
    assert "\n" not in str(caught.value)


def test_bucket_without_its_package_names_package():
    # In a new process, because other tests replace Google's buckets by one in memory for the rest of the process.
    program = (
        "import sys; sys.modules['gcsfs'] = None\n"
        "from isheep_jax.runtime.locate import locate_model; locate_model('gs://bucket/model')"
    )
    environment = {**os.environ, "EPATH_USE_TF": "false"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    error = "UserError: --model: gs://bucket/model needs a package that is not installed: "
    assert error in run.stderr
    assert "gcsfs" in run.stderr.partition(error)[2]


def test_links_to_nothing_and_to_themselves_are_named(tmp_path):
    (tmp_path / "config.json").symlink_to(tmp_path / "blobs" / "1")
    with pytest.raises(UserError, match=r"config\.json there is a link to a file that is missing"):
        locate_model(str(tmp_path))
    (tmp_path / "config.json").unlink()
    (tmp_path / "config.json").symlink_to(tmp_path / "config.json")
    with pytest.raises(UserError, match=r"config\.json cannot be read: Too many levels of symbolic links"):
        locate_model(str(tmp_path))


@pytest.mark.parametrize("lost", ["fine_tune.json", "model/config.json"])
def test_newest_model_that_lost_a_file_is_named_and_no_earlier_one_is_used(tmp_path, lost):
    for number in (1, 2):
        iteration = tmp_path / f"iteration_{number}"
        make_model(iteration / "model")
        write_json(iteration / "fine_tune.json", {"metrics": {}})
        write_json(iteration / "summary.json", {})
    (tmp_path / "iteration_2" / lost).unlink()
    with pytest.raises(UserError, match=f"iteration_2/{re.escape(lost)} is missing; restore it, or "):
        locate_model(str(tmp_path))
