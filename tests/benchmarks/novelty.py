"""Time and memory of the novelty pool on synthetic instructions, all of them offered to one pool.

python tests/benchmarks/novelty.py [--sizes 10000 100000 300000] [--data usual alike] [--limit 0.7]

usual: sentences from templates; their slots are filled from 60,000 words with Zipf's frequencies; a tenth are near
duplicates of an earlier one. alike: the same with 300 words, so that all instructions share their words and lists of
the prefix filter are long. Pairs are those that a comparison of each with each would make.
"""

import argparse
import random
import re
import time
from pathlib import Path

import numpy as np

from isheep_jax.loop.novelty import Pool

TEMPLATES = [
    "Write a # # about a # that # the # of #.",
    "Explain the difference between # and # to a #.",
    "Give three # for # who # # in the #.",
    "Classify the following # as # or #.",
    "Rewrite the # so that it # # and # #.",
    "What is the # of # in #?",
    "Create a # plan for a # # with # and a # of #, and say why the # # matters.",
    "Summarise the # in one # and list its # #.",
    "How would you # a # without # it?",
    "Translate the # into # and explain the # # behind it for a # who knows no #.",
    "Suggest # names for a # that # # and #.",
    "Find the # in the given # and # it.",
    "Describe # # # # in the # of a # # from #.",
    "# the # of #, then # the # and # every # that # more than # #.",
]


def words(count: int) -> list[str]:
    rng = random.Random("words")
    syllables = [a + b for a in "bdfgklmnprstv" for b in ("a", "e", "i", "o", "u", "en", "or", "ist", "al")]
    found: dict[str, None] = {}
    while len(found) < count:
        found["".join(rng.choices(syllables, k=rng.randint(1, 4)))] = None
    return list(found)


def instructions(count: int, vocabulary: int) -> list[str]:
    """count: how many. vocabulary: words that fill the templates (count)."""
    known = words(vocabulary)
    draw = np.random.default_rng(vocabulary)
    frequency = 1 / (np.arange(vocabulary) + 3.0)
    slots = draw.choice(vocabulary, size=count * 8, p=frequency / frequency.sum())
    shapes = draw.integers(len(TEMPLATES), size=count).tolist()
    copied = (draw.random(count) < 0.1).tolist()
    sources = draw.random(count).tolist()
    filling = (known[i] for i in slots.tolist())
    made: list[str] = []
    for i in range(count):
        if copied[i] and made:
            text = made[int(sources[i] * len(made))].split()
            text[i % len(text)] = known[slots[i]]
            made.append(" ".join(text))
        else:
            made.append(re.sub("#", lambda _: next(filling), TEMPLATES[shapes[i]]))
    return made


def resident(field: str) -> float:
    """GiB. field: VmRSS (now) or VmHWM (peak)."""
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 300_000])
    parser.add_argument("--data", nargs="+", choices=["usual", "alike"], default=["usual", "alike"])
    parser.add_argument("--limit", type=float, default=0.7)
    options = parser.parse_args()
    for data in options.data:
        texts = instructions(max(options.sizes), 60_000 if data == "usual" else 300)
        ids = [str(i) for i in range(len(texts))]
        before = resident("VmRSS")
        pool, start, done = Pool(options.limit), time.perf_counter(), 0
        for size in sorted(options.sizes):
            # A wave's worth at a time, as a run does.
            for first in range(done, size, 2000):
                block = slice(first, min(first + 2000, size))
                pool.admit(ids[block], texts[block], [""] * len(texts[block]))
            done, seconds = size, time.perf_counter() - start
            print(
                f"{data}: {size:,} instructions in {seconds:.1f} s, {size * (size - 1) / 2 / seconds:.3g} pairs/s, "
                f"{len(pool):,} new, pool {resident('VmRSS') - before:.2f} GiB",
                flush=True,
            )


if __name__ == "__main__":
    main()
