"""Responses that a stop string ended are told from those that the model ended, and stumps are dropped."""

import pytest
from scripted_backend import Fuse, ScriptedModel, context_of, tiny_config

from isheep_jax.config import RespondConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.loop.prompting.zero_shot import BARE_STOP, ZeroShot, prompt_for
from isheep_jax.loop.records import KEPT, Instruction, from_line, to_line
from isheep_jax.loop.stages.respond import respond


class Says(ScriptedModel):
    def __init__(self, text, stop):
        super().__init__("says", Fuse())
        self.text, self.stop = text, stop

    def complete(self, request):
        return Completion(request.id, self.text, stop=self.stop)


def pair(tmp_path, task, text, stop=""):
    context = context_of(tiny_config(tmp_path, respond=RespondConfig(samples=1, rules="basic", base_prompt="bare")))
    instruction = Instruction("1", task, "", 0, (), KEPT)
    prompts = ZeroShot(context, {"1": prompt_for(task, "", bare=True)})
    assert prompts.stop == BARE_STOP
    (record,) = respond(context, Says(text, stop), [instruction], prompts)
    return record


@pytest.mark.parametrize(
    ("task", "text", "stop"),
    [
        ("Write a quiz with Question and Answer lines.", "Here is a quiz:", "\nQuestion:"),
        ("Write a quiz about rivers.", "River Quiz", "\nQuestion:"),
        ("Write a dialogue between a user and an assistant.", "Good morning!", "\nAssistant:"),
        ("Make an FAQ about bees.", "Bees, explained.", "\nQuestion:"),
        ("Show me how people talk.", "They talk like **this:**", "\nUser:"),
        ("Name three things.", "They are,", "<|im_end|>"),
    ],
)
def test_a_stump_before_a_stop_string_is_dropped(tmp_path, task, text, stop):
    record = pair(tmp_path, task, text, stop)
    assert (record.verdict.reason, record.stop) == ("cut at a stop string", stop)
    assert from_line(type(record), to_line(record)) == record


@pytest.mark.parametrize(
    ("task", "text", "stop"),
    [
        ("Which river flows through Vienna?", "The Danube.", "\nQuestion:"),
        ("Which river flows through Vienna?", "The Danube.", ""),
        ("Write a dialogue.", "A: Good morning!\nB: Good morning!", "<|im_end|>"),
        ("Write a dialogue.", "A: Good morning!\nB: Good morning!", ""),
        ("Announce a list.", "Here it is:", ""),
    ],
)
def test_a_whole_answer_is_kept_and_the_record_says_what_ended_it(tmp_path, task, text, stop):
    record = pair(tmp_path, task, text, stop)
    assert record.verdict == KEPT
    assert record.stop == (stop or None)
