"""Short answers to questions: taken out of a response, and compared with the right ones as SQuAD and TriviaQA do."""

import re
import string
from collections import Counter
from collections.abc import Callable, Sequence

from isheep_jax.decode.requests import SamplingParams
from isheep_jax.evaluation.task import TaskOptions
from isheep_jax.text.conversation import Message, Prompt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
# TriviaQA puts spaces in place of punctuation, which also includes these quotation marks and accents.
_SPACES_FOR_PUNCTUATION = str.maketrans(dict.fromkeys(string.punctuation + "‘’´`", " "))

# What stands before the answer in "Answer: Paris", "A: Paris" and "The correct answer to this question is: Paris".
_LABEL = re.compile(
    r"(?:(?:(?:final|short|correct) )?answer|a) ?:|(?:the |my )?(?:(?:final|short|correct) )?answer "
    r"(?:to (?:the|this|your) question )?(?:is|was)\b ?:?",
    re.IGNORECASE,
)

Normalizer = Callable[[str], str]


def short_answers(options: TaskOptions) -> SamplingParams:
    """Returns how short answers are asked for: greedily, with a limit of 64 tokens, or 32 for a text to continue.

    A chat model has room for a sentence around the answer. A text ends with its line: the model would go on with
    questions of its own.
    """
    if options.chat:
        return SamplingParams(temperature=0.0, max_tokens=options.settings.max_tokens or 64)
    return SamplingParams(temperature=0.0, max_tokens=options.settings.max_tokens or 32, stop=("\n",))


def prompt_with_examples(
    instruction: str,
    examples: Sequence[tuple[str, str]],
    question: str,
    chat: bool,
) -> Prompt:
    """Returns a question after worked examples: earlier turns of a conversation, or a text that ends with "Answer:".

    Args:
        instruction: stands before the first example.
        examples: questions with their answers. Without them small chat models answer in sentences, whatever the
            instruction says, and hardly a right one matches exactly.
        question: what is asked, with its passage.
        chat: whether the model holds conversations.
    """
    if not chat:
        worked = "".join(f"{asked}\nAnswer: {answer}\n\n" for asked, answer in examples)
        return f"{instruction}\n\n{worked}{question}\nAnswer:"
    turns = [Message(*turn) for asked, answer in examples for turn in (("user", asked), ("assistant", answer))]
    first, *later = *turns, Message("user", question)
    return (Message("user", f"{instruction}\n\n{first.content}"), *later)


def short_answer(text: str) -> str:
    """Returns the answer that a response gives: its first line that has one, without label and marks of emphasis.

    Labels are "Answer:", "A:", "The answer is" and the like at the start of the line. The same for every model and
    task; a sentence around the answer stays, and counts as the metrics count it.
    """
    for line in text.splitlines():
        line = line.replace("**", "").replace("`", "").strip()
        label = _LABEL.match(line)
        answer = line[label.end() :].strip() if label else line
        if answer:
            return answer
    return ""


def squad_normalized(text: str) -> str:
    """Returns the text in lower case, without punctuation and English articles, as SQuAD 1.1 and 2.0 compare it."""
    return _squeezed(text.lower().translate(_NO_PUNCTUATION))


def triviaqa_normalized(text: str) -> str:
    """Returns the text in lower case, with spaces for punctuation, without articles, as TriviaQA compares it."""
    return _squeezed(text.lower().translate(_SPACES_FOR_PUNCTUATION))


def _squeezed(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text).split())


def exact_match(answer: str, right: Sequence[str], normalized: Normalizer) -> bool:
    """Returns whether the normalized answer is one of the normalized right ones."""
    return normalized(answer) in {normalized(gold) for gold in right}


def f1(
    answer: str,
    right: Sequence[str],
    normalized: Normalizer,
    empty_is_answer: bool = False,
) -> float:
    """Returns the highest F1 of the answer's words with those of a right answer.

    Args:
        answer: what the model answered.
        right: at least one right answer.
        normalized: makes the words comparable.
        empty_is_answer: whether an answer without words is right where a right answer has none, as in SQuAD 2.0;
            otherwise it is wrong.
    """
    words = normalized(answer).split()
    return max(_overlap(words, normalized(gold).split(), empty_is_answer) for gold in right)


def _overlap(words: list[str], gold: list[str], empty_is_answer: bool) -> float:
    if not words or not gold:
        return float(empty_is_answer and words == gold)
    common = (Counter(words) & Counter(gold)).total()
    precision, recall = common / len(words), common / len(gold)
    return 2 * precision * recall / (precision + recall) if common else 0.0


def contains_answer(text: str, right: Sequence[str], normalized: Normalizer) -> bool:
    """Returns whether the text has the words of a right answer, one after the other."""
    words = f" {normalized(text)} "
    return any(f" {gold} " in words for gold in map(normalized, right) if gold)
