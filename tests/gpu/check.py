"""What one GPU does with the programs of decoding and training, next to what is expected of an H100.

    python tests/gpu/check.py [--output FILE.json] [--parts decode,train] [--minutes 8]
    python tests/gpu/check.py --small       # on a CPU, toy sizes: whether the script itself works

Each part runs in a process of its own with a time limit, the most valuable first, so that one that crashes or hangs
costs only its own figures. A figure is printed, and FILE.json written, as soon as it is there. The exit
code is 0 if all parts ran to their end, whatever the figures are. docs/gpu.md says what each figure means.
"""

import argparse
import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Timer
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))  # the package of this checkout, also where it is not installed
# A line of a part's output that is a figure, or a fact that has no expectation.
FIGURE = "FIGURE "
# A part is not begun when less time is left.
_LEAST_SECONDS = 10


@dataclass(frozen=True)
class Expectation:
    """What a figure should be on an H100 of 80 GB. otherwise: what a figure outside of it says."""

    low: float
    high: float
    unit: str
    otherwise: str


# By arithmetic, at 2.9 of the 3.35 TB/s: a step reads 15.0 GB of weights, and 17.2 GB of cache at 1,024 keys; without
# the kernel XLA copies a block of keys before the product that reads it, which makes three times the cache's traffic.
EXPECTED = {
    "decode, quarter": Expectation(8, 14, "ms", "above: launches and waits dominate; look at a profile"),
    "decode, half": Expectation(11, 18, "ms", "above: if the line of a quarter is within, the kernel is slow"),
    "decode, whole": Expectation(17, 26, "ms", "above: the kernel reads slower than memory allows"),
    "decode, mixed lengths": Expectation(11, 19, "ms", "as slow as whole: rows are not read as far as they go only"),
    "decode, whole, top_p 1": Expectation(16, 26, "ms", "1 ms below the line of whole: rejection waits for the host"),
    "decode, whole, in blocks": Expectation(17, 50, "ms", "as fast as the kernel: XLA does without it"),
    "decode kernel difference": Expectation(0, 2e-2, "of the largest", "the kernel computes something else"),
    "decode compile": Expectation(5, 60, "s", "minutes: autotuning; --xla_gpu_autotune_level, or keep the programs"),
    "decode temporaries": Expectation(0, 3, "GiB", "above 10: the keys are transposed in every call"),
    "prefill, short row": Expectation(8, 20, "ms", "above: the row is too short for the arithmetic units"),
    "prefill, long row": Expectation(30, 60, "ms", "above 80: cuDNN is not used, or does not skip what is not causal"),
    "train step": Expectation(0.8, 1.3, "s", "above 1.5: compare with the line for chunks"),
    "train step in chunks": Expectation(1.0, 2.5, "s", "as fast as cuDNN: attention is not what takes the time"),
    "train loss difference": Expectation(0, 1e-2, "nats", "cuDNN or its arguments are wrong"),
    "packed loss difference": Expectation(0, 1e-2, "nats", "the mask of packed rows is wrong on cuDNN"),
    "packed gradient difference": Expectation(0, 3e-2, "of the norm", "cuDNN's gradient under a mask is wrong"),
    "same update twice": Expectation(1, 1, "1: same bits", "0: a resumed fine-tuning has other last digits"),
    "same tokens, float32": Expectation(96, 96, "of 96", "fewer: the number of slots changes what is sampled"),
    "same tokens, bfloat16": Expectation(0, 96, "of 96", ""),
    "tiny accuracy": Expectation(0.4, 0.6, "", "a loop that works on CPUs goes wrong here"),
    "slots busy": Expectation(0.75, 1.0, "", "the schedule leaves slots idle"),
    "share of the limit": Expectation(0.3, 0.9, "", "below: read the decode lines"),
}


@dataclass(frozen=True)
class Part:
    """A part of the check. run: prints its figures. seconds: its time limit on a GPU."""

    run: Callable[[bool], None]
    seconds: int


def report(name: str, value: float | None = None, **facts: Any) -> None:
    """Prints a figure. name: a key of `EXPECTED`, or of something of which nothing is expected."""
    print(FIGURE + json.dumps({"name": name, "value": value, **facts}), flush=True)


# What the parts run on. jax is imported in their processes only.


def timed(run: Callable[[], Any], repeats: int = 3) -> float:
    """Returns the seconds of a call, after one for nothing."""
    import jax

    jax.block_until_ready(run())
    start = time.perf_counter()
    for _ in range(repeats):
        result = run()
    jax.block_until_ready(result)
    return (time.perf_counter() - start) / repeats


