"""The generate command: which model, which prompts, what comes out."""

import json
import subprocess
import sys

import pytest

from isheep_jax.errors import UserError
from isheep_jax.generate import find_model, main, read_prompts, text_of


def make_model(directory):
    directory.mkdir(parents=True)
    (directory / "config.json").write_text("{}")
    return directory


def test_a_run_directory_means_its_newest_finished_model(tmp_path):
    for number in (1, 2, 10):
        model = make_model(tmp_path / f"iteration_{number}" / "model")
    (tmp_path / "iteration_11" / "checkpoints").mkdir(parents=True)
    assert find_model(str(tmp_path)) == model


def test_a_model_directory_means_itself(tmp_path):
    assert find_model(str(make_model(tmp_path / "model"))) == tmp_path / "model"


def test_a_run_without_a_finished_model_says_to_go_on(tmp_path):
    (tmp_path / "iteration_0").mkdir()
    with pytest.raises(UserError, match="no finished model yet"):
        find_model(str(tmp_path))


def test_prompts_are_read_from_both_kinds_of_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "id": 7}\n\n{"instruction": "b", "input": "c"}\n{"instruction": "d", "input": ""}\n'
    )
    assert [text_of(record) for record in read_prompts(path)] == ["a", "b\nc", "d"]


@pytest.mark.parametrize("line", ["{not json", '["a"]', '{"text": "a"}', '{"prompt": 3}'])
def test_a_bad_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2: "):
        read_prompts(path)


def test_a_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="holds no prompts"):
        read_prompts(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model=m"], "either --prompt"),
        (["--model=m", "--prompt=a", "--input=b"], "either --prompt"),
        (["--model=/nowhere", "--prompt=a"], "/nowhere is neither a model directory"),
        (["--model=m", "--prompt=a", "--top_p=0"], "--top_p: 0.0 is out of range"),
        (["--model=m", "--prompt=a", "--max_token=3"], "did you mean --max_tokens"),
    ],
)
def test_bad_settings_are_refused_before_any_model_is_read(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "isheep_jax.generate", *map(str, arguments)], capture_output=True, text=True, check=False
    )


def test_the_command_prints_the_completion_and_nothing_else(small_checkpoint):
    result = run("--model", small_checkpoint, "--prompt", "hello", "--max_tokens=5")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


def test_a_file_of_prompts_comes_back_line_by_line_with_completions(small_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "one", "id": "x"}\n{"prompt": "' + "long " * 500 + '"}\n')
    files = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    main([f"--model={small_checkpoint}", *files, "--max_tokens=5", "--temperature=1", "--raw"])
    good, bad = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["id"] == "x"
    assert good["finish"] in ("stop", "length")
    assert isinstance(good["completion"], str)
    assert bad["finish"] == "error"
    assert bad["error"]


def test_a_prompt_that_does_not_fit_is_one_line(small_checkpoint):
    with pytest.raises(UserError, match="--prompt: "):
        main([f"--model={small_checkpoint}", "--prompt", "long " * 500])
