import pytest
from scripted_backend import Fuse, Killed, ScriptedModel, context_of, snapshot, tiny_config

from isheep_jax.config import SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.novelty import Pool
from isheep_jax.loop.prompting.few_shot import FewShot
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.shown import SeedPool, choose_seeds
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
    return synthesize(context, model, pool, [FewShot(context, SeedPool(SEEDS))])


def test_it_stops_with_exactly_as_many_as_asked_for(tmp_path):
    pool = Pool(1.0)
    records = write(
        tmp_path, Fixed(" Count up to {0}.\n###\nInstruction: Count down from {0}."), pool=pool, novelty=1.0
    )
    assert [r.verdict.kept for r in records] == [True] * 10
    assert len(pool) == 10
    assert [r.id for r in records[:2]] == ["1-000000", "1-000001"]
    assert [r.prompt for r in records[:4]] == [0, 0, 1, 1]
    assert list(records[0].seeds) == [s.id for s in choose_seeds(context_of(tiny_config("")), SeedPool(SEEDS), 0, 3)]


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


def test_tasks_of_the_last_prompt_beyond_the_last_needed_one_are_recorded_as_such(tmp_path):
    model = Fixed(" Count up to {0}.\n###\nInstruction: Count down from {0}.")
    records = write(tmp_path, model, novelty=1.0, instructions=9)
    assert [r.verdict.reason for r in records] == [""] * 9 + ["more than needed"]


@pytest.mark.parametrize("drop_lowest", [0.0, 0.3])
def test_records_do_not_depend_on_how_many_prompts_are_with_the_model(tmp_path, monkeypatch, drop_lowest):
    monkeypatch.setattr("isheep_jax.loop.stages.synthesize.PART_PROMPTS", 8)
    snapshots = []
    for at_a_time in (1, 5, 300):
        model = ScriptedModel("writer", Fuse())
        model.at_a_time = at_a_time
        write(tmp_path / str(at_a_time), model, instructions=150, drop_lowest=drop_lowest)
        snapshots.append(snapshot(tmp_path / str(at_a_time)))
    assert snapshots[1:] == snapshots[:1] * 2
    assert len([name for name in snapshots[0] if "part-" in name]) > 1


def test_no_more_prompts_are_with_the_model_than_may_be_needed(tmp_path):
    class Counting(ScriptedModel):
        at_a_time, with_model, most = 300, 0, 0

        def order(self, requests):
            def counted():
                for request in requests:
                    self.with_model += request is not None
                    self.most = max(self.most, self.with_model)
                    yield request

            for request in super().order(counted()):
                yield request
                self.with_model -= 1

    model = Counting("writer", Fuse())
    write(tmp_path, model, instructions=40)
    assert 8 <= model.most <= 40


class Ways(ScriptedModel):
    """Writes a new task per shot at temperature 0.5, and one for all others; every completion has ten tokens."""

    def __init__(self, fuse=None):
        super().__init__("ways", fuse or Fuse())
        self.sampled = {}

    def asked(self, request, sampling):
        super().asked(request, sampling)
        self.sampled[int(request.id.rsplit("/", 1)[1])] = sampling.temperature

    def complete(self, request):
        number = int(request.id.rsplit("/", 1)[1])
        shots = request.prompt.count("Do the thing number")
        tasks = [f" Count up to {number} in steps of {k}." for k in range(shots if number % 2 else 1)]
        return Completion(request.id, "\n###\nInstruction:".join(tasks), tuple(range(10)))


EXPLORED = {"shots": 2, "other_shots": (4,), "other_temperatures": (0.5,), "trial_prompts": 6, "instructions": 120}


def explore(tmp_path, fuse=None, **settings):
    model = Ways(fuse)
    return model, write(tmp_path, model, novelty=1.0, **{**EXPLORED, **settings})


def manifest(tmp_path):
    return (
        context_of(tiny_config(tmp_path, synthesize=SynthesizeConfig(**{**EXPLORED, "novelty": 1.0})))
        .files("instructions")
        .done()["counts"]
    )


def test_every_way_is_tried_equally_and_then_the_best_is_used(tmp_path):
    model, records = explore(tmp_path)
    by_prompt = {r.prompt: (len(r.seeds), model.sampled[r.prompt]) for r in records}
    trial = [by_prompt[n] for n in range(24)]
    assert trial[:4] == [(2, 1.0), (2, 0.5), (4, 1.0), (4, 0.5)]
    assert {way: trial.count(way) for way in trial} == dict.fromkeys(trial[:4], 6)
    # Odd prompts write a task per shot: of the ways, those at temperature 0.5.
    assert {by_prompt[n] for n in by_prompt if n >= 24} == {(4, 0.5)}
    assert len(by_prompt) > 24
    ways = manifest(tmp_path)["ways"]
    assert ways["2 shots at temperature 0.5"] == {
        "prompts": 6, "tokens": 60, "kept": 12, "per_thousand_tokens": 200.0
    }  # fmt: skip
    assert list(ways) == [f"{s} shots at temperature {t}" for s in (2, 4) for t in ("1", "0.5")]


def test_a_trial_that_is_killed_ends_with_the_same_records(tmp_path):
    explore(tmp_path / "whole")
    whole = snapshot(tmp_path / "whole")
    for at in (3, 20, 25, 40):
        with pytest.raises(Killed):
            explore(tmp_path / str(at), Fuse(at))
        explore(tmp_path / str(at))
        assert snapshot(tmp_path / str(at)) == whole


def test_tokens_are_recorded_once_per_prompt_also_where_it_gave_no_task(tmp_path):
    class Sparse(Ways):
        def complete(self, request):
            completion = super().complete(request)
            return completion if "/3" in request.id else Completion(request.id, "", tuple(range(7)))

    records = write(tmp_path, Sparse(), novelty=1.0, instructions=1)
    assert [r.prompt for r in records if r.tokens is not None] == list(range(4))
    assert [r.verdict.reason for r in records if r.prompt == 1] == ["empty"]
    counts = (
        context_of(tiny_config(tmp_path, synthesize=SynthesizeConfig(instructions=1, shots=3, novelty=1.0)))
        .files("instructions")
        .done()["counts"]
    )
    assert (counts["tokens"], counts["per_thousand_tokens"]) == (31, 96.774)  # two more than needed passed as well


def test_only_strict_rules_drop_junk(tmp_path):
    model = Fixed(" The tree number {0} is not high.", " Name {0} trees that grow in the north.")
    for rules, reasons in (("paper", {""}), ("strict", {"", "asks for nothing"})):
        records = write(tmp_path / rules, model, rules=rules, novelty=1.0, instructions=4)
        assert {r.verdict.reason for r in records[:4]} == reasons


def test_the_lowest_lifts_of_a_part_are_dropped_before_they_count_as_earlier_instructions(tmp_path, monkeypatch):
    monkeypatch.setattr("isheep_jax.loop.stages.synthesize.PART_PROMPTS", 8)
    model = Fixed(" Count up to {0}.", " Draw a map of {0}.")
    records = write(tmp_path, model, novelty=1.0, instructions=3, drop_lowest=0.5)
    part = [r for r in records if r.prompt < 8 and r.prompt % 2 == 0]
    low = [r for r in part if r.verdict.reason == "among the lowest lifts"]
    assert len(part) == 4
    assert len(low) == 2
    assert max(r.lift for r in low) < min(r.lift for r in part if r not in low)
    assert all(r.lift is None for r in records if r.verdict.reason == "needs more than text")
