"""TriviaQA: aliases are right, other answers wrong; the layouts in which the questions are published."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from published import published

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError
from isheep_jax.evaluation.task import Response, TaskOptions
from isheep_jax.evaluation.triviaqa import TASK

OFFICIAL = [
    {
        "QuestionId": "tc_1",
        "Question": "Which bay does the Holm ferry cross?",
        "Answer": {"Value": "Bay of Norvik", "NormalizedAliases": ["bay of norvik", "norvik bay"]},
    },
    {
        "QuestionId": "tc_2",
        "Question": "Who built the Holm bridge?",
        "Answer": {"Value": "Astrid Lund", "NormalizedAliases": ["astrid lund"], "HumanAnswers": ["A. Lund"]},
    },
]


def official(directory, name="wikipedia-dev.json", rows=OFFICIAL, **fields) -> TaskOptions:
    path = directory / "triviaqa" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"Data": rows, "Version": 1.0, **fields}))
    return TaskOptions(EvaluateConfig(task_data=str(directory)))


def parquet(directory, rows) -> TaskOptions:
    path = directory / "triviaqa" / "validation.parquet"
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), path)
    return TaskOptions(EvaluateConfig(task_data=str(directory)))


def values(options, *texts):
    samples = TASK.samples(options)
    pairs = [(sample, Response(sample.id, 0, ("",), (text,), ("stop",))) for sample, text in zip(samples, texts)]
    return [score.values for score in TASK.score(pairs, None)]


def test_every_alias_is_right_and_other_answers_are_wrong(tmp_path):
    options = official(tmp_path)
    right, wrong = {"em": 1, "f1": 1, "contains": 1}, {"em": 0, "f1": 0, "contains": 0}
    assert values(options, "The Bay of Norvik.", "Astrid-Lund") == [right, right]
    assert values(options, "Answer: Norvik Bay", "a. lund") == [right, right]
    assert values(options, "Skagen", "") == [wrong, wrong]


def test_sentence_with_an_alias_contains_it_without_matching(tmp_path):
    (first,) = values(official(tmp_path), "It crosses Norvik Bay.\nAstrid Lund")
    assert first == {"em": 0, "f1": pytest.approx(2 / 3), "contains": 1}


def test_prompt_that_was_not_answered_is_wrong(tmp_path):
    sample = TASK.samples(official(tmp_path))[0]
    (score,) = TASK.score([(sample, Response(sample.id, 0, ("",), ("",), ("error",), "too long"))], None)
    assert score.values == {"em": 0, "f1": 0, "contains": 0}


def test_prompts_of_both_forms_end_with_the_question(tmp_path):
    options = official(tmp_path)
    prompt = TASK.samples(options)[0].prompt
    assert [m.role for m in prompt] == ["user", "assistant"] * 5 + ["user"]
    assert prompt[0].content.startswith("Answer each question with a name")
    assert prompt[-1].content == "Question: Which bay does the Holm ferry cross?"
    sample = TASK.samples(TaskOptions(options.settings, chat=False))[0]
    assert sample.prompt.endswith("\n\nQuestion: Which bay does the Holm ferry cross?\nAnswer:")
    assert sample.prompt.count("\nAnswer: ") == 5
    assert sample.sampling.stop == ("\n",)
    assert sample.held_out == ("Which bay does the Holm ferry cross?",)


def test_published_rows_and_official_files_give_the_same_samples(tmp_path):
    rows = [
        {
            "question_id": row["QuestionId"],
            "question": row["Question"],
            "answer": {"value": "", "normalized_aliases": row["Answer"]["NormalizedAliases"]},
        }
        for row in OFFICIAL
    ]
    from_rows = TASK.samples(parquet(tmp_path, [*rows, rows[0]]))  # one question, with two documents
    assert [sample.id for sample in from_rows] == ["tc_1", "tc_2"]
    no_human_answers = [
        {**row, "Answer": {"NormalizedAliases": row["Answer"]["NormalizedAliases"]}} for row in OFFICIAL
    ]
    assert TASK.samples(official(tmp_path, rows=no_human_answers)) == from_rows


@pytest.fixture
def prepared(tmp_path):
    """A directory where TensorFlow Datasets prepared trivia_qa/rc.nocontext, and began to prepare a later version."""
    text = tfds.features.Text

    class TriviaQa(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        BUILDER_CONFIGS = (tfds.core.BuilderConfig(name="rc.nocontext"),)
        VERSION = tfds.core.Version("1.1.0")
        code_path = None

        def _info(self):
            answer = {"normalized_aliases": tfds.features.Sequence(text())}
            features = {"question_id": text(), "question": text(), "answer": answer}
            return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"validation": self._generate_examples()}

        def _generate_examples(self):
            for row in OFFICIAL:
                answer = {"normalized_aliases": row["Answer"]["NormalizedAliases"]}
                yield (
                    row["QuestionId"],
                    {
                        "question_id": row["QuestionId"],
                        "question": row["Question"],
                        "answer": answer,
                    },
                )

    TriviaQa(data_dir=tmp_path, config="rc.nocontext", file_format="array_record").download_and_prepare()
    begun = tmp_path / "trivia_qa" / "rc.nocontext" / "incomplete.X_1.2.0"
    begun.mkdir()
    (begun / "dataset_info.json").write_text("{}")
    return tmp_path


def test_dataset_of_tfds_is_read_in_place_of_a_file(prepared):
    samples = TASK.samples(TaskOptions(EvaluateConfig(task_data=str(prepared))))
    assert {s.id: s.reference["answers"] for s in samples} == {
        row["QuestionId"]: row["Answer"]["NormalizedAliases"] for row in OFFICIAL
    }
    assert len(TASK.samples(official(prepared, rows=OFFICIAL[:1]))) == 1  # a file goes first


def test_verified_files_give_verified_questions_only(tmp_path):
    rows = [{**row, "QuestionPartOfVerifiedEval": i == 1} for i, row in enumerate(OFFICIAL)]
    assert [s.id for s in TASK.samples(official(tmp_path, rows=rows, VerifiedEval=True))] == ["tc_2"]
    assert len(TASK.samples(official(tmp_path, rows=rows, VerifiedEval=False))) == 2


def test_two_official_files_are_ambiguous(tmp_path):
    official(tmp_path)
    with pytest.raises(UserError, match=r"keep one of .*/unfiltered-web-dev\.json, .*/wikipedia-dev\.json"):
        TASK.samples(official(tmp_path, name="unfiltered-web-dev.json"))


def test_damaged_and_missing_files_are_named_in_one_line(tmp_path):
    settings = TaskOptions(EvaluateConfig(task_data=str(tmp_path)))
    with pytest.raises(UserError, match=r"/triviaqa/validation\.parquet is missing"):
        TASK.samples(settings)
    no_answers = [{"QuestionId": "tc_9", "Question": "Who?"}]
    with pytest.raises(UserError, match=r"wikipedia-dev\.json: question 3 .* \(no 'Answer'\)"):
        TASK.samples(official(tmp_path, rows=[*OFFICIAL, *no_answers]))
    with pytest.raises(UserError, match=r"triviaqa: question tc_9 has no answer"):
        TASK.samples(official(tmp_path, rows=[{**no_answers[0], "Answer": {"NormalizedAliases": []}}]))
    (tmp_path / "triviaqa" / "wikipedia-dev.json").unlink()
    (tmp_path / "triviaqa" / "validation.parquet").write_bytes(b"no rows")
    with pytest.raises(UserError, match=r"cannot read .*/triviaqa/validation\.parquet"):
        TASK.samples(settings)


def test_official_sample_is_read(tmp_path):
    (tmp_path / "triviaqa").mkdir()
    (tmp_path / "triviaqa" / "dev.json").write_bytes(published("triviaqa/triviaqa_sample.json").read_bytes())
    options = TaskOptions(EvaluateConfig(task_data=str(tmp_path)))
    right = {"em": 1, "f1": 1, "contains": 1}
    assert values(options, "Sunset Blvd.") == [right]
    assert values(options, "West Sunset Boulevard") == [right]
    assert values(options, "Evita") == [dict.fromkeys(right, 0)]
