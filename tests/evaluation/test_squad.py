"""SQuAD 1.1 and 2.0: scores and abstentions as in the official scripts, files of every layout."""

import json
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from published import published

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.figures import figures_of
from isheep_jax.evaluation.squad import SQUAD, SQUAD_V2
from isheep_jax.evaluation.task import Response, Sample, TaskOptions
from isheep_jax.text.conversation import Message

PASSAGE = "The ferry to Holm leaves at nine. It takes two hours, and carries forty cars."
QUESTIONS = {
    "q1": ("When does the ferry leave?", ["at nine", "nine"]),
    "q2": ("How many cars does it carry?", ["forty"]),
    "q3": ("Who is its captain?", []),
}
FILES = {SQUAD: "squad/dev-v1.1.json", SQUAD_V2: "squad_v2/dev-v2.0.json"}


def nested(ids):
    rows = [
        {"id": i, "question": QUESTIONS[i][0], "answers": [{"text": t, "answer_start": 0} for t in QUESTIONS[i][1]]}
        for i in ids
    ]
    return {"version": "v", "data": [{"title": "Ferry", "paragraphs": [{"context": PASSAGE, "qas": rows}]}]}


def flat(ids):
    rows = [
        {"id": i, "question": QUESTIONS[i][0], "context": PASSAGE, "answers": {"text": QUESTIONS[i][1]}} for i in ids
    ]
    return {"data": rows}


def settings_with(directory, task, content, **settings) -> EvaluateConfig:
    path = directory / FILES[task]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return EvaluateConfig(task_data=str(directory), **settings)


@pytest.fixture
def options(tmp_path):
    """Options of either task with all of its questions."""
    settings_with(tmp_path, SQUAD, nested(["q1", "q2"]))
    return TaskOptions(settings_with(tmp_path, SQUAD_V2, nested(QUESTIONS)))


def values(task, samples: list[Sample], texts: list[str]) -> list[dict]:
    responses = [Response(sample.id, 0, ("",), (text,), ("stop",)) for sample, text in zip(samples, texts)]
    return [score.values for score in task.score(list(zip(samples, responses)), None)]


def means(task, samples, texts) -> dict[str, float]:
    scores = values(task, samples, texts)
    return {name: figure.value for name, figure in figures_of((s.id, v) for s, v in zip(samples, scores)).items()}


def test_right_answers_score_one_and_wrong_ones_zero(options):
    samples = SQUAD.samples(options)
    assert means(SQUAD, samples, ["Nine.", "The answer is forty"]) == {"em": 1, "f1": 1}
    assert means(SQUAD, samples, ["ten", "unanswerable"]) == {"em": 0, "f1": 0}


def test_questions_without_answer_are_right_by_abstaining(options):
    samples = SQUAD_V2.samples(options)
    right = {"em": 1, "f1": 1, "has_answer_em": 1, "has_answer_f1": 1, "no_answer_em": 1}
    assert means(SQUAD_V2, samples, ["nine", "forty", "unanswerable"]) == right
    assert means(SQUAD_V2, samples, ["nine", "forty", "The question is Unanswerable."]) == right
    assert means(SQUAD_V2, samples, ["nine", "forty", ""]) == right
    wrong = ["unanswerable", "ten", "Captain Lund"]
    assert means(SQUAD_V2, samples, wrong) == dict.fromkeys(right, 0)


def test_words_that_are_shared_count_for_f1(options):
    samples = SQUAD_V2.samples(options)
    assert values(SQUAD_V2, samples[:1], ["It leaves at nine"]) == [
        {"em": 0, "f1": pytest.approx(2 / 3), "has_answer_em": 0, "has_answer_f1": pytest.approx(2 / 3)}
    ]


@pytest.mark.parametrize("task", [SQUAD, SQUAD_V2])
def test_prompt_that_was_not_answered_is_no_abstention(task, options):
    pairs = [(sample, Response(sample.id, 0, ("",), ("",), ("error",), "too long")) for sample in task.samples(options)]
    assert all(value == 0 for score in task.score(pairs, None) for value in score.values.values())


