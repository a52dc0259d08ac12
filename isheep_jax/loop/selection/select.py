"""Applies the selection rule: which pairs the model learns from, with the last verdict on every pair.

The rules themselves are in `rules.py`. Here is what all of them share: the pair's measures and bucket, one pair per
instruction, topping up, the largest share of a bucket, and `select.max_pairs`.
"""

import dataclasses
import math
import random
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from isheep_jax.config import Config, SelectConfig
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.judging.scores import criteria_of, probability_above
from isheep_jax.loop.records import KEPT, Pair, Scores, Selected, Verdict, dropped, kept
from isheep_jax.loop.selection.rules import RULES, Candidates, Rule, effective_rule

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n")


@dataclass(frozen=True)
class Measures:
    """Measures that rules need besides scores. A value is None if the model could not give it.

    perplexities: per token of a response given its instruction, by the pair's id. clusters: by the instruction's id.
    """

    perplexities: Mapping[str, float | None] = field(default_factory=dict)
    clusters: Mapping[str, int | None] = field(default_factory=dict)


def select(
    config: Config,
    iteration: int,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    measures: Measures | None = None,
    turn: int = 1,
) -> list[Selected]:
    """The last verdict on every pair, in the order of generation; at most one pair per instruction is kept.

    Args:
        config: The run's settings.
        iteration: Its number, from 1.
        pairs: All pairs of the iteration, those that the text rules dropped as well.
        scores: The scores of the kept ones; empty without assessment.
        measures: What the rule needs besides scores.
        turn: Turn of the conversation. In the second, nothing may be good enough.

    Raises:
        NothingLeftError: The first turn keeps fewer than `select.min_pairs` pairs. The message says how the pairs were
            scored and which setting to change.
    """
    settings = dataclasses.replace(config.select, rule=effective_rule(config))
    names = f"{config.seed}/{iteration}", "" if turn == 1 else f"/{turn}"
    selected = _decide(settings, pairs, scores, measures or Measures(), *names)
    # Even with min_pairs=0 there must be a pair to learn from.
    if turn == 1 and len(kept(selected)) < max(1, settings.min_pairs):
        raise NothingLeftError(_too_few(settings, iteration, selected))
    return selected


def describe(config: Config) -> str:
    """Returns which pairs the rule in force keeps, as the object of "keeps"."""
    scores = "both scores" if len(criteria_of(config.assess)) == 2 else "the score"
    return RULES[effective_rule(config)].describe(config.select, scores)


def sentences(text: str) -> int:
    """Number of sentences by the text's own punctuation; at least 1. A point within a number ends none."""
    return max(1, sum(bool(re.search(r"\w", piece)) for piece in _SENTENCE_END.split(text)))


def _decide(
    settings: SelectConfig,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    measures: Measures,
    seed_prefix: str,
    seed_suffix: str,
) -> list[Selected]:
    """Every pair with its last verdict. Random numbers are seeded by names with this beginning and end."""
    rule = RULES[settings.rule]
    count = None
    if rule.as_many_as:
        other = dataclasses.replace(settings, rule=rule.as_many_as)
        count = len(kept(_decide(other, pairs, scores, measures, seed_prefix, seed_suffix)))
    records = _gather(rule, settings, pairs, scores, measures)
    verdicts = {r.id: r.verdict for r in records}

    rng = random.Random(f"{seed_prefix}/sample{seed_suffix}")
    representatives = _one_per_instruction(rule, settings, kept(records), rng)
    ranks = rule.representative == "best"
    for record in kept(records):
        if record.id not in representatives:
            verdicts[record.id] = dropped("another sample is better" if ranks else "not the sample that was drawn")

    candidates = [r for r in records if r.id in representatives]
    # A rule that draws never looks at scores, not even to choose which of too many pairs stay.
    best_first = rule.best_first(settings, candidates) if ranks else candidates
    scored = {r.instruction_id for r in records if r.sum is not None or not scores}
    rng = random.Random(f"{seed_prefix}/select{seed_suffix}")
    verdicts |= rule.drop(Candidates(settings, candidates, scored, count, rng))

    if rule.tops_up:
        missing = settings.top_up_to - sum(verdicts[r.id].kept for r in best_first)
        others = [r for r in best_first if not verdicts[r.id].kept]
        verdicts |= {r.id: KEPT for r in others[: max(0, missing)]}
    verdicts |= _beyond_bucket_share(settings, [r for r in best_first if verdicts[r.id].kept])
    in_order = candidates if settings.max_pairs_order == "first" else best_first
    for record in [r for r in in_order if verdicts[r.id].kept][settings.max_pairs :]:
        verdicts[record.id] = dropped("more than select.max_pairs")
    return [dataclasses.replace(r, verdict=verdicts[r.id]) for r in records]


def _gather(
    rule: Rule, settings: SelectConfig, pairs: Sequence[Pair], scores: Sequence[Scores], measures: Measures
) -> list[Selected]:
    """Every pair with its scores and measures, and with the verdict that it has before the rule decides."""
    by_id = {s.id: s for s in scores}
    return [_gather_pair(rule, settings, pair, by_id.get(pair.id), measures) for pair in pairs]


