"""Whether a model's readings find the known order of public responses: win rates and AUCs with intervals, per set.

python tests/benchmarks/judging.py --model MODEL --data DIRECTORY [--limit 60] [--sets alpaca_eval ...]
    [--readings rubric lift ...] [--framing auto] [--chat_template auto] [--output readings.jsonl]

DIRECTORY has the published files as TASK/FILE, like `evaluate.task_data`; `public_pairs.py` says which and how they are
used. Programs run in the sandbox of the evaluation. Prints a table in Markdown. The output keeps every reading of every
response; what it has of a set and a reading is not read again, so that the same command goes on and prints the table.
"""

import argparse
import functools
import json
import math
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from public_pairs import SETS, Item

from isheep_jax.config import AssessConfig, Config, SelectConfig
from isheep_jax.loop.judging.check import WORSE, KnownPair, ReadingCheck, check, measure
from isheep_jax.loop.judging.reader import Reader
from isheep_jax.loop.judging.readings import READINGS
from isheep_jax.loop.prompting.templates import load as load_templates
from isheep_jax.loop.records import Checked, from_line, to_line
from isheep_jax.loop.stages.table import templates_of
from isheep_jax.runtime.load import load

# Ways to make an order of a log-likelihood.
ORDERS = {
    "per token": SelectConfig(per="token"),
    "in total": SelectConfig(per="total"),
    "per token, length taken out": SelectConfig(per="token", length_control="regression"),
    "in total, length taken out": SelectConfig(per="total", length_control="regression"),
}


def main() -> None:
    options = _options()
    known = _known_readings(options.output)
    # What is known already needs no model.
    model = functools.cache(lambda: load(options.model, chat_template=options.chat_template))
    is_chat = options.framing == "chat" or (options.framing == "auto" and options.chat_template == "auto")
    framing = "chat" if is_chat else "text"
    columns: dict[str, dict[str, str]] = {}
    for name in options.sets:
        pairs = _known(SETS[name].read(options.data, options.limit))
        for reading in options.readings:
            begun = time.monotonic()
            if reading == "pairwise" and pairs[0].task.startswith("single"):
                continue
            if (name, reading) not in known:
                settings = AssessConfig(readings=(reading,))
                templates = load_templates("standard", templates_of(Config(assess=settings)))
                reader = Reader(settings, templates, model(), framing, "judging")
                found = sorted(check(reader, pairs, bare=False), key=lambda indexed: indexed[0])
                known[name, reading] = [record for _, record in found]
                _keep(options.output, name, reading, known[name, reading])
                print(f"{name}, {reading}: {len(pairs)} responses in {time.monotonic() - begun:.0f} s", flush=True)
            columns.setdefault(name, {}).update(_rows(reading, known[name, reading]))
    print(f"\n{options.model}, asked in {framing}, {_hardware()}\n")
    print("\n".join(_table(columns)))


def _known_readings(path: Path) -> dict[tuple[str, str], list[Checked]]:
    """Returns what an earlier run has read, by set and reading."""
    known: dict[tuple[str, str], list[Checked]] = {}
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        values = json.loads(line)
        record = from_line(Checked, json.dumps(values["record"]))
        known.setdefault((values["set"], values["reading"]), []).append(record)
    return known


def _keep(path: Path, name: str, reading: str, records: Sequence[Checked]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(f'{{"set": "{name}", "reading": "{reading}", "record": {to_line(record)}}}\n')


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--limit", type=int, default=60, help="most pairs of a set")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    usual = [name for name in READINGS if name != "self_consistency"]  # the same for both of a pair
    parser.add_argument("--readings", nargs="+", choices=READINGS, default=usual)
    parser.add_argument("--framing", choices=("auto", "text", "chat"), default="auto")
    parser.add_argument("--chat_template", default="auto", help="'plain' for a base model")
    parser.add_argument("--output", type=Path, default=Path("readings.jsonl"))
    return parser.parse_args()


def _known(items: Sequence[Item]) -> list[KnownPair]:
    """Returns the items as the check of a judge has them; single ones as pairs that share nothing but their place."""
    places: Counter[bool] = Counter()
    pairs = []
    for item in items:
        task = item.pair or f"single-{places[item.is_better]}"
        places[item.is_better] += 1
        pairs.append(KnownPair(task, "" if item.is_better else WORSE, item.instruction, "", item.response))
    return pairs


def _rows(reading: str, records: Sequence[Checked]) -> Iterator[tuple[str, str]]:
    """Yields the rows of the table: the name of a way to order, and its figures."""
    is_sum = any(_tokens(record, reading) for record in records)
    for order, settings in ORDERS.items() if is_sum else {"": SelectConfig()}.items():
        yield f"{reading} {order}".strip(), _cell(measure(settings, [reading], records), records)


def _tokens(record: Checked, reading: str) -> int:
    value = (record.scores.readings or {}).get(reading)
    return value.tokens if value else 0


def _cell(found: ReadingCheck, records: Sequence[Checked]) -> str:
    """Returns the share of pairs in the right order with its interval, if there are pairs, and the AUC with its own."""
    auc = f"{found.auc.value:.2f} ({found.auc.low:.2f} to {found.auc.high:.2f})"
    if records[0].task.startswith("single"):
        return f"AUC {auc}"
    low, high = _wilson(found.wins, len({record.task for record in records}))
    return f"{found.wins:.2f} ({low:.2f} to {high:.2f}); AUC {auc}"


def _wilson(share: float, count: int, z: float = 1.96) -> tuple[float, float]:
    """Returns the interval of 95 % of a share of independent pairs."""
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z / (1 + z * z / count) * math.sqrt(share * (1 - share) / count + z * z / (4 * count * count))
    return middle - half, middle + half


def _table(columns: dict[str, dict[str, str]]) -> Iterator[str]:
    rows = list(dict.fromkeys(row for column in columns.values() for row in column))
    yield f"| reading | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    for row in rows:
        yield f"| {row} | {' | '.join(column.get(row, '') for column in columns.values())} |"


def _hardware() -> str:
    """Returns the number of cores and their vector instructions."""
    cpu = Path("/proc/cpuinfo")
    text = cpu.read_text() if cpu.exists() else ""
    flags = text.partition("flags")[2].partition("\n")[0].split()
    vectors = [name for name in ("avx2", "avx512f", "amx_bf16") if name in flags]
    return f"{text.count('processor')} cores with {', '.join(vectors) or 'unknown instructions'}"


if __name__ == "__main__":
    main()
