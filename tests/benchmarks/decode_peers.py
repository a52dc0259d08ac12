"""Compares the decode engine's speed with its peers', in one run on one machine.

python tests/benchmarks/decode_peers.py [--workloads respond assess] [--peers-python PATH] [--output FILE.json]

The model is a Llama of 100 million parameters with random weights. Workloads, with lengths forced: synthesize (prompts
of 400 tokens, 64 to 512 new ones), respond (prompts of 20 to 200, 1 to 400 new ones, log-normal around 55), assess (60
to 300 tokens after a shared rubric of 300: the engine scores ten choices by prefill, its peers generate 32 tokens).

Peers: `generate` of transformers in float32 and in bfloat16, its continuous batching, and Tunix's sampler. They are in
requirements.txt and requirements-tunix.txt here, and may have virtual environments of their own (--peers-python,
--tunix-python). One that is not installed is a row that says so.

Every engine is a process of its own, and compiles and warms up before anything is timed. Then they take turns; the
engine runs before and after the peers in each round, so that other load on the machine shows as a spread. It decodes
the whole workload each time. A peer would take many minutes for that, and so runs a share of it in each round, of which
decode_engines.py says how it is chosen; the whole's time is that of the shares over their part of the work.

The table has requests per second, new tokens per second, and the ratio of the engine's rate to each peer's.
"""

import argparse
import dataclasses
import json
import os
import platform
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from isheep_jax.speed.shapes import SHAPES
from isheep_jax.speed.workloads import WORKLOADS, Workload

REQUESTS = {"synthesize": 96, "respond": 256, "assess": 192}
PEERS = ["float32", "bfloat16", "continuous", "tunix"]
# How many times as fast as these peers the engine has to be.
TARGETS = {
    "synthesize": {"transformers float32": 5.0, "tunix float32": 5.0},
    "respond": {"transformers float32": 3.0, "tunix float32": 5.0},
    "assess": {"transformers float32": 2.5, "tunix float32": 5.0},
}


@dataclass(frozen=True)
class Row:
    """An engine and its settings. batch: rows of a static batch, or sequences at a time (0: the engine's choice)."""

    engine: str
    dtype: str
    batch: int
    python: str

    @property
    def label(self) -> str:
        return f"{self.engine} {self.dtype}"


