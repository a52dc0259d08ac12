"""IFEval: verdicts agree with those that are published, at every run; the harness is left as it was."""

import contextlib
import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from published import published

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation import ifeval
from isheep_jax.evaluation.figures import figures_of
from isheep_jax.evaluation.task import Response, Scoring, TaskOptions
from isheep_jax.text.conversation import Message

pytest.importorskip("lm_eval", reason='checks IFEval\'s instructions; pip install -e ".[eval]"')
nltk = pytest.importorskip("nltk")

pytestmark = pytest.mark.lm_eval

ROWS = [
    {
        "key": 3,
        "prompt": "Describe a harbor without commas, in fewer than 20 words.",
        "instruction_id_list": ["punctuation:no_comma", "length_constraints:number_words"],
        "kwargs": [{}, {"relation": "less than", "num_words": 20}],
    },
    {
        "key": 14,
        "prompt": "Praise tea and use # at least three times.",
        "instruction_id_list": ["keywords:letter_frequency"],
        "kwargs": [{"letter": "#", "let_frequency": 3, "let_relation": "at least"}],
    },
    {
        "key": 15,
        "prompt": "Use two words in capitals at most and answer in German.",
        "instruction_id_list": ["change_case:capital_word_frequency", "language:response_language"],
        "kwargs": [{"capital_frequency": 3, "capital_relation": "less than"}, {"language": "de"}],
    },
]


@pytest.fixture(autouse=True)
def _punkt(monkeypatch, tmp_path):
    """A sentence splitter without any abbreviation, so that nothing is downloaded."""
    data = tmp_path / "nltk_data" / "tokenizers" / "punkt_tab" / "english"
    data.mkdir(parents=True)
    for name in ("abbrev_types.txt", "collocations.tab", "ortho_context.tab", "sent_starters.txt"):
        (data / name).touch()
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "nltk_data")])


@pytest.fixture
def settings(tmp_path) -> EvaluateConfig:
    path = tmp_path / "data" / "ifeval" / "input_data.jsonl"
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return EvaluateConfig(task_data=str(tmp_path / "data"))


def values_of(settings, *texts, error=""):
    items = ifeval.TASK.samples(TaskOptions(settings))
    responses = [Response(item.id, 0, ("",), (text,), ("stop",), error) for item, text in zip(items, texts)]
    scores = ifeval.TASK.score(list(zip(items, responses)), scoring_of(settings))
    return [score.values for score in scores], [score.details for score in scores]


def scoring_of(settings) -> Scoring:
    return Scoring(settings, Path(), lambda *_: contextlib.nullcontext())


def test_samples_are_users_turns_or_texts_with_their_own_limit(settings):
    first = ifeval.TASK.samples(TaskOptions(settings))[0]
    assert first.id == "3"
    assert first.prompt == (Message("user", ROWS[0]["prompt"]),)
    assert (first.sampling.temperature, first.sampling.max_tokens) == (0.0, 1280)
    assert first.held_out == (ROWS[0]["prompt"],)
    shorter = EvaluateConfig(task_data=settings.task_data, max_tokens=9)
    first = ifeval.TASK.samples(TaskOptions(shorter, chat=False))[0]
    assert (first.prompt, first.sampling.max_tokens) == (ROWS[0]["prompt"], 9)


def test_each_instruction_counts_strictly_and_loosely(settings):
    values, details = values_of(settings, "Here it is, sir:\nSmall boats in the sun", "# ##", "Das ist ein guter Tee.")
    assert values == [
        {"prompt_strict": 0, "prompt_loose": 1, "instruction_strict": [0, 1], "instruction_loose": [1, 1]},
        {"prompt_strict": 1, "prompt_loose": 1, "instruction_strict": [1], "instruction_loose": [1]},
        {"prompt_strict": 1, "prompt_loose": 1, "instruction_strict": [1, 1], "instruction_loose": [1, 1]},
    ]
    assert details[0] == {"failed_strict": ["punctuation:no_comma"], "failed_loose": []}


@pytest.mark.parametrize(("text", "follows"), [("## e e e e e e n n n n", 0), ("###", 1)])
def test_character_that_is_no_letter_is_counted_itself(settings, text, follows):
    for seed in range(20):
        random.seed(seed)
        assert values_of(settings, "", text)[0][1]["prompt_strict"] == follows


@pytest.mark.parametrize(("text", "error"), [("", ""), ("Boats", "the prompt has 9 tokens")])
def test_missing_response_follows_no_instruction(settings, text, error):
    (values,), _ = values_of(settings, text, error=error)
    assert values == {"prompt_strict": 0, "prompt_loose": 0, "instruction_strict": [0, 0], "instruction_loose": [0, 0]}


def test_scoring_leaves_no_trace_in_process(settings):
    import langdetect
    from lm_eval.tasks.ifeval import instructions_registry

    random.seed(5)
    before = (
        random.getstate(),
        langdetect.DetectorFactory.seed,
        instructions_registry.INSTRUCTION_DICT["keywords:letter_frequency"],
    )
    values_of(settings, "a", "b", "c")
    assert before == (
        random.getstate(),
        langdetect.DetectorFactory.seed,
        instructions_registry.INSTRUCTION_DICT["keywords:letter_frequency"],
    )


def test_missing_data_of_nltk_is_one_line_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(nltk.data, "path", [str(tmp_path / "empty")])
    monkeypatch.setattr(nltk, "download", lambda *_, **__: False)
    with pytest.raises(UserError, match=r"punkt_tab .*NLTK_DATA"):
        ifeval.TASK.check(EvaluateConfig())


def test_damaged_file_is_named(settings, tmp_path):
    (tmp_path / "data" / "ifeval" / "input_data.jsonl").write_text('{"key": 1, "prompt": "a"}\n')
    with pytest.raises(UserError, match=r"input_data\.jsonl is not IFEval's"):
        ifeval.TASK.samples(TaskOptions(settings))


def gpt4_figures() -> dict:
    """The figures of GPT-4's published responses."""
    settings = EvaluateConfig(task_data=str(published("ifeval/input_data.jsonl").parents[1]))
    items = ifeval.TASK.samples(TaskOptions(settings))
    # In the order of the prompts; the text of one prompt is not the same in both files.
    lines = published("ifeval/input_response_data_gpt4_20231107_145030.jsonl").read_text().splitlines()
    responses = [
        Response(item.id, 0, ("",), (json.loads(line)["response"],), ("stop",)) for item, line in zip(items, lines)
    ]
    scores = ifeval.TASK.score(list(zip(items, responses)), scoring_of(settings))
    figures = figures_of((item.id, score.values) for item, score in zip(items, scores))
    return {name: (round(figure.value * figure.count), figure.count) for name, figure in figures.items()}


def test_published_responses_have_published_accuracies_at_every_run(monkeypatch):
    monkeypatch.setattr(nltk.data, "path", [str(published("nltk_data"))])
    first = gpt4_figures()
    assert first["prompt_strict"] in ((416, 541), (417, 541))
    assert first["instruction_strict"] in ((697, 834), (698, 834))
    assert first["prompt_loose"][0] in range(429, 433)
    assert first["instruction_loose"][0] in range(712, 716)
    assert gpt4_figures() == first
    program = f"import json; from {Path(__file__).stem} import gpt4_figures; print(json.dumps(gpt4_figures()))"
    paths = [str(Path(__file__).parent), str(Path(__file__).parents[1] / "support"), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "NLTK_DATA": str(published("nltk_data")), "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", program]
    again = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert {name: tuple(counts) for name, counts in json.loads(again.stdout).items()} == first