def test_chat_prompt_has_worked_examples_as_turns(options):
    sample, sample_v2 = SQUAD.samples(options)[0], SQUAD_V2.samples(options)[0]
    for prompt in (sample.prompt, sample_v2.prompt):
        assert [m.role for m in prompt] == ["user", "assistant"] * 4 + ["user"]
        assert prompt[-1] == Message("user", f"Passage: {PASSAGE}\nQuestion: When does the ferry leave?")
        assert prompt[0].content.startswith("Answer each question with the fewest words of its passage")
    answers = [m.content for m in sample_v2.prompt if m.role == "assistant"]
    assert answers.count("unanswerable") == 2
    assert not any("unanswerable" in m.content for m in sample.prompt)
    assert (sample.sampling.temperature, sample.sampling.max_tokens, sample.sampling.stop) == (0, 64, ())


def test_text_prompt_has_worked_examples_and_ends_with_its_line(options):
    options = TaskOptions(options.settings, chat=False)
    sample, sample_v2 = SQUAD.samples(options)[0], SQUAD_V2.samples(options)[0]
    assert sample.prompt.endswith(f"\n\nPassage: {PASSAGE}\nQuestion: When does the ferry leave?\nAnswer:")
    assert sample.prompt.count("\nAnswer: ") == 4
    assert "unanswerable" not in sample.prompt
    assert sample_v2.prompt.count("\nAnswer: unanswerable\n") == 2
    assert (sample.sampling.max_tokens, sample.sampling.stop) == (32, ("\n",))


def test_worked_examples_are_answered_by_their_passages(options):
    text = SQUAD.samples(TaskOptions(options.settings, chat=False))[0].prompt
    for block in text.split("\n\n")[1:-1]:
        passage, _, answer = block.split("\n")
        assert answer.removeprefix("Answer: ") in passage


def test_limit_of_tokens_is_a_setting(options):
    settings = EvaluateConfig(task_data=options.settings.task_data, max_tokens=7)
    assert {s.sampling.max_tokens for chat in (True, False) for s in SQUAD.samples(TaskOptions(settings, chat))} == {7}


def test_questions_are_kept_out_of_training(options):
    assert {text for sample in SQUAD_V2.samples(options) for text in sample.held_out} == {
        text for text, _ in QUESTIONS.values()
    }


@pytest.mark.parametrize("layout", [nested, flat])
def test_both_layouts_give_the_same_samples(layout, tmp_path):
    samples = SQUAD_V2.samples(TaskOptions(settings_with(tmp_path, SQUAD_V2, layout(QUESTIONS))))
    assert [(s.id, s.reference["answers"]) for s in samples] == [(i, a) for i, (_, a) in QUESTIONS.items()]
    assert all(PASSAGE in s.prompt[-1].content for s in samples)


def test_dataset_of_tfds_is_read_in_place_of_a_file(tmp_path):
    prepare_squad(tmp_path)
    options = TaskOptions(EvaluateConfig(task_data=str(tmp_path)))
    samples = SQUAD.samples(options)
    assert {(s.id, *s.reference["answers"]) for s in samples} == {("q1", "at nine", "nine"), ("q2", "forty")}
    assert all(PASSAGE in s.prompt[-1].content for s in samples)
    settings_with(tmp_path, SQUAD, nested(["q2"]))
    assert [s.id for s in SQUAD.samples(options)] == ["q2"]  # a file goes first


def test_dataset_of_tfds_that_needs_tensorflow_is_refused(tmp_path):
    info = prepare_squad(tmp_path) / "dataset_info.json"
    info.write_text(info.read_text().replace("array_record", "tfrecord"))
    with pytest.raises(UserError, match=r'cannot read .*/squad/v1\.1/3\.0\.0 .* file_format="array_record"') as error:
        SQUAD.samples(TaskOptions(EvaluateConfig(task_data=str(tmp_path))))
    assert "\n" not in str(error.value)


