"""IFEval (Zhou et al., 2023): prompts with instructions whose following a program can check.

The checkers are those of lm-evaluation-harness (extra `eval`). The published script is random in two places, which are
fixed here: language detection has a seed, and a character that is no letter is counted (the script counts a random
letter instead, in two prompts).
"""

import contextlib
import io
import random
from collections.abc import Iterator, Sequence
from typing import Any

from isheep_jax import distributed
from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.evaluation.task import Response, Sample, Score, Scoring, Task, TaskOptions
from isheep_jax.evaluation.task_files import task_file
from isheep_jax.text.conversation import Message
from isheep_jax.text_files import read_objects

DATA = "ifeval/input_data.jsonl"
_LIKE = '{"key": 0, "prompt": "...", "instruction_id_list": ["..."], "kwargs": [{}]}'
MAX_TOKENS = 1280  # as in lm-evaluation-harness
_LETTER_FREQUENCY = "keywords:letter_frequency"


def samples(options: TaskOptions) -> list[Sample]:
    """Returns the 541 prompts: a user's turn, or the bare text for a model that continues texts."""
    path = task_file(options.settings, DATA)
    try:
        return [_sample(row, options) for _, row in read_objects(path, "evaluate.task_data", _LIKE)]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{path} is not IFEval's data ({error!r}): each line needs key, prompt, instruction_id_list and kwargs"
        ) from None


def _sample(row: dict[str, Any], options: TaskOptions) -> Sample:
    text, instructions, arguments = row["prompt"], row["instruction_id_list"], row["kwargs"]
    if len(instructions) != len(arguments):
        raise ValueError(f"key {row['key']} has {len(instructions)} instructions and {len(arguments)} kwargs")
    return Sample(
        id=str(row["key"]),
        prompt=(Message("user", text),) if options.chat else text,
        sampling=SamplingParams(temperature=0.0, max_tokens=options.settings.max_tokens or MAX_TOKENS),
        reference={"prompt": text, "instructions": instructions, "kwargs": arguments},
        held_out=(text,),
    )


def score(responses: Sequence[tuple[Sample, Response]], scoring: Scoring) -> list[Score]:
    """Returns for each response whether all instructions are followed, and whether each is, strictly and loosely.

    Loosely: in at least one of the variants of the response without its first line, last line or asterisks. A response
    that is missing follows none.
    """
    # One process checks, so that the others need no data of nltk.
    values = distributed.from_primary(lambda: _verdicts(responses))
    return [Score(v, _failed(sample, v)) for (sample, _), v in zip(responses, values)]


def _verdicts(responses: Sequence[tuple[Sample, Response]]) -> list[dict[str, Any]]:
    with _deterministic_checkers() as checkers:
        verdicts = []
        for sample, response in responses:
            item = checkers.InputExample(
                sample.id, sample.reference["instructions"], sample.reference["prompt"], sample.reference["kwargs"]
            )
            text = "" if response.error else response.text
            strict = checkers.test_instruction_following_strict(item, text).follow_instruction_list
            loose = checkers.test_instruction_following_loose(item, text).follow_instruction_list
            verdicts.append(
                {
                    "prompt_strict": int(all(strict)),
                    "prompt_loose": int(all(loose)),
                    "instruction_strict": list(map(int, strict)),
                    "instruction_loose": list(map(int, loose)),
                }
            )
        return verdicts


def _failed(sample: Sample, values: dict[str, Any]) -> dict[str, Any]:
    instructions = sample.reference["instructions"]
    return {
        f"failed_{kind}": [name for name, v in zip(instructions, values[f"instruction_{kind}"]) if not v]
        for kind in ("strict", "loose")
    }


@contextlib.contextmanager
def _deterministic_checkers() -> Iterator[Any]:
    """Yields the harness's module of checkers, in a state in which equal responses always get equal verdicts."""
    import langdetect
    from lm_eval.tasks.ifeval import instructions, instructions_registry, utils

    class LiteralCharacter(instructions.LetterFrequencyChecker):
        def build_description(self, *, letter=None, **arguments):
            description = super().build_description(letter=letter, **arguments)
            self._letter = letter.strip().lower() if letter and letter.strip() else self._letter
            return description

    table, state, seed = instructions_registry.INSTRUCTION_DICT, random.getstate(), langdetect.DetectorFactory.seed
    original = table[_LETTER_FREQUENCY]
    try:
        table[_LETTER_FREQUENCY] = LiteralCharacter
        langdetect.DetectorFactory.seed = 0
        random.seed(0)  # for arguments that a prompt of another file leaves open
        yield utils
    finally:
        table[_LETTER_FREQUENCY] = original
        langdetect.DetectorFactory.seed = seed
        random.setstate(state)


def check(settings: EvaluateConfig) -> None:
    """Raises `UserError` where the checkers or the data of nltk that they need are missing."""
    distributed.from_primary(_check_nltk)


def _check_nltk() -> None:
    try:
        import langdetect  # noqa: F401
        import lm_eval  # noqa: F401
        import nltk
    except ImportError as error:
        raise UserError(f'ifeval: {error.name} is not installed: pip install "isheep_jax[eval]"') from None
    if _has_punkt(nltk):
        return
    # It prints its failures, which the error below says in one line.
    with contextlib.redirect_stderr(io.StringIO()):
        nltk.download("punkt_tab", quiet=True)
    if not _has_punkt(nltk):
        raise UserError(
            "ifeval: nltk's data punkt_tab is neither here nor can it be downloaded; set NLTK_DATA to a directory with "
            "tokenizers/punkt_tab"
        )


def _has_punkt(nltk: Any) -> bool:
    with contextlib.suppress(LookupError):
        return bool(nltk.data.find("tokenizers/punkt_tab/english/"))
    return False


TASK = Task(
    title="IFEval",
    version=1,
    samples=samples,
    score=score,
    main="prompt_strict",
    shown=("instruction_strict", "prompt_loose", "instruction_loose"),
    check=check,
)
