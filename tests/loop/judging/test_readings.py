"""Each reading against the log-probabilities that it is made of, on a small random model and on scripted judges."""

import dataclasses
import math

import pytest

from isheep_jax.config import AssessConfig, DecodeConfig
from isheep_jax.decode.requests import ChoiceLogprobs, Request, TextLogprob
from isheep_jax.loop.filters.blind_spots import RULES
from isheep_jax.loop.judging.copying import copied_tokens
from isheep_jax.loop.judging.framing import framed
from isheep_jax.loop.judging.reader import Candidate, Reader
from isheep_jax.loop.judging.readings import READINGS, read
from isheep_jax.loop.judging.scores import NUMBERS
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.prompting.zero_shot import prompt_for
from isheep_jax.loop.records import KEPT, ReadingValue
from isheep_jax.runtime.load import load as load_model
from isheep_jax.text.conversation import Message

TEMPLATES = load("tiny", ("quality", "following", "backward", "pairwise"))
TASKS = [
    ("Name a big river.", "", "The Nile is a big river."),
    ("Add the numbers.", "1 2 3", "The sum is 6."),
    ("Say the word cat.", "", "Say the word cat, he said."),
]


@pytest.fixture(scope="module")
def judge(small_checkpoint):
    """Every character is a token, so that digits are split."""
    return load_model(str(small_checkpoint), decode=DecodeConfig(slots=4, max_length=512), compute_dtype="float32")


def candidate(number, instruction, input, response, *, bare=False, **more):
    prompts = {"prompt": (instruction, input), "empty": ("", "")}
    made = {name: prompt_for(*text, bare=bare) for name, text in prompts.items()}
    return Candidate(f"1-{number}", instruction, input, response, **made, **more)


def candidates(bare=False):
    return [candidate(n, *task, bare=bare) for n, task in enumerate(TASKS)]


def reading(judge, name, pairs, framing="chat", templates=TEMPLATES, **settings):
    """The records of the pairs, in their order."""
    reader = Reader(AssessConfig(readings=(name,), **settings), templates, judge, framing, "1/assess")
    found = dict(read(reader, pairs))
    assert len(found) == len(pairs)
    return [found[i] for i in range(len(pairs))]


def values(judge, name, pairs, **more):
    return [record.readings[name] for record in reading(judge, name, pairs, **more)]


def scored(judge, prompt, text):
    (result,) = judge.text_logprobs([Request("a", prompt)], [text])
    assert not result.error
    return result


@pytest.mark.parametrize("bare", [True, False])
def test_the_likelihood_is_the_log_probability_after_what_was_answered(judge, bare):
    pairs = candidates(bare)
    for pair, found in zip(pairs, values(judge, "likelihood", pairs)):
        expected = scored(judge, pair.prompt, pair.response)
        assert found.value == pytest.approx(expected.logprob, abs=1e-3)
        assert found.tokens == len(pair.response)


@pytest.mark.parametrize("bare", [True, False])
def test_the_ending_is_the_log_probability_of_the_end_after_the_response(judge, bare):
    pairs = candidates(bare)
    expected = [scored(judge, pair.prompt, pair.response).end for pair in pairs]
    found = values(judge, "ending", pairs)
    assert [value.value for value in found] == pytest.approx(expected, abs=1e-3)
    assert {value.tokens for value in found} == {0}


def test_several_readings_ask_each_text_once_and_read_what_each_reads_alone(judge):
    class Counted:
        def __init__(self):
            self.asked = []

        def text_logprobs(self, requests, texts):
            self.asked += [(request.prompt, text) for request, text in zip(requests, texts)]
            return judge.text_logprobs(requests, texts)

    names, pairs, counted = ("lift", "likelihood", "ending"), candidates(), Counted()
    # The same pair twice, as a damage that looks at no task makes it.
    pairs = [*pairs, dataclasses.replace(pairs[0], id="again")]
    together = dict(read(Reader(AssessConfig(readings=names), TEMPLATES, counted, "chat", "1/assess"), pairs))
    assert len(counted.asked) == len(set(counted.asked)) == 2 * len(candidates())
    for name in names:
        assert [together[i].readings[name] for i in range(len(pairs))] == values(judge, name, pairs)


@pytest.mark.parametrize("bare", [True, False])
def test_the_lift_is_the_difference_of_two_log_probabilities_over_what_is_not_copied(judge, bare):
    pairs = candidates(bare)
    for pair, found in zip(pairs, values(judge, "lift", pairs)):
        given, empty = (scored(judge, prompt, pair.response) for prompt in (pair.prompt, pair.empty))
        copied = copied_tokens((pair.instruction, pair.input), pair.response, given.spans)
        own = [i for i, left_out in enumerate(copied) if not left_out]
        assert found.tokens == len(own)
        gains = [given.logprobs[i] - empty.logprobs[i] for i in own]
        assert found.value == pytest.approx(sum(gains), abs=1e-3)
    assert [found.tokens == len(pair.response) for pair, found in zip(pairs, values(judge, "lift", pairs))] == [
        *(False, True, False)
    ]


