"""The generate command: which model, which prompts, what comes out."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from isheep_jax.decode.engine import Engine
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.generate import COMMAND, main, read_prompts, text_of
from isheep_jax.runtime.kept_completions import KeptCompletions


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


def _prompts(path, count):
    path.write_text("".join(json.dumps({"prompt": f"Prompt {n}.", "id": n}) + "\n" for n in range(count)))


@pytest.mark.parametrize(
    ("output", "message"),
    [(".", "is a directory; name a file"), ("nowhere/out", "there is no directory"), ("in.jsonl/out", "no directory")],
)
def test_an_output_that_cannot_be_written_is_refused_before_a_model_is_looked_for(tmp_path, output, message):
    _prompts(tmp_path / "in.jsonl", 1)
    with pytest.raises(UserError, match=f"^--output: .*{message}"):
        main(["--model=/nowhere", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/{output}"])


def test_what_an_earlier_command_wrote_into_a_line_is_replaced(small_checkpoint, tmp_path, capsys):
    stale = {"finish_reason": "error", "error": "too long", "completion": "", "prompt": "a", "id": 3}
    (tmp_path / "in.jsonl").write_text(json.dumps(stale))
    main([f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", "--max_tokens=2"])
    line = json.loads(capsys.readouterr().out)
    assert line.keys() == {"prompt", "id", "completion", "finish_reason"}
    assert line["finish_reason"] != "error"


def test_lines_without_a_completion_are_counted_and_no_completion_at_all_is_an_error(
    small_checkpoint, tmp_path, capsys
):
    long = json.dumps({"prompt": "long " * 500}) + "\n"
    arguments = [f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", "--max_tokens=2"]
    (tmp_path / "in.jsonl").write_text(long + '{"prompt": "a"}\n')
    main(arguments)
    assert "note: 1 of 2 prompts have no completion, such as prompt 1: the prompt has" in capsys.readouterr().err
    (tmp_path / "in.jsonl").write_text(long)
    with pytest.raises(UserError, match=r"^--input: 1 of 1 prompts have no completion"):
        main(arguments)
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_command_that_was_killed_goes_on_and_writes_what_an_undisturbed_one_writes(
    small_checkpoint, tmp_path, monkeypatch
):
    _prompts(tmp_path / "in.jsonl", 200)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    arguments = [f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", "--max_tokens=9", "--temperature=1"]
    main([*arguments, f"--output={whole}"])
    # So that parts are written at once.
    start = "import sys, isheep_jax.runtime.kept_completions as k; from isheep_jax.generate import main; k._SECONDS = 0"
    command = [sys.executable, "-c", f"{start}; main(sys.argv[1:])", *arguments, f"--output={killed}", "--slots=8"]
    process = subprocess.Popen(command)
    parts, deadline = tmp_path / "killed.partial", time.monotonic() + 300
    while len(list(parts.glob("part-*"))) < 2:
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    done = sum(len(part.read_text().splitlines()) - 1 for part in parts.glob("part-*"))
    assert 0 < done < 200
    assert not killed.exists()

    asked = []
    generate = Engine.generate
    monkeypatch.setattr(Engine, "generate", lambda self, r, s: (asked.extend(r), generate(self, r, s))[1])
    # A part that was damaged since is made again.
    first = parts / "part-000000.jsonl"
    first.write_bytes(first.read_bytes().replace(b'"text": "', b'"text": "no', 1))
    main([*arguments, f"--output={killed}"])
    assert len(asked) == 200 - done + 32
    assert killed.read_bytes() == whole.read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "killed", "whole"]


def test_completions_of_other_settings_are_refused_and_those_of_other_prompts_made_again(small_checkpoint, tmp_path):
    directory = epath.Path(tmp_path / "out.partial")
    kept = KeptCompletions(directory, {"temperature": 0.0})
    kept.add(Completion("0", "yes"), "Yes or no?")
    kept.flush()
    with pytest.raises(UserError, match=r"out\.partial has .*temperature was 0\.0, now 1\.0; remove it, or"):
        KeptCompletions(directory, {"temperature": 1.0})
    again = KeptCompletions(directory, {"temperature": 0.0})
    assert again.find("0", "Yes or no?") == Completion("0", "yes")
    assert (again.find("0", "No or yes?"), again.find("1", "Yes or no?")) == (None, None)


def test_what_is_in_a_directory_of_that_name_is_left_alone(tmp_path):
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "notes").write_text("mine")
    with pytest.raises(UserError, match="holds something else"):
        KeptCompletions(epath.Path(tmp_path / "out.partial"), {})
    assert (tmp_path / "out.partial" / "notes").read_text() == "mine"


def test_two_commands_do_not_write_one_output(small_checkpoint, tmp_path):
    _prompts(tmp_path / "in.jsonl", 1)
    arguments = [f"--model={small_checkpoint}", f"--input={tmp_path}/in.jsonl", f"--output={tmp_path}/out"]
    holder = subprocess.Popen(
        [sys.executable, "-c", "import sys\nfrom isheep_jax.directory_lock import owned\n"
         "with owned('', sys.argv[1]): print('held', flush=True); sys.stdin.read()", f"{tmp_path}/out.partial"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"held\n"
        with pytest.raises(UserError, match=rf"--output: .*out\.partial is in use by process {holder.pid}\b"):
            main([*arguments, "--max_tokens=2"])
    finally:
        holder.communicate()
    main([*arguments, "--max_tokens=2"])
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out"]
