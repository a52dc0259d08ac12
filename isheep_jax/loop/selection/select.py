"""Which pairs the model learns from.

I-SHEEP keeps those with both scores above a threshold (section 3.2) and compares that with perplexity, density, both
and no filter (section 4.3). Beside those: the top fraction in all or of each bucket, and draws of equal size.
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
from isheep_jax.loop.records import KEPT, Pair, Score, Scores, Selected, Verdict, dropped, kept
from isheep_jax.loop.stages.assess import probability_above

# Rules that look at scores; the others never do, and a missing score drops nothing there.
_BY_SCORES = ("threshold", "top_fraction")
_BY_PERPLEXITY = ("perplexity", "density_perplexity")
_BY_CLUSTER = ("density", "density_perplexity")
# Rules that draw which of several responses stands for its instruction.
_DRAW = ("random", "random_threshold", "density")
# Rules that put the pairs into an order, so that the next best ones can fill up.
_RANK = ("threshold", "top_fraction", "perplexity")
# What no threshold brings back: nothing can be learned from it.
_UNUSABLE = ("not decoded", "unfinished", "empty", "no thoughts", "no answer")

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n")


def sentences(text: str) -> int:
    """Number of sentences by the text's own punctuation; at least 1. A point within a number ends none."""
    return max(1, sum(bool(re.search(r"\w", piece)) for piece in _SENTENCE_END.split(text)))


@dataclass(frozen=True)
class Measures:
    """What rules need beside scores. A value is None where the model could not give it.

    perplexities: per token of a response given its instruction, by the pair's id. clusters: by the instruction's id.
    """

    perplexities: Mapping[str, float | None] = field(default_factory=dict)
    clusters: Mapping[str, int | None] = field(default_factory=dict)


def effective_rule(config: Config) -> str:
    """`select.rule`, but 'none' where it asks for scores and `assess.level` has none."""
    by_scores = config.select.rule in (*_BY_SCORES, "random_threshold")
    return "none" if by_scores and config.assess.level == "none" else config.select.rule


def needs_perplexities(config: Config) -> bool:
    return effective_rule(config) in _BY_PERPLEXITY


def needs_clusters(config: Config) -> bool:
    return effective_rule(config) in _BY_CLUSTER or config.select.buckets == "clusters"


def select(
    config: Config,
    iteration: int,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    measures: Measures | None = None,
    turn: int = 1,
) -> list[Selected]:
    """The last verdict on every pair, in the order of generation; at most one pair per instruction is kept.

    turn: of the conversation; the second may have nothing that is good enough. Raises NothingLeftError, which says what
    was scored how and which setting to lower, when fewer than `select.min_pairs` pairs are kept of the first.
    """
    settings = dataclasses.replace(config.select, rule=effective_rule(config))
    names = f"{config.seed}/{iteration}", "" if turn == 1 else f"/{turn}"
    result = _decide(settings, pairs, scores, measures or Measures(), *names)
    # Whatever the setting says, there is nothing to learn from no pair.
    if turn == 1 and len(kept(result)) < max(1, settings.min_pairs):
        raise NothingLeftError(_too_few(settings, iteration, result))
    return result


def _decide(
    settings: SelectConfig,
    pairs: Sequence[Pair],
    scores: Sequence[Scores],
    measures: Measures,
    run: str,
    turn: str,
) -> list[Selected]:
    """run, turn: begin and end the names of the random numbers."""
    size = None
    if settings.rule == "random_threshold":
        threshold = dataclasses.replace(settings, rule="threshold")
        size = len(kept(_decide(threshold, pairs, scores, measures, run, turn)))
    records = _gather(settings, pairs, scores, measures)
    verdicts = {r.id: r.verdict for r in records}
    chosen = _one_per_instruction(records, settings, random.Random(f"{run}/sample{turn}"))
    drawn = settings.rule in (*_DRAW, "none")
    for record in records:
        if record.verdict.kept and record.id not in chosen:
            verdicts[record.id] = dropped("not the sample that was drawn" if drawn else "another sample is better")
    candidates = [r for r in records if r.id in chosen]
    # Rules that never look at scores do not look at them where their own verdict leaves too many, either.
    order = candidates if drawn else _best_first(candidates, settings)
    scored = {r.instruction_id for r in records if r.sum is not None or not scores}
    verdicts.update(_rule(settings, candidates, scored, size, random.Random(f"{run}/select{turn}")))
    if settings.rule in _RANK:
        missing = settings.top_up_to - sum(verdicts[r.id].kept for r in order)
        verdicts.update({r.id: KEPT for r in [r for r in order if not verdicts[r.id].kept][: max(0, missing)]})
    verdicts.update(_beyond_share(settings, [r for r in order if verdicts[r.id].kept]))
    left = candidates if settings.max_pairs_order == "first" else order
    for record in [r for r in left if verdicts[r.id].kept][settings.max_pairs :]:
        verdicts[record.id] = dropped("more than select.max_pairs")
    return [dataclasses.replace(r, verdict=verdicts[r.id]) for r in records]


