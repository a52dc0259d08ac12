"""Checks the values of a config: the range of each number, and settings that exclude or need each other."""

import math
import re
import urllib.parse

from isheep_jax.config import Config, SynthesizeConfig, flatten, is_server
from isheep_jax.errors import UserError

# Names of environment variables, and what looks like a key: letters and digits alone.
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_KEY = re.compile(r"(?=.*\d)[A-Za-z0-9]+")

# What a number may be, as an interval: a square bracket includes the end, a round one does not. The upper ends of
# counts are beyond all use: a mistyped number above them would end in days without a word, or without memory.
RANGES = {
    "iterations": "[1, 10000]",
    "mesh.slices": "[1, 100000]",
    "synthesize.instructions": "[1, 10000000]",
    "synthesize.topic_share": "(0, 1]",
    "synthesize.shots": "[1, 1000]",
    "synthesize.temperature": "[0, 100]",
    "synthesize.other_shots": "[1, 1000]",
    "synthesize.other_temperatures": "[0, 100]",
    "synthesize.trial_prompts": "[1, 1000000]",
    "synthesize.top_p": "(0, 1]",
    "synthesize.max_tokens": "[1, 1000000]",
    "synthesize.drop_lowest": "[0, 1)",
    "synthesize.novelty": "[0, 1]",
    "respond.samples": "[1, 10000]",
    "respond.temperature": "[0, 100]",
    "respond.top_p": "(0, 1]",
    "respond.max_tokens": "[1, 1000000]",
    "retrieval.examples": "[1, 1000]",
    "assess.judge_requests": "[1, 10000]",
    "assess.samples": "[1, 10000]",
    "assess.temperature": "[0, 100]",
    "assess.top_p": "(0, 1]",
    "assess.max_tokens": "[1, 1000000]",
    "assess.agreement": "[0, inf)",
    "select.threshold": "[-1, 10]",
    "select.fraction": "(0, 1]",
    "select.weights": "[0, inf)",
    "select.consistency": "[0, 1]",
    "select.perplexity": "(1, inf)",
    "select.clusters": "[1, 1000000]",
    "select.bucket_share": "(0, 1]",
    "select.top_up_to": "[0, inf)",
    "select.following_ceiling": "[1, 10]",
    "select.min_pairs": "[0, inf)",
    "select.max_pairs": "[1, inf)",
    "guard.min_auc": "[0, 1]",
    "guard.min_novelty": "[0, 1]",
    "guard.min_score_mass": "[0, 1]",
    "guard.min_yield": "[0, 1]",
    "stop.patience": "[1, inf)",
    "sft.lora_rank": "[1, 65536]",
    "sft.lora_alpha": "(0, inf)",
    "sft.lora_dropout": "[0, 1)",
    "sft.learning_rate": "(0, 1]",
    "sft.warmup_steps": "[0, inf)",
    "sft.weight_decay": "[0, inf)",
    "sft.clip_norm": "(0, inf)",
    "sft.epochs": "[1, 10000]",
    "sft.sequence_length": "[2, 10000000]",
    "sft.batch_size": "[1, 1000000]",
    "sft.validation_fraction": "[0, 1)",
    "sft.checkpoint_every": "[1, inf)",
    "clone.temperature": "[0, 100]",
    "clone.top_p": "(0, 1]",
    "clone.max_tokens": "[1, 1000000]",
    "decode.slots": "[0, 100000]",
    "decode.steps_per_call": "[1, 10000]",
    "decode.max_length": "[0, 10000000]",
    "evaluate.limit": "[0, inf)",
    "evaluate.max_tokens": "[0, 1000000]",
    "evaluate.attempts": "[1, 10000]",
    "evaluate.judge_requests": "[1, 10000]",
}

# Most pairs of an iteration: their records are in memory, a few kilobytes each.
MOST_PAIRS = 10_000_000
# Most tokens of a batch, and of all slots: their positions are 32-bit numbers.
MOST_TOKENS = 2**31 - 1

# Kinds of object stores that paths may be in.
_SCHEMES = ("gs", "s3", "az", "hf")