def prepare_squad(directory) -> Path:
    """Prepares the dataset squad/v1.1 in `directory` as TensorFlow Datasets does, and returns where it is."""
    text = tfds.features.Text

    class Squad(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="v1.1"),)
        VERSION = tfds.core.Version("3.0.0")
        code_path = None

        def _info(self):
            answers = tfds.features.Sequence({"text": text(), "answer_start": np.int32})
            features = {"id": np.str_, "question": text(), "context": text(), "answers": answers}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for row in flat(["q1", "q2"])["data"]:
                answers = [{"text": text, "answer_start": 0} for text in row["answers"]["text"]]
                yield row["id"], {**row, "answers": answers}

    builder = Squad(data_dir=directory, config="v1.1", file_format="array_record")
    builder.download_and_prepare()
    return Path(builder.data_dir)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"data": [\n{"title": }]}', r"dev-v1\.1\.json: not JSON: Expecting value at line 2, character 11"),
        ('{"rows": []}', r'dev-v1\.1\.json is not in the published layout: .* "data"'),
        ('["data"]', r'dev-v1\.1\.json is not in the published layout: .* "data"'),
        ('{"data": []}', r"dev-v1\.1\.json has no questions"),
        (
            nested(["q1"]) | {"data": [{"paragraphs": [{"qas": [{"id": "q"}]}]}]},
            r"json: question 1 .* \(no 'answers'\)",
        ),
        ({"data": [*flat(["q1"])["data"], {"id": "q"}]}, r"json: question 2 .* \(no 'answers'\)"),
        (nested(["q3"]), r"squad: question q3 has no answer; .* squad_v2"),
    ],
)
def test_damaged_files_are_named_in_one_line(content, message, tmp_path):
    with pytest.raises(UserError, match=message) as error:
        SQUAD.samples(TaskOptions(settings_with(tmp_path, SQUAD, content)))
    assert "\n" not in str(error.value)


def test_missing_file_is_named_with_its_source(tmp_path):
    with pytest.raises(UserError, match=r"--evaluate.task_data: .*/squad/dev-v1\.1\.json is missing; .*rajpurkar"):
        SQUAD.samples(TaskOptions(EvaluateConfig(task_data=str(tmp_path))))


def test_sample_of_squad_2_scores_as_in_the_official_script(tmp_path):
    content = published("squad/squad_v2_sample.json").read_text()
    samples = SQUAD_V2.samples(TaskOptions(settings_with(tmp_path, SQUAD_V2, content)))
    texts = []
    for index, sample in enumerate(samples):
        answers = sample.reference["answers"]
        texts.append(["", answers[0] if answers else "Normandy", f"{answers[0]} indeed" if answers else ""][index % 3])
    official = {  # printed by evaluate-v2.0.py for these predictions
        "em": 50.0,
        "f1": 68.1859410430839,
        "has_answer_em": 37.5,
        "has_answer_f1": 69.32539682539682,
        "no_answer_em": 66.66666666666667,
    }
    assert {name: 100 * value for name, value in means(SQUAD_V2, samples, texts).items()} == pytest.approx(official)
    golds = [sample.reference["answers"] for sample in samples]
    assert set(means(SQUAD_V2, samples, [gold[0] if gold else "unanswerable" for gold in golds]).values()) == {1}
    assert set(means(SQUAD_V2, samples, ["a goat"] * len(golds)).values()) == {0}


def test_sample_of_squad_1_scores_as_in_the_official_script(tmp_path):
    content = published("squad/squad_small_nested.json").read_text()
    samples = SQUAD.samples(TaskOptions(settings_with(tmp_path, SQUAD, content)))
    texts = [" ".join(sample.reference["answers"][-1].split()[:2]) for sample in samples]
    official = {"em": 66.66666666666667, "f1": 88.26981297569532}  # by evaluate-v1.1.py for these predictions
    assert {name: 100 * value for name, value in means(SQUAD, samples, texts).items()} == pytest.approx(official)
