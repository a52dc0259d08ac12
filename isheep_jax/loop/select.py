"""Which scored pairs the model learns from (I-SHEEP section 3.2: both scores above a threshold; and better ways)."""

import random
import re
from collections.abc import Sequence

from isheep_jax.config import Config, SelectConfig
from isheep_jax.errors import UserError
from isheep_jax.loop.assess import probability_above
from isheep_jax.loop.records import KEPT, Pair, Scores, Selected, Verdict, dropped, kept

_SENTENCE_END = re.compile(r"[.!?…]+[\"'”’)\]]*(?=\s|$)|[。！？]+|\n")


def sentences(text: str) -> int:
    """Number of sentences by the text's own punctuation; at least 1. A point within a number ends none."""
    return max(1, sum(bool(re.search(r"\w", piece)) for piece in _SENTENCE_END.split(text)))


def select(config: Config, iteration: int, pairs: Sequence[Pair], scores: Sequence[Scores]) -> list[Selected]:
    """The last verdict on every pair, in the order of generation; at most one pair per instruction is kept.

    Raises UserError, which says what was scored how and which setting to lower, when fewer than `select.at_least`
    pairs are kept.
    """
    settings = config.select
    records = _gather(settings, pairs, scores)
    verdicts = {r.id: r.verdict for r in records}
    blind = settings.rule in ("random", "none")
    chosen = _one_per_instruction(records, settings, random.Random(f"{config.seed}/{iteration}/sample"))
    for record in records:
        if record.verdict.kept and record.id not in chosen:
            verdicts[record.id] = dropped("not the sample that was drawn" if blind else "another sample is better")
    candidates = [r for r in records if r.id in chosen]
    scored = {r.instruction_id for r in records if r.sum is not None}
    verdicts.update(_rule(settings, candidates, scored, random.Random(f"{config.seed}/{iteration}/select")))
    left = [r for r in candidates if verdicts[r.id].kept]
    # Rules that never look at scores do not look at them here either.
    order = left if blind or settings.at_most_order == "first" else _best_first(left)
    for record in order[settings.at_most :]:
        verdicts[record.id] = dropped("more than select.at_most")
    result = [Selected(**{**vars(r), "verdict": verdicts[r.id]}) for r in records]
    # Whatever the setting says, there is nothing to learn from no pair.
    if len(kept(result)) < max(1, settings.at_least):
        raise UserError(_too_few(settings, iteration, result))
    return result


def _gather(settings: SelectConfig, pairs: Sequence[Pair], scores: Sequence[Scores]) -> list[Selected]:
    by_id = {s.id: s for s in scores}
    records = []
    for pair in pairs:
        quality = following = total = above = None
        verdict = pair.verdict
        if score := by_id.get(pair.id):
            # 'none' and 'random' have no use for scores: a missing one drops nothing.
            verdict = KEPT if settings.rule in ("random", "none") else score.verdict
            quality, following = score.quality.value, score.following.value
            if quality is not None and following is not None:
                total = round(quality + min(following, settings.following_ceiling), 4)
            chances = [probability_above(s, settings.threshold) for s in (score.quality, score.following)]
            if None not in chances:
                above = round(chances[0] * chances[1], 4)
        records.append(
            Selected(
                id=pair.id,
                instruction_id=pair.instruction_id,
                instruction=pair.instruction,
                input=pair.input,
                response=pair.response,
                quality=quality,
                following=following,
                sum=total,
                above=above,
                bucket=_bucket(settings, pair.instruction),
                verdict=verdict,
            )
        )
    return records


def _bucket(settings: SelectConfig, instruction: str) -> str:
    """The name of an instruction's bucket."""
    if settings.buckets == "none":
        return ""
    length = str(min(4, sentences(instruction)))
    if settings.buckets == "sentences":
        return length
    word = re.search(r"\w+", instruction)
    return f"{length} {word.group().lower() if word else ''}"


def _one_per_instruction(records: Sequence[Selected], settings: SelectConfig, rng: random.Random) -> set[str]:
    """Ids of one pair per instruction: the best by score, a drawn one ('random') or the first ('none')."""
    groups: dict[str, list[Selected]] = {}
    for record in kept(records):
        groups.setdefault(record.instruction_id, []).append(record)
    if settings.rule == "random":
        return {rng.choice(group).id for group in groups.values()}
    if settings.rule == "none":
        return {group[0].id for group in groups.values()}
    return {_best_first(group)[0].id for group in groups.values()}


def _best_first(records: Sequence[Selected]) -> list[Selected]:
    """By the sum of the scores; the earlier one among equals."""
    return sorted(records, key=lambda r: -(r.sum or 0.0))


def _rule(
    settings: SelectConfig, candidates: Sequence[Selected], scored: set[str], rng: random.Random
) -> dict[str, Verdict]:
    """Verdicts on the candidates that the rule drops. scored: instructions that have a scored response."""
    if settings.rule == "none":
        return {}
    if settings.rule == "threshold":
        low = {}
        for r in candidates:
            under = [c for c, s in (("quality", r.quality), ("following", r.following)) if not s > settings.threshold]
            if under:
                low[r.id] = dropped("not above the threshold", ", ".join(under))
        return low
    buckets: dict[str, list[Selected]] = {}
    for record in candidates:
        buckets.setdefault(record.bucket, []).append(record)
    # 'random' keeps as many as 'top_fraction' would: unscored instructions do not count there either.
    sizes = {name: sum(r.instruction_id in scored for r in bucket) for name, bucket in sorted(buckets.items())}
    verdicts = {}
    for name, count in _shares(settings.fraction, sizes).items():
        if settings.rule == "random":
            stay = {r.id for r in rng.sample(buckets[name], count)}
            verdicts |= {r.id: dropped("not drawn") for r in buckets[name] if r.id not in stay}
        else:
            verdicts |= {r.id: dropped("not in the top fraction") for r in _best_first(buckets[name])[count:]}
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


def _too_few(settings: SelectConfig, iteration: int, records: Sequence[Selected]) -> str:
    scored = [r for r in records if r.sum is not None]
    what = f"select: {len(kept(records))} pairs are kept, select.at_least asks for {settings.at_least}"
    if not scored:
        return f"{what}; none of {len(records)} pairs has scores, so look at the reasons in responses/ and scores/"

    def spread(name: str) -> str:
        values = [getattr(r, name) for r in scored]
        return f"{name}: mean {sum(values) / len(values):.2f}, highest {max(values):.2f}"

    lower = {
        "threshold": f"lower select.threshold (now {settings.threshold:g}) or use select.rule=top_fraction",
        "top_fraction": f"raise select.fraction (now {settings.fraction:g})",
        "random": f"raise select.fraction (now {settings.fraction:g})",
        "none": "lower select.at_least",
    }[settings.rule]
    how = "the same command with it goes on from here"
    if iteration > 1 and settings.rule != "none":
        how = "in a new run directory; only a lower select.at_least goes on from here"
    return f"{what}; of {len(scored)} scored pairs {spread('quality')}, {spread('following')}; {lower} ({how})"