def check_values(config: Config) -> None:
    """Raises `UserError` for a number out of its range and for an empty list that needs an item."""
    settings = flatten(config)
    for name, interval in RANGES.items():
        value = settings[name]
        for number in value if isinstance(value, list) else [value]:
            check_range(name, number, interval)
    if not settings["respond.temperature"]:
        raise UserError("--respond.temperature: the list is empty; it needs a temperature for iteration 1")
    check_together(config)


def check_section(section: str, settings: object) -> None:
    """Raises `UserError` for a number out of its range in one section of a config, such as "sft"."""
    for name, interval in RANGES.items():
        if name.startswith(f"{section}."):
            check_range(name, getattr(settings, name.removeprefix(f"{section}.")), interval)


def check_server(section: str, url: str, key_variable: str) -> None:
    """Raises `UserError` for the URL of a judge that is none, and for secrets in settings, which runs write down.

    section: "assess" or "evaluate". url, key_variable: its judge and judge_key.
    """
    try:
        parts = urllib.parse.urlsplit(url)
        is_url = bool(parts.hostname) and (parts.port or 1) > 0 and url.isprintable() and " " not in url
    except ValueError:
        is_url = False
    # None of these messages shows a value that may be secret.
    if not is_url:
        raise UserError(f"--{section}.judge: it is no URL of a server, such as http://localhost:8000/v1")
    if parts.username is not None or parts.query or parts.fragment:
        raise UserError(
            f"--{section}.judge: a user, a password or a query has no place in it, since runs write it down; a key "
            f"belongs into the environment variable that --{section}.judge_key names"
        )
    if not _VARIABLE.fullmatch(key_variable) or (len(key_variable) >= 20 and _KEY.fullmatch(key_variable)):
        raise UserError(
            f"--{section}.judge_key: it must be the name of an environment variable, such as OPENAI_API_KEY, which has "
            "the key; the key itself belongs into no setting, since runs write settings down"
        )


def check_together(config: Config) -> None:
    """Raises `UserError` for settings that are good by themselves but not with each other."""
    assess, select, stop = config.assess, config.select, config.stop
    if not config.name.strip(" .") or not config.name.isprintable() or set(config.name) & set("/\\"):
        # It is shown on terminals and in cards, and names the directory in runs/.
        raise UserError(
            f"--name: {config.name!r} is no name; it needs letters or digits, without / or control characters"
        )
    settings = flatten(config)
    for name in ("workdir", "synthesize.seeds", "guard.pairs"):
        check_scheme(f"--{name}", settings[name])
    if is_server(assess.judge):
        if assess.read != "sampled":
            raise UserError("--assess.read: a server as the judge gives only sampled judgments; it must be sampled")
        if assess.framing == "chat":
            raise UserError("--assess.framing: a server as the judge is told to go on with a text; it must be text")
        check_server("assess", assess.judge, assess.judge_key)
        if not assess.judge_model:
            raise UserError("--assess.judge_model: it is empty; name the model that the server of --assess.judge has")
    pairs = config.synthesize.instructions * config.respond.samples
    if pairs > MOST_PAIRS:
        raise UserError(
            f"--respond.samples: {config.synthesize.instructions} instructions with {config.respond.samples} responses "
            f"each are {pairs:,} pairs; an iteration has at most {MOST_PAIRS:,}"
        )
    for count, length in (("sft.batch_size", "sft.sequence_length"), ("decode.slots", "decode.max_length")):
        settings = flatten(config)
        if settings[count] * settings[length] > MOST_TOKENS:
            raise UserError(
                f"--{count}: {settings[count]:,} rows of --{length}={settings[length]} tokens are more than "
                f"{MOST_TOKENS:,} tokens; use at most {MOST_TOKENS // settings[length]:,}"
            )
    if select.min_pairs > config.synthesize.instructions:
        raise UserError(
            f"--select.min_pairs: {select.min_pairs} pairs cannot be kept of {config.synthesize.instructions} "
            "instructions, one pair each; lower it or raise --synthesize.instructions"
        )
    if assess.samples > 1 and assess.read != "sampled":
        raise UserError("--assess.samples: several judgments per score need --assess.read=sampled")
    if select.ranking == "probability" and (assess.readings != ("rubric",) or assess.read != "expected"):
        raise UserError("--select.ranking: probability needs --assess.readings=rubric alone and --assess.read=expected")
    _check_ranking(config)
    if select.bucket_share < 1 and select.buckets == "none":
        raise UserError("--select.bucket_share: there are no buckets to share; set --select.buckets, too")
    if assess.agreement and not assess.readings:
        raise UserError("--assess.agreement: there is nothing to compare without --assess.readings")
    _check_ways(config.synthesize)
    if config.synthesize.turns == 2 and config.respond.method != "zero_shot":
        raise UserError("--synthesize.turns: 2 needs --respond.method=zero_shot; other prompts are for single turns")
    if config.synthesize.turns == 2 and config.clone.enabled:
        raise UserError("--synthesize.turns: 2 needs --clone.enabled=False; only single turns are answered again")
    if stop.measure == "accuracy" and not config.evaluate.tasks:
        raise UserError("--stop.measure: accuracy needs a task in --evaluate.tasks")
    if config.sft.save == "adapter" and config.sft.method != "lora":
        raise UserError("--sft.save: adapter needs --sft.method=lora; training all weights needs --sft.save=model")
    if stop.measure == "validation_loss" and not config.sft.validation_fraction:
        raise UserError("--stop.measure: validation_loss needs --sft.validation_fraction above 0")


