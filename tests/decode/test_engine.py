import dataclasses
import logging

import jax
import numpy as np
import pytest
from meshes import mesh_of
from minute_model import (
    ARCHITECTURE,
    LETTERS,
    TableTokenizer,
    full_logits,
    make_engine,
    ragged,
    random_parameters,
)

from isheep_jax.decode import device_calls, scheduler
from isheep_jax.decode.cache import Sizing, allocate_cache, rows_sharding
from isheep_jax.decode.packing import POSITION, empty_rows
from isheep_jax.decode.prefill import prefill
from isheep_jax.decode.requests import NOT_NUMBERS, Request, SamplingParams
from isheep_jax.errors import UserError
from isheep_jax.model.architecture import parameter_table
from isheep_jax.sharding import DECODE_RULES, param_shardings, put

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


def by_id(completions) -> dict:
    return {completion.id: completion for completion in completions}


def dispatch_ahead(monkeypatch, calls: int) -> None:
    """Makes the engine dispatch so many calls before it reads the results of one, as on another platform."""

    class Ahead(scheduler.Scheduler):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.calls_ahead = calls

    monkeypatch.setattr("isheep_jax.decode.engine.Scheduler", Ahead)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_numbers_are_an_error_and_never_text(params, temperature):
    # Finite weights, whose products are not.
    huge = params | {"final_norm": np.full_like(params["final_norm"], 3e38)}
    sampling = dataclasses.replace(GREEDY, temperature=temperature)
    engine = make_engine(huge)
    (completion,) = engine.generate(ragged(1), sampling)
    assert (completion.finish_reason, completion.error, completion.text) == ("error", NOT_NUMBERS, "")
    stream = engine.stream(*ragged(1), sampling)
    with pytest.raises(StopIteration) as end:
        next(stream)
    assert end.value.value == completion
    with pytest.raises(UserError, match="not numbers"):
        list(engine.generate(ragged(9), sampling))


class GappyTokenizer(TableTokenizer):
    def missing_ids(self, rows):
        return ((2, 30), (50, rows))


@pytest.mark.parametrize("temperature", [0.0, 3.0])
def test_rows_without_a_token_are_never_drawn_and_probabilities_are_the_models(params, temperature):
    sampling = dataclasses.replace(GREEDY, temperature=temperature, logprobs=True, repetition_penalty=1.1)
    drawn = {}
    for tokenizer in (TableTokenizer(), GappyTokenizer()):
        completions = list(make_engine(params, tokenizer=tokenizer).generate(ragged(14), sampling))
        drawn[type(tokenizer)] = {token for completion in completions for token in completion.tokens}
    missing = {*range(2, 30), *range(50, ARCHITECTURE.vocab_size)}
    assert drawn[TableTokenizer] & missing
    assert not drawn[GappyTokenizer] & missing
    completion = completions[0]
    prompt = TableTokenizer().encode(next(r.prompt for r in ragged(14) if r.id == completion.id))
    expected = jax.nn.log_softmax(full_logits(params, [*prompt, *completion.tokens]), axis=-1)
    found = [expected[len(prompt) - 1 + i, token] for i, token in enumerate(completion.tokens)]
    np.testing.assert_allclose(completion.logprobs, found, atol=1e-4)


def test_tokens_equal_teacher_forced_argmax_of_plain_forward(params):
    requests = ragged(14)
    completions = by_id(make_engine(params).generate(requests, GREEDY))
    kinds = set()
    for request in requests:
        completion = completions[request.id]
        prompt = TableTokenizer().encode(request.prompt)
        best = full_logits(params, [*prompt, *completion.tokens]).argmax(-1)[len(prompt) - 1 :].tolist()
        assert best[: len(completion.tokens)] == list(completion.tokens)
        if completion.finish_reason == "stop":
            assert best[-1] == 1
        else:
            assert len(completion.tokens) == min(12, 48 - len(prompt))
        assert completion.text == TableTokenizer().decode(completion.tokens)
        kinds.add((completion.finish_reason, len(completion.tokens) == 12))
    assert {finish for finish, _ in kinds} == {"stop", "length"}


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, top_p=0.9, max_tokens=12)])
def test_tokens_do_not_depend_on_slots_steps_per_call_order_or_neighbors(params, sampling):
    requests = ragged(12)
    expected = by_id(make_engine(params).generate(requests, sampling))
    for settings in ({"slots": 1, "steps_per_call": 3}, {"slots": 16, "steps_per_call": 64}):
        assert by_id(make_engine(params, **settings).generate(requests, sampling)) == expected
    engine = make_engine(params)
    assert by_id(engine.generate(requests[::-1], sampling)) == expected
    for request in requests[::4]:
        assert list(engine.generate([request], sampling)) == [expected[request.id]]


