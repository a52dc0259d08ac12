"""Tasks of lm-evaluation-harness on a scripted model: what it is asked, what is kept, and what comes out."""

import contextlib
import hashlib
import json
import os
import random
import sys
import types
from collections import Counter

import numpy as np
import pytest
from scripted_backend import Fuse, Killed
from test_distributed import Group

from isheep_jax.config import DecodeConfig, EvaluateConfig
from isheep_jax.decode.requests import Completion, Request, SamplingParams, TextLogprob, TokenIds
from isheep_jax.errors import UserError
from isheep_jax.evaluation import tasks
from isheep_jax.loop.models import DeferredModel
from isheep_jax.runtime.load import load

pytest.importorskip("lm_eval", reason='runs tasks of lm-evaluation-harness; pip install -e ".[eval]"')

from lm_eval.api.instance import Instance

from isheep_jax.evaluation.harness.definitions import check_name, data_digest, load_task
from isheep_jax.evaluation.harness.evaluator import HarnessEvaluator, held_out_texts
from isheep_jax.evaluation.harness.language_model import _BATCH, HarnessModel

pytestmark = pytest.mark.lm_eval

START, END = 0, 1


class CharacterTokenizer:
    """0 begins a text, written <s>; 1 ends a turn; each character is a token. The template knows no system turn."""

    bos_id, eos_ids, start_id = START, (END,), START

    def encode(self, text, bos=True):
        return [START] * bos + [2 + ord(c) for c in text]

    def spell(self, ids):
        return "".join("<s>" if i == START else chr(i - 2) for i in ids)

    def render(self, conversation):
        if any(message.role == "system" for message in conversation):
            raise UserError("no system turn")
        return "<s>" + "".join(f"[{m.role}]{m.content}" for m in conversation) + "[assistant]"


class ScriptedTokenModel:
    """Finds texts with the letter z likely, and answers every prompt by the number of its tokens."""

    tokenizer = CharacterTokenizer()

    def __init__(self, max_length=4000, fuse=None):
        self.max_length, self.fuse = max_length, fuse or Fuse()
        self.prompts, self.texts, self.samplings = [], [], []

    def weights_digest(self):
        return "weights"

    def text_logprobs(self, requests, texts):
        self.fuse.tick()
        for request, text in reversed(list(zip(requests, texts, strict=True))):
            assert request.prompt.ids[: len(request.prefix.ids)] == request.prefix.ids
            assert len(request.prompt.ids) + len(text.ids) <= self.max_length
            self.prompts.append(request.prompt.ids)
            self.texts.append(text.ids)
            spelled = self.tokenizer.spell(text.ids)
            noise = int(hashlib.sha256(f"{request.prompt} {text}".encode()).hexdigest()[:4], 16) / 2**17
            yield TextLogprob(request.id, noise - len(text.ids) + 50 * spelled.count("z"), len(text.ids), greedy=True)

    def generate(self, requests, sampling):
        self.samplings.append(sampling)
        for request in requests:
            self.fuse.tick()
            self.prompts.append(request.prompt.ids)
            reason = "length" if len(request.prompt.ids) % 2 else "stop"
            yield Completion(request.id, f" The answer is {len(request.prompt.ids)}.", finish_reason=reason)


class Bar:
    def advance(self, n=1, **notes):
        self.done = getattr(self, "done", 0) + n


@pytest.fixture
def data(tmp_path):
    """Returns a function that writes the documents of a task and returns the directory for --task_data."""

    def write(task, rows, split="validation"):
        path = tmp_path / "data" / "lm_eval" / task / f"{split}.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / "data")

    return write


def choices(count=6):
    """Documents of truthfulqa_mc1, whose first choice is the right one; the model prefers another in each third one."""
    return [
        {
            "question": f"Which letter follows {chr(97 + i)}?",
            "mc1_targets": {"choices": ["fizz", f"word {i}" + " zzz" * (i % 3 == 0), "no"], "labels": [1, 0, 0]},
        }
        for i in range(count)
    ]


