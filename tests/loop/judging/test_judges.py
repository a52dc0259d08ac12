"""Who judges, found by name; and how far two judges agree, against numbers worked out by hand."""

import pytest

from isheep_jax.config import AssessConfig, Config, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.files import write_json
from isheep_jax.loop.judging.agreement import measure_agreement, sample_candidates
from isheep_jax.loop.judging.judges import identity, own_model
from isheep_jax.loop.judging.reader import Candidate
from isheep_jax.loop.records import KEPT, Pair, ReadingValue, Score, Scores, dropped
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.runtime.locate import locate_judge


def judged_by(judge):
    return Config(assess=AssessConfig(judge=str(judge), judge_model="m", read="sampled"))


@pytest.mark.parametrize(
    ("judge", "models"), [("current", [None, 1, 2]), ("previous", [None, None, 1]), ("base", [None, None, None])]
)
def test_the_runs_own_judges_are_so_many_iterations_back(tmp_path, judge, models):
    run = RunDirectory(tmp_path, Config())
    found = [own_model(run, judge, number) for number in (1, 2, 3)]
    assert [m and int(m.parent.name.rpartition("_")[2]) for m in found] == models


def test_another_model_is_found_as_everywhere_and_named_by_the_end_of_its_path(tmp_path):
    for name in ("iteration_0", "iteration_1/model", "iteration_2/model"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for number in (1, 2):
        write_json(tmp_path / f"iteration_{number}" / "fine_tune.json", {"metrics": {}})
    assert locate_judge(judged_by(tmp_path)) == tmp_path / "iteration_2" / "model"
    assert identity(locate_judge(judged_by(tmp_path))) == {"assess.judge": "iteration_2/model"}
    for judge in ("base", "current", "previous", "http://localhost:1/v1", "https://x/v1"):
        assert locate_judge(judged_by(judge)) is None
    assert identity(None) == {}


@pytest.mark.parametrize(
    ("judge", "words"),
    [("curent", "did you mean 'current'"), ("/nowhere", "--assess.judge: /nowhere is no directory")],
)
def test_what_is_no_judge_is_named(judge, words):
    with pytest.raises(UserError, match=words):
        locate_judge(judged_by(judge))


def scores(*values):
    """Records with (quality, following) or a single quality; None for one without scores."""
    made = []
    for n, value in enumerate(values):
        quality, following = value if isinstance(value, tuple) else (value, None)
        verdict = dropped("unscored") if value is None else KEPT
        made.append(Scores(f"{n}", Score(quality), None if following is None else Score(following), verdict))
    return made


def agreement(first, second, threshold, readings=("rubric",)):
    config = Config(assess=AssessConfig(readings=readings), select=SelectConfig(threshold=threshold))
    pairs = [Candidate(f"{n}", "Do it.", "", "Done.", "Do it.", "") for n in range(len(first))]
    return measure_agreement(config, pairs, first, second)


def test_judges_that_read_likelihoods_are_compared_by_what_ranks_the_pairs():
    def read(*lifts):
        return [Scores(f"{n}", None, None, KEPT, {"lift": ReadingValue(x, 2)}) for n, x in enumerate(lifts)]

    found = agreement(read(1.0, 2.0, 3.0), read(-1.0, 5.0, 9.0), 8, ("lift",))
    assert found == {"pairs": 3, "correlation": 1.0}


def test_agreement_by_hand():
    first, second = scores((9, 9), (9, 7), (4, 4), None, (5, 5)), scores((9, 10), (8, 8), (5, 3), (1, 1), None)
    # Means 9, 8, 4 and 9.5, 8, 4: the same order. The first passes and the others do not, for both.
    assert agreement(first, second, 8) == {
        **{"pairs": 3, "correlation": 1.0, "difference": round(0.5 / 3, 4), "same_verdict": 1.0},
    }
    # Ranks 1, 2, 3 and 3, 1.5, 1.5, so that Spearman's correlation is -sqrt(3)/2.
    found = agreement(scores(1, 2, 3), scores(9, 4, 4), 3)
    assert found["correlation"] == pytest.approx(-0.866, abs=1e-3)
    # None of the first is above 3, all of the second are.
    assert found["same_verdict"] == 0.0


def test_a_judge_that_says_always_the_same_has_no_correlation_and_no_pair_no_agreement():
    assert agreement(scores(5, 5), scores(1, 2), 8)["correlation"] is None
    assert agreement(scores(5), scores(None), 8) == {"pairs": 0}


def test_the_sample_is_the_runs_own_and_no_larger_than_what_there_is():
    pairs = [Pair(f"{n}", f"{n}", "", "", "", KEPT) for n in range(50)]

    def ids(seed=0, number=1, count=10):
        return [p.id for p in sample_candidates(Config(seed=seed, assess=AssessConfig(agreement=count)), number, pairs)]

    assert len(set(ids())) == 10
    assert ids() == ids() == sorted(ids(), key=int)
    assert ids() not in (ids(seed=1), ids(number=2))
    assert ids(count=99) == [p.id for p in pairs]
