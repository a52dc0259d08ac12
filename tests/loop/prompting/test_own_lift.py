import pytest
from scripted_backend import Fuse, ScriptedModel, context_of, tiny_config

from isheep_jax.decode.requests import TextLogprob
from isheep_jax.loop.prompting.own_lift import lowest, own_lifts
from isheep_jax.loop.prompting.protocols import ParsedInstruction


class Reader(ScriptedModel):
    """Finds requests likelier after an announcement; some texts do not fit, and some have no probability."""

    def __init__(self):
        super().__init__("reader", Fuse())
        self.texts = set()

    def text_logprobs(self, requests, texts):
        for request, text in reversed(list(zip(requests, texts, strict=True))):
            self.texts.add(text)
            tokens = len(text.split())
            if "long" in text:
                yield TextLogprob(request.id, error="too long")
            elif "nothing" in text:
                yield TextLogprob(request.id, float("nan"), tokens)
            else:
                yield TextLogprob(
                    request.id, tokens * (-1.0 if "Write" in text and request.prompt.strip() else -3.0), tokens
                )


def test_the_lift_is_per_token_and_over_instruction_and_input(tmp_path):
    tasks = [
        ParsedInstruction("Trees are green.", ""),
        ParsedInstruction("Write more.", "a poem"),
        ParsedInstruction("Write a long poem.", ""),
        ParsedInstruction("Write nothing.", ""),
    ]
    reader = Reader()
    assert own_lifts(context_of(tiny_config(tmp_path)), reader, "x", tasks) == [0.0, 2.0, None, None]
    assert " Write more.\na poem" in reader.texts


@pytest.mark.parametrize(
    ("share", "indices"),
    [(0.0, set()), (0.24, set()), (0.25, {3}), (0.5, {3, 0}), (0.75, {3, 0, 2}), (0.99, {3, 0, 2})],
)
def test_the_lowest_known_lifts_are_a_share_of_the_known_ones(share, indices):
    assert lowest([0.5, None, 0.5, -1.0, 2.0], share) == indices