def evaluate(task, directory, task_data, model=None, *, template="", decoding=None, **settings):
    settings = EvaluateConfig(tasks=(task,), task_data=task_data, **settings)
    evaluator = HarnessEvaluator(task, settings, {"chat_template": template, "seed": 0, **(decoding or {})})
    result = evaluator(model or ScriptedTokenModel(), directory, lambda *_: contextlib.nullcontext(Bar()))
    assert json.loads(json.dumps(result)) == result
    assert evaluator.is_current(result)
    return result


def lines(directory):
    return [json.loads(line) for line in (directory / "samples.jsonl").read_text().splitlines()]


def harness_model(directory, model, task="lm_eval:x", max_tokens=0):
    return HarnessModel(
        model,
        directory,
        task=task,
        facts={"weights": "w"},
        max_tokens=max_tokens,
        progress=lambda *_: contextlib.nullcontext(Bar()),
    )


def instances(kind, *arguments, task="x"):
    return [Instance(kind, {}, a, i, metadata=(task, i, 1)) for i, a in enumerate(arguments)]


def test_most_probable_choice_is_the_response(tmp_path, data):
    result = evaluate("lm_eval:truthfulqa_mc1", tmp_path, data("truthfulqa_mc1", choices()))
    assert result["accuracy"] == result["figures"]["acc"]["value"] == pytest.approx(4 / 6)
    assert result["stderr"] == pytest.approx(np.std([1, 1, 1, 1, 0, 0], ddof=1) / 6**0.5)
    assert (result["count"], result["of"], result["main"], result["version"]) == (6, 6, "acc", 2.0)
    responses = lines(tmp_path)
    assert [line["texts"][0] for line in responses] == [" fizz" if i % 3 else f" word {i} zzz" for i in range(6)]
    assert [line["values"] for line in responses] == [{"acc": float(i % 3 > 0)} for i in range(6)]
    assert [line["sample"] for line in responses] == [f"truthfulqa_mc1/{i}" for i in range(6)]


def test_loaded_checkpoint_answers_with_its_log_likelihoods(tmp_path, data, small_checkpoint):
    engine = load(str(small_checkpoint), decode=DecodeConfig(slots=8, max_length=128), compute_dtype="float32")
    backend = types.SimpleNamespace(load=lambda directory: engine, weights_digest=lambda directory: "w")
    evaluate("lm_eval:truthfulqa_mc1", tmp_path, data("truthfulqa_mc1", choices(2)), DeferredModel(backend, None))
    for line in lines(tmp_path):
        prompt, tokenizer = line["prompts"][0], engine.tokenizer
        for continuation, (logprob, _) in zip(
            line["details"]["continuations"], line["details"]["answers"], strict=True
        ):
            following = tokenizer.encode(continuation, bos=False)
            context = tokenizer.encode(prompt)[-(128 - len(following)) :]
            request = Request("a", TokenIds(tuple(context)))
            (expected,) = engine.text_logprobs([request], [TokenIds(tuple(following))])
            assert logprob == pytest.approx(expected.logprob, abs=1e-4)


def test_limit_takes_the_first_documents(tmp_path, data):
    result = evaluate("lm_eval:truthfulqa_mc1", tmp_path, data("truthfulqa_mc1", choices()), limit=2)
    assert (result["count"], result["of"]) == (2, 6)
    assert [line["sample"] for line in lines(tmp_path)] == ["truthfulqa_mc1/0", "truthfulqa_mc1/1"]


