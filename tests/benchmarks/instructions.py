"""What a model's new instructions are like under different settings of `synthesize`, with the same number of prompts.

python tests/benchmarks/instructions.py MODEL [--chat_template=plain] [--rows=default,strict,...] [--prompts=24]
    [--max_tokens=300] [--seed=0] [--examples=5] [--completions=FILE]

Each row runs the stage `synthesize` alone on the base model, for one part of prompts, and prints how many instructions
were kept, how many per thousand new tokens (those of listing topics count), the share of all tasks that was dropped
for each reason, the mean novelty of the kept ones (1 less the highest ROUGE-L to a seed or an earlier one), their mean
lift and length, and some of them, evenly spread. Completions that rows share are made once, and once for all calls with
the same FILE.
"""

import argparse
import contextlib
import dataclasses
import itertools
import pickle
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from etils import epath
from rapidfuzz.distance import LCSseq

from isheep_jax.config import Config, DecodeConfig, ModelConfig, SynthesizeConfig
from isheep_jax.decode.requests import Completion, Request, SamplingParams
from isheep_jax.loop.algorithm import novelty_pool
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters.normalization import tokenize
from isheep_jax.loop.filters.novelty import rouge_l
from isheep_jax.loop.prompting.methods import SYNTHESIZE_METHODS
from isheep_jax.loop.prompting.own_lift import own_lifts
from isheep_jax.loop.prompting.seeds import Seed, read_seeds
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.records import Instruction, kept
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.stages import synthesize
from isheep_jax.runtime.backend import JaxBackend
from isheep_jax.runtime.run import LogReporter

# Settings that differ from the defaults, by the name of the row.
ROWS = {
    "default": {},
    "strict": {"rules": "strict"},
    "drop lowest fifth": {"drop_lowest": 0.2},
    "strict, drop lowest fifth": {"rules": "strict", "drop_lowest": 0.2},
    "3 shots": {"shots": 3},
    "8 shots": {"shots": 8},
    "temperature 0.7": {"temperature": 0.7},
    "strict, temperature 0.7": {"rules": "strict", "temperature": 0.7},
    "nearest": {"choose": "nearest"},
    "diverse": {"choose": "diverse"},
    "topics": {"method": "topics", "topic_share": 1.0},
}
# Instructions asked for per prompt of the method 'topics': it then collects topics for as many prompts.
PER_TOPIC_PROMPT = 2.5


class Enough(Exception):
    """Ends the stage after its first part."""


class Writer:
    """A model that answers what it was asked before from memory, and ends the stage after some prompts."""

    def __init__(self, model, memory: dict, prompts: int):
        self._model, self._memory, self._prompts = model, memory, prompts
        self.tokens = 0

    def generate(self, requests: Iterable[Request | None], sampling: SamplingParams) -> Iterator[Completion]:
        is_stream = not isinstance(requests, Sequence)
        if is_stream:
            requests = list(itertools.islice(filter(None, requests), self._prompts))
        new = [r for r in requests if (r, sampling) not in self._memory]
        by_id = {r.id: r for r in new}
        for completion in self._model.generate(new, sampling) if new else ():
            self._memory[by_id[completion.id], sampling] = completion
        for request in requests:
            completion = self._memory[request, sampling]
            self.tokens += len(completion.tokens)
            yield completion
        if is_stream:
            raise Enough

    def text_logprobs(self, requests, texts):
        return self._model.text_logprobs(requests, texts)

    def embed(self, requests):
        return self._model.embed(requests)


def write(
    config: Config, row: dict, prompts: int, model, seeds: list[Seed], memory: dict
) -> tuple[list[Instruction], int, StageContext]:
    """Returns the records of a part, and how many tokens were written for it."""
    count = round(PER_TOPIC_PROMPT * prompts) if row.get("method") == "topics" else 10**6
    config = dataclasses.replace(config, synthesize=dataclasses.replace(config.synthesize, instructions=count, **row))
    templates = load("standard", ("synthesize", "topics", "guided"))
    directory = RunDirectory(epath.Path(tempfile.mkdtemp()), config)
    context = StageContext(config, templates, seeds, frozenset(), directory, LogReporter(), iteration=1)
    writer = Writer(model, memory, prompts)
    sources = SYNTHESIZE_METHODS[config.synthesize.method].sources(context, writer, None)
    synthesize.PART_PROMPTS = prompts
    with contextlib.suppress(Enough):
        synthesize.synthesize(context, writer, novelty_pool(context), sources)
    return context.files("instructions").records(), writer.tokens, context


def novelty(seeds: list[Seed], new: list[Instruction]) -> float:
    """Returns the mean over the new instructions of 1 less the highest ROUGE-L to a seed or an earlier one."""
    pool, distances = [tokenize(seed.instruction) for seed in seeds], []
    for record in new:
        words = tokenize(record.instruction)
        distances.append(1 - max(rouge_l(LCSseq.similarity(words, x), len(words), len(x)) for x in pool if x))
        pool.append(words)
    return mean(distances)


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def report(name: str, records: list[Instruction], tokens: int, context: StageContext, model, examples: int) -> None:
    new = kept(records)
    lifts = [lift for lift in own_lifts(context, model, "benchmark", new) if lift is not None]
    reasons = Counter(r.verdict.reason for r in records if not r.verdict.kept)
    dropped = ", ".join(f"{reason} {n / len(records):.0%}" for reason, n in reasons.most_common())
    words = mean([len(f"{r.instruction} {r.input}".split()) for r in new])
    print(
        f"| {name} | {tokens} | {len(records)} | {len(new)} | {1000 * len(new) / tokens:.1f} | "
        f"{novelty(context.seeds, new):.2f} | {mean(lifts):.2f} | {words:.0f} | {dropped} |"
    )
    for record in new[:: max(1, len(new) // examples)][:examples]:
        print("   ", repr(record.instruction[:160]), "|", repr(record.input[:80]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--chat_template", default="auto")
    parser.add_argument("--rows", default=",".join(ROWS).replace(", ", "; "))
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--max_tokens", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--examples", type=int, default=5)
    parser.add_argument("--completions", type=Path)
    options = parser.parse_args()
    config = Config(
        seed=options.seed,
        workdir=tempfile.mkdtemp(),
        model=ModelConfig(options.model, options.chat_template, "float32"),
        synthesize=SynthesizeConfig(max_tokens=options.max_tokens),
        decode=DecodeConfig(slots=options.prompts, max_length=2048),
    )
    model = JaxBackend(config).load(None)
    seeds = read_seeds(load("standard").seeds_file("builtin"), 8, "paper")
    file = options.completions
    memory: dict = pickle.loads(file.read_bytes()) if file and file.exists() else {}
    print("| row | tokens | tasks | kept | per 1,000 tokens | novelty | lift | words | dropped |")
    print("|---|---|---|---|---|---|---|---|---|")
    for name in options.rows.split(","):
        name = name.replace("; ", ", ")
        start = time.monotonic()
        records, tokens, context = write(config, ROWS[name], options.prompts, model, seeds, memory)
        if file:
            file.write_bytes(pickle.dumps(memory))
        report(name, records, tokens, context, model, options.examples)
        print(f"    {time.monotonic() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
