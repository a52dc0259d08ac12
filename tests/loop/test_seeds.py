import json

import pytest

from isheep_jax.errors import UserError
from isheep_jax.loop import templates
from isheep_jax.loop.novelty import Pool
from isheep_jax.loop.rules import instruction_reason
from isheep_jax.loop.seeds import read_seeds


def write(tmp_path, *lines):
    path = tmp_path / "seeds.jsonl"
    path.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return path


def test_three_dialects_give_the_same_seed(tmp_path):
    path = write(
        tmp_path,
        {"instruction": "Do it. ", "input": "this", "output": "done"},
        "",
        {"id": "s_1", "instruction": "Do it.", "instances": [{"input": "this", "output": "done"}]},
        {"instruction": "Do it."},
    )
    seeds = read_seeds(path, 3)
    assert [s.id for s in seeds] == ["seed-001", "seed-002", "seed-003"]
    assert [(s.instruction, s.input, s.output) for s in seeds[:2]] == [("Do it.", "this", "done")] * 2
    assert (seeds[2].input, seeds[2].output) == ("", "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{oops", "line 2: not JSON"),
        ("[1]", "line 2: not an object"),
        ('{"input": "x"}', "line 2: there is no 'instruction'"),
        ('{"instruction": 3}', "line 2: 'instruction' should be text"),
        ('{"instruction": "x", "instances": []}', "line 2: 'instances' should be a list"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = write(tmp_path, {"instruction": "Do it."}, line)
    with pytest.raises(UserError) as e:
        read_seeds(path, 1)
    assert f"synthesize.seeds: {path}, {message}" in str(e.value)
    assert "\n" not in str(e.value)


def test_empty_missing_binary_and_too_few_are_refused(tmp_path):
    with pytest.raises(UserError, match="is empty; it needs one task per line"):
        read_seeds(write(tmp_path, "", "  "), 1)
    with pytest.raises(UserError, match=r"synthesize.seeds: cannot read .*nowhere.jsonl: No such file"):
        read_seeds(tmp_path / "nowhere.jsonl", 1)
    with pytest.raises(UserError, match=r"synthesize.shots: 5 seeds per prompt, but .* has only 1"):
        read_seeds(write(tmp_path, {"instruction": "Do it."}), 5)
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="it is not UTF-8 text"):
        read_seeds(tmp_path / "binary", 1)


def test_the_seeds_that_come_with_the_prompts_pass_their_own_rules():
    seeds = read_seeds(templates.load("standard").seeds, 5)
    assert len(seeds) >= 40
    assert [s.id for s in seeds if instruction_reason("paper", s.instruction, s.input)] == []
    new = Pool(0.7).admit([s.id for s in seeds], [s.instruction for s in seeds], [s.input for s in seeds])
    assert new == [None] * len(seeds)
