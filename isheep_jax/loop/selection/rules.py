"""The rules of selection, an entry of `RULES` each: what a rule needs, how it orders and drops pairs, its description.

I-SHEEP keeps the pairs with both scores above a threshold (section 3.2) and compares that with perplexity, density,
both and no filter (section 4.3). `top_fraction` and the random draws of equal size are ours. `select.py` applies a
rule; the check of the settings, the planner, the console and the model card ask its entry. A new rule is one entry
here and its name in `config.RuleName`.
"""

import math
import random
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any, Literal

from isheep_jax.config import Config, SelectConfig, is_server
from isheep_jax.errors import UserError
from isheep_jax.loop.filters.verdicts import CUT, EMPTY, NO_ANSWER, NO_THOUGHTS, NOT_DECODED, UNFINISHED
from isheep_jax.loop.judging.scores import criteria_of
from isheep_jax.loop.records import Selected, Verdict, dropped

# What a rule looks at: any readings, one of them by name, or clusters.
Need = Literal["readings", "rubric", "likelihood", "clusters"]

# Reasons after which a pair has nothing to learn from, whatever a rule says.
_UNUSABLE = (NOT_DECODED, UNFINISHED, CUT, EMPTY, NO_THOUGHTS, NO_ANSWER)


@dataclass(frozen=True)
class Candidates:
    """The candidates of a rule: one pair per instruction, each with everything that the rule needs."""

    settings: SelectConfig
    records: Sequence[Selected]
    """In the order of generation."""
    scored: Set[str]
    """Ids of the instructions with at least one scored response."""
    count: int | None
    """Pairs that the rule named by `Rule.as_many_as` keeps; None for a rule without one."""
    rng: random.Random


@dataclass(frozen=True)
class Rule:
    """One rule of selection."""

    describe: Callable[[Config], str]
    """Which pairs are kept, as the object of "keeps"."""
    hint: Callable[[SelectConfig], str]
    """Which setting of the selection keeps more pairs; "" if none does."""
    drop: Callable[[Candidates], dict[str, Verdict]]
    """Returns the verdicts on the candidates that the rule drops, by id."""
    share: Callable[[Config], float] | None
    """Share of the instructions that it keeps (0 to 1) where the settings tell; None where only the run can."""
    needs: frozenset[Need] = frozenset()
    """What it looks at. Clusters are computed with the judge's weights."""
    representative: Literal["best", "random", "first"] = "best"
    """Which of an instruction's responses is its candidate. Only rules that take the best one rank pairs."""
    order: Callable[[SelectConfig, Selected], Any] | None = None
    """Sort key of a rule that ranks: smaller is better, and the earlier pair is the better one of equals."""
    tops_up: bool = False
    """Whether the best of what it drops fill up to `select.top_up_to`."""
    requires_score: Callable[[SelectConfig], bool] = lambda settings: False
    """Whether a pair that the judge could not score is dropped."""
    restores: Callable[[SelectConfig], bool] = lambda settings: False
    """Whether pairs come back that the text rules dropped, other than those with nothing to learn from."""
    as_many_as: str = ""
    """Name of the rule whose number of kept pairs this one draws."""

    def best_first(self, settings: SelectConfig, records: Sequence[Selected]) -> list[Selected]:
        """The records in the rule's order."""
        return sorted(records, key=lambda record: self.order(settings, record))

    def restores_pair(self, settings: SelectConfig, reason: str) -> bool:
        """Returns whether a pair that was dropped for this reason comes back."""
        return self.restores(settings) and reason not in _UNUSABLE


def _by_scores(settings: SelectConfig, record: Selected) -> tuple[float, ...]:
    """Sort key of `select.ranking`."""
    total = math.inf if record.rank is None else -record.rank
    return (-(record.above or 0.0), total) if settings.ranking == "probability" else (total,)


def _by_perplexity(settings: SelectConfig, record: Selected) -> float:
    return record.perplexity


def _drop_none(candidates: Candidates) -> dict[str, Verdict]:
    return {}


def _drop_below_threshold(candidates: Candidates) -> dict[str, Verdict]:
    verdicts = {}
    for record in candidates.records:
        scores = (("quality", record.quality), ("following", record.following))
        low = [name for name, value in scores if value is not None and not value > candidates.settings.threshold]
        if low:
            verdicts[record.id] = dropped("not above the threshold", ", ".join(low))
    return verdicts


def _drop_surprising(candidates: Candidates) -> dict[str, Verdict]:
    high = [r for r in candidates.records if r.perplexity > candidates.settings.perplexity]
    return {r.id: dropped("perplexity too high", f"{r.perplexity:.2f}") for r in high}


