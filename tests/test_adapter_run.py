"""A run that stores adapters makes the records of one that stores models, and every command takes its iterations."""

import json
import shutil

import pytest
from etils import epath

from isheep_jax import evaluate, export, generate
from isheep_jax.errors import UserError
from isheep_jax.runtime.opening import locate_base, open_located
from isheep_jax.train import main

SETTINGS = [
    "--config=tiny",
    "--iterations=2",
    "--synthesize.instructions=6",
    "--respond.samples=1",
    "--select.fraction=1",
    "--evaluate.limit=8",
    "--sft.method=lora",
    "--sft.start=previous",
    "--sft.learning_rate=0.02",
    "--sft.batch_size=8",
    "--decode.max_length=512",
    "--decode.slots=16",
    "--guard.judge=off",
]


@pytest.fixture(scope="module")
def runs(small_checkpoint, tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    for save in ("model", "adapter"):
        main([*SETTINGS, f"--model.path={small_checkpoint}", f"--workdir={place / save}", f"--sft.save={save}"])
    return place / "model", place / "adapter"


def contents(directory):
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name != "README.md"}


def test_records_and_last_model_do_not_depend_on_what_is_stored(runs):
    whole, adapters = runs
    parts = sorted(path.relative_to(whole) for path in whole.glob("iteration_*/*/part-*"))
    assert len(parts) > 6
    assert [part for part in parts if (adapters / part).read_bytes() != (whole / part).read_bytes()] == []
    for number in (0, 1, 2):
        results = [
            json.loads((run / f"iteration_{number}" / "evaluation.json").read_text())["tiny"]
            for run in (whole, adapters)
        ]
        assert results[0]["figures"] == results[1]["figures"]
    assert contents(adapters / "iteration_2" / "model") == contents(whole / "iteration_2" / "model")
    best = json.loads((adapters / "best.json").read_text())["iteration"]
    assert {path.parent.name for path in adapters.glob("*/model")} == {f"iteration_{n}" for n in {best, 2} - {0}}
    # The same command changes nothing.
    before = {path: path.stat().st_mtime_ns for path in adapters.rglob("*.safetensors")}
    go_on(adapters)
    assert {path: path.stat().st_mtime_ns for path in adapters.rglob("*.safetensors")} == before


def unfinished(run, directory):
    """Returns a copy of a run as it is before its end, when no iteration has a whole model."""
    run = shutil.copytree(run, directory)
    for number in (1, 2):
        manifest = run / f"iteration_{number}" / "fine_tune.json"
        values = json.loads(manifest.read_text())
        values.pop("sha256")
        values["files"] = {name: digest for name, digest in values["files"].items() if name.startswith("adapter/")}
        manifest.write_text(json.dumps(values))
        shutil.rmtree(run / f"iteration_{number}" / "model", ignore_errors=True)
    return run


def go_on(run):
    """Starts the command of a run again."""
    base = json.loads((run / "config.json").read_text())["model"]["path"]
    main([*SETTINGS, f"--model.path={base}", f"--workdir={run}", "--sft.save=adapter"])


def test_finished_run_whose_whole_model_is_damaged_says_so(runs, tmp_path):
    run = shutil.copytree(runs[1], tmp_path / "run")
    (run / "iteration_2" / "model" / "model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match=r"iteration_2/model/model.safetensors has changed since the run made it"):
        go_on(run)


def test_whole_model_is_written_although_somebody_removed_the_card(runs, tmp_path):
    run = unfinished(runs[1], tmp_path / "run")
    (run / "iteration_2" / "adapter" / "README.md").unlink()
    go_on(run)
    assert contents(run / "iteration_2" / "model") == contents(runs[0] / "iteration_2" / "model")


def test_adapter_is_not_merged_into_other_weights_than_the_runs(runs, small_checkpoint, tmp_path):
    run, base = unfinished(runs[1], tmp_path / "run"), shutil.copytree(small_checkpoint, tmp_path / "base")
    adapter_config = run / "iteration_1" / "adapter" / "adapter_config.json"
    adapter_config.write_text(adapter_config.read_text().replace(str(small_checkpoint), str(base)))
    locate_base(epath.Path(run / "iteration_1" / "adapter"))  # a copy has the same bytes
    weights = bytearray((base / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (base / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=rf"{base} is not the base any more that {run} began with.*: model.safetensors"):
        locate_base(epath.Path(run / "iteration_1" / "adapter"))


def test_adapters_that_are_each_others_base_are_refused(tmp_path):
    for name, base in (("a", "b"), ("b", "a")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        settings = {"base_model_name_or_path": str(tmp_path / base)}
        (tmp_path / name / "adapter_config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match=r"a/adapter_config.json: base_model_name_or_path leads back to the adapter"):
        open_located(epath.Path(tmp_path / "a"))


def test_commands_take_iteration_without_model(runs, tmp_path, capsys):
    whole, adapters = runs
    run = unfinished(adapters, tmp_path / "run")
    export.main([str(run), str(tmp_path / "out"), "--iteration=1"])
    assert contents(tmp_path / "out") == contents(whole / "iteration_1" / "model")
    capsys.readouterr()
    answers = []
    for model in (whole, run, run / "iteration_2" / "adapter"):
        generate.main([f"--model={model}", "--prompt=hello", "--max_tokens=8", "--temperature=0"])
        answers.append(capsys.readouterr().out)
    assert answers[0] == answers[1] == answers[2]
    evaluate.main([f"--model={run}", "--iteration=1", f"--output={tmp_path}/measured", "--tasks=tiny", "--limit=8"])
    measured = json.loads((tmp_path / "measured" / "iteration_1" / "evaluation.json").read_text())["tiny"]["figures"]
    assert measured == json.loads((whole / "iteration_1" / "evaluation.json").read_text())["tiny"]["figures"]
    with pytest.raises(UserError, match=r"--model.path: .* is a LoRA adapter without .* isheep_jax.export"):
        main(["--config=tiny", f"--model.path={run}", f"--workdir={tmp_path}/other"])