def test_what_the_instruction_does_not_change_has_no_lift(judge):
    pairs = [dataclasses.replace(pair, empty=pair.prompt) for pair in candidates()]
    assert [found.value for found in values(judge, "lift", pairs)] == pytest.approx([0, 0, 0], abs=1e-4)
    (all_copied,) = values(judge, "lift", [candidate(0, "Say the big word.", "", "the big word")])
    assert all_copied == ReadingValue(0.0, 0)


def test_a_judge_that_cuts_the_response_otherwise_after_an_empty_prompt_gives_no_lift():
    class Uneven:
        def text_logprobs(self, requests, texts):
            for request, text in zip(requests, texts):
                count = len(text) - ("/empty/" in request.id)
                yield TextLogprob(request.id, -1.0, count, logprobs=(-1.0,) * count, spans=((0, 1),) * count)

    record, *_ = reading(Uneven(), "lift", candidates())
    assert "other tokens" in record.readings["lift"].error
    assert (record.verdict.reason, record.verdict.detail) == ("unscored", "lift")


@pytest.mark.parametrize("framing", ["text", "chat"])
def test_the_backward_lift_is_that_of_the_instruction_by_the_response(judge, framing):
    pairs = candidates()
    for pair, found in zip(pairs, values(judge, "backward_lift", pairs, framing=framing)):
        prompts = [framed(TEMPLATES.render("backward", response=text), framing) for text in (pair.response, "")]
        text = " " + "\n".join(filter(None, (pair.instruction, pair.input)))
        given, empty = (scored(judge, prompt, text) for prompt in prompts)
        assert found.value == pytest.approx(given.logprob - empty.logprob, abs=1e-3)
        assert found.tokens == len(text)


@pytest.mark.parametrize("framing", ["text", "chat"])
def test_the_mass_of_the_rubric_is_that_of_the_numbers_which_count_once_where_digits_are_split(judge, framing):
    (record, *_) = reading(judge, "rubric", candidates(), framing=framing)
    pair = candidates()[0]
    shown = {"instruction": pair.instruction, "input": pair.input, "response": pair.response}
    prompt = framed(TEMPLATES.render("quality", **shown), framing)
    request = Request("a", prompt)
    (alone,) = zip(*(next(iter(judge.choice_logprobs([request], [number]))).logprobs for number in NUMBERS[:9]))
    # " 1" alone includes " 10".
    assert record.quality.mass == pytest.approx(sum(map(math.exp, alone)), abs=1e-4)
    assert record.readings is None
    assert record.verdict == KEPT


def test_in_a_users_turn_the_last_line_is_what_the_assistant_begins_with():
    text = "Rate it.\n\nResponse: a\nb\n\nI rate this response"
    assert framed(text, "text") == text
    assert framed(text, "chat") == (
        Message("user", "Rate it.\n\nResponse: a\nb"),
        Message("assistant", "I rate this response"),
    )
    assert framed("Rate {response} in a line", "chat") == (
        Message("user", "Rate {response} in a line"),
        Message("assistant", "Rating (1 to 10):"),
    )


@pytest.mark.parametrize("name", [name for name, row in READINGS.items() if row.needs_weights])
@pytest.mark.parametrize("framing", ["text", "chat"])
def test_shared_prefixes_and_neighbors_change_nothing(judge, name, framing):
    class WithoutPrefixes:
        def __getattr__(self, method):
            def call(requests, texts):
                return getattr(judge, method)([Request(r.id, r.prompt) for r in requests], texts)

            return call

    templates = load("standard", TEMPLATES_OF[name]) if name in TEMPLATES_OF else TEMPLATES
    pairs = [dataclasses.replace(pair, others=("No.", "It is so.")) for pair in candidates()]
    found = values(judge, name, pairs, framing=framing, templates=templates)
    for other in (
        values(WithoutPrefixes(), name, pairs, framing=framing, templates=templates),
        [values(judge, name, [pair], framing=framing, templates=templates)[0] for pair in pairs[::-1]][::-1],
    ):
        assert [x.value for x in other] == pytest.approx([x.value for x in found], abs=2e-3)
        assert [x.tokens for x in other] == [x.tokens for x in found]


# Their beginning is long enough to be shared.
TEMPLATES_OF = {name: row.templates for name, row in READINGS.items() if row.templates}


