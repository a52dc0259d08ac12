"""The domain's samples are its own, right and not held out; its measurement is the tiny world's on its prompts."""

from etils import epath
from scripted_backend import Counting

from isheep_jax.config import EvaluateConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.evaluation import tiny_domain
from isheep_jax.evaluation.tasks import evaluators, held_out_texts
from isheep_jax.loop.inputs import read_inputs
from isheep_jax.named_configs import named_config
from isheep_jax.presets import replace_settings
from isheep_jax.tiny import world


def test_file_of_samples_is_what_command_prints():
    config = named_config("tiny_domain")
    seeds = read_inputs(config, None).seeds
    assert [(s.instruction, s.output) for s in seeds] == [(s["question"], s["answer"]) for s in tiny_domain.samples()]
    assert len(seeds) < 100
    for seed in seeds:
        item = world.parse_instruction(seed.instruction)
        assert world.check(item, seed.output).correct
        assert item.split == "train"
        assert item.task in tiny_domain.TASKS
        assert len(item.constraints) == 1
        assert item.constraints[0] in tiny_domain.CONSTRAINTS


def test_splits_are_held_out_and_share_nothing():
    development, test = (tiny_domain.split_items(split)[:300] for split in ("development", "test"))
    assert {item.split for item in development} == {"development"}
    assert not {i.instruction for i in development} & {i.instruction for i in test}
    assert len({(i.task, i.arguments, i.constraints) for i in development}) == 300
    held_out = tiny_domain.TASK.held_out_texts()
    assert {i.instruction for i in development + test} <= held_out
    assert not {s["question"] for s in tiny_domain.samples()} & held_out


def test_measurement_is_of_domain_and_its_prompts_are_never_learned(tmp_path):
    config = replace_settings(named_config("tiny_domain"), {"evaluate.limit": 40})
    items = tiny_domain.split_items("development")[:40]

    class Half:
        """Answers every other prompt right."""

        def generate(self, requests, sampling):
            for i, request in enumerate(requests):
                assert request.prompt[0].content == items[i].instruction
                yield Completion(request.id, items[i].response if i % 2 else items[i].answer)

    evaluator = evaluators(config.evaluate, {"chat_template": "tiny", "weights": "w"})["tiny_domain"]
    result = evaluator(Half(), epath.Path(tmp_path), Counting())
    assert (result["accuracy"], result["figures"]["content"]["value"], result["count"]) == (0.5, 1.0, 40)
    assert {f"constraint_{name}" for name in tiny_domain.CONSTRAINTS} <= set(result["figures"])
    assert held_out_texts(config.evaluate) == tiny_domain.TASK.held_out_texts()
    assert EvaluateConfig().tasks == ()