def llama(small: bool) -> Any:
    """Returns the architecture of Llama 3 8B, or of one with a single layer."""
    from isheep_jax.planning.models import planned_architecture
    from isheep_jax.speed.shapes import SHAPES

    if small:
        sizes = {"layers": 1, "hidden_size": 128, "heads": 2, "kv_heads": 1, "vocab_size": 2048}
        return dataclasses.replace(SHAPES["llama_100m"], intermediate_size=256, **sizes)
    with tempfile.TemporaryDirectory() as work:
        return planned_architecture("meta-llama/Meta-Llama-3-8B", Path(work))


def random_weights(architecture: Any, mesh: Any) -> Any:
    """Returns bfloat16 weights, laid out for decoding."""
    import jax
    import jax.numpy as jnp

    from isheep_jax.model.architecture import init_parameters, parameter_table
    from isheep_jax.sharding import DECODE_RULES, param_shardings

    shardings = param_shardings(parameter_table(architecture), mesh, DECODE_RULES)
    init = jax.jit(init_parameters, static_argnums=(0, 2), out_shardings=shardings)
    return init(architecture, jax.random.key(0), jnp.dtype("bfloat16"))


def one_device_meshes() -> tuple[Any, Any]:
    """Returns the training mesh and the decode mesh of the first device."""
    import jax

    from isheep_jax.config import MeshConfig
    from isheep_jax.sharding import decode_mesh, make_mesh

    mesh = make_mesh(MeshConfig(), jax.devices()[:1])
    return mesh, decode_mesh(mesh, 1)


def report_memory() -> None:
    """Prints the most memory that was in use, and how much there is."""
    import jax

    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" in stats:
        report("peak memory", round(stats["peak_bytes_in_use"] / 2**30, 1), unit="GiB", of=stats["bytes_limit"] / 2**30)


