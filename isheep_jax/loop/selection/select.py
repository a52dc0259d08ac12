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
from dataclasses import dataclass

from isheep_jax.config import Config, SelectConfig
from isheep_jax.errors import NothingLeftError
from isheep_jax.loop.judging.scores import probability_above
from isheep_jax.loop.records import KEPT, Pair, Scores, Selected, Verdict, dropped, kept
from isheep_jax.loop.selection.ranking import Ranking, perplexity, rank, rubric_sum
from isheep_jax.loop.selection.rules import RULES, Candidates, Rule, effective_rule

# Cluster of each instruction by its id; None if the model could not give it.
Clusters = Mapping[str, int | None]

_SENTENCE_END = re.compile(r"(?<![.!?…])[.!?…]++[\"'”’)\]]*+(?=\s|$)|[。！？]+|\n")


def select(
    config: Config,
    iteration: int,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    clusters: Clusters | None = None,
    turn: int = 1,
) -> list[Selected]:
    """The last verdict on every pair, in the order of generation; at most one pair per instruction is kept.

    Args:
        config: The run's settings.
        iteration: Its number, from 1.
        pairs: All pairs of the iteration, those that the text rules dropped as well.
        scores: The scores of the kept ones; empty without assessment.
        clusters: Cluster of each instruction by its id (None if the model could not give it), where a rule needs it.
        turn: Turn of the conversation. In the second, nothing may be good enough.

    Raises:
        NothingLeftError: The first turn keeps fewer than `select.min_pairs` pairs. The message says how the pairs were
            scored and which setting to change.
    """
    settings, readings = dataclasses.replace(config.select, rule=effective_rule(config)), config.assess.readings
    names = f"{config.seed}/{iteration}", "" if turn == 1 else f"/{turn}"
    known = _Known(pairs, {s.id: s for s in scores}, clusters or {}, rank(settings, readings, pairs, scores))
    selected = _decide(settings, known, *names)
    # Even with min_pairs=0 there must be a pair to learn from.
    if turn == 1 and len(kept(selected)) < max(1, settings.min_pairs):
        raise NothingLeftError(_too_few(settings, iteration, selected))
    return selected


def describe(config: Config) -> str:
    """Returns which pairs the rule in force keeps, as the object of "keeps"."""
    return RULES[effective_rule(config)].describe(config)


def sentences(text: str) -> int:
    """Number of sentences by the text's own punctuation; at least 1. A point within a number ends none."""
    return max(1, sum(bool(re.search(r"\w", piece)) for piece in _SENTENCE_END.split(text)))


@dataclass(frozen=True)
class _Known:
    """All pairs of a turn, what the judge says of each by its id, clusters of the instructions, and the ranking."""

    pairs: Sequence[Pair]
    scores: Mapping[str, Scores]
    clusters: Clusters
    ranking: Ranking


def _decide(settings: SelectConfig, known: _Known, seed_prefix: str, seed_suffix: str) -> list[Selected]:
    """Every pair with its last verdict. Random numbers are seeded by names with this beginning and end."""
    rule = RULES[settings.rule]
    count = None
    if rule.as_many_as:
        other = dataclasses.replace(settings, rule=rule.as_many_as)
        count = len(kept(_decide(other, known, seed_prefix, seed_suffix)))
    agreements = _agreements(known.pairs, known.scores)
    records = [_gather(rule, settings, known, pair, agreements) for pair in known.pairs]
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
    scored = {r.instruction_id for r in records if r.rank is not None or not known.scores}
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


def _gather(rule: Rule, settings: SelectConfig, known: _Known, pair: Pair, agreements: Mapping[str, float]) -> Selected:
    """The pair with what is known of it, and with the verdict that it has before the rule decides."""
    scores, ranking = known.scores.get(pair.id), known.ranking
    rubric = [s for s in (scores.quality, scores.following) if s is not None] if scores else []
    chances = [probability_above(s, settings.threshold) for s in rubric]
    # Where the sum of the scores is the only reading, as it is, it says everything.
    more = settings.length_control != "none" or set(ranking.values) - {"rubric"}
    values = {name: round(values[pair.id], 4) for name, values in ranking.values.items() if pair.id in values}
    number = ranking.numbers.get(pair.id)
    record = Selected(
        id=pair.id,
        instruction_id=pair.instruction_id,
        instruction=pair.instruction,
        input=pair.input,
        response=pair.response,
        quality=scores.quality.value if scores and scores.quality else None,
        following=scores.following.value if scores and scores.following else None,
        sum=rubric_sum(settings, scores) if scores else None,
        above=round(math.prod(chances), 4) if chances and None not in chances else None,
        bucket=_bucket(settings, pair, known.clusters),
        verdict=KEPT,
        perplexity=perplexity((scores.readings or {}).get("likelihood")) if scores else None,
        cluster=known.clusters.get(pair.instruction_id),
        readings=values if more else None,
        ranked_by=round(number, 12) if more and number is not None else None,
    )
    verdict = _verdict_before(rule, settings, pair, record, scores)
    agreement = agreements.get(pair.instruction_id)
    low, high = settings.consistency
    if verdict.kept and rule.requires_score(settings) and agreement is not None and not low <= agreement <= high:
        verdict = dropped("agreement outside select.consistency", f"{agreement:.2f}")
    return dataclasses.replace(record, verdict=verdict)


def _verdict_before(rule: Rule, settings: SelectConfig, pair: Pair, record: Selected, scores: Scores | None) -> Verdict:
    """The verdict before the rule decides: of the text rules, and of whether the rule has what it needs."""
    if not pair.verdict.kept:
        return KEPT if rule.restores_pair(settings, pair.verdict.reason) else pair.verdict
    if "likelihood" in rule.needs and record.perplexity is None:
        return dropped("no perplexity")
    if ("clusters" in rule.needs or settings.buckets == "clusters") and record.cluster is None:
        return dropped("no embedding")
    return scores.verdict if scores and rule.requires_score(settings) else KEPT


def _agreements(pairs: Sequence[Pair], scores: Mapping[str, Scores]) -> dict[str, float]:
    """Returns the mean agreement between the responses to an instruction, by its id, where it was read."""
    values: dict[str, list[float]] = {}
    for pair in pairs:
        reading = (scores[pair.id].readings or {}).get("self_consistency") if pair.id in scores else None
        if reading is not None and reading.value is not None:
            values.setdefault(pair.instruction_id, []).append(reading.value)
    return {id: math.fsum(each) / len(each) for id, each in values.items()}


def _bucket(settings: SelectConfig, pair: Pair, clusters: Clusters) -> str:
    """The name of an instruction's bucket."""
    if settings.buckets == "none":
        return ""
    if settings.buckets == "clusters":
        cluster = clusters.get(pair.instruction_id)
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
    shown = [
        {"quality": r.quality, "following": r.following, "perplexity": r.perplexity, **(r.readings or {})}
        for r in records
    ]
    for name in dict.fromkeys(name for each in shown for name in each if name != "rubric"):
        values = [value for each in shown if (value := each.get(name)) is not None]
        if values:
            end = f"lowest {min(values):.2f}" if name == "perplexity" else f"highest {max(values):.2f}"
            spreads.append(f"{name}: mean {sum(values) / len(values):.2f}, {end}")
    if spreads:
        scored = sum(r.rank is not None or r.perplexity is not None for r in records)
        return f"{what}; of {scored} scored pairs {', '.join(spreads)}; {_remedy(rule, settings, iteration)}"
    if "readings" in rule.needs:
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
