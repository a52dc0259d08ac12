"""Time and memory of the novelty pool on synthetic instructions, all of them offered to one pool.

python tests/benchmarks/novelty.py [--sizes 10000 100000 300000] [--data usual alike] [--limit 0.7]

usual: sentences from templates; their slots are filled from 60,000 words with Zipf's frequencies; a tenth are near
duplicates of an earlier one. alike: the same with 300 words, so that all instructions share their words and the lists
of the prefix filter are long. Pairs are those that a comparison of each with each would make; a million instructions
are extrapolated by the growth between the last two sizes. Each kind of data has a process of its own.
"""

import argparse
import math
import random
import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from isheep_jax.loop.filters.novelty import Pool

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
ENDINGS = [
    "",
    " Use at most # words.",
    " Mention the # and one # that #.",
    " in the style of a # #",
    " for # who have never # a #",
    " Do not # any #.",
    " Add a # example from #.",
    " and say which # is # and why",
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
    slots = draw.choice(vocabulary, size=count * 10, p=frequency / frequency.sum())
    shapes = draw.integers(len(TEMPLATES) * len(ENDINGS), size=count).tolist()
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
            shape = TEMPLATES[shapes[i] % len(TEMPLATES)] + ENDINGS[shapes[i] // len(TEMPLATES)]
            made.append(re.sub("#", lambda _: next(filling), shape))
    return made


def resident() -> float:
    """Memory of this process in GiB."""
    return int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20


def measure(data: str, sizes: list[int], limit: float) -> None:
    texts = instructions(max(sizes), 60_000 if data == "usual" else 300)
    ids = [str(i) for i in range(len(texts))]
    before = resident()
    pool, start, times = Pool(limit), time.perf_counter(), {0: 0.0}
    for size in sorted(sizes):
        # A wave's worth at a time, as a run does.
        for first in range(max(times), size, 2000):
            block = slice(first, min(first + 2000, size))
            pool.admit(ids[block], texts[block], [""] * len(texts[block]))
        seconds = times[size] = time.perf_counter() - start
        print(
            f"{data}: {size:,} instructions in {seconds:.1f} s, {size * (size - 1) / 2 / seconds:.3g} pairs/s, "
            f"{len(pool):,} new, pool {resident() - before:.2f} GiB",
            flush=True,
        )
    *_, (n, a), (m, b) = times.items()
    if n:
        power = math.log(b / a) / math.log(m / n)
        print(
            f"{data}: time grows with the power {power:.2f}; 1,000,000 would take {b * (1e6 / m) ** power / 60:.0f} min"
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 100_000, 300_000])
    parser.add_argument("--data", nargs="+", choices=["usual", "alike"], default=["usual", "alike"])
    parser.add_argument("--limit", type=float, default=0.7)
    options = parser.parse_args()
    if len(options.data) == 1:
        measure(options.data[0], options.sizes, options.limit)
        return
    for data in options.data:
        shared = [f"--limit={options.limit}", "--sizes", *map(str, options.sizes)]
        subprocess.run([sys.executable, __file__, *shared, "--data", data], check=True)


if __name__ == "__main__":
    main()