def decode(small: bool) -> None:
    """Times decode steps at several lengths of the sequences."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from isheep_jax.config import DecodeConfig
    from isheep_jax.decode.device_slots import CACHE_POSITION, CHANGED, LAST_TOKEN, REMAINING, UPDATE_COLUMNS, new_slots
    from isheep_jax.decode.programs import DecodeShape, compile_decode_steps
    from isheep_jax.decode.sampling import DeviceSamplingParams

    report("devices", kind=jax.devices()[0].device_kind, platform=jax.default_backend(), jax=jax.__version__)
    _, mesh = one_device_meshes()
    architecture, dtype = llama(small), jnp.dtype("bfloat16")
    params = random_weights(architecture, mesh)
    slots, length = (8, 512) if small else (128, 2048)
    config = DecodeConfig(slots=slots, max_length=length)
    nominal = DecodeShape.nominal(config, architecture, mesh=mesh, compute_dtype=dtype, eos_ids=())
    state = new_slots(architecture, slots, length, dtype, mesh, penalties=False)
    steps, mixed = nominal.steps_per_call, np.linspace(length // 16, length, slots).astype(np.int32)
    lines = [
        ("decode, quarter", length // 4, 0.95),
        ("decode, half", length // 2, 0.95),
        ("decode, whole", length, 0.95),
        ("decode, mixed lengths", mixed, 0.95),
        ("decode, whole, top_p 1", length, 1.0),
        ("decode, whole, in blocks", length, 0.95),
    ]
    for name, keys, top_p in lines:
        with without_kernel() if "blocks" in name else contextlib.nullcontext():
            start = time.perf_counter()
            # The program in blocks has another limit of keys, so that it is not taken for the one with the kernel.
            shape = dataclasses.replace(nominal, key_limit=length + 1 if "blocks" in name else nominal.key_limit)
            program = compile_decode_steps(shape, nominal)
        if name == lines[0][0]:
            report("decode compile", round(time.perf_counter() - start, 1))
            report("decode temporaries", round(program.memory_analysis().temp_size_in_bytes / 2**30, 2))
        updates = np.zeros((slots, UPDATE_COLUMNS), np.int32)
        updates[:, LAST_TOKEN], updates[:, CACHE_POSITION] = 5, keys - steps  # the call ends with so many keys
        updates[:, REMAINING], updates[:, CHANGED] = 10**6, 1
        sampling = DeviceSamplingParams(top_p=np.float32(top_p))
        limits = np.asarray([slots, 0], np.int32)

        def run(program=program, updates=updates, sampling=sampling, limits=limits):
            nonlocal state
            state, sampled = program(params, state, updates, sampling, limits, None)
            return sampled

        report(name, round(1e3 * timed(run) / steps, 2), keys=round(float(np.mean(keys))))
    report_memory()
    del state
    compare_decode_kernel(architecture, mesh)
    prefill(architecture, params, mesh, small)


@contextlib.contextmanager
def without_kernel() -> Iterator[None]:
    """Switches the kernel of decode steps off."""
    from isheep_jax.decode import programs
    from isheep_jax.model import attention

    modules = attention, programs
    refusals = [module.kernel_refusal for module in modules]
    for module in modules:
        module.kernel_refusal = lambda *arguments: "switched off"
    try:
        yield
    finally:
        for module, refusal in zip(modules, refusals):
            module.kernel_refusal = refusal


def compare_decode_kernel(architecture: Any, mesh: Any) -> None:
    """Compares the attention of a decode step by the kernel and by XLA, on random keys."""
    import jax
    import jax.numpy as jnp

    from isheep_jax.decode.device_slots import new_slots
    from isheep_jax.model.attention import cached_attention
    from isheep_jax.model.attention_reference import AttentionConfig
    from isheep_jax.sharding import DECODE_RULES, ActivationSharding

    dtype, rows, length = jnp.dtype("bfloat16"), 16, 1024
    two_layers = dataclasses.replace(architecture, layers=2)
    cache = new_slots(two_layers, rows, length, dtype, mesh, penalties=False).cache
    cache = jax.tree.map(lambda x: jax.random.normal(jax.random.key(x.ndim), x.shape, x.dtype), cache)
    q = jax.random.normal(jax.random.key(1), (rows, 1, architecture.heads, architecture.head_dim), dtype)
    last = jnp.linspace(0, length - 1, rows).astype(jnp.int32)[:, None]

    def attend(q: Any, cache: Any, layer: Any) -> Any:
        return cached_attention(
            q,
            cache,
            layer,
            AttentionConfig(),
            jnp.asarray(0),
            positions=last,
            cache_positions=last,
            key_limit=length,
            prefix_kv=(),
            sharding=ActivationSharding(mesh, DECODE_RULES),
        ).astype(jnp.float32)

    by_kernel = jax.jit(lambda *arguments: attend(*arguments))(q, cache, jnp.asarray(1))
    with without_kernel():
        by_xla = jax.jit(lambda *arguments: attend(*arguments))(q, cache, jnp.asarray(1))
    report("decode kernel difference", float(jnp.abs(by_kernel - by_xla).max() / jnp.abs(by_xla).max()))


def prefill(architecture: Any, params: Any, mesh: Any, small: bool) -> None:
    """Times rows of prompts."""
    import jax.numpy as jnp
    import numpy as np

    from isheep_jax.decode.device_slots import new_slots
    from isheep_jax.decode.packing import empty_rows, fill
    from isheep_jax.decode.prefill import prefill as run_prefill

    dtype = jnp.dtype("bfloat16")
    cache = new_slots(architecture, 8, 256 if small else 2048, dtype, mesh, penalties=False).cache
    lengths = ((64, 2), (128, 1)) if small else ((512, 4), (2048, 1))
    for name, (length, prompts) in zip(("prefill, short row", "prefill, long row"), lengths):
        packed, each = empty_rows(1, length), length // prompts
        for i in range(prompts):
            fill(packed[0], each * i, i + 1, np.full(each - 20, 7, np.int32), i)

        def run(packed=packed):
            nonlocal cache
            cache = run_prefill(params, cache, packed, None, architecture=architecture, mesh=mesh, compute_dtype=dtype)
            return cache

        report(name, round(1e3 * timed(run), 2), tokens=length)


def train(small: bool) -> None:
    """Times train steps, and compares what cuDNN computes with what XLA computes."""
    import jax
    import numpy as np

    from isheep_jax.model import attention_gpu
    from isheep_jax.named_configs import named_config
    from isheep_jax.sft import data
    from isheep_jax.sft.train_step import TrainSetup, build_train_programs
    from isheep_jax.sharding import put

    mesh, decode_mesh = one_device_meshes()
    architecture = llama(small)
    config = named_config("llama_8b_gpu").sft
    if small:
        config = dataclasses.replace(config, batch_size=2, sequence_length=256)
    rows, length = config.batch_size, config.sequence_length
    refusal = attention_gpu.cudnn_refusal

    def batch(segments: int) -> Any:
        tokens = np.random.default_rng(0).integers(3, architecture.vocab_size, (rows, length)).astype(np.int32)
        each = length // segments
        ids = np.broadcast_to(1 + np.arange(length, dtype=np.int32) // each, tokens.shape).copy()
        positions = np.broadcast_to(np.arange(length, dtype=np.int32) % each, tokens.shape).copy()
        return data.Batch(tokens, np.roll(tokens, -1, axis=1), np.ones_like(tokens), ids, positions)

    def updated(architecture: Any, base: Any, packing: bool, cudnn: bool) -> tuple[float, dict, Any]:
        attention_gpu.cudnn_refusal = refusal if cudnn else lambda shape, capability: "switched off"
        build_train_programs.cache_clear()
        setup = TrainSetup.from_config(architecture, dataclasses.replace(config, packing=packing), mesh, "bfloat16")
        programs = build_train_programs(setup)
        base = jax.device_put(base, programs.parameter_shardings)
        examples = put(batch(4 if packing else 1), programs.batch_sharding)
        state = programs.init_state(base, np.uint32(0))

        def step() -> dict:
            nonlocal state
            state, metrics = programs.train_step(state, base, examples, np.float32(1e-5), np.int32(1), np.uint32(0))
            return metrics

        metrics = jax.device_get(step())
        weights = jax.device_get(state.weights)
        return timed(step), {name: float(value) for name, value in metrics.items()}, weights

    params = random_weights(architecture, decode_mesh)
    seconds, metrics, weights = updated(architecture, params, packing=False, cudnn=True)
    report("train step", round(seconds, 3), loss=metrics["loss"])
    report_memory()
    again = updated(architecture, params, packing=False, cudnn=True)[2]
    same = all(np.array_equal(a, b) for a, b in zip(jax.tree.leaves(weights), jax.tree.leaves(again)))
    report("same update twice", float(same))
    few = dataclasses.replace(architecture, layers=min(4, architecture.layers))
    few_params = params | {"layers": jax.tree.map(lambda x: x[: few.layers], params["layers"])}
    by_cudnn = updated(few, few_params, packing=True, cudnn=True)[1]
    by_xla = updated(few, few_params, packing=True, cudnn=False)[1]
    report("packed loss difference", abs(by_cudnn["loss"] - by_xla["loss"]))
    norms = by_cudnn["gradient_norm"], by_xla["gradient_norm"]
    report("packed gradient difference", abs(norms[0] - norms[1]) / norms[1])
    seconds, by_xla, _ = updated(architecture, params, packing=False, cudnn=False)
    report("train step in chunks", round(seconds, 3))
    report("train loss difference", abs(metrics["loss"] - by_xla["loss"]))


def tokens(small: bool) -> None:
    """Compares completions of the embedded model between numbers of slots."""
    import jax.numpy as jnp

    from isheep_jax.checkpoint.pretrained import open_model
    from isheep_jax.config import DecodeConfig
    from isheep_jax.decode.engine import Engine
    from isheep_jax.decode.requests import Request, SamplingParams
    from isheep_jax.sharding import DECODE_RULES
    from isheep_jax.tiny import CHECKPOINT

    _, mesh = one_device_meshes()
    model = open_model(CHECKPOINT)
    requests = [Request(f"{i}", f"Swap cat and red. Number {i}.\n") for i in range(96)]
    for dtype in ("float32",) if small else ("float32", "bfloat16"):
        weights = model.load(mesh=mesh, rules=DECODE_RULES, dtype=jnp.dtype(dtype))
        found = []
        for slots in (32, 96) if small else (32, 64, 96):
            config = DecodeConfig(slots=slots, max_length=128)
            engine = Engine(
                weights, model.architecture, model.tokenizer, config, mesh=mesh, seed=1, compute_dtype=dtype
            )
            completions = engine.generate(requests, SamplingParams(max_tokens=32))
            found.append({completion.id: completion.tokens for completion in completions})
        report(f"same tokens, {dtype}", sum(all(one[i] == found[0][i] for one in found) for i in found[0]))


def tiny(small: bool) -> None:
    """Runs an iteration of the loop on the embedded world."""
    with tempfile.TemporaryDirectory() as work:
        command = [sys.executable, "-m", "isheep_jax.train", "--config=tiny", "--iterations=1", f"--workdir={work}"]
        if small:
            command += ["--synthesize.instructions=16", "--evaluate.limit=8"]
        subprocess.run(command, check=True, stdout=sys.stderr, cwd=work)
        figures = json.loads((Path(work) / "iteration_1" / "evaluation.json").read_text())
    report("tiny accuracy", figures["tiny"]["accuracy"])


def benchmark(small: bool) -> None:
    """Runs the benchmark of decoding on requests like those of two stages."""
    with tempfile.TemporaryDirectory() as work:
        output = Path(work) / "speed.json"
        model = ["--config=tiny", "--requests=8"] if small else ["--config=llama_8b_gpu", "--random", "--requests=256"]
        command = [sys.executable, "-m", "isheep_jax.benchmark", "decode", *model, "--workload=respond,assess"]
        subprocess.run([*command, f"--output={output}"], check=True, stdout=sys.stderr)
        speeds = json.loads(output.read_text())["workloads"]
    for speed in speeds:
        facts = {name: speed[name] for name in ("workload", "requests_per_second", "tokens_per_second", "idle_share")}
        if speed["slots"]:  # scoring has none
            report("slots busy", round(speed["occupancy"], 3), **facts)
        report("share of the limit", round(speed["fraction_of_limit"], 3), workload=speed["workload"])


# In the order in which they are run; together within eight minutes on an H100, but for the last.
PARTS = {
    "decode": Part(decode, 190),
    "train": Part(train, 190),
    "tokens": Part(tokens, 60),
    "tiny": Part(tiny, 90),
    "benchmark": Part(benchmark, 150),
}


def run_part(name: str, small: bool, seconds: float, programs: str) -> Iterator[dict[str, Any]]:
    """Yields the figures of a part that runs in a process of its own; last its state: "ran", "failed" or "too long".

    programs: directory in which compiled programs are kept.
    """
    command = [sys.executable, __file__, "--part", name, *(["--small"] if small else [])]
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "JAX_COMPILATION_CACHE_DIR": programs,
    }
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    timer = _kill_after(process, seconds)
    for line in process.stdout:
        if line.startswith(FIGURE):
            yield judged(json.loads(line.removeprefix(FIGURE)), small)
        else:
            print(line, end="", file=sys.stderr)
    code = process.wait()
    timer.cancel()
    took = time.perf_counter() - start
    state = "ran" if code == 0 else "too long" if took >= seconds else "failed"
    yield {"name": f"part {name}", "state": state, "seconds": round(took, 1)}


def _kill_after(process: subprocess.Popen, seconds: float) -> Timer:
    def kill() -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = Timer(seconds, kill)
    timer.start()
    return timer


def judged(figure: dict[str, Any], small: bool) -> dict[str, Any]:
    """Returns a figure with what is expected and whether it is within; toy sizes are expected to be nothing."""
    expectation = EXPECTED.get(figure["name"])
    if expectation is None:
        return figure
    figure |= {"unit": expectation.unit}
    if small:
        return figure
    within = expectation.low <= figure["value"] <= expectation.high
    return figure | {"expected": [expectation.low, expectation.high], "within": within}


def line_of(figure: dict[str, Any]) -> str:
    """Returns the printed line of a figure or of a part's state."""
    facts = {
        name: value for name, value in figure.items() if name not in ("name", "value", "unit", "expected", "within")
    }
    text = f"{figure['name']:32}"
    if figure.get("value") is not None:
        text += f" {figure['value']:>10.4g} {figure.get('unit', ''):12}"
    if "within" in figure:
        low, high = figure["expected"]
        text += f" {'within' if figure['within'] else 'OUTSIDE'} {low:g} to {high:g}"
        if not figure["within"]:
            text += f" ({EXPECTED[figure['name']].otherwise})"
    return text + "".join(f"  {name}={value}" for name, value in facts.items())


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="JSON file for the figures")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to run, of: %(default)s")
    parser.add_argument("--minutes", type=float, default=8.0, help="no part starts or goes on after so many minutes")
    parser.add_argument("--small", action="store_true", help="toy sizes, for a CPU; nothing is expected of the figures")
    parser.add_argument("--part", choices=PARTS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        PARTS[options.part].run(options.small)
        return 0
    if unknown := [name for name in options.parts.split(",") if name not in PARTS]:
        parser.error(f"--parts: {unknown[0]} is not one of {', '.join(PARTS)}")
    figures: list[dict[str, Any]] = []
    for figure in run_parts(options.parts.split(","), options.small, 60 * options.minutes):
        figures.append(figure)
        print(line_of(figure), flush=True)
        if options.output:
            options.output.write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(figure.get("state", "ran") not in ("ran", "no time") for figure in figures))


def run_parts(names: Sequence[str], small: bool, seconds: float) -> Iterator[dict[str, Any]]:
    """Yields the figures of parts that together may take so many seconds."""
    end = time.perf_counter() + seconds
    with tempfile.TemporaryDirectory() as programs:
        for name in names:
            left = end - time.perf_counter()
            if left < _LEAST_SECONDS:
                yield {"name": f"part {name}", "state": "no time"}
            else:
                yield from run_part(name, small, left if small else min(left, PARTS[name].seconds), programs)


if __name__ == "__main__":
    sys.exit(main())