def _gather(
    settings: SelectConfig, pairs: Sequence[Pair], scores: Sequence[Scores], measures: Measures
) -> list[Selected]:
    by_id = {s.id: s for s in scores}
    records = []
    for pair in pairs:
        asked: list[Score] = []
        score = by_id.get(pair.id)
        if score:
            asked = [s for s in (score.quality, score.following) if s is not None]
        values = [s.value for s in asked]
        chances = [probability_above(s, settings.threshold) for s in asked]
        quality = score.quality.value if score and score.quality else None
        following = score.following.value if score and score.following else None
        total = (quality or 0.0) + min(following or 0.0, settings.following_ceiling)
        records.append(
            Selected(
                id=pair.id,
                instruction_id=pair.instruction_id,
                instruction=pair.instruction,
                input=pair.input,
                response=pair.response,
                quality=quality,
                following=following,
                sum=round(total, 4) if asked and None not in values else None,
                above=round(math.prod(chances), 4) if asked and None not in chances else None,
                bucket=_bucket(settings, pair, measures),
                verdict=_verdict_before(settings, pair, score, measures),
                perplexity=measures.perplexities.get(pair.id),
                cluster=measures.clusters.get(pair.instruction_id),
            )
        )
    return records


def _verdict_before(settings: SelectConfig, pair: Pair, score: Scores | None, measures: Measures) -> Verdict:
    """The verdict on a pair before the rule: that of the stages before, and whether the rule has what it needs."""
    if not pair.verdict.kept:
        brought_back = settings.rule == "threshold" and settings.threshold < 0
        return KEPT if brought_back and pair.verdict.reason not in _UNUSABLE else pair.verdict
    if settings.rule in _BY_PERPLEXITY and measures.perplexities.get(pair.id) is None:
        return dropped("no perplexity")
    if (settings.rule in _BY_CLUSTER or settings.buckets == "clusters") and (
        measures.clusters.get(pair.instruction_id) is None
    ):
        return dropped("no embedding")
    needs_score = settings.rule == "top_fraction" or (settings.rule == "threshold" and settings.threshold > 0)
    return score.verdict if score and needs_score else KEPT


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


def _one_per_instruction(records: Sequence[Selected], settings: SelectConfig, rng: random.Random) -> set[str]:
    """Ids of one pair per instruction: the best, or where the rule does not rank, a drawn one or (none) the first."""
    groups: dict[str, list[Selected]] = {}
    for record in kept(records):
        groups.setdefault(record.instruction_id, []).append(record)
    if settings.rule in _DRAW:
        return {rng.choice(group).id for group in groups.values()}
    if settings.rule == "none":
        return {group[0].id for group in groups.values()}
    return {_best_first(group, settings)[0].id for group in groups.values()}


def _best_first(records: Sequence[Selected], settings: SelectConfig) -> list[Selected]:
    """By perplexity or by `select.ranking`; the earlier one among equals."""
    if settings.rule in _BY_PERPLEXITY:
        return sorted(records, key=lambda r: r.perplexity)
    if settings.ranking == "probability":
        return sorted(records, key=lambda r: (-(r.above or 0.0), -(r.sum or 0.0)))
    return sorted(records, key=lambda r: -(r.sum or 0.0))


