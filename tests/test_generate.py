"""The generate command: which model, which prompts, what comes out."""

import json
import subprocess
import sys

import pytest

from isheep_jax.errors import UserError
from isheep_jax.generate import COMMAND, main, read_prompts, text_of


def test_prompts_are_read_from_both_kinds_of_lines(tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text(
        '{"prompt": "a", "id": 7}\n\n{"instruction": "b", "input": "c"}\n{"instruction": "d", "input": ""}\n'
    )
    assert [text_of(record) for record in read_prompts(path)] == ["a", "b\nc", "d"]


@pytest.mark.parametrize("line", ["{not json", '["a"]', '{"text": "a"}', '{"prompt": 3}'])
def test_bad_line_is_named_by_its_number(tmp_path, line):
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a"}\n' + line + "\n")
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 2\b"):
        read_prompts(path)


def test_file_without_prompts_is_refused(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(UserError, match="is empty; each line should be like"):
        read_prompts(tmp_path / "empty.jsonl")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "--model is missing"),
        (["--model=m"], "either --prompt"),
        (["--model=m", "--prompt=a", "--input=b"], "either --prompt"),
        (["--model=m", "--prompt=a", "--chat"], "either --prompt"),
        (["--model=m", "--raw", "--chat"], "--raw: a conversation needs the chat template"),
        (["--model=m", "--prompt=a", "--output=b"], "--output: .* give --input too"),
        (["--model=/nowhere", "--prompt=a"], "--model: /nowhere is no directory"),
        (["--model=m", "--prompt=a", "--top_p=0"], "--top_p: 0.0 is out of range"),
        (["--model=m", "--prompt=a", "--max_token=3"], "did you mean --max_tokens"),
    ],
)
def test_bad_settings_are_refused_before_any_model_is_read(arguments, message):
    with pytest.raises(UserError, match=message):
        main(arguments)


def test_command_prints_completion_and_nothing_else(small_checkpoint):
    arguments = ["--model", str(small_checkpoint), "--prompt", "hello", "--max_tokens=5"]
    result = subprocess.run(
        [sys.executable, "-m", COMMAND.module, *arguments], capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    assert result.stdout.endswith("\n")


def test_file_of_prompts_comes_back_line_by_line_with_completions(small_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "one", "id": "x"}\n{"prompt": "' + "long " * 500 + '"}\n')
    files = [f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out.jsonl"]
    main([f"--model={small_checkpoint}", *files, "--max_tokens=5", "--temperature=1", "--raw"])
    good, bad = (json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines())
    assert good["id"] == "x"
    assert good["finish_reason"] in ("stop", "length")
    assert isinstance(good["completion"], str)
    assert bad["finish_reason"] == "error"
    assert bad["error"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "long " * 500], r"--prompt: the prompt has \d+ tokens; --max_length=512 must hold it"),
        (["--prompt=a", "--max_length=1"], "^--max_length=1 does not fit the model"),
        (["--prompt=a", "--decode_tensor=3"], "^--decode_tensor=3 does not divide the 8 devices"),
        (["--prompt=a", "--decode_tensor=8"], "^--decode_tensor=8 does not divide the model's"),
    ],
)
def test_what_does_not_fit_is_told_by_flags_of_this_command(small_checkpoint, arguments, message):
    with pytest.raises(UserError, match=message):
        main([f"--model={small_checkpoint}", *arguments])


def test_count_of_slots_that_does_not_divide_is_rounded_up(small_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 9)  # over 8 devices: slots for 16
    main([f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out", "--max_tokens=2"])
    assert len((tmp_path / "out").read_text().splitlines()) == 9
