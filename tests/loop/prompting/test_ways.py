from isheep_jax.config import SynthesizeConfig
from isheep_jax.loop.prompting.ways import Trial, Way, Yield, ways_of
from isheep_jax.loop.records import KEPT, Instruction, dropped

SETTINGS = SynthesizeConfig(shots=5, other_shots=(3,), other_temperatures=(0.7,), trial_prompts=2)


def records(*tokens, kept):
    """A record per number of tokens (None: of the same prompt as the one before), the first ones kept."""
    return [
        Instruction(str(i), "Count.", "", 0, (), KEPT if i < kept else dropped("not new"), tokens=n)
        for i, n in enumerate(tokens)
    ]


def test_a_yield_counts_a_completion_once_and_is_unknown_without_tokens():
    gave = Yield.of(records(300, None, None, 100, kept=3))
    assert (gave.prompts, gave.tokens, gave.kept, gave.per_thousand_tokens) == (2, 400, 3, 7.5)
    assert Yield.of(records(0, kept=0)).per_thousand_tokens is None


def test_the_main_settings_are_the_first_way_and_the_only_one_without_others():
    assert ways_of(SETTINGS)[0] == Way(5, 1.0)
    assert len(ways_of(SETTINGS)) == 4
    assert ways_of(SynthesizeConfig()) == [Way(5, 1.0)]


def test_a_trial_that_was_interrupted_goes_on_in_turn():
    trial = Trial(SETTINGS)
    assert trial.prompts == 8
    first = trial.choose(3)
    for way in first:
        trial.add(way, records(10, kept=0))
    assert trial.prompts == 5
    assert first + trial.choose(5) == ways_of(SETTINGS) * 2


def test_the_best_way_of_the_trial_is_used_whatever_comes_after_it():
    trial = Trial(SETTINGS)
    for way in ways_of(SETTINGS):
        trial.add(way, records(10, 10, kept=1 if way == Way(3, 0.7) else 0))
    assert trial.prompts == 0
    assert trial.choose(2) == [Way(3, 0.7)] * 2
    trial.add(Way(5, 1.0), records(10, kept=1))
    trial.add(Way(3, 0.7), records(100, kept=0))
    assert trial.choose(1) == [trial.best] == [Way(3, 0.7)]


def test_of_equal_ways_the_first_is_used():
    trial = Trial(SETTINGS)
    for way in ways_of(SETTINGS):
        trial.add(way, records(10, 10, kept=1))
    assert trial.best == Way(5, 1.0)
