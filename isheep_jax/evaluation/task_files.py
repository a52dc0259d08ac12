"""The published files of the tasks: a local copy, or a download that is kept and checked."""

import hashlib
import http.client
import os
import urllib.error
import urllib.request
from dataclasses import dataclass
from pathlib import Path

from etils import epath

from isheep_jax.config import EvaluateConfig
from isheep_jax.errors import UserError, one_line

_TIMEOUT = 60.0  # seconds without an answer


@dataclass(frozen=True)
class DataFile:
    """A published file. url: where it is. sha256: of its content; "": not known."""

    url: str
    sha256: str = ""


_SQUAD = "https://rajpurkar.github.io/SQuAD-explorer/dataset"
_GOOGLE = "https://raw.githubusercontent.com/google-research/google-research/master"
_EVALPLUS = "https://github.com/evalplus"
_FASTCHAT = "https://raw.githubusercontent.com/lm-sys/FastChat/main/fastchat/llm_judge"

# By TASK/FILE, which is also the path in `evaluate.task_data`.
DATA_FILES = {
    "alpaca_eval/gpt4_1106_preview_outputs.json": DataFile(
        "https://raw.githubusercontent.com/tatsu-lab/alpaca_eval/main/results/gpt4_1106_preview/model_outputs.json",
        "83db546b872ddebee8965fd05fa48461ee3c32bc695c62fb57f2d214ff741ec4",
    ),
    "humaneval/HumanEval.jsonl.gz": DataFile(
        "https://raw.githubusercontent.com/openai/human-eval/master/data/HumanEval.jsonl.gz",
        "b796127e635a67f93fb35c04f4cb03cf06f38c8072ee7cee8833d7bee06979ef",
    ),
    "humaneval_plus/HumanEvalPlus.jsonl.gz": DataFile(
        f"{_EVALPLUS}/humanevalplus_release/releases/download/v0.1.10/HumanEvalPlus.jsonl.gz"
    ),
    "mbpp/mbpp.jsonl": DataFile(
        f"{_GOOGLE}/mbpp/mbpp.jsonl",
        "ccf64ceae9c5403bf50a044cb6d505bfd2a2963ee58338ba268fd65beab92a9f",
    ),
    "mbpp/sanitized-mbpp.json": DataFile(f"{_GOOGLE}/mbpp/sanitized-mbpp.json"),
    "mbpp_plus/MbppPlus.jsonl.gz": DataFile(f"{_EVALPLUS}/mbppplus_release/releases/download/v0.2.0/MbppPlus.jsonl.gz"),
    "ifeval/input_data.jsonl": DataFile(
        f"{_GOOGLE}/instruction_following_eval/data/input_data.jsonl",
        "67ffeee0fcb87c317c5b08a2de85557b4a7e96ada6178aa645b4954fe4b53d49",
    ),
    "self_instruct/seed_tasks.jsonl": DataFile(
        "https://raw.githubusercontent.com/yizhongw/self-instruct/main/data/seed_tasks.jsonl",
        "7779004fa198fdf27cf70a159363879d8a26c53329e11b436af17b3941875f48",
    ),
    "squad/dev-v1.1.json": DataFile(
        f"{_SQUAD}/dev-v1.1.json",
        "95aa6a52d5d6a735563366753ca50492a658031da74f301ac5238b03966972c9",
    ),
    "squad_v2/dev-v2.0.json": DataFile(
        f"{_SQUAD}/dev-v2.0.json",
        "80a5225e94905956a6446d296ca1093975c4d3b3260f1d6c8f68bc2ab77182d8",
    ),
    # The rows of both parts of the set for reading comprehension. The official archive weighs gigabytes.
    "triviaqa/validation.parquet": DataFile(
        "https://huggingface.co/datasets/mandarjoshi/trivia_qa/resolve/0f7faf33a3908546c6fd5b73a660e0f8ff173c2f/"
        "rc.nocontext/validation-00000-of-00001.parquet"
    ),
    "xstest/xstest_prompts.csv": DataFile(
        "https://raw.githubusercontent.com/paul-rottger/xstest/475f10bf0a3d6a9dfb174b6de1a38afbfdff98a5/"
        "xstest_prompts.csv",
        "11783fb294ed017473ee53c207d71f2161c7672c8d0b037501e78387f801cb5a",
    ),
    "mt_bench/question.jsonl": DataFile(
        f"{_FASTCHAT}/data/mt_bench/question.jsonl",
        "119565adbab82227089cefdb44c8d7e2cf04dc0a0ec233634c82e7d4e2a944f7",
    ),
    "mt_bench/reference_answer_gpt-4.jsonl": DataFile(
        f"{_FASTCHAT}/data/mt_bench/reference_answer/gpt-4.jsonl",
        "f957a5bc977badb66885ec970e6cd08527845780313f0995764260e5777b9b3f",
    ),
    "mt_bench/judge_prompts.jsonl": DataFile(
        f"{_FASTCHAT}/data/judge_prompts.jsonl",
        "fd283293406d024f44c174b094ef48031d0687a4682fd3a56b29b138f80281b6",
    ),
}


def task_file(settings: EvaluateConfig, name: str) -> epath.Path:
    """Returns the path of a task's published file.

    settings: `task_data` is the directory with local copies; where it is empty, the file is downloaded to the user's
        cache directory, unless it is there.
    name: key of `DATA_FILES`.
    Raises `UserError` when there is no such file, the download fails or is not the file that was published.
    """
    file = DATA_FILES[name]
    if settings.task_data:
        path = epath.Path(settings.task_data).expanduser() / name
        if not path.exists():
            raise UserError(f"--evaluate.task_data: {path} is missing; put there what is published at {file.url}")
        return path
    cached = cache_directory() / name
    if not cached.exists():
        _download(file, cached, name)
    return epath.Path(cached)


def cache_directory() -> Path:
    """Returns where downloaded files are kept."""
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return cache / "isheep_jax" / "task_data"


def _download(file: DataFile, path: Path, name: str) -> None:
    advice = f"put a copy into a directory as {name} and name that directory with --evaluate.task_data"
    try:
        with urllib.request.urlopen(file.url, timeout=_TIMEOUT) as response:
            data = response.read()
    except (OSError, http.client.HTTPException) as error:
        raise UserError(f"cannot download {file.url} ({one_line(error)}); {advice}") from error
    if file.sha256 and (found := hashlib.sha256(data).hexdigest()) != file.sha256:
        raise UserError(
            f"{file.url} is not the file that was published (sha256 {found[:12]}, not {file.sha256[:12]}); {advice}"
        )
    # Each host has its own cache, and processes may share one: a name of its own, then a rename.
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; set XDG_CACHE_HOME to another directory") from error