def test_group_has_its_mean_and_those_of_its_tasks(tmp_path, data):
    parts = ("murder_mysteries", "object_placements", "team_allocation")
    for size, part in enumerate(parts, start=1):
        rows = [
            {"narrative": f"Story {i}.", "question": "Who?", "choices": "['Liz', 'Ann']", "answer_choice": "Ann"}
            for i in range(size)
        ]
        rows[0]["answer_choice"] = "Liz"  # whom the model prefers
        task_data = data(f"leaderboard_musr_{part}", rows, split=part)
    result = evaluate("lm_eval:leaderboard_musr", tmp_path, task_data)
    assert result["figures"]["acc_norm"]["value"] == pytest.approx(3 / 6)
    means = {part: figure["value"] for part, figure in result["groups"]["task"].items()}
    assert means == {f"leaderboard_musr_{part}": pytest.approx(1 / size) for size, part in enumerate(parts, start=1)}
    assert (result["count"], len(lines(tmp_path))) == (6, 6)


def test_generation_follows_the_tasks_settings(tmp_path, data):
    task_data = data("gsm8k_cot", [{"question": "?" * i, "answer": "#### 8"} for i in range(3)], split="test")
    model = ScriptedTokenModel()
    result = evaluate("lm_eval:gsm8k_cot", tmp_path / "a", task_data, model)
    (sampling,) = model.samplings
    assert (sampling.temperature, sampling.max_tokens, sampling.stop) == (0.0, 256, ("Q:", "</s>", "<|im_end|>"))
    assert set(result["figures"]) == {"exact_match,strict-match", "exact_match,flexible-extract"}
    assert 0 < result["unfinished"] == sum(len(p) % 2 for p in model.prompts) / 3
    responses = lines(tmp_path / "a")
    assert all(line["texts"][0].startswith(" The answer is") for line in responses)
    assert result["unfinished"] == sum(line["finish_reasons"] == ["length"] for line in responses) / 3
    shorter = ScriptedTokenModel()
    evaluate("lm_eval:gsm8k_cot", tmp_path / "b", task_data, shorter, max_tokens=7)
    assert shorter.samplings[0].max_tokens == 7


def test_worked_examples_are_a_prefix_that_all_prompts_share(tmp_path, data):
    prefixes = []

    class Model(ScriptedTokenModel):
        def generate(self, requests, sampling):
            prefixes.extend(request.prefix.ids for request in requests)
            yield from super().generate(requests, sampling)

    task_data = data("gsm8k_cot", [{"question": f"{c} is?", "answer": "#### 8"} for c in "abc"], split="test")
    evaluate("lm_eval:gsm8k_cot", tmp_path, task_data, Model())
    (prefix,) = set(prefixes)
    assert CharacterTokenizer().spell(prefix).startswith("<s>Q: There are 15 trees")
    assert CharacterTokenizer().spell(prefix).endswith("\n\nQ: ")


def test_chat_prompts_are_rendered_and_begin_once(tmp_path, data):
    model = ScriptedTokenModel()
    task_data = data("truthfulqa_mc1", choices(1))
    result = evaluate("lm_eval:truthfulqa_mc1", tmp_path / "chat", task_data, model, template="digest")
    assert result["settings"]["prompt_format"] == "chat"
    spelled = {CharacterTokenizer().spell(prompt) for prompt in model.prompts}
    assert all(text.startswith("<s>[user]Q: ") and text.endswith("\nA:[assistant]") for text in spelled)
    plain = ScriptedTokenModel()
    evaluate(
        "lm_eval:truthfulqa_mc1",
        tmp_path / "text",
        task_data,
        plain,
        template="digest",
        prompt_format="completion",
    )
    assert all(prompt[0] == START and prompt.count(START) == 1 for prompt in plain.prompts)


def test_template_without_system_turn_and_begun_answers_are_rendered(tmp_path):
    model = harness_model(tmp_path, ScriptedTokenModel())
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hi"}]
    assert model.apply_chat_template(turns) == "<s>[user]Hi[assistant]"
    begun = [*turns, {"role": "assistant", "content": "Well,"}]
    assert model.apply_chat_template(begun, add_generation_prompt=False) == "<s>[user]Hi[assistant]Well,"


