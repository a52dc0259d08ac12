"""ISARA-style on the embedded model: a domain of the tiny world from 12 samples.

Command:  python -m isheep_jax.train --config=tiny_domain
Hardware: two CPU cores, 2 GB of memory.
Time:     about one minute on two cores, measured.
Result:   accuracy on development prompts of the domain from .03 to .82 and .98 or more in two iterations, measured.
"""

import dataclasses

from isheep_jax.config import Config, EvaluateConfig, ModelConfig
from isheep_jax.named_configs import named_config
from isheep_jax.presets import apply_preset


def config() -> Config:
    tiny = named_config("tiny")
    domain = dataclasses.replace(
        tiny,
        name="tiny_domain",
        # The embedded model after reading pages of questions with answers: it takes its manners from examples.
        model=ModelConfig(path="tiny_pages", compute_dtype="float32"),
        synthesize=dataclasses.replace(tiny.synthesize, seeds="builtin:domain", max_tokens=40),
        evaluate=EvaluateConfig(tasks=("tiny_domain",), limit=512),
    )
    return apply_preset("isara", domain)
