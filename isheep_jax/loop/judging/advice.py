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
    if not any(passes for *_, passes in found):
        names = ", ".join(name for names in others for name in names)
        tried = f"none of {names} does better" if others else "there is no other reading for it"
        return f"{tried}, so another model should judge (assess.judge)"
    auc, label, _ = max(entry for entry in found if entry[-1])
    names = ",".join(together) if label == "together" else label.split()[0]
    settings = f"--assess.readings={names} --select.rule=top_fraction --select.length_control=buckets"
    if label.endswith("in total"):
        settings += " --select.per=total"
    return f"another reading reaches {auc:.2f}: {settings}"