def _rule(
    settings: SelectConfig, candidates: Sequence[Selected], scored: set[str], size: int | None, rng: random.Random
) -> dict[str, Verdict]:
    """Verdicts on the candidates that the rule drops.

    scored: instructions that have a scored response. size: how many random_threshold keeps.
    """
    if settings.rule == "none":
        return {}
    if settings.rule == "threshold":
        low = {}
        for r in candidates:
            values = (("quality", r.quality), ("following", r.following))
            under = [name for name, value in values if value is not None and not value > settings.threshold]
            if under:
                low[r.id] = dropped("not above the threshold", ", ".join(under))
        return low
    if settings.rule == "perplexity":
        high = [r for r in candidates if r.perplexity > settings.perplexity]
        return {r.id: dropped("perplexity too high", f"{r.perplexity:.2f}") for r in high}
    if settings.rule == "random_threshold":
        stay = {r.id for r in rng.sample(candidates, min(size, len(candidates)))}
        return {r.id: dropped("not drawn") for r in candidates if r.id not in stay}
    by_cluster = settings.rule in _BY_CLUSTER
    groups: dict[str, list[Selected]] = {}
    for record in candidates:
        groups.setdefault(record.cluster if by_cluster else record.bucket, []).append(record)
    if by_cluster:
        return _one_per_cluster(settings, groups, rng)
    # 'random' keeps as many as 'top_fraction' would: unscored instructions do not count there either.
    sizes = {name: sum(r.instruction_id in scored for r in bucket) for name, bucket in sorted(groups.items())}
    verdicts = {}
    for name, count in _shares(settings.fraction, sizes).items():
        if settings.rule == "random":
            stay = {r.id for r in rng.sample(groups[name], count)}
            verdicts |= {r.id: dropped("not drawn") for r in groups[name] if r.id not in stay}
        else:
            verdicts |= {r.id: dropped("not in the top fraction") for r in _best_first(groups[name], settings)[count:]}
    return verdicts


def _shares(fraction: float, sizes: dict[str, int]) -> dict[str, int]:
    """How many to keep of each bucket: the fraction of all in total, split by largest remainders.

    Rounding each bucket by itself would keep too few, or none, where buckets are small.
    """
    exact = {name: fraction * size for name, size in sizes.items()}
    shares = {name: int(share) for name, share in exact.items()}
    missing = int(fraction * sum(sizes.values()) + 0.5) - sum(shares.values())
    for name in sorted(exact, key=lambda name: (shares[name] - exact[name], name))[:missing]:
        shares[name] += 1
    return shares


def _one_per_cluster(
    settings: SelectConfig, groups: Mapping[int, Sequence[Selected]], rng: random.Random
) -> dict[str, Verdict]:
    """Verdicts on those that do not stand for their cluster."""
    if settings.rule == "density":
        reason = "another of its cluster was drawn"
        stay = {rng.choice(groups[cluster]).id for cluster in sorted(groups)}
    else:
        reason = "another of its cluster has a lower perplexity"
        stay = {_best_first(group, settings)[0].id for group in groups.values()}
    return {r.id: dropped(reason) for group in groups.values() for r in group if r.id not in stay}


def _beyond_share(settings: SelectConfig, left: Sequence[Selected]) -> dict[str, Verdict]:
    """Verdicts on those of `left`, best first, that are more than `select.bucket_share` allows their bucket."""
    if settings.bucket_share == 1:
        return {}
    limit = max(1, int(settings.bucket_share * len(left)))
    seen: Counter[str] = Counter()
    verdicts = {}
    for record in left:
        seen[record.bucket] += 1
        if seen[record.bucket] > limit:
            verdicts[record.id] = dropped("more than its bucket's share", record.bucket)
    return verdicts


def _too_few(settings: SelectConfig, iteration: int, records: Sequence[Selected]) -> str:
    lower = {
        "threshold": f"lower select.threshold (now {settings.threshold:g}) or use select.rule=top_fraction",
        "top_fraction": f"raise select.fraction (now {settings.fraction:g})",
        "random": f"raise select.fraction (now {settings.fraction:g})",
        "random_threshold": f"lower select.threshold (now {settings.threshold:g})",
        "perplexity": f"raise select.perplexity (now {settings.perplexity:g})",
        "density": f"raise select.clusters (now {settings.clusters})",
        "density_perplexity": f"raise select.clusters (now {settings.clusters})",
        "none": "lower select.min_pairs",
    }[settings.rule]
    how = "the same command with it goes on from here"
    if iteration > 1 and settings.rule != "none":
        how = "in a new run directory; only a lower select.min_pairs goes on from here"
    what = f"select: {len(kept(records))} pairs are kept, select.min_pairs asks for {settings.min_pairs}"
    spreads = []
    for name in ("quality", "following", "perplexity"):
        values = [value for r in records if (value := getattr(r, name)) is not None]
        if values:
            end = f"lowest {min(values):.2f}" if name == "perplexity" else f"highest {max(values):.2f}"
            spreads.append(f"{name}: mean {sum(values) / len(values):.2f}, {end}")
    if spreads:
        scored = sum(r.sum is not None or r.perplexity is not None for r in records)
        return f"{what}; of {scored} scored pairs {', '.join(spreads)}; {lower} ({how})"
    if settings.rule in _BY_SCORES:
        return f"{what}; none of {len(records)} pairs has scores, so look at the reasons in responses/ and scores/"
    return f"{what} of {len(records)}; {lower} ({how})"
