"""Whatever a model writes is read in linear time: loops of one character or word, and forms that never end."""

import contextlib
import signal

import pytest

from isheep_jax.chat_server import without_thought
from isheep_jax.cli.errors import without_sections
from isheep_jax.evaluation import alpaca_eval, answers, judging, mt_bench, programs, squad, xstest
from isheep_jax.loop.filters import blind_spots, held_out, junk, labels, text_rules
from isheep_jax.loop.filters.novelty import Pool
from isheep_jax.loop.judging.scores import parse_score
from isheep_jax.loop.prompting import few_shot, principles, topics
from isheep_jax.loop.records import KEPT, Instruction
from isheep_jax.loop.selection.select import sentences
from isheep_jax.loop.stages import clone
from isheep_jax.tiny import world

# Characters of a text.
LENGTH = 20_000
# Seconds of CPU time for all readings of one text; linear time is a few hundredths of one, quadratic time many.
LIMIT = 3.0

REPEATED = [
    *"#19 \t\n\r.!?:;,*_-–`~'\"()[]<>{}/\\|=aAéх答。１\u0660\u0301\u2028\u202e\x00",
    *("###\n", "\n#", "\n ", " \n", "\r\n", "1. ", "1.\n", "\n1.", "\n1", "- ", "* ", "> ", "**", "\n**", "![", "?\n"),
    *("Instruction:", "###Instruction:", "\nInput:", "Input: ", "**Input:** ", "no input ", "none ", "<noinput>"),
    *("the ", "a b ", "so ", "sorry ", "very ", "is ", "i ", "i am an ", "i do ", "answer ", "answer: ", "a\n\n"),
    *("<think>", "```\n", "~~~\n", "`` `", "def f\n", "import ", "a=", "a.", "\n\ndef ", "word, word. ", "答案"),
    *("[1", "[[1", "[[", "\x1b["),
]
# What begins a form, with what may go on for ever in it.
AFTER = {"[[": "1", "[[1.": "0", "[": "1", "<think>": "\n", "- ": "a", "```": "`", "``` ": "a ", "~~~": "~", "1": "\n"}


def parses_form(text):
    few_shot.parse(text, finished=True)
    few_shot.parse(text, finished=False)
    labels.is_no_input(text)


def reads_topics(text):
    for line in topics.read_topics(text, finished=True):
        topics.topic_reason(line)


def reads_instruction(text):
    for rules in ("paper", "strict", "basic"):
        text_rules.instruction_reason(rules, text, "")
        text_rules.instruction_reason(rules, "Name a good color.", text)


def reads_junk(text):
    for rule in junk._RULES.values():
        rule(text.strip(), "")
        rule("Sum up the following.", text.strip())


def reads_response(text):
    for rules in ("paper", "basic"):
        text_rules.response_reason(rules, text, "", text_rules.clean_response(rules, text))


def reads_blind_spots(text):
    for name in blind_spots.RULES:
        blind_spots.blind_spot(frozenset({name}), "Name a good color of the sky.", "", text)
        blind_spots.blind_spot(frozenset({name}), text, "", "Blue.")


def reads_answer(text):
    principles.until_repeated(principles.clean(text))
    clone.echo_reason(Instruction("1", text, "", 0, (), KEPT), "Answer this at great length, please.", text)


def reads_scores(text):
    for parser in ("strict", "paper"):
        parse_score(text, parser)


def reads_novelty(text):
    pool = Pool(0.7)
    pool.admit(["a", "b"], [text, text + " more"], ["", ""])
    held_out.is_held_out(text, "", frozenset({"a"}))


def reads_program(text):
    programs.completed("def f():\n", programs.code_in(text, "f"), "f")


def reads_short_answer(text):
    answer = answers.short_answer(text)
    for normalized in (answers.squad_normalized, answers.triviaqa_normalized):
        answers.f1(answer, ["a b c"], normalized)
        answers.contains_answer(text, ["a b c"], normalized)
    squad._ABSTAINS.search(text)


def reads_verdicts(text):
    verdict = judging.Verdict(without_thought(text))
    mt_bench.rating(verdict)
    alpaca_eval.probability_of_a(verdict)


READERS = {
    "tasks in the form": parses_form,
    "topics": reads_topics,
    "rules for instructions": reads_instruction,
    "strict rules": reads_junk,
    "rules for responses": reads_response,
    "blind spots": reads_blind_spots,
    "answers by principles": reads_answer,
    "scores": reads_scores,
    "novelty": reads_novelty,
    "sentences": sentences,
    "programs": reads_program,
    "short answers": reads_short_answer,
    "refusals": xstest.refused,
    "verdicts": reads_verdicts,
    "the tiny world": world.parse_instruction,
    "messages": lambda text: without_sections(text, "evaluate", "decode"),
}


@contextlib.contextmanager
def seconds(limit: float):
    """Fails where the block takes more CPU time; a pattern that is being searched is stopped, too."""

    def late(*_):
        raise TimeoutError(f"more than {limit} s")

    before = signal.signal(signal.SIGVTALRM, late)
    signal.setitimer(signal.ITIMER_VIRTUAL, limit)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@pytest.mark.parametrize("reader", READERS)
def test_degenerate_text_is_read_in_linear_time(reader):
    for before, repeated in [*(("", r) for r in REPEATED), *AFTER.items()]:
        with seconds(LIMIT):
            READERS[reader](before + repeated * (LENGTH // len(repeated)) + "!")
