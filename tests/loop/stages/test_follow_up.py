"""Second turns: what may follow a pair, how it is judged and how it is learned."""

import pytest
from scripted_backend import Fuse, ScriptedBackend, ScriptedModel, SilentReporter, context_of, evaluator, tiny_config

from isheep_jax.config import RespondConfig, SFTConfig, SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import KEPT, Instruction, Selected, from_line, kept
from isheep_jax.loop.stages.follow_up import write_follow_ups
from isheep_jax.text.conversation import Message


class Says(ScriptedModel):
    def __init__(self, *answers):
        super().__init__("says", Fuse())
        self.answers = answers
        self.sampling = None

    def generate(self, requests, sampling):
        self.sampling = sampling
        return super().generate(requests, sampling)

    def complete(self, request):
        answer = self.answers[int(request.id.rsplit("/", 1)[1])]
        return answer if isinstance(answer, Completion) else Completion(request.id, answer)


def pair(n, instruction="Add the numbers up.", input="1 2"):
    return Selected(str(n), "i", instruction, input, "It is 3.", None, None, None, None, "", KEPT)


def written(tmp_path, *answers, held_out=frozenset(), rules="paper"):
    config = tiny_config(tmp_path, synthesize=SynthesizeConfig(turns=2, rules=rules))
    model, pairs = Says(*answers), [pair(n) for n in range(len(answers))]
    templates = load("standard", ("synthesize", "follow_up"))
    context = context_of(config, templates=templates, held_out=held_out, turn=2)
    return write_follow_ups(context, model, pairs), model


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (" Now add 4 to that, too.", ""),
        ("Too short here", "too short"),
        ("This is long enough.", ""),
        ("add the numbers UP!", "repeats the first turn"),
        ("add the numbers up again!", ""),
        ("Draw me a picture of it.", "needs more than text"),
        ("Describe me a pictured scene.", ""),
        ("Tell me the secret word.", "in an evaluation set"),
        ("Tell me the secret words.", ""),
        ("   ", "empty"),
        ("Response: it is 3 all right", "leftover of the form"),
    ],
)
def test_each_rule_drops_its_text_and_keeps_the_nearest_other(tmp_path, text, reason):
    ((record,), _) = written(tmp_path, text, held_out=frozenset({"tell me the secret word"}))
    assert record.verdict.reason == reason
    assert (record.id, record.instruction, record.seeds) == ("0.2", text.strip(), ("0",))


def test_what_is_cut_off_or_was_not_decoded_does_not_count(tmp_path):
    cut = Completion("1/follow_up/0", "Now add 4 to", finish_reason="length")
    failed = Completion("1/follow_up/1", "", finish_reason="error", error="too long")
    records, _ = written(tmp_path, cut, failed)
    assert [r.verdict.reason for r in records] == ["unfinished", "not decoded"]


def test_the_model_is_shown_the_pair_and_stops_where_the_other_speaks(tmp_path):
    _, model = written(tmp_path, "Now add 4 to that, too.")
    prompt = model.prompts["1/follow_up/0"]
    assert "Person: Add the numbers up.\n1 2\n\nAssistant: It is 3.\n\nPerson:" in prompt
    assert "\nAssistant:" in model.sampling.stop


def lines(path, cls):
    return [from_line(cls, line) for part in sorted(path.glob("part-*")) for line in part.read_text().splitlines()]


def go(path, **changes):
    backend = ScriptedBackend()
    config = tiny_config(path, synthesize=SynthesizeConfig(instructions=30, shots=3, novelty=0.9, turns=2), **changes)
    return run(config, backend, {"fake": evaluator}, frozenset(), SilentReporter()), backend


def test_what_is_kept_is_learned_as_one_conversation_beside_its_first_turn(tmp_path):
    rows, backend = go(tmp_path)
    place = tmp_path / "iteration_2"
    firsts = {s.id: s for s in kept(lines(place / "selected", Selected))}
    follow = lines(place / "second_turn" / "instructions", Instruction)
    assert [f.seeds[0] for f in follow] == list(firsts)
    assert {f.verdict.reason for f in follow} == {"", "too short"}
    second = kept(lines(place / "second_turn" / "selected", Selected))
    assert rows[2].second_turn == {"instructions": len(kept(follow)), "kept": len(second)}
    assert len(second) > 0
    examples = {e.id: e for e in backend.calls[1].examples}
    assert list(examples) == [*firsts, *(s.id for s in second)]
    for s in second:
        first = firsts[s.instruction_id.removesuffix(".2")]
        (opening,) = examples[first.id].conversation
        said = (opening, Message("assistant", first.response), Message("user", s.instruction))
        assert examples[s.id].conversation == said
        assert examples[s.id].response == s.response


def test_the_second_turn_is_answered_after_the_first_as_text_or_as_a_conversation(tmp_path):
    _, backend = go(tmp_path, respond=RespondConfig(base_prompt="bare"))
    prompts = {id: p for model in backend.models for id, p in model.prompts.items() if ".2" in id and "/respond/" in id}
    for id, prompt in prompts.items():
        if id.startswith("1/"):
            first, _, rest = prompt.partition("\n")
            assert "\n\n" in rest
            assert rest.endswith("\n")
            assert first
        else:
            assert [m.role for m in prompt] == ["user", "assistant", "user"]
    assert {id[0] for id in prompts} == {"1", "2"}


def test_the_judge_sees_the_first_turn_before_the_second(tmp_path):
    _, backend = go(tmp_path)
    prompts = {id: p for model in backend.models for id, p in model.prompts.items() if "1/assess/quality" in id}
    place = tmp_path / "iteration_1"
    firsts = {f"{s.id}.2": s for s in kept(lines(place / "selected", Selected))}
    seconds = [s for s in lines(place / "second_turn" / "selected", Selected) if f"1/assess/quality/{s.id}" in prompts]
    assert seconds
    for second in seconds:
        first = firsts[second.instruction_id]
        said = f"{first.instruction}\n{first.input}" if first.input else first.instruction
        whole = f"Instruction: {said}\n\nResponse: {first.response}\n\nInstruction: {second.instruction}"
        assert whole in prompts[f"1/assess/quality/{second.id}"]


def test_a_second_turn_without_an_instruction_leaves_the_first(tmp_path, monkeypatch):
    complete = ScriptedModel.complete

    def never_follows(model, request):
        return Completion(request.id, "Draw it") if "/follow_up/" in request.id else complete(model, request)

    monkeypatch.setattr(ScriptedModel, "complete", never_follows)
    rows, backend = go(tmp_path)
    assert rows[1].second_turn == {"instructions": 0, "kept": 0}
    assert len(backend.calls[0].examples) == rows[1].kept > 0
    again, backend = go(tmp_path)
    assert again == rows
    assert backend.loaded == []


def test_all_iterations_bring_their_second_turns(tmp_path):
    rows, backend = go(tmp_path, sft=SFTConfig(data="all"))
    counts = [len(call.examples) for call in backend.calls]
    per_row = [row.kept + row.second_turn["kept"] for row in rows[1:]]
    assert counts == [per_row[0], sum(per_row)]
