"""The schedule of an iteration's decoding under the former rules and under the present ones, side by side in one run.

python tests/benchmarks/schedule.py [--configs=llama_70b_v4,llama_8b_v5e,llama_8b_gpu] [--markdown]

No device is needed: the engine's own scheduler runs with a stand-in for the devices, on prompts and completions of the
lengths that `isheep_jax.plan` supposes. The former rules: synthesis in waves of at most 256 prompts, other stages in
blocks of 2,048 requests, prompts to slots in the order of the slots, rows of 512 tokens with prompts at multiples of
128 on TPUs, as many slots to the end. Texts are decoded by a byte-level BPE tokenizer that is trained on this
repository's documents, and searched for the stop strings of the stage; the time of both, of packing and of all other
work of the host is measured on this machine. The devices' least time is that of reading weights and keys at the chip's
bandwidth, under the former rules of all sequences as far as the longest.
"""

import argparse
import dataclasses
import math
import re
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from isheep_jax.config import Config
from isheep_jax.decode.cache import Sizing, bucket_of
from isheep_jax.decode.requests import SamplingParams
from isheep_jax.decode.scheduler import Scheduler
from isheep_jax.loop.prompting.templates import load
from isheep_jax.loop.prompting.zero_shot import BARE_STOP
from isheep_jax.model.architecture import Architecture
from isheep_jax.model.attention_decode_tpu import block_length
from isheep_jax.model.attention_gpu import KERNEL_BLOCK
from isheep_jax.model.quantization import abstract_weights
from isheep_jax.named_configs import named_config
from isheep_jax.planning.demands import stage_demands
from isheep_jax.planning.hardware import GPU_CHIPS, Chip, parse_topology
from isheep_jax.planning.lengths import Lengths
from isheep_jax.planning.models import planned_architecture
from isheep_jax.planning.replay import SupposedCalls, SupposedModel, replay_generation
from isheep_jax.planning.schedule import Generation, StageSchedule

ROOT = Path(__file__).parent.parent.parent
STAGES = {"instructions": "synthesize", "responses": "respond", "scores": "assess"}
LARGEST_WAVE, FIRST_WAVE, BLOCK = 256, 64, 2048


class FormerSizing(Sizing):
    """Rows of at most 512 tokens, unless a prompt is longer."""

    def aligned(self, tokens: int) -> int:
        align = 128 if self.platform == "tpu" else 32
        return -(-tokens // align) * align

    def capacity(self, tokens: int) -> int:
        return 512

    def row_length(self, tokens: int) -> int:
        return bucket_of(tokens, 128 if self.platform == "tpu" else 32)


class FormerScheduler(Scheduler):
    """Fills slots in their order, as soon as they are idle, and keeps all of them to the end."""

    _few = 0

    def _deal(self, prompts, idle):
        for prompt, slot in zip(prompts, idle):
            yield prompt, slot, None

    def _fewer_slots(self) -> int:
        return 0


class Clock:
    """Seconds that the stand-in for the devices took."""

    seconds = 0.0


class TimedCalls(SupposedCalls):
    def decode(self, *arguments):
        begun = time.perf_counter()
        outputs = super().decode(*arguments)
        Clock.seconds += time.perf_counter() - begun
        return outputs


class DocumentTokenizer:
    """A byte-level BPE tokenizer of this repository's documents, and the token ids of these."""

    def __init__(self):
        paths = sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
        text = "\n\n".join(path.read_text() for path in paths)
        self._tokenizer = Tokenizer(models.BPE())
        self._tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        self._tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=16000,
            special_tokens=["<pad>", "<|end_of_text|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        self._tokenizer.train_from_iterator(text.split("\n\n"), trainer)
        prose = re.sub(r"[#\n|`]+", " ", text)  # no stop string
        self.ids = np.asarray(self._tokenizer.encode(prose).ids, np.int32)
        self.vocab_size = self._tokenizer.get_vocab_size()

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

    def special_id(self, text: str) -> None:
        return None


@dataclasses.dataclass
class Stage:
    """Sums over the calls of a stage."""

    schedule: StageSchedule = dataclasses.field(default_factory=StageSchedule)
    host: float = 0.0

    def add(self, demand: Generation, model: SupposedModel, stop: tuple[str, ...], scheduler: type[Scheduler]) -> None:
        Clock.seconds, begun = 0.0, time.perf_counter()
        self.schedule += replay_generation(demand, model, SamplingParams(stop=stop), scheduler, TimedCalls)
        self.host += time.perf_counter() - begun - Clock.seconds


def waves(demand: Generation, needed: int) -> list[Generation]:
    """Returns the former waves of synthesis: each as many prompts as were needed at the yield so far."""
    count, found, done = len(demand.prompts), [], 0
    per_prompt = needed / count
    while done < count:
        size = (
            FIRST_WAVE if not done else min(LARGEST_WAVE, max(8, math.ceil((needed - per_prompt * done) / per_prompt)))
        )
        found.append(part(demand, done, done + size))
        done += size
    return found


def blocks(demand: Generation) -> list[Generation]:
    return [part(demand, first, first + BLOCK) for first in range(0, len(demand.prompts), BLOCK)]


def part(demand: Generation, first: int, last: int) -> Generation:
    return dataclasses.replace(demand, prompts=demand.prompts[first:last], completions=demand.completions[first:last])


def device_bytes(config: Config, architecture: Architecture, shards: int, tensor: int) -> tuple[float, float]:
    """Returns the bytes of the weights, and of a cache position of a slot, that a chip reads in a step."""
    tree = abstract_weights(architecture, config.decode.weights_dtype, jnp.dtype("bfloat16"))
    weights = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))
    position = 2 * architecture.layers * architecture.kv_heads * architecture.head_dim * 2
    return weights / tensor, position / tensor / shards


