"""Presets: the settings of a published method, laid over any config by `--preset=NAME`.

A preset says how the loop works. It leaves what the loop works on as in the config: the model and the devices, the
prompts and seeds, the evaluation, and the run's name, directory and seed.
"""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeVar

from isheep_jax.config import AssessConfig, Config, SelectConfig
from isheep_jax.errors import UserError, did_you_mean

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Preset:
    """description: one line for `--help`. apply: the config with the method's settings in place of its own."""

    description: str
    apply: Callable[[Config], Config]


def replace_settings(config: Settings, settings: Mapping[str, object]) -> Settings:
    """Returns a config with other values of some settings, named as on the command line ("sft.learning_rate").

    Raises `UserError` with the nearest name for one that is not a setting. Values are checked by what uses the config.
    """
    known = [field.name for field in dataclasses.fields(config)]
    for name, value in settings.items():
        section, _, rest = name.partition(".")
        if section not in known or (rest and not dataclasses.is_dataclass(getattr(config, section))):
            hint = "" if section in known else did_you_mean(section, known)
            raise UserError(f"'{name}' is not a setting of {type(config).__name__}; {hint}known: {', '.join(known)}")
        if rest:
            value = replace_settings(getattr(config, section), {rest: value})
        config = dataclasses.replace(config, **{section: value})
    return config


def i_sheep(config: Config) -> Config:
    """Applies I-SHEEP as published (arXiv 2408.08072 v3 and its code, compared in docs/reproduce.md).

    `iterations` stays: the paper's number follows the model's size, and the named configs have it.
    """
    stays = ("name", "workdir", "iterations", "seed", "prompts", "model", "mesh", "decode", "evaluate")
    return replace_settings(
        Config(**{name: getattr(config, name) for name in stays}),
        {
            # Seeds are data, as the prompts are; how the backward pass saves memory, and what is stored, is a matter of
            # the devices.
            "synthesize.seeds": config.synthesize.seeds,
            "sft.remat": config.sft.remat,
            "sft.save": config.sft.save,
            "synthesize.instructions": 10_000,
            "synthesize.shots": 5,
            "synthesize.temperature": 1.0,
            "synthesize.top_p": 0.95,
            "synthesize.max_tokens": 1000,
            "synthesize.rules": "paper",
            "synthesize.novelty": 0.7,
            "synthesize.novelty_scope": "iteration",
            "respond.samples": 1,
            "respond.temperature": (1.0,),
            "respond.top_p": 0.95,
            "respond.max_tokens": 1000,
            "respond.base_prompt": "bare",
            "respond.rules": "paper",
            "assess.readings": ("rubric",),
            "assess.level": "both",
            "assess.framing": "text",
            "assess.prompt": "standard",
            # The published models were made with the base as the judge in every iteration; the text says 'current'.
            "assess.judge": "base",
            "assess.read": "sampled",
            "assess.samples": 1,
            "assess.parser": "paper",
            "assess.temperature": 1.0,
            "assess.top_p": 0.95,
            "assess.max_tokens": 1000,
            "select.rule": "threshold",
            "select.threshold": 8.0,
            "select.max_pairs": 3000,
            "select.max_pairs_order": "first",
            "guard.action": "off",
            "sft.start": "base",
            "sft.data": "iteration",
            "sft.method": "lora",
            "sft.lora_rank": 8,
            "sft.lora_alpha": 16.0,
            "sft.lora_dropout": 0.05,
            "sft.learning_rate": 5e-5,
            "sft.warmup_steps": 20,
            "sft.epochs": 2,
            "sft.sequence_length": 1024,
            "sft.batch_size": 16,
            "sft.packing": False,
            "sft.validation_fraction": 0.1,
            "sft.checkpoint_every": 100,
        },
    )


def self_align(config: Config) -> Config:
    """Applies Dromedary's SELF-ALIGN (arXiv 2305.03047): topics, principles with thoughts, engraving, verbose cloning.

    Settings that depend on the size of model and data stay: the number of instructions, their rules, and those of the
    optimizer. Published are about 360,000 instructions and, for 65B, LoRA of rank 16, a learning rate of 4e-4, batches
    of 768, one epoch.
    """
    aligned = dataclasses.replace(
        config,
        iterations=1,
        assess=AssessConfig(readings=()),
        # Whatever passes the filters is learned.
        select=SelectConfig(rule="none", max_pairs=10**9, min_pairs=config.select.min_pairs),
    )
    # The tiny world has no words for topics.
    method = "few_shot" if config.prompts == "tiny" else "topics"
    return replace_settings(
        aligned,
        {
            "synthesize.method": method,
            "synthesize.temperature": 1.0,
            "synthesize.top_p": 0.98,
            "respond.method": "principles",
            "respond.samples": 1,
            "respond.temperature": (0.5,),
            "respond.top_p": 0.95,
            # The prompt needs most of a context of 2048; what does not end is dropped.
            "respond.max_tokens": min(config.respond.max_tokens, 384),
            # Principles have filters of their own.
            "respond.rules": "basic",
            "sft.start": "base",
            "sft.data": "iteration",
            "sft.seeds": "none",
            "clone.enabled": True,
            "clone.temperature": 0.3,
            "clone.top_p": 0.7,
            "clone.max_tokens": 512,
        },
    )


def isara(config: Config) -> Config:
    """Applies ISARA-style alignment to a domain from fewer than 100 samples, after the abstract of arXiv 2401.06785.

    From the abstract: samples without instructions or principles; prompts with samples related to the domain; the model
    writes more samples, is fine-tuned on them, and starts again. From summaries by others: a question first, then its
    answer. Everything else is our choice, and a setting: similarity by the model's own mean last hidden states, how
    many pairs a prompt has and from which pool, the most probable answer instead of a sampled one, no scores, each
    fine-tuning from the base on the pairs of its iteration. The number of instructions, the rules and novelty, the
    number of iterations and the optimizer stay as the config has them.
    """
    domain = dataclasses.replace(
        config,
        assess=AssessConfig(readings=()),
        select=SelectConfig(rule="none", max_pairs=10**9, min_pairs=config.select.min_pairs),
    )
    return replace_settings(
        domain,
        {
            "synthesize.method": "retrieved",
            "synthesize.turns": 1,
            "respond.method": "retrieved",
            "respond.samples": 1,
            "respond.temperature": (0.0,),
            "retrieval.pool": "seeds",
            "retrieval.choose": "nearest",
            "sft.start": "base",
            "sft.data": "iteration",
            "sft.seeds": "none",
            "clone.enabled": False,
        },
    )


PRESETS: dict[str, Preset] = {
    "i_sheep": Preset("I-SHEEP with every setting as published", i_sheep),
    "isara": Preset("ISARA-style: a domain from few samples, similar ones in the context", isara),
    "self_align": Preset("Dromedary's SELF-ALIGN: topics, principles, engraving, verbose cloning", self_align),
}


def apply_preset(name: str, config: Config) -> Config:
    """Returns the config with the preset's settings. Raises `UserError` with the nearest name for an unknown one."""
    if name not in PRESETS:
        hint = did_you_mean(name, PRESETS)
        raise UserError(f"--preset: there is no preset '{name}'; {hint}known: {', '.join(PRESETS)}")
    return PRESETS[name].apply(config)