def test_long_prompts_lose_their_beginning(tmp_path):
    scripted = ScriptedTokenModel(max_length=20)
    model = harness_model(tmp_path, scripted, max_tokens=5)
    ((_, greedy),) = model.loglikelihood(instances("loglikelihood", ("a" * 30 + "b" * 15, " cdef")))
    assert greedy
    assert CharacterTokenizer().spell(scripted.prompts[0]) == "b" * 15
    model.generate_until(instances("generate_until", ("a" * 30 + "b" * 15, {"until": []})))
    assert CharacterTokenizer().spell(scripted.prompts[1]) == "b" * 15
    with pytest.raises(UserError, match=r"continuation of 20 tokens, .*--decode\.max_length"):
        model.loglikelihood(instances("loglikelihood", ("a", "b" * 20)))
    with pytest.raises(UserError, match=r"256 new tokens.*--evaluate.max_tokens"):
        harness_model(tmp_path, scripted).generate_until(instances("generate_until", ("a", {})))


def test_spaces_at_the_end_of_a_context_belong_to_the_continuation(tmp_path):
    scripted = ScriptedTokenModel()
    model = harness_model(tmp_path, scripted)
    model.loglikelihood(instances("loglikelihood", ("a ", "b"), ("", "cd")))
    asked = {
        CharacterTokenizer().spell(p): CharacterTokenizer().spell(t) for p, t in zip(scripted.prompts, scripted.texts)
    }
    assert asked == {"<s>a": " b", "<s>": "cd"}


@pytest.mark.parametrize("length", [1, 18, 19, 20, 60])
def test_rolling_windows_predict_each_token_once(tmp_path, length):
    scripted = ScriptedTokenModel(max_length=20)
    text = "".join(chr(ord("A") + i % 50) for i in range(length))
    harness_model(tmp_path, scripted).loglikelihood_rolling(instances("loglikelihood_rolling", (text,)))
    predicted = [token for tokens in scripted.texts for token in tokens]
    assert Counter(predicted) == Counter(CharacterTokenizer().encode(text))
    for prompt, tokens in zip(scripted.prompts, scripted.texts):
        assert len(prompt) == 1 or len(prompt) + len(tokens) == 20  # as much context as fits


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"until": "\n", "do_sample": False, "temperature": 0.7}, SamplingParams(0.0, max_tokens=256, stop=("\n",))),
        ({"until": ["a", "", "a"], "max_gen_toks": 9}, SamplingParams(0.0, max_tokens=9, stop=("a",))),
        ({"do_sample": True, "temperature": 0.7, "top_p": 0.9}, SamplingParams(0.7, 0.9, max_tokens=256)),
        ({"do_sample": True}, SamplingParams(1.0, max_tokens=256)),
        ({"temperature": 0.2, "max_new_tokens": 4, "num_beams": 1}, SamplingParams(0.2, max_tokens=4)),
    ],
)
def test_settings_of_generation_are_read_as_the_harness_does(tmp_path, arguments, expected):
    scripted = ScriptedTokenModel()
    harness_model(tmp_path, scripted).generate_until(instances("generate_until", ("a", arguments)))
    assert scripted.samplings == [expected]


def test_beams_are_refused(tmp_path):
    with pytest.raises(UserError, match="4 beams"):
        harness_model(tmp_path, ScriptedTokenModel()).generate_until(
            instances("generate_until", ("a", {"num_beams": 4}))
        )


def test_equal_requests_are_asked_once_unless_they_are_sampled(tmp_path):
    scripted = ScriptedTokenModel()
    model = harness_model(tmp_path, scripted)
    model.loglikelihood(instances("loglikelihood", ("a", "b"), ("a", "b"), ("a", "c")))
    model.generate_until(instances("generate_until", ("a", {}), ("a", {})))
    assert (len(scripted.texts), len(scripted.prompts)) == (2, 3)
    model.generate_until(instances("generate_until", ("a", {"temperature": 1.0}), ("a", {"temperature": 1.0})))
    assert len(scripted.prompts) == 5