def check_scheme(setting: str, path: str) -> None:
    """Raises `UserError` for a path in a kind of store that is not known; the path, which may have a key, is not shown.

    setting: name of the setting that has the path, for the message.
    """
    scheme, is_remote, _ = path.partition("://")
    if is_remote and scheme not in _SCHEMES:
        known = ", ".join(f"{known}://" for known in _SCHEMES)
        raise UserError(f"{setting}: {scheme[:20]}:// is not known; name a local path, or one that begins with {known}")


def _check_ways(synthesize: SynthesizeConfig) -> None:
    for name, others, value in (
        ("shots", "other_shots", synthesize.shots),
        ("temperature", "other_temperatures", synthesize.temperature),
    ):
        values = (value, *getattr(synthesize, others))
        if len(set(values)) < len(values):
            raise UserError(
                f"--synthesize.{others}: {', '.join(map(str, values[1:]))} and --synthesize.{name}={value} must all be "
                "different"
            )
    if synthesize.method == "retrieved":
        for name, given in (("other_shots", synthesize.other_shots), ("choose", synthesize.choose != "random")):
            if given:
                raise UserError(
                    f"--synthesize.{name}: --synthesize.method=retrieved shows the pairs of --retrieval.*, not seeds"
                )


def _check_ranking(config: Config) -> None:
    readings, select = config.assess.readings, config.select
    if select.weights:
        if len(select.weights) != len(readings):
            raise UserError(
                f"--select.weights: {len(select.weights)} weights for {len(readings)} in --assess.readings; "
                "each reading needs one"
            )
        if select.ranking != "sum":
            raise UserError("--select.weights: only --select.ranking=sum has weights")
        if not any(select.weights):
            raise UserError("--select.weights: one of them must be above 0")
    if len(select.consistency) != 2 or select.consistency[0] > select.consistency[1]:
        raise UserError("--select.consistency: it must be the lowest and the highest agreement, such as 0.1,0.9")
    if select.consistency != (0.0, 1.0) and "self_consistency" not in readings:
        raise UserError("--select.consistency: it needs self_consistency in --assess.readings")


def check_range(name: str, number: float, interval: str) -> None:
    """Raises `UserError` when the number is outside the interval, written as in `RANGES`."""
    low, high = _ends(interval)
    inside = low < number < high or (interval[0] == "[" and number == low) or (interval[-1] == "]" and number == high)
    if not inside:
        raise UserError(f"--{name}: {number} is out of range; it must be {describe_range(interval)}")


def describe_range(interval: str) -> str:
    """Returns the interval in words, such as "above 0 and at most 1"."""
    low, high = _ends(interval)
    parts = []
    if math.isfinite(low):
        parts.append(f"at least {_written(low)}" if interval[0] == "[" else f"above {_written(low)}")
    if math.isfinite(high):
        parts.append(f"at most {_written(high)}" if interval[-1] == "]" else f"below {_written(high)}")
    return " and ".join(parts) or "a finite number"


def _written(number: float) -> str:
    return f"{number:,.0f}" if number.is_integer() else f"{number:g}"


def _ends(interval: str) -> tuple[float, float]:
    low, high = interval[1:-1].split(",")
    return float(low), float(high)
