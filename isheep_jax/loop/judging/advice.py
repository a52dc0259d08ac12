"""Which other readings of a judge would do, where the one that was checked fails."""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace

from isheep_jax.config import Config, is_server
from isheep_jax.errors import UserError
from isheep_jax.loop.judging.check import checkable, result_of
from isheep_jax.loop.judging.readings import READINGS, TOGETHER
from isheep_jax.loop.records import Checked


def advice(config: Config, read: Callable[[Config], Sequence[Checked]]) -> str:
    """Returns which other readings of the same judge pass, and the settings for them; or that none does.

    Args:
        config: Settings whose readings fail.
        read: Returns the pairs of the check with what the judge says of them under other settings. Raises UserError
            where something that these settings need is missing.
    """
    possible = [
        name
        for name in checkable(is_server(config.assess.judge))
        if not (READINGS[name].needs_others and config.respond.samples < 2)
    ]
    together = tuple(name for name in TOGETHER if name in possible)
    others = [*filter(None, [together]), *((name,) for name in possible if name not in together)]
    others = [names for names in others if names != config.assess.readings]
    found = []
    for names in others:
        other = replace(
            config,
            assess=replace(config.assess, readings=names),
            select=replace(config.select, weights=(), ranking="sum", length_control="buckets"),
        )
        with contextlib.suppress(UserError):  # the prompts may lack what they need
            for label, order in result_of(other, read(other)).readings.items():
                found.append((order.auc.value, label, order.passes(config.guard)))
    if not found:
        return "there is no other reading for it, so another model should judge (assess.judge)"
    passes, auc, label = max((passes, auc, label) for auc, label, passes in found)
    names = ",".join(together) if label == "together" else label.split()[0]
    if not passes:
        return f"the best of the others, {names}, reaches {auc:.2f}, so another model should judge (assess.judge)"
    settings = {"assess.readings": names, "select.rule": "top_fraction", "select.length_control": "buckets"}
    if config.select.ranking != "sum":
        settings["select.ranking"] = "sum"
    if config.select.weights:
        settings["select.weights"] = ""
    if label.endswith(("per token", "in total")):
        settings["select.per"] = label.split()[-1]
    shown = " ".join(f"--{name}={value}" for name, value in settings.items() if _differs(config, name, value))
    return f"{names} reaches {auc:.2f}: {shown}"


def _differs(config: Config, name: str, value: str) -> bool:
    """Returns whether a setting is to be named: where it differs, and the readings and the rule in any case."""
    section, field = name.split(".")
    return field in ("readings", "rule") or getattr(getattr(config, section), field) != value