def _drop_outside_top_fraction(candidates: Candidates) -> dict[str, Verdict]:
    verdicts = {}
    for bucket, count in _bucket_counts(candidates):
        best_first = sorted(bucket, key=lambda record: _by_scores(candidates.settings, record))
        verdicts |= {r.id: dropped("not in the top fraction") for r in best_first[count:]}
    return verdicts


def _drop_at_random(candidates: Candidates) -> dict[str, Verdict]:
    """Keeps as many of each bucket as `top_fraction` would."""
    verdicts = {}
    for bucket, count in _bucket_counts(candidates):
        verdicts |= _drop_all_but(bucket, count, candidates.rng)
    return verdicts


def _drop_down_to_count(candidates: Candidates) -> dict[str, Verdict]:
    records = candidates.records
    return _drop_all_but(records, min(candidates.count, len(records)), candidates.rng)


def _drop_all_but(records: Sequence[Selected], count: int, rng: random.Random) -> dict[str, Verdict]:
    """Keeps `count` of the records, drawn at random."""
    drawn = {r.id for r in rng.sample(records, count)}
    return {r.id: dropped("not drawn") for r in records if r.id not in drawn}


def _one_random_per_cluster(candidates: Candidates) -> dict[str, Verdict]:
    groups = _groups(candidates.records, "cluster")
    stay = {candidates.rng.choice(groups[cluster]).id for cluster in sorted(groups)}
    return {r.id: dropped("another of its cluster was drawn") for r in candidates.records if r.id not in stay}


def _likeliest_per_cluster(candidates: Candidates) -> dict[str, Verdict]:
    groups = _groups(candidates.records, "cluster")
    stay = {min(group, key=lambda record: record.perplexity).id for group in groups.values()}
    reason = "another of its cluster has a lower perplexity"
    return {r.id: dropped(reason) for r in candidates.records if r.id not in stay}


def _groups(records: Sequence[Selected], field: str) -> dict[Any, list[Selected]]:
    """Records by the value of a field."""
    groups: dict[Any, list[Selected]] = {}
    for record in records:
        groups.setdefault(getattr(record, field), []).append(record)
    return groups


def _bucket_counts(candidates: Candidates) -> list[tuple[list[Selected], int]]:
    """Each bucket of the candidates with the number of pairs to keep of it, by the bucket's name.

    Instructions without a scored response do not count, so that a draw keeps as many as the ranking does.
    """
    buckets = _groups(candidates.records, "bucket")
    sizes = {
        name: sum(record.instruction_id in candidates.scored for record in buckets[name]) for name in sorted(buckets)
    }
    return [(buckets[name], count) for name, count in _shares(candidates.settings.fraction, sizes).items()]


