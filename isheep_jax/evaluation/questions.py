"""The questions of SQuAD and TriviaQA: official JSON files, flat rows, datasets that TensorFlow Datasets prepared."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from etils import epath

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError, one_line
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.text_files import parse_json, read_text

TRIVIAQA_FILE = "triviaqa/validation.parquet"


@dataclass(frozen=True)
class Question:
    """A question with its right answers, none where it has no answer. passage: what it is about ("": no passage)."""

    id: str
    text: str
    answers: tuple[str, ...]
    passage: str = ""


def squad_questions(settings: EvaluateConfig, file: str, dataset: str) -> list[Question]:
    """Returns the questions of a development set of SQuAD.

    Args:
        settings: `task_data` says where the data is.
        file: name of the official file, as TASK/FILE.
        dataset: its name in TensorFlow Datasets; used where `task_data` has no such file but this dataset.
    """
    prepared = _prepared_dataset(settings, dataset)
    if prepared and not (epath.Path(settings.task_data).expanduser() / file).exists():
        return _questions(prepared, _prepared_rows(prepared), _flat_squad_question)
    path = task_file(settings, file)
    articles = _read_field(path, "data")
    if not any("paragraphs" in article for article in articles):
        return _questions(path, articles, _flat_squad_question)
    paragraphs = (paragraph for article in articles for paragraph in article["paragraphs"])
    pairs = ((paragraph, row) for paragraph in paragraphs for row in paragraph["qas"])
    return _questions(path, pairs, lambda pair: _squad_question(*pair))


def triviaqa_questions(settings: EvaluateConfig) -> list[Question]:
    """Returns the questions of TriviaQA, each once.

    `task_data` may have the published rows as Parquet, an official JSON file of any name (such as
    triviaqa/unfiltered-web-dev.json), or the dataset trivia_qa/rc.nocontext of TensorFlow Datasets.
    """
    questions = _triviaqa_rows(settings)
    for question in questions:
        if not question.answers:
            raise UserError(f"triviaqa: question {question.id} has no answer; take a file of the development set")
    # One question may come with a web page and with an article of Wikipedia; without them it is the same.
    unique: dict[str, Question] = {}
    for question in questions:
        unique.setdefault(question.id, question)
    return list(unique.values())


def _triviaqa_rows(settings: EvaluateConfig) -> list[Question]:
    if settings.task_data:
        directory = epath.Path(settings.task_data).expanduser()
        files = sorted(str(path) for path in (directory / "triviaqa").glob("*.json"))
        if len(files) > 1:
            raise UserError(f"--evaluate.task_data: keep one of {', '.join(files)}; results on them are not the same")
        if files:
            path = epath.Path(files[0])
            return _questions(path, _official_triviaqa_rows(path), _official_triviaqa_question)
        prepared = _prepared_dataset(settings, "trivia_qa/rc.nocontext")
        if prepared and not (directory / TRIVIAQA_FILE).exists():
            return _questions(prepared, _prepared_rows(prepared), _triviaqa_question)
    path = task_file(settings, TRIVIAQA_FILE)
    return _questions(path, _parquet_rows(path), _triviaqa_question)


def _questions(
    where: epath.Path,
    rows: Iterable[Any],
    question: Callable[[Any], Question],
) -> list[Question]:
    """Returns the question in each row. Raises UserError, naming `where`, for rows that are not in the layout."""
    questions = []
    try:
        for row in rows:
            questions.append(question(row))
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else one_line(error)
        raise UserError(f"{where}: question {len(questions) + 1} is not in the published layout ({reason})") from error
    if not questions:
        raise UserError(f"{where} has no questions")
    return questions


def _squad_question(paragraph: Mapping[str, Any], row: Mapping[str, Any]) -> Question:
    answers = tuple(answer["text"] for answer in row["answers"])
    return Question(str(row["id"]), row["question"].strip(), answers, paragraph["context"].strip())


def _flat_squad_question(row: Mapping[str, Any]) -> Question:
    answers = tuple(map(_text, row["answers"]["text"]))
    return Question(_text(row["id"]), _text(row["question"]).strip(), answers, _text(row["context"]).strip())


def _triviaqa_question(row: Mapping[str, Any]) -> Question:
    answers = tuple(map(_text, row["answer"]["normalized_aliases"]))
    return Question(_text(row["question_id"]), _text(row["question"]).strip(), answers)


def _official_triviaqa_question(row: Mapping[str, Any]) -> Question:
    answer = row["Answer"]
    answers = (*answer["NormalizedAliases"], *answer.get("HumanAnswers", ()))
    return Question(row["QuestionId"], row["Question"].strip(), answers)


def _official_triviaqa_rows(path: epath.Path) -> list[Any]:
    content = _read_json(path)
    rows = _field(path, content, "Data")
    if not content.get("VerifiedEval"):
        return rows
    # A file of the verified set also has questions that are not in it, and says so, as the official script expects.
    return [row for row in rows if row.get("QuestionPartOfVerifiedEval")]


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def _read_field(path: epath.Path, name: str) -> list[Any]:
    return _field(path, _read_json(path), name)


def _field(path: epath.Path, content: Any, name: str) -> list[Any]:
    rows = content.get(name) if isinstance(content, dict) else None
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UserError(f'{path} is not in the published layout: an object with a list of objects "{name}"')
    return rows


def _read_json(path: epath.Path) -> Any:
    try:
        return parse_json(read_text(path, "evaluate.task_data"))
    except ValueError as error:
        raise UserError(f"evaluate.task_data: {path}: {error}") from None


def _parquet_rows(path: epath.Path) -> list[Any]:
    import pyarrow
    import pyarrow.parquet

    try:
        with path.open("rb") as file:
            return pyarrow.parquet.read_table(file, columns=["question_id", "question", "answer"]).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise UserError(f"cannot read {path}: {one_line(error)}") from error


def _prepared_dataset(settings: EvaluateConfig, dataset: str) -> epath.Path | None:
    """Returns the directory of the newest version that TensorFlow Datasets prepared in `task_data`; None without."""
    if not settings.task_data:
        return None
    found = (epath.Path(settings.task_data).expanduser() / dataset).glob("*/dataset_info.json")
    versions = {tuple(path.parent.name.split(".")): path.parent for path in found}
    finished = [version for version in versions if all(part.isdecimal() for part in version)]
    return versions[max(finished, key=lambda version: [*map(int, version)])] if finished else None


def _prepared_rows(directory: epath.Path) -> Iterable[Any]:
    import tensorflow_datasets as tfds

    try:
        return tfds.builder_from_directory(directory).as_data_source(split="validation")
    except (NotImplementedError, ValueError, OSError) as error:
        advice = 'prepare it with file_format="array_record"'
        raise UserError(f"cannot read {directory} without TensorFlow; {advice} ({one_line(error)[:200]})") from error