def _gather_pair(rule: Rule, settings: SelectConfig, pair: Pair, scores: Scores | None, measures: Measures) -> Selected:
    asked_for = [s for s in (scores.quality, scores.following) if s is not None] if scores else []
    values = [s.value for s in asked_for]
    chances = [probability_above(s, settings.threshold) for s in asked_for]
    quality = scores.quality.value if scores and scores.quality else None
    following = scores.following.value if scores and scores.following else None
    total = (quality or 0.0) + min(following or 0.0, settings.following_ceiling)
    return Selected(
        id=pair.id,
        instruction_id=pair.instruction_id,
        instruction=pair.instruction,
        input=pair.input,
        response=pair.response,
        quality=quality,
        following=following,
        sum=round(total, 4) if values and None not in values else None,
        above=round(math.prod(chances), 4) if chances and None not in chances else None,
        bucket=_bucket(settings, pair, measures),
        verdict=_verdict_before(rule, settings, pair, scores, measures),
        perplexity=measures.perplexities.get(pair.id),
        cluster=measures.clusters.get(pair.instruction_id),
    )


def _verdict_before(
    rule: Rule, settings: SelectConfig, pair: Pair, scores: Scores | None, measures: Measures
) -> Verdict:
    """The verdict before the rule decides: of the text rules, and of whether the rule has what it needs."""
    if not pair.verdict.kept:
        return KEPT if rule.restores_pair(settings, pair.verdict.reason) else pair.verdict
    if "perplexities" in rule.needs and measures.perplexities.get(pair.id) is None:
        return dropped("no perplexity")
    by_cluster = "clusters" in rule.needs or settings.buckets == "clusters"
    if by_cluster and measures.clusters.get(pair.instruction_id) is None:
        return dropped("no embedding")
    return scores.verdict if scores and rule.requires_score(settings) else KEPT


def _bucket(settings: SelectConfig, pair: Pair, measures: Measures) -> str:
    """The name of an instruction's bucket."""
    if settings.buckets == "none":
        return ""
    if settings.buckets == "clusters":
        cluster = measures.clusters.get(pair.instruction_id)
        return "" if cluster is None else str(cluster)
    length = str(min(4, sentences(pair.instruction)))
    if settings.buckets == "sentences":
        return length
    word = re.search(r"\w+", pair.instruction)
    return f"{length} {word.group().lower() if word else ''}"


def _one_per_instruction(
    rule: Rule, settings: SelectConfig, records: Sequence[Selected], rng: random.Random
) -> set[str]:
    """Ids of the pairs that stand for their instructions."""
    groups: dict[str, list[Selected]] = {}
    for record in records:
        groups.setdefault(record.instruction_id, []).append(record)
    if rule.representative == "random":
        return {rng.choice(group).id for group in groups.values()}
    if rule.representative == "first":
        return {group[0].id for group in groups.values()}
    return {rule.best_first(settings, group)[0].id for group in groups.values()}


def _beyond_bucket_share(settings: SelectConfig, best_first: Sequence[Selected]) -> dict[str, Verdict]:
    """Verdicts on the pairs that are more than `select.bucket_share` allows their bucket; the best of it stay."""
    if settings.bucket_share == 1:
        return {}
    limit = max(1, int(settings.bucket_share * len(best_first)))
    seen: Counter[str] = Counter()
    verdicts = {}
    for record in best_first:
        seen[record.bucket] += 1
        if seen[record.bucket] > limit:
            verdicts[record.id] = dropped("more than its bucket's share", record.bucket)
    return verdicts


def _too_few(settings: SelectConfig, iteration: int, records: Sequence[Selected]) -> str:
    """The message when fewer than `select.min_pairs` pairs are kept: how they were scored, and what to change."""
    rule = RULES[settings.rule]
    what = f"select: {len(kept(records))} pairs are kept, select.min_pairs asks for {settings.min_pairs}"
    spreads = []
    for name in ("quality", "following", "perplexity"):
        values = [value for r in records if (value := getattr(r, name)) is not None]
        if values:
            end = f"lowest {min(values):.2f}" if name == "perplexity" else f"highest {max(values):.2f}"
            spreads.append(f"{name}: mean {sum(values) / len(values):.2f}, {end}")
    if spreads:
        scored = sum(r.sum is not None or r.perplexity is not None for r in records)
        return f"{what}; of {scored} scored pairs {', '.join(spreads)}; {_remedy(rule, settings, iteration)}"
    if "scores" in rule.needs:
        return f"{what}; none of {len(records)} pairs has scores, so look at the reasons in responses/ and scores/"
    return f"{what} of {len(records)}; {_remedy(rule, settings, iteration)}"


def _remedy(rule: Rule, settings: SelectConfig, iteration: int) -> str:
    """Returns which setting keeps more pairs, or asks for fewer, and where the run goes on with it."""
    hint, resumes = rule.hint(settings), "(the same command with it goes on from here)"
    if not hint:
        can_be_lower = settings.min_pairs > 1
        return f"lower select.min_pairs {resumes}" if can_be_lower else "look at the reasons in responses/"
    if iteration > 1:
        resumes = "(in a new run directory; only a lower select.min_pairs goes on from here)"
    return f"{hint} {resumes}"