def test_sampled_tokens_depend_on_seed_and_id_alone(params):
    sampling = SamplingParams(temperature=1.0, max_tokens=12)
    engine = make_engine(params)
    completions = by_id(engine.generate([Request(name, "abc") for name in "xyz"], sampling))
    assert len({completion.tokens for completion in completions.values()}) == 3
    other = by_id(make_engine(params, seed=1).generate([Request("x", "abc")], sampling))
    assert other["x"].tokens != completions["x"].tokens
    assert by_id(make_engine(params).generate([Request("x", "abc")], sampling))["x"] == completions["x"]


def test_refilled_slot_sees_nothing_of_sequence_before(params):
    engine = make_engine(params, slots=1, steps_per_call=3)
    long, short = Request("long", LETTERS), Request("short", "ab")
    both = by_id(engine.generate([long, short], GREEDY))  # longest first: `short` comes into the slot of `long`
    assert both["short"] == next(engine.generate([short], GREEDY))


def test_prompt_that_does_not_fit_is_error_of_that_request_alone(params):
    engine = make_engine(params)
    good = Request("good", "abc")
    completions = by_id(engine.generate([Request("long", "a" * 48), good], GREEDY))
    assert completions["long"].finish_reason == "error"
    assert "49 tokens" in completions["long"].error
    assert "decode.max_length=48" in completions["long"].error
    assert completions["good"] == next(engine.generate([good], GREEDY))
    assert by_id(engine.generate([Request("fits", "a" * 46)], GREEDY))["fits"].finish_reason in ("length", "stop")


def test_completions_end_at_max_length(params):
    sampling = SamplingParams(temperature=1.0, max_tokens=1000)
    for completion in make_engine(params).generate([Request(str(i), "ab" * i) for i in range(1, 20)], sampling):
        prompt = TableTokenizer().encode("ab" * int(completion.id))
        assert completion.finish_reason == "stop" or len(prompt) + len(completion.tokens) == 48


def test_stop_strings_cut_text_wherever_tokens_and_calls_end(params):
    requests = ragged(12)
    sampling = SamplingParams(temperature=1.0, max_tokens=30)
    free = by_id(make_engine(params).generate(requests, sampling))
    # Two letters that some completions hold next to each other across a border of tokens, and one single letter.
    text = max((completion.text for completion in free.values()), key=len)
    stop = (text[3:6], text[8:9])
    stopped = 0
    stopping = dataclasses.replace(sampling, stop=stop)
    for completion in make_engine(params, steps_per_call=2).generate(requests, stopping):
        whole = free[completion.id]
        ends = [whole.text.find(string) for string in stop if string in whole.text]
        if ends:
            stopped += 1
            assert completion.finish_reason == "stop"
            assert completion.text == whole.text[: min(ends)]
            assert whole.text.startswith(completion.text + completion.stop)
            assert completion.stop in stop
            assert whole.tokens[: len(completion.tokens)] == completion.tokens
            assert TableTokenizer().decode(completion.tokens).startswith(completion.text)
        else:
            assert completion == whole
    assert stopped > 1


def test_search_for_stop_strings_decodes_the_last_tokens_alone(params):
    class Counting(TableTokenizer):
        decoded = 0

        def decode(self, ids):
            self.decoded += len(ids)
            return super().decode(ids)

    counts = []
    for length in (40, 80):
        tokenizer = Counting()
        sampling = SamplingParams(temperature=1.0, max_tokens=length, stop=("no such text",))
        engine = make_engine(params, tokenizer=tokenizer, steps_per_call=2, max_length=128)
        (completion,) = (c for c in engine.generate(ragged(12)[3:4], sampling))
        assert len(completion.tokens) == length
        counts.append(tokenizer.decoded)
    assert counts[1] < 3 * counts[0]