class Preferring:
    """A judge that says how much likelier A is than B (log-odds)."""

    def __init__(self, odds):
        self.odds, self.asked = odds, []

    def choice_logprobs(self, requests, choices):
        for request in requests[::-1]:
            self.asked.append(request.prompt)
            shown = [request.prompt.partition(f"Response {name}: ")[2].partition("\n")[0] for name in "AB"]
            a = -math.log1p(math.exp(-self.odds(*shown)))
            yield ChoiceLogprobs(request.id, (a, math.log1p(-math.exp(a)) if a < -1e-12 else -40.0))


def siblings(*responses):
    others = [tuple(other for k, other in enumerate(responses) if k != n) for n in range(len(responses))]
    return [
        dataclasses.replace(candidate(n, "Name a river.", "", response), others=others[n])
        for n, response in enumerate(responses)
    ]


def test_a_judge_that_goes_by_the_order_prefers_none():
    found = values(Preferring(lambda a, b: 3.0), "pairwise", siblings("Nile", "Rhine", "Po"), framing="text")
    assert [x.value for x in found] == [0.5, 0.5, 0.5]


def test_the_preferred_response_wins_in_both_orders_and_each_question_is_asked_once():
    judge = Preferring(lambda a, b: 2.0 * (len(a) - len(b)) + 1.0)
    found = [x.value for x in values(judge, "pairwise", siblings("Nile", "Rhine", "Po"), framing="text")]
    assert len(judge.asked) == len(set(judge.asked)) == 3 * 2

    def preferred(difference):
        return sum(1 / (1 + math.exp(-(2.0 * difference + sign))) for sign in (1, -1)) / 2

    assert found == pytest.approx(
        [(preferred(-1) + preferred(2)) / 2, (preferred(1) + preferred(3)) / 2, (preferred(-2) + preferred(-3)) / 2],
        abs=1e-4,
    )
    assert sum(found) == pytest.approx(1.5, abs=1e-3)


def test_a_preference_that_is_not_a_number_is_no_value():
    class Broken(Preferring):
        def choice_logprobs(self, requests, choices):
            for request in requests:
                yield ChoiceLogprobs(request.id, (-math.inf, -math.inf))

    for found in values(Broken(None), "pairwise", siblings("Nile", "Rhine"), framing="text"):
        assert (found.value, found.error) == (None, "the model's log-probabilities are not numbers")


def test_agreement_with_the_other_responses_is_their_mean_rouge():
    pairs = siblings("It is the Nile.", "It is the Po.", "Rhine")
    found = values(None, "self_consistency", pairs)
    # Three of four words are common to the first two, and none to the third.
    assert [x.value for x in found] == [0.375, 0.375, 0.0]
    assert values(None, "self_consistency", siblings("Nile", "nile!"))[0].value == 1.0


@pytest.mark.parametrize("name", [name for name, row in READINGS.items() if row.needs_others])
def test_a_response_without_another_one_has_nothing_to_be_compared_with(name):
    class Unasked:
        def choice_logprobs(self, requests, choices):
            assert not requests
            return iter(())

    (record,) = reading(Unasked(), name, siblings("Nile"))
    assert record.readings[name].value is None
    assert (record.verdict.reason, record.verdict.detail) == ("unscored", name)


def test_what_does_not_fit_is_unscored_and_says_why(judge):
    pairs = [candidate(9, "Name a river.", "", "x " * 300), *candidates()[:1]]
    for name in ("likelihood", "lift"):
        too_long, fine = reading(judge, name, pairs)
        assert "decode.max_length=512" in too_long.readings[name].error
        assert (too_long.verdict.reason, fine.verdict) == ("unscored", KEPT)


def test_several_readings_are_one_record_with_the_scores_of_the_rubric(judge):
    names = ("lift", "rubric", "likelihood")
    reader = Reader(AssessConfig(readings=names, level="quality"), TEMPLATES, judge, "chat", "1/assess")
    found = dict(read(reader, candidates()))
    assert found.keys() == {0, 1, 2}
    for i, record in found.items():
        assert list(record.readings) == ["lift", "likelihood"]
        assert record.quality.value is not None
        assert record.following is None
        assert record.id == candidates()[i].id


LOOPS = "It goes on and on. " * 9


@pytest.mark.parametrize(("names", "reason"), [(("rubric",), ""), (("likelihood",), "repeats itself")])
def test_a_pair_in_the_blind_spot_of_a_reading_in_use_is_dropped_for_it(judge, names, reason):
    reader = Reader(AssessConfig(readings=names), TEMPLATES, judge, "chat", "1/assess")
    ((_, record),) = read(reader, [candidate(0, "Name a river.", "", LOOPS)])
    assert record.verdict.reason == reason


def test_blind_spots_are_reasons_of_the_text_rules():
    assert READINGS["rubric"].blind_to == frozenset()
    for row in READINGS.values():
        assert row.blind_to <= RULES.keys()


def test_without_readings_nothing_is_asked():
    reader = Reader(AssessConfig(readings=()), TEMPLATES, None, "text", "1/assess")
    assert list(read(reader, candidates())) == []
