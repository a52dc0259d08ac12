import pytest
from scripted_backend import Fuse, ScriptedModel, context_of, tiny_config

from isheep_jax.config import SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.novelty import Pool
from isheep_jax.loop.prompting.few_shot import FewShot, shown_seeds
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.stages.synthesize import synthesize

SEEDS = [Seed(f"seed-{i:03d}", f"Do the thing number {i} quickly.", "", "") for i in range(8)]


class Fixed(ScriptedModel):
    """Writes the texts in turn, by prompt index."""

    def __init__(self, *texts, finish_reason="stop"):
        super().__init__("fixed", Fuse())
        self.texts, self.finish_reason = texts, finish_reason

    def complete(self, request):
        k = int(request.id.rsplit("/", 1)[1])
        return Completion(
            request.id, self.texts[k % len(self.texts)].format(k), finish_reason=self.finish_reason, error="too long"
        )


def write(tmp_path, model, held_out=frozenset(), pool=None, **settings):
    config = tiny_config(tmp_path, synthesize=SynthesizeConfig(**{"instructions": 10, "shots": 3, **settings}))
    pool = Pool(config.synthesize.novelty) if pool is None else pool
    context = context_of(config, seeds=SEEDS, held_out=held_out)
    return synthesize(context, model, pool, [FewShot(context)])


def test_it_stops_with_exactly_as_many_as_asked_for(tmp_path):
    pool = Pool(1.0)
    records = write(
        tmp_path, Fixed(" Count up to {0}.\n###\nInstruction: Count down from {0}."), pool=pool, novelty=1.0
    )
    assert [r.verdict.kept for r in records] == [True] * 10 + [False] * 10
    assert {r.verdict.reason for r in records[10:]} == {"more than needed"}
    assert len(pool) == 10
    assert [r.id for r in records[:2]] == ["1-000000", "1-000001"]
    assert [r.prompt for r in records[:4]] == [0, 0, 1, 1]
    assert list(records[0].seeds) == [
        s.id for s in shown_seeds(context_of(tiny_config("", synthesize=SynthesizeConfig(shots=3)), seeds=SEEDS), 0)
    ]


def test_every_dropped_task_says_why(tmp_path):
    model = Fixed(
        " Count up to {0} in steps of two please.",
        " Draw a map of the town.",
        " Tell me the secret word.",
        " Count up to 0 in steps of two please.",
    )
    records = write(tmp_path, model, held_out=frozenset({"tell me the secret word"}), novelty=0.95, instructions=4)
    reasons = [r.verdict.reason for r in records[:4]]
    assert reasons == ["", "needs more than text", "in an evaluation set", "not new"]
    assert records[3].verdict.detail == f"1.000 to {records[0].id}"


def test_a_model_that_writes_nothing_new_stops_the_run_with_a_reason(tmp_path):
    with pytest.raises(UserError, match=r"gave 1 new instructions, 1 of 10 .* \(dropped so far: not new: \d+\)") as e:
        write(tmp_path, Fixed(" Say the same thing again."))
    assert "synthesize.novelty" in str(e.value)
    assert "\n" not in str(e.value)


def test_a_prompt_that_does_not_fit_is_recorded(tmp_path):
    with pytest.raises(UserError, match="not decoded"):
        write(tmp_path, Fixed("", finish_reason="error"))
    assert context_of(tiny_config(tmp_path)).files("instructions").records()[0].verdict.detail == "too long"