def test_special_token_as_stop_string_ends_completion_though_no_text_shows_it(params):
    requests, sampling = ragged(12), SamplingParams(temperature=1.0, max_tokens=30)
    marker = TableTokenizer().pieces.index("de")
    tokenizer = TableTokenizer({marker: "<|user|>"})
    free = by_id(make_engine(params, tokenizer=tokenizer).generate(requests, sampling))
    stopping = dataclasses.replace(sampling, stop=("ab", "<|user|>"))
    stopped = 0
    for completion in make_engine(params, tokenizer=tokenizer, steps_per_call=2).generate(requests, stopping):
        whole = free[completion.id]
        before = whole.tokens[: whole.tokens.index(marker)] if marker in whole.tokens else whole.tokens
        text = TableTokenizer().decode(before)
        if "ab" in text:
            assert completion.text == text[: text.index("ab")]
        elif marker in whole.tokens:
            stopped += 1
            assert (completion.text, completion.tokens, completion.finish_reason) == (text, before, "stop")
        else:
            assert completion == whole
    assert stopped > 1


def test_nothing_recompiles_after_first_stage_of_first_model(params, caplog):
    def stage(engine, sampling):
        list(engine.generate(ragged(9), sampling))
        list(engine.choice_logprobs(ragged(5), ["a", "b"]))

    warm = make_engine(params, slots=5)
    stage(warm, GREEDY)
    model = warm.model
    for length in (32, 64, 128, 256, 320):  # of rows that a refill of one slot or of several needs
        cache = allocate_cache(ARCHITECTURE, 5, 48, model.compute_dtype, model.mesh)
        prefill(model.params, cache, put(empty_rows(1, length), rows_sharding(model.mesh)), None, **model.static_args)
    with jax.log_compiles(), caplog.at_level(logging.WARNING):
        other = random_parameters(1)  # from a jitted function or from the host: both are put on the device alike
        caplog.clear()
        stage(make_engine(other, slots=5), SamplingParams(temperature=0.7, top_p=0.8, max_tokens=7, stop=("ab",)))
        stage(make_engine(jax.tree.map(np.asarray, other), slots=5, seed=3), SamplingParams(max_tokens=9))
    compiled = [record.getMessage() for record in caplog.records if "Compiling" in record.getMessage()]
    assert not compiled


def test_weights_are_placed_by_decode_rules(params):
    mesh = mesh_of((4, 1, 2))
    engine = make_engine(params, slots=8, mesh=mesh)
    shardings = param_shardings(parameter_table(ARCHITECTURE), mesh, DECODE_RULES)
    same = jax.tree.map(
        lambda leaf, sharding: leaf.sharding.is_equivalent_to(sharding, leaf.ndim), engine.model.params, shardings
    )
    assert all(jax.tree.leaves(same))