class Process:
    """A child process with one engine. timed: what its runs took, as {"seconds": ..., "share": of the workload}."""

    def __init__(self, row: Row, setup: dict):
        self.row, self.timed, self.error = row, [], ""
        self.log = tempfile.TemporaryFile("w+")  # noqa: SIM115 (lives as long as the child)
        self.child = subprocess.Popen(
            [row.python, str(Path(__file__).with_name("decode_engines.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            # Threads of an engine that waits for its turn must not spin.
            env={"OMP_WAIT_POLICY": "passive", **os.environ},
        )
        self.versions = self._ask(setup | dataclasses.asdict(row)).get("versions", {})

    def run(self, part: int) -> None:
        if not self.error:
            answer = self._ask(part)
            self.timed += [answer] if answer else []

    def close(self) -> None:
        self.child.stdin.close()
        self.child.wait()
        self.log.close()

    def seconds(self) -> float:
        """Seconds of the whole workload."""
        return sum(run["seconds"] for run in self.timed) / sum(run["share"] for run in self.timed)

    def _ask(self, question: dict | int) -> dict:
        """The child's answer; nothing, and `error` says why, if it has none."""
        try:
            print(json.dumps(question), file=self.child.stdin, flush=True)
            line = self.child.stdout.readline()
        except BrokenPipeError:
            line = ""
        self.log.seek(0)
        last = (self.log.read().strip().splitlines() or ["it wrote nothing"])[-1]
        answer = json.loads(line) if line else {"error": f"the process ended: {last}"}
        self.error = answer.get("error", "")
        return {} if self.error else answer


def compare(workload: Workload, rows: list[Row], options: argparse.Namespace) -> list[dict]:
    """Runs the first row's engine and the others in turn. Returns a result per row."""
    shape = SHAPES["llama_100m"]
    prefix, prompts = workload.prompts(shape.vocab_size)
    setup = {
        "model": {
            "vocab_size": shape.vocab_size,
            "hidden_size": shape.hidden_size,
            "intermediate_size": shape.intermediate_size,
            "num_hidden_layers": shape.layers,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "max_position_embeddings": shape.context_length,
            "rms_norm_eps": shape.norm_eps,
            "rope_theta": shape.rope_theta,
        },
        "workload": dataclasses.asdict(workload) | {"prefix": prefix, "prompts": prompts},
        "parts": options.rounds,
        "steps_per_call": options.steps_per_call,
    }
    processes = []
    try:
        for row in rows:
            print(f"  {workload.name}: {row.label} (batch {row.batch}) warms up", file=sys.stderr, flush=True)
            processes.append(Process(row, setup))
        ours, *peers = processes
        for part in range(options.rounds):
            for process in (ours, *peers, ours):
                process.run(part)
                if process.timed:
                    print(f"  {workload.name}: {process.row.label}: {process.timed[-1]}", file=sys.stderr, flush=True)
    finally:
        for process in processes:
            process.close()
    return [_result(workload, process, ours) for process in processes]


def _result(workload: Workload, process: Process, ours: Process) -> dict:
    result = dataclasses.asdict(process.row) | {"label": process.row.label, "workload": workload.name}
    result |= {"requests": len(workload), "error": process.error, "versions": process.versions, "runs": process.timed}
    del result["python"]
    if process.timed and not process.error:
        rate = len(workload) / process.seconds()
        # Scoring samples no token.
        tokens = sum(workload.new_tokens) / process.seconds() if workload.new_tokens else None
        result |= {"requests_per_second": rate, "tokens_per_second": tokens}
        if ours.timed and process is not ours:
            result["ratio"] = process.seconds() / ours.seconds()
            result["target"] = TARGETS[workload.name].get(process.row.label)
    return result


def table(results: list[dict]) -> str:
    lines = [
        f"{'workload':<11} {'engine':<26} {'batch':>5} {'requests/s':>10} {'tokens/s':>9} {'ratio':>7} {'target':>7}"
    ]
    for result in results:
        start = f"{result['workload']:<11} {result['label']:<26} {result['batch'] or 'own':>5} "
        if result["error"] or "requests_per_second" not in result:
            lines.append(start + (result["error"] or "did not run"))
            continue
        tokens, ratio, target = result["tokens_per_second"], result.get("ratio"), result.get("target")
        lines.append(
            start
            + f"{result['requests_per_second']:>10.3f} "
            + (f"{tokens:>9.1f} " if tokens is not None else f"{'':>9} ")
            + (f"{ratio:>6.2f}x " if ratio is not None else f"{'':>7} ")
            + (f"{target:>6.1f}x" if target else "")
        )
    return "\n".join(line.rstrip() for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--requests", type=int, help="of each workload (default: 96, 256 and 192)")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each engine")
    parser.add_argument("--slots", type=int, default=0, help="of the engine (0: its own choice)")
    parser.add_argument("--steps-per-call", type=int, default=0, help="of the engine (0: its own choice)")
    parser.add_argument("--batch", type=int, nargs="+", default=[16], help="rows of the peers' batches, tried in turn")
    parser.add_argument("--dtype", default="float32", help="of the engine")
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=PEERS)
    parser.add_argument("--peers-python", default=sys.executable, help="interpreter that has transformers")
    parser.add_argument("--tunix-python", help="interpreter that has Tunix (default: that of --peers-python)")
    parser.add_argument("--seed", type=int, default=0, help="of lengths and token ids")
    parser.add_argument("--output", type=Path, help="results as JSON")
    options = parser.parse_args()

    peers, tunix = options.peers_python, options.tunix_python or options.peers_python
    kinds = {
        "float32": ("transformers", "float32", peers),
        "bfloat16": ("transformers", "bfloat16", peers),
        "continuous": ("continuous", "float32", peers),
        "tunix": ("tunix", "float32", tunix),
    }
    rows = [Row("isheep_jax", options.dtype, options.slots, sys.executable)]
    for batch in options.batch:
        rows += [Row(engine, dtype, batch, python) for engine, dtype, python in map(kinds.get, options.peers)]
    results = []
    for name in options.workloads:
        workload = WORKLOADS[name](options.requests or REQUESTS[name], options.seed)
        results += compare(workload, rows, options)
        print(table(results[-len(rows) :]), file=sys.stderr, flush=True)
    print(f"{os.cpu_count()} CPU cores, {platform.machine()}; isheep_jax {results[0]['versions']}")
    print(table(results))
    if options.output:
        options.output.write_text(json.dumps({"cores": os.cpu_count(), "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
