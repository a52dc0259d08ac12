import numpy as np
import pytest
from scripted_backend import Fuse, ScriptedModel, context_of, tiny_config

from isheep_jax.config import SynthesizeConfig
from isheep_jax.decode.requests import Embedding
from isheep_jax.errors import UserError
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.shown import SeedPool, choose_seeds, seed_pool

# Three subjects, by the last digit.
SEEDS = [Seed(f"seed-{i:03d}", f"Do {i} of subject {i % 3}.", "", "") for i in range(30)]


class BySubject(ScriptedModel):
    """Embeds a seed by its subject, with a common part that dwarfs it."""

    def __init__(self, too_long=()):
        super().__init__("by subject", Fuse())
        self.too_long = too_long

    def embed(self, requests):
        for request in reversed(requests):
            if request.id.rpartition("/")[2] in self.too_long:
                yield Embedding(request.id, error="too long")
                continue
            rng = np.random.default_rng(len(request.prompt) + int(request.prompt.split()[1]))
            vector = np.array([9.0, 9.0, 9.0, 9.0]) + 0.01 * rng.standard_normal(4)
            vector[int(request.prompt[-2])] += 1
            yield Embedding(request.id, tuple(vector.tolist()))


def subjects(tmp_path, choose, number, shots=3):
    config = tiny_config(tmp_path / choose, synthesize=SynthesizeConfig(choose=choose, shots=shots))
    context = context_of(config, seeds=SEEDS)
    seeds = choose_seeds(context, seed_pool(context, BySubject()), number, shots)
    assert len({s.id for s in seeds}) == shots
    return [s.instruction[-2] for s in seeds]


def test_nearest_seeds_are_of_one_subject_and_diverse_ones_of_all(tmp_path):
    assert all(len(set(subjects(tmp_path, "nearest", n))) == 1 for n in range(8))
    assert all(len(set(subjects(tmp_path, "diverse", n))) == 3 for n in range(8))


def chosen(seed, iteration, number, choose, tmp_path):
    config = tiny_config(tmp_path, seed=seed, synthesize=SynthesizeConfig(choose=choose, shots=3))
    context = context_of(config, tmp_path / f"{seed}{choose}", seeds=SEEDS, iteration=iteration)
    return choose_seeds(context, seed_pool(context, BySubject()), number, 3)


@pytest.mark.parametrize("choose", ["random", "nearest", "diverse"])
def test_a_prompts_seeds_follow_from_the_seed_the_iteration_and_its_number(choose, tmp_path):
    first = chosen(0, 1, 7, choose, tmp_path)
    assert first == chosen(0, 1, 7, choose, tmp_path)
    others = [chosen(*key, choose, tmp_path) for key in ((1, 1, 7), (0, 2, 7), (0, 1, 8))]
    assert all(first != other for other in others)


def test_more_shots_than_candidates_take_every_seed(tmp_path):
    for choose in ("random", "nearest", "diverse"):
        assert len(subjects(tmp_path, choose, 0, shots=30)) == 30


def test_a_seed_that_does_not_fit_is_not_shown_and_too_few_are_an_error(tmp_path):
    config = tiny_config(tmp_path, synthesize=SynthesizeConfig(choose="diverse", shots=29))
    context = context_of(config, seeds=SEEDS)
    assert SEEDS[4] not in seed_pool(context, BySubject(too_long=("seed-004",))).seeds
    context = context_of(config, tmp_path / "other", seeds=SEEDS)
    with pytest.raises(UserError, match=r"only 28 seeds fit the context, but a prompt shows 29; raise decode"):
        seed_pool(context, BySubject(too_long=("seed-004", "seed-005")))


def test_random_seeds_need_no_embeddings(tmp_path):
    assert seed_pool(context_of(tiny_config(tmp_path), seeds=SEEDS), BySubject()) == SeedPool(SEEDS)