def test_bad_settings_are_one_clear_line(params):
    with pytest.raises(UserError, match=r"decode\.slots=6 does not divide over 4 data shards; .* nearest .*: 8"):
        make_engine(params, slots=6, mesh=mesh_of((4, 1, 2)))
    with pytest.raises(UserError, match=r"decode\.max_length=129 .* 128 tokens"):
        make_engine(params, max_length=129)
    with pytest.raises(UserError, match=r"decode\.steps_per_call=0"):
        make_engine(params, steps_per_call=0)
    engine = make_engine(params)
    for bad in ({"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"max_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(UserError, match=next(iter(bad))):
            engine.generate([Request("a", "a")], SamplingParams(**bad))


def test_id_that_occurs_twice_is_refused(params):
    twice = [Request("a", "a"), Request("a", "b")]
    with pytest.raises(ValueError, match="'a'"):
        make_engine(params).generate(twice, GREEDY)
    with pytest.raises(ValueError, match="'a'"):
        make_engine(params).choice_logprobs(twice, ["b"])


@pytest.mark.parametrize("sampling", [GREEDY, SamplingParams(temperature=1.0, max_tokens=12)])
def test_shared_prefix_changes_no_token(params, sampling):
    prefix = "the quick brown fox jumps over 13 lazy dogs. "
    requests = [Request(request.id, prefix + request.prompt) for request in ragged(12)]
    expected = by_id(make_engine(params, max_length=128).generate(requests, sampling))
    sharing = [dataclasses.replace(request, prefix=prefix) for request in requests]
    engine = make_engine(params, max_length=128)
    assert all(engine.model.tokenize(request).prefix for request in sharing)
    assert by_id(engine.generate(sharing, sampling)) == expected
    # Together with others that share nothing, and where the prompt does not begin with the prefix.
    mixed = [*sharing[:5], *requests[5:9], *[dataclasses.replace(r, prefix="no such prefix" * 5) for r in requests[9:]]]
    assert by_id(engine.generate(mixed, sampling)) == expected


def test_samples_of_one_prompt_share_its_prefill(params, monkeypatch):
    filled = []

    def counted(params, cache, packed, *rest, **static):
        filled.append(int((packed[..., POSITION] == 0).sum()))
        return prefill(params, cache, packed, *rest, **static)

    monkeypatch.setattr(device_calls, "prefill", counted)
    sampling = SamplingParams(temperature=1.0, max_tokens=6)
    requests = [Request(f"{name}/{i}", name * 9) for name in ("abc", "xyz") for i in range(4)]
    completions = by_id(make_engine(params, slots=8).generate(requests, sampling))
    assert sum(filled) == 2
    for request in requests:
        assert next(make_engine(params).generate([request], sampling)) == completions[request.id]


def watch_slots(monkeypatch) -> list[int]:
    """Returns the number of slots of each call of the decode program."""
    sizes, dispatch = [], scheduler.Scheduler._dispatch

    def watched(self, *arguments):
        sizes.append(len(self._table))
        return dispatch(self, *arguments)

    monkeypatch.setattr(scheduler.Scheduler, "_dispatch", watched)
    return sizes


@pytest.mark.parametrize(("shards", "fewest"), [(1, 32), (2, 64)])
def test_last_prompts_move_to_fewer_slots(params, monkeypatch, shards, fewest):
    requests, sampling = ragged(150), dataclasses.replace(GREEDY, max_tokens=30)
    expected = by_id(make_engine(params, slots=32).generate(requests, sampling))
    sizes = watch_slots(monkeypatch)
    engine = make_engine(params, mesh=mesh_of((shards, 1, 1)), slots=128)
    assert by_id(engine.generate(requests, sampling)) == expected
    assert sorted(set(sizes)) == [slots for slots in (32, 64, 128) if slots >= fewest]
    assert sizes == sorted(sizes, reverse=True)


def test_schedule_of_accelerators_changes_nothing(params, monkeypatch):
    requests, sampling = ragged(150), SamplingParams(temperature=1.0, max_tokens=40, stop=("ab",), presence_penalty=0.5)
    expected = by_id(make_engine(params, slots=32).generate(requests, sampling))
    sizes = watch_slots(monkeypatch)
    monkeypatch.setattr(scheduler, "_STEPS_LEFT", 1)
    monkeypatch.setattr(scheduler, "_SAVED_SHARE", 0.0)
    engine = make_engine(params, mesh=mesh_of((2, 1, 1)), slots=64)
    engine.model.__dict__["sizing"] = Sizing("gpu", 2)
    assert by_id(engine.generate(requests, sampling)) == expected
    assert sorted(set(sizes)) == [16, 64]


def test_stream_is_taken_as_slots_become_idle_and_its_completions_are_those_of_a_list(params):
    requests = ragged(40)
    expected = by_id(make_engine(params).generate(requests, GREEDY))
    taken, finished = 0, []

    def stream():
        nonlocal taken
        for request in requests:
            while taken - len(finished) >= 6:
                yield None
            taken += 1
            yield request

    for completion in make_engine(params).generate(stream(), GREEDY):
        finished.append(completion)
        assert len(finished) <= taken <= len(finished) + 6
    assert by_id(finished) == expected
    completions = make_engine(params).generate(iter(requests), GREEDY)
    assert next(completions) in expected.values()
    completions.close()


def test_stream_whose_prompts_grow_or_change_their_prefix_goes_on_in_other_slots(params):
    prefix = "the quick brown fox jumps over 13 lazy dogs. "
    short, long = ragged(30)[:10], ragged(30)[20:]
    requests = [*short, *long, *(Request(f"{r.id}/p", prefix + r.prompt, prefix) for r in short), *short[:0]]
    expected = by_id(make_engine(params, max_length=128).generate(requests, GREEDY))
    assert by_id(make_engine(params, max_length=128).generate(iter(requests), GREEDY)) == expected


def test_stream_that_waits_for_nothing_is_an_error(params):
    with pytest.raises(RuntimeError, match="waits for results"):
        list(make_engine(params).generate(iter([None]), GREEDY))


def test_stream_may_wait_for_prompt_that_does_not_fit(params):
    finished = []

    def stream():
        yield Request("long", "a" * 100)
        while not finished:
            yield None
        yield Request("short", "abc")

    for completion in make_engine(params).generate(stream(), GREEDY):
        finished.append(completion)
    assert [completion.id for completion in finished] == ["long", "short"]
    assert finished[0].finish_reason == "error"


def test_call_dispatched_ahead_changes_nothing(params, monkeypatch):
    requests, sampling = ragged(20), SamplingParams(temperature=1.0, max_tokens=20, stop=("ab", "t"))
    expected = by_id(make_engine(params).generate(requests, sampling))

    dispatch_ahead(monkeypatch, 1)
    assert by_id(make_engine(params).generate(requests, sampling)) == expected


def test_filters_and_penalties_reach_sampler(params):
    requests, engine = ragged(8), make_engine(params)
    greedy = by_id(engine.generate(requests, GREEDY))
    for settings in ({"top_k": 1}, {"min_p": 1.0}):
        assert by_id(engine.generate(requests, SamplingParams(temperature=1.0, max_tokens=12, **settings))) == greedy
    once = engine.generate(requests, dataclasses.replace(GREEDY, presence_penalty=1e6))
    repeated = engine.generate(requests, dataclasses.replace(GREEDY, repetition_penalty=1e6))
    for completion in once:
        assert len(set(completion.tokens)) == len(completion.tokens)
    for completion, request in zip(sorted(repeated, key=lambda c: c.id), sorted(requests, key=lambda r: r.id)):
        prompt = TableTokenizer().encode(request.prompt)
        logits = full_logits(params, prompt)[-1].copy()
        logits[prompt] = np.where(logits[prompt] > 0, logits[prompt] / 1e6, logits[prompt] * 1e6)
        assert [*completion.tokens, 1][0] == logits.argmax()


def test_logprobs_are_those_of_plain_forward(params):
    requests = ragged(8)
    sampling = SamplingParams(temperature=0.7, top_p=0.9, max_tokens=9, logprobs=True)
    for completion in make_engine(params).generate(requests, sampling):
        prompt = TableTokenizer().encode(next(r.prompt for r in requests if r.id == completion.id))
        logits = full_logits(params, [*prompt, *completion.tokens]).astype(np.float64)
        logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        expected = [logprobs[len(prompt) - 1 + i, token] for i, token in enumerate(completion.tokens)]
        np.testing.assert_allclose(completion.logprobs, expected, atol=1e-4)


def test_request_may_have_length_of_its_own(params):
    sampling = SamplingParams(temperature=1.0, max_tokens=12)
    whole = next(make_engine(params).generate([Request("a", "abc")], sampling))
    short = next(make_engine(params).generate([Request("a", "abc", max_tokens=3)], sampling))
    assert short.tokens == whole.tokens[:3]


@pytest.mark.parametrize("calls_ahead", [0, 1])
def test_decoding_and_scoring_transfer_data_only_explicitly(params, monkeypatch, calls_ahead):
    prefix = "the quick brown fox jumps over 13 lazy dogs. "
    requests = [Request(r.id, prefix + r.prompt, prefix) for r in ragged(40)]
    requests += [Request(f"{r.id}/copy", r.prompt, r.prefix) for r in requests[:3]]
    dispatch_ahead(monkeypatch, calls_ahead)
    engine = make_engine(params, slots=64, max_length=128)
    penalties = SamplingParams(temperature=1.0, max_tokens=9, presence_penalty=0.5, logprobs=True)

    def decode():
        return (
            list(engine.generate(requests, penalties)),
            list(engine.choice_logprobs(requests, ["a", "10||"])),
            list(engine.text_logprobs(requests, ["a"] * len(requests))),
            list(engine.embed(requests)),
        )

    expected = decode()
    with jax.transfer_guard("disallow"):
        assert decode() == expected