def test_killed_evaluation_goes_on_and_ends_alike(tmp_path, data):
    rows = [{"question": f"What is {i}?", "answer": "#### 8"} for i in range(80)]
    task_data = data("gsm8k_cot", rows, split="test")
    expected = evaluate("lm_eval:gsm8k_cot", tmp_path / "whole", task_data)
    with pytest.raises(Killed):
        evaluate("lm_eval:gsm8k_cot", tmp_path / "cut", task_data, ScriptedTokenModel(fuse=Fuse(70)))
    rest = ScriptedTokenModel()
    assert evaluate("lm_eval:gsm8k_cot", tmp_path / "cut", task_data, rest) == expected
    assert len(rest.prompts) == 80 - 64  # two parts of 32 were kept
    assert (tmp_path / "cut" / "samples.jsonl").read_bytes() == (tmp_path / "whole" / "samples.jsonl").read_bytes()


PROGRAM = """
import json, sys
sys.path[:0] = json.loads(sys.argv[1])
from pathlib import Path
from isheep_jax import distributed
from isheep_jax.cli.errors import report_error

with distributed.distributed_session(lambda error: report_error(error, "program", [])):
    from test_harness import evaluate
    print(json.dumps(evaluate("lm_eval:truthfulqa_mc1", Path(sys.argv[2]), sys.argv[3])))
"""


def test_of_two_processes_both_have_the_result_of_one_and_the_first_writes(tmp_path, data):
    task_data = data("truthfulqa_mc1", choices())
    expected = evaluate("lm_eval:truthfulqa_mc1", tmp_path / "one", task_data)
    arguments = [json.dumps(sys.path), str(tmp_path / "two"), task_data]
    with Group([["-c", PROGRAM, *arguments]] * 2, tmp_path / "output") as group:
        assert group.codes(200) == [0, 0], group.text(0, "err")
        assert [json.loads(group.text(index, "out")) for index in (0, 1)] == [expected] * 2
    files = [{p.name: p.read_bytes() for p in (tmp_path / d).rglob("*.jsonl")} for d in ("one", "two")]
    assert files[0] == files[1]


def test_scored_batches_are_kept_whole(tmp_path):
    arguments = [("a", "b" * (i + 1)) for i in range(_BATCH + 10)]
    model = ScriptedTokenModel(fuse=Fuse(2))
    with pytest.raises(Killed):
        harness_model(tmp_path / "cut", model).loglikelihood(instances("loglikelihood", *arguments))
    rest = ScriptedTokenModel()
    again = harness_model(tmp_path / "cut", rest).loglikelihood(instances("loglikelihood", *arguments))
    assert len(rest.texts) == 10
    assert again == harness_model(tmp_path / "whole", ScriptedTokenModel()).loglikelihood(
        instances("loglikelihood", *arguments)
    )


def test_answers_are_kept_by_weights_and_never_by_a_name(tmp_path, data):
    task_data = data("truthfulqa_mc1", choices())
    asked = []
    for weights in ("a", "b", "a"):
        model = ScriptedTokenModel()
        evaluate("lm_eval:truthfulqa_mc1", tmp_path, task_data, model, decoding={"weights": weights})
        asked.append(len(model.texts))
    assert asked == [18, 18, 0]


@pytest.mark.parametrize("task", ["leaderboard_musr", "leaderboard_musr_team_allocation"])
def test_digest_of_local_data_is_that_of_the_task_and_of_its_group(data, task):
    part, row = "leaderboard_musr_team_allocation", {"question": "Who?"}

    def digest():
        return data_digest(f"lm_eval:{task}", task_data)

    task_data = data("gsm8k", [row])
    assert digest() == ""
    data(part, [row])
    before = digest()
    assert len(before) == 64
    data("gsm8k", [{"question": "other"}])
    assert digest() == before
    data(part, [{"question": "other"}])
    assert digest() != before