def least_seconds(schedule: StageSchedule, model: SupposedModel, chip: Chip) -> float:
    """Returns the least seconds of the stage: bytes at the chip's bandwidth, prompts at its peak."""
    weights, position = model.step_bytes
    seconds = sum(
        steps * (weights + slots * positions * position) / chip.hbm_bandwidth
        for (slots, positions), steps in schedule.decode.items()
    )
    # Each weight, of two bytes, is a multiplication and an addition for each token.
    return seconds + sum(calls * tokens for tokens, calls in schedule.prefill.items()) * weights / chip.flops


def row(config: str, stage: str, rules: str, found: Stage, model: SupposedModel, chip: Chip) -> list[str]:
    schedule = found.schedule
    host, device = found.host / schedule.calls, least_seconds(schedule, model, chip) / schedule.calls
    return [
        config,
        stage,
        rules,
        f"{schedule.steps:,}",
        f"{schedule.slots_busy:.0%}",
        f"{schedule.slots_busy_before_tail:.0%}",
        f"{schedule.padding:.2f}",
        f"{sum(schedule.prefill.values()):,}",
        f"{host / device:.0%}",
    ]


HEADER = [
    "config",
    "stage",
    "rules",
    "decode steps",
    "slots busy",
    "before the tail",
    "positions per prompt token",
    "prefill calls",
    "host / least device time of a call",
]


def rows_of(name: str, tokenizer: DocumentTokenizer) -> list[list[str]]:
    config = named_config(name)
    with tempfile.TemporaryDirectory() as work:
        architecture = planned_architecture(config.model.path, Path(work))
    tensor = config.mesh.decode_tensor or 1
    if config.mesh.topology:
        tpu = parse_topology(config.mesh.topology)
        chip, platform, shards = tpu.chip, "tpu", tpu.chips // tensor
    else:
        chip, platform, shards = GPU_CHIPS["H100"], "gpu", 1
    decode, asked = config.decode, stage_demands(config, Lengths())
    stops = {"instructions": load(config.prompts).synthesize_stop, "responses": BARE_STOP, "scores": ()}
    found = []
    for stage, title in STAGES.items():
        model = SupposedModel(
            Sizing(platform, shards),
            decode.max_length,
            decode.slots,
            decode.steps_per_call,
            device_bytes(config, architecture, shards, tensor),
            rows=tokenizer.vocab_size,
            tokenizer=tokenizer,
            text=tokenizer.ids[1000 : 1000 + decode.steps_per_call],
        )
        former = dataclasses.replace(model, sizing=FormerSizing(platform, shards))
        width = architecture.kv_heads * architecture.head_dim // tensor
        block = block_length(decode.max_length, width) if platform == "tpu" else KERNEL_BLOCK
        model = dataclasses.replace(model, read_block=block, reads_sequences_alone=True)
        before, after = Stage(), Stage()
        for demand in asked[stage, 1]:
            parts = waves(demand, config.synthesize.instructions) if demand.stream else blocks(demand)
            for one in parts:
                before.add(one, former, stops[stage], FormerScheduler)
            after.add(demand, model, stops[stage], Scheduler)
        found.append(row(name, title, "former", before, former, chip))
        found.append(row(name, title, "present", after, model, chip))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--configs", default="llama_70b_v4,llama_8b_v5e,llama_8b_gpu")
    parser.add_argument("--markdown", action="store_true")
    options = parser.parse_args()
    tokenizer = DocumentTokenizer()
    found = [row for name in options.configs.split(",") for row in rows_of(name, tokenizer)]
    if options.markdown:
        for cells in (HEADER, ["---"] * len(HEADER), *found):
            print("| " + " | ".join(cells) + " |")
    else:
        for cells in (HEADER, *found):
            print("  ".join(cell.rjust(max(12, len(title))) for cell, title in zip(cells, HEADER)))


if __name__ == "__main__":
    main()
