"""What a run holds in memory: the records of one iteration, some kilobytes each, and none of an earlier one."""

import gc
import json
import subprocess
import sys
from pathlib import Path

import pytest
from scripted_backend import ScriptedBackend, SilentReporter, evaluator, tiny_config

from isheep_jax.config import RespondConfig, SynthesizeConfig
from isheep_jax.loop.algorithm import run
from isheep_jax.loop.records import Instruction, Pair, Scores, Selected

# Kilobytes of a pair with its instruction, response of 80 words and scores, in all stages together.
KILOBYTES = 12

# A run whose process says how much memory it took more than before it.
MEASURED = """
import json, random, resource, sys
from pathlib import Path
from scripted_backend import ScriptedBackend, ScriptedModel, SilentReporter, evaluator, tiny_config
from isheep_jax.config import RespondConfig, SelectConfig, SynthesizeConfig
from isheep_jax.decode.requests import Completion
from isheep_jax.loop.algorithm import run

class Writer(ScriptedModel):
    prompts = property(lambda self: {}, lambda self, value: None)

    def complete(self, request):
        rng = random.Random(f"{self.name}/{request.id}")
        words = lambda n: " ".join(f"word{rng.randint(0, 9999)}" for _ in range(n))
        if "/synthesize/" in request.id:
            tasks = (f"###\\n{n}. Instruction: Explain {words(14)}.\\n" for n in range(5, 15))
            return Completion(request.id, "".join(tasks))
        if "/respond/" in request.id:
            return Completion(request.id, words(80) + ".")
        return super().complete(request)

class Backend(ScriptedBackend):
    def model(self, name):
        return Writer(name, self.fuse)

def go(directory, count):
    config = tiny_config(
        Path(directory),
        iterations=1,
        synthesize=SynthesizeConfig(instructions=count, shots=3, rules="basic"),
        respond=RespondConfig(samples=1),
        select=SelectConfig(rule="threshold", threshold=-1),
    )
    run(config, Backend(), {"fake": evaluator}, frozenset(), SilentReporter())
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

before = go(sys.argv[1] + "/few", 100)
print(json.dumps(go(sys.argv[1] + "/many", int(sys.argv[2])) - before))
"""


def records_in_memory():
    return [o for o in gc.get_objects() if isinstance(o, Instruction | Pair | Scores | Selected)]


class Alive(SilentReporter):
    """Counts, after each iteration, the records in memory by the iteration that made them."""

    def __init__(self, backend):
        super().__init__()
        self.backend = backend
        self.counts: list[set[str]] = []
        self.others = records_in_memory()  # of tests before this one

    def row(self, summary):
        self.backend.calls.clear()
        del self.backend.models[:-1]
        gc.collect()
        others = {id(record) for record in self.others}
        records = [record for record in records_in_memory() if id(record) not in others]
        self.counts.append({record.id.partition("-")[0] for record in records})


@pytest.mark.parametrize("iterations", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_no_record_of_an_earlier_iteration_stays_in_memory(tmp_path, iterations):
    config = tiny_config(
        tmp_path,
        iterations=iterations,
        synthesize=SynthesizeConfig(instructions=6, shots=3, novelty=0.95),
        respond=RespondConfig(samples=1),
    )
    backend = ScriptedBackend()
    reporter = Alive(backend)
    run(config, backend, {"fake": evaluator}, frozenset(), reporter)
    assert len(reporter.counts) == iterations + 1
    for number, alive in enumerate(reporter.counts):
        assert alive <= {str(number)}


@pytest.mark.slow
def test_a_pair_takes_some_kilobytes_in_all_stages_together(tmp_path):
    count = 20_000
    support = Path(__file__).parents[1] / "support"
    code = f"import sys; sys.path.insert(0, {str(support)!r}); {MEASURED}"
    command = [sys.executable, "-c", code.replace("; \nimport", "\nimport", 1), str(tmp_path), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=1200)
    assert 0 < json.loads(done.stdout) < KILOBYTES * count