def test_changed_local_data_is_measured_again(tmp_path, data):
    settings = EvaluateConfig(task_data=data("truthfulqa_mc1", choices()))
    evaluator = HarnessEvaluator("lm_eval:truthfulqa_mc1", settings, {"chat_template": ""})
    result = evaluator(ScriptedTokenModel(), tmp_path / "out", lambda *_: contextlib.nullcontext(Bar()))
    data("truthfulqa_mc1", choices())
    assert evaluator.is_current(result)
    data("truthfulqa_mc1", choices(7))
    assert not evaluator.is_current(result)


def test_harness_leaves_no_trace_and_forks_nothing(tmp_path, data, monkeypatch):
    monkeypatch.setattr(os, "fork", lambda: pytest.fail("a process was forked"))
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    random.seed(3)
    np.random.seed(4)
    before = random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)
    rows = [{"text": f"he said {word}"} for word in ("buzz", "yes", "no")]
    result = evaluate("lm_eval:lambada_openai", tmp_path, data("lambada_openai", rows, split="test"))
    assert (random.getstate(), np.random.get_state()[1].tolist(), dict(os.environ)) == before
    assert result["figures"]["perplexity"]["stderr"] > 0  # by resampling, which the harness does in other processes
    assert "accuracy" not in result
    assert result["figures"]["acc"]["count"] == 3


def test_figure_without_standard_error_gets_one_by_resampling(tmp_path, data):
    rows = [{"page": text} for text in ("one two three", "four", "five six")]
    result = evaluate("lm_eval:wikitext", tmp_path, data("wikitext", rows, split="test"))
    assert result["main"] == "word_perplexity"
    assert all(figure["stderr"] > 0 for figure in result["figures"].values())
    assert all(line["values"] == {} for line in lines(tmp_path))  # pairs of sums, not figures of a document


def test_held_out_texts_are_the_questions(data):
    task_data = data("truthfulqa_mc1", choices(2))
    assert held_out_texts("lm_eval:truthfulqa_mc1", EvaluateConfig(task_data=task_data)) == {
        "Which letter follows a?",
        "Which letter follows b?",
    }


def test_task_of_the_harness_is_named_with_its_prefix(data):
    settings = EvaluateConfig(tasks=("lm_eval:truthfulqa_mc1",), task_data=data("truthfulqa_mc1", choices(1)))
    (evaluator,) = tasks.evaluators(settings, {"chat_template": ""}).values()
    assert isinstance(evaluator, HarnessEvaluator)
    assert tasks.held_out_texts(settings) == {"Which letter follows a?"}


def test_misspelled_task_is_refused_with_the_nearest_name(monkeypatch):
    known = types.SimpleNamespace(task_index={"some_tag": None})
    monkeypatch.setattr("isheep_jax.evaluation.harness.definitions._all_definitions", lambda: known)
    with pytest.raises(UserError, match="no task 'truthfulqa_mc_1'; did you mean 'truthfulqa_mc1'"):
        check_name("lm_eval:truthfulqa_mc_1")
    with pytest.raises(UserError, match="lm_eval:some_tag is a tag of several tasks"):
        check_name("lm_eval:some_tag")


def test_what_cannot_be_run_is_refused_with_a_reason(data, monkeypatch):
    def unreachable(**arguments):
        raise ConnectionError("the hub is\nnot there")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"the hub is not there.*DIR/lm_eval/boolq/SPLIT\.jsonl.*--evaluate.task_data"):
        load_task("lm_eval:boolq", "")
    with pytest.raises(UserError, match="without a sandbox; humaneval and mbpp are"):
        load_task("lm_eval:humaneval", "")
    with pytest.raises(UserError, match=r"gsm8k/train\.jsonl is missing, which lm_eval:gsm8k reads"):
        load_task("lm_eval:gsm8k", data("gsm8k", [{"question": "a", "answer": "b"}], split="test"))
