"""Published figures are those that were published, and are found by a model's sizes."""

import json
from pathlib import Path

import pytest

import isheep_jax
from isheep_jax.evaluation.reference import base_of, reference_rows
from isheep_jax.evaluation.tasks import TASKS

MODELS = Path(isheep_jax.__file__).parent / "planning/models"
SMOLLM2 = {
    "hidden_size": 576, "num_hidden_layers": 30, "intermediate_size": 1536, "num_key_value_heads": 3,
    "max_position_embeddings": 8192, "vocab_size": 49152,
}  # fmt: skip


def value(base, what, task, figure, **options) -> float:
    (row,) = [r for r in reference_rows(base, task, **options) if (r.what, r.figures) == (what, (figure,))]
    return row.value


@pytest.mark.parametrize("path", sorted(MODELS.glob("*.json")), ids=lambda path: path.stem)
def test_bases_are_known_by_their_sizes_alone(path):
    name = path.stem.split("--")[1]
    known = name.startswith(("Qwen1.5", "SmolLM2")) or name == "Meta-Llama-3-70B"
    assert base_of(json.loads(path.read_text())) == (name if known else None)


@pytest.mark.parametrize(
    ("changed", "known"),
    [
        ({}, True),
        ({"vocab_size": 49160, "rope_theta": 1.0}, True),  # tokens were added
        ({"vocab_size": 128256}, False),
        ({"max_position_embeddings": 2048}, False),  # the first SmolLM
        ({"num_hidden_layers": 31}, False),
        ({"vocab_size": None}, False),
    ],
)
def test_added_tokens_do_not_hide_a_base_but_other_sizes_do(changed, known):
    assert base_of({**SMOLLM2, **changed}) == ("SmolLM2-135M" if known else None)


def test_a_config_without_sizes_has_no_known_base():
    assert base_of({"model_type": "gemma3"}) is None
    assert reference_rows(None, "ifeval") == []


def test_gains_that_the_paper_names_follow_from_its_rows():
    """Its abstract: from the first iteration to the best at 72B, relative for judges and absolute elsewhere."""

    def figure(iteration, task, name):
        return value("Qwen1.5-72B", f"I-SHEEP iteration {iteration}", task, name)

    assert figure(5, "alpaca_eval", "win_rate") / figure(1, "alpaca_eval", "win_rate") == pytest.approx(1.782, abs=1e-3)
    assert figure(3, "mt_bench", "rating") / figure(1, "mt_bench", "rating") == pytest.approx(1.240, abs=1e-3)
    gain = figure(5, "ifeval", "prompt_strict") - figure(1, "ifeval", "prompt_strict")
    assert gain == pytest.approx(0.0888)
    code = [("humaneval", "pass@1"), ("humaneval_plus", "pass@1"), ("mbpp", "pass@1")]
    gains = [figure(5, *name) - value("Qwen1.5-72B", "Qwen1.5-72B", *name) for name in code]
    assert sum(gains) / 3 == pytest.approx(0.2477, abs=1e-4)
    for name, gain in ((("triviaqa", "contains"), 0.1204), (("squad_v2", "em"), 0.2029)):
        assert figure(5, *name) - value("Qwen1.5-72B", "Qwen1.5-72B", *name) == pytest.approx(gain)


def test_turns_of_mt_bench_average_to_the_published_score():
    for iteration in range(1, 7):
        what = f"I-SHEEP iteration {iteration}"
        one, two, both = (value("Qwen1.5-72B", what, "mt_bench", f) for f in ("turn_1", "turn_2", "rating"))
        assert (one + two) / 2 == pytest.approx(both, abs=0.02)


def test_official_chat_models_are_shown_beside_each_base():
    published = {"1.8B": 0.1608, "4B": 0.2551, "7B": 0.3882, "14B": 0.4251, "32B": 0.4954, "72B": 0.5102}
    for size, share in published.items():
        assert value(f"Qwen1.5-{size}", f"Qwen1.5-{size}-Chat", "ifeval", "prompt_strict") == share
    assert value("Meta-Llama-3-70B", "Meta-Llama-3-70B-Instruct", "ifeval", "prompt_strict") == 0.78


def test_the_same_model_may_have_figures_of_two_harnesses():
    rows = reference_rows("SmolLM2-360M", "ifeval")
    assert [row.value for row in rows] == [0.41, 0.083]
    assert {row.figures for row in rows} == {("prompt_strict", "instruction_strict")}
    assert len({row.setting for row in rows}) == 2


def test_ablations_are_told_apart_and_shown_when_asked_for():
    rows = reference_rows("Qwen1.5-72B", "ifeval", ablations=True)
    assert {row.what for row in reference_rows("Qwen1.5-72B", "ifeval")} == {
        *(f"I-SHEEP iteration {n}" for n in range(1, 7)), "Self-Instruct", "Qwen1.5-72B-Chat",
    }  # fmt: skip
    assert len({row.what for row in rows if row.ablation}) > 20
    what = "I-SHEEP iteration 3, simple criteria"
    assert value("Qwen1.5-72B", what, "ifeval", "prompt_strict", ablations=True) == 0.4214


def test_figures_have_the_names_of_our_tasks():
    content = json.loads((Path(isheep_jax.__file__).parent / "evaluation/reference.json").read_text())
    published = {
        (task, names) for row in content["rows"] for task, figures in row["figures"].items() for names in figures
    }
    for task, names in published:
        assert task.startswith("lm_eval:") or {*names.split(" + ")} <= {TASKS[task].main, *TASKS[task].shown}


def test_no_figure_is_given_twice_and_every_one_says_how_it_was_measured():
    bases = [f"Qwen1.5-{size}" for size in ("1.8B", "4B", "7B", "14B", "32B", "72B")]
    content = json.loads((Path(isheep_jax.__file__).parent / "evaluation/reference.json").read_text())
    tasks = {task for row in content["rows"] for task in row["figures"]}
    for base in [*bases, "Meta-Llama-3-70B", "SmolLM2-135M", "SmolLM2-360M"]:
        rows = [row for task in sorted(tasks) for row in reference_rows(base, task, ablations=True)]
        assert len({(row.what, row.task, row.figures, row.source) for row in rows}) == len(rows) > 0
        for row in rows:
            assert row.setting
            assert row.source
            assert 0 < row.value < (10 if row.task == "mt_bench" else 1)
