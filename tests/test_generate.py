"""The generate command: which model, which prompts, what comes out."""

import json
import os
import subprocess
import sys

import pytest

from isheep_jax.errors import UserError
from isheep_jax.generate import main, read_prompts, text_of


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


def run(*arguments, **options):
    command = [sys.executable, "-m", "isheep_jax.generate", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)


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
    assert good["finish_reason"] in ("stop", "length")
    assert isinstance(good["completion"], str)
    assert bad["finish_reason"] == "error"
    assert bad["error"]


def test_a_prompt_that_does_not_fit_is_one_line(small_checkpoint):
    with pytest.raises(UserError, match="--prompt: "):
        main([f"--model={small_checkpoint}", "--prompt", "long " * 500])


@pytest.fixture
def three_prompts(tmp_path):
    path = tmp_path / "three.jsonl"
    path.write_text("".join(f'{{"prompt": "{word}"}}\n' for word in ("one", "two words", "and three words")))
    return path


@pytest.mark.parametrize("decode_tensor", [1, 2])
def test_prompts_that_do_not_divide_over_the_devices_give_what_one_device_gives(
    small_checkpoint, three_prompts, decode_tensor
):
    arguments = ["--model", small_checkpoint, "--input", three_prompts, "--max_tokens=6", "--temperature=1"]
    one = {**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"}
    expected, found = run(*arguments, env=one), run(*arguments, f"--decode_tensor={decode_tensor}")
    assert expected.returncode == found.returncode == 0, found.stderr
    assert found.stdout == expected.stdout
    assert len(found.stdout.splitlines()) == 3


def test_a_count_of_slots_that_does_not_divide_is_rounded_up(small_checkpoint, tmp_path):
    (tmp_path / "in.jsonl").write_text('{"prompt": "a"}\n' * 9)  # over 8 devices: slots for 16
    main([f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out", "--max_tokens=2"])
    assert len((tmp_path / "out").read_text().splitlines()) == 9