def _shares(fraction: float, sizes: Mapping[str, int]) -> dict[str, int]:
    """Returns how many to keep of each bucket: the fraction of all in total, split by largest remainders.

    Rounding each bucket by itself would keep too few, or none, where buckets are small.
    """
    exact = {name: fraction * size for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    missing = int(fraction * sum(sizes.values()) + 0.5) - sum(shares.values())
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[:missing]:
        shares[name] += 1
    return shares


def _raise_fraction(settings: SelectConfig) -> str:
    return f"raise select.fraction (now {settings.fraction:g})"


def _raise_clusters(settings: SelectConfig) -> str:
    return f"raise select.clusters (now {settings.clusters})"


def _fraction(config: Config) -> float:
    return config.select.fraction


def _clusters_per_instruction(config: Config) -> float:
    return min(1.0, config.select.clusters / config.synthesize.instructions)


def _describe_top_fraction(config: Config) -> str:
    among = "" if config.select.length_control == "none" else ", without the effect of length"
    return f"the best {config.select.fraction:.0%} by {_RANKED_BY[config.select.ranking](config)}{among}"


def _scores(config: Config) -> str:
    return "both scores" if len(criteria_of(config.assess)) == 2 else "the score"


def _names(config: Config) -> list[str]:
    return ["the sum of the scores" if name == "rubric" else name for name in config.assess.readings]


def _in_sum(config: Config) -> str:
    """Returns the readings with their weights: "2 x lift, likelihood and ending"."""
    from isheep_jax.loop.selection.ranking import weights_of  # here, so that --help does not wait for it

    names = _names(config)
    if len(names) > 1:
        weights = weights_of(config.select, config.assess.readings)
        names = [name if weight == 1 else f"{weight:g} x {name}" for name, weight in zip(names, weights, strict=True)]
    *first, last = names
    return " and ".join(filter(None, [", ".join(first), last]))


# What each way to rank goes by.
_RANKED_BY: dict[str, Callable[[Config], str]] = {
    "sum": _in_sum,
    "lexicographic": lambda config: ", then ".join(_names(config)),
    "probability": lambda config: f"the probability of {_scores(config)} above {config.select.threshold:g}",
}


RULES: dict[str, Rule] = {
    "threshold": Rule(
        describe=lambda config: f"those with {_scores(config)} above {config.select.threshold:g}",
        hint=lambda settings: f"lower select.threshold (now {settings.threshold:g}) or use select.rule=top_fraction",
        needs=frozenset({"readings", "rubric"}),
        order=_by_scores,
        drop=_drop_below_threshold,
        share=None,
        tops_up=True,
        requires_score=lambda settings: settings.threshold > 0,
        restores=lambda settings: settings.threshold < 0,
    ),
    "top_fraction": Rule(
        describe=_describe_top_fraction,
        hint=_raise_fraction,
        needs=frozenset({"readings"}),
        order=_by_scores,
        drop=_drop_outside_top_fraction,
        share=_fraction,
        tops_up=True,
        requires_score=lambda settings: True,
    ),
    "random": Rule(
        describe=lambda config: f"{config.select.fraction:.0%} drawn at random",
        hint=_raise_fraction,
        representative="random",
        drop=_drop_at_random,
        share=_fraction,
    ),
    "random_threshold": Rule(
        describe=lambda config: f"as many as have {_scores(config)} above {config.select.threshold:g}, drawn at random",
        hint=lambda settings: f"lower select.threshold (now {settings.threshold:g})",
        needs=frozenset({"readings", "rubric"}),
        representative="random",
        drop=_drop_down_to_count,
        share=None,
        as_many_as="threshold",
    ),
    "perplexity": Rule(
        describe=lambda config: f"those with a perplexity of at most {config.select.perplexity:g}",
        hint=lambda settings: f"raise select.perplexity (now {settings.perplexity:g})",
        needs=frozenset({"likelihood"}),
        order=_by_perplexity,
        drop=_drop_surprising,
        share=None,
        tops_up=True,
    ),
    "density": Rule(
        describe=lambda config: "one of each cluster of instructions, drawn at random",
        hint=_raise_clusters,
        needs=frozenset({"clusters"}),
        representative="random",
        drop=_one_random_per_cluster,
        share=_clusters_per_instruction,
    ),
    "density_perplexity": Rule(
        describe=lambda config: "the one with the lowest perplexity of each cluster of instructions",
        hint=_raise_clusters,
        needs=frozenset({"clusters", "likelihood"}),
        order=_by_perplexity,
        drop=_likeliest_per_cluster,
        share=_clusters_per_instruction,
    ),
    "none": Rule(
        describe=lambda config: "all that pass the text rules",
        hint=lambda settings: "",
        representative="first",
        drop=_drop_none,
        share=None,
    ),
}


def effective_rule(config: Config) -> str:
    """Returns the name of the rule in force: 'none' where `select.rule` needs readings and there are none."""
    unread = not config.assess.readings and "readings" in RULES[config.select.rule].needs
    return "none" if unread else config.select.rule


def share_of(config: Config) -> float | None:
    """Returns the share of the instructions that the rule in force keeps (0 to 1); None where only the run can tell."""
    share = RULES[effective_rule(config)].share
    return None if share is None else share(config)


def hint(config: Config) -> str:
    """Returns which setting of the selection lets the rule in force keep more pairs; "" if none does."""
    return RULES[effective_rule(config)].hint(config.select)


def needs_clusters(config: Config) -> bool:
    """Returns whether selection looks at clusters of the instructions."""
    return "clusters" in RULES[effective_rule(config)].needs or config.select.buckets == "clusters"


def check_readings(config: Config) -> None:
    """Raises UserError where readings, rule and judge do not go together."""
    from isheep_jax.loop.judging.readings import READINGS  # here, so that --help does not wait for it

    settings, select, server = config.assess, config.select, is_server(config.assess.judge)
    for name in settings.readings:
        reading = READINGS[name]
        if settings.readings.count(name) > 1:
            raise UserError(f"--assess.readings: {name} is there twice")
        if reading.needs_weights and server:
            raise UserError(f"--assess.readings: {name} needs the judge's weights, but --assess.judge is a server")
        if reading.needs_others and config.respond.samples < 2:
            raise UserError(
                f"--assess.readings: {name} compares the responses to an instruction, "
                f"but --respond.samples is {config.respond.samples}; it must be at least 2"
            )
    for name in RULES[effective_rule(config)].needs & READINGS.keys() - set(settings.readings):
        raise UserError(f"--select.rule: {select.rule} needs {name} in --assess.readings")
    if needs_clusters(config) and server:
        name = "buckets" if select.buckets == "clusters" else "rule"
        raise UserError(
            f"--select.{name}: {getattr(select, name)} needs the judge's weights, but --assess.judge is a server"
        )
