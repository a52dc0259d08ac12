"""What an iteration does between its stages: it loads weights, from files or the hosts' memory, and saves what it made.

Loads follow from who is asked in which order, since the devices hold one model at a time.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from isheep_jax.checkpoint.hf_save import STREAMS
from isheep_jax.config import Config, SFTConfig
from isheep_jax.loop.judging.judges import second_judge
from isheep_jax.loop.stages import judge_check
from isheep_jax.model.architecture import Architecture, leaves
from isheep_jax.model.lora import lora_table

Layout = Literal["decode", "train"]

# Bytes per second that a host reads from a bucket with many ranges at once, and that one stream writes to it. Writing
# is what others measured: 100 to 200 GB at 141 to 148 MB/s (epam/cloud-pipeline#1374). Reading is assumed.
READ_RATE = 1e9
STREAM_RATE = 145e6
WRITE_RATE = STREAMS * STREAM_RATE
# Bytes per second from a host's memory to each of its devices: assumed, half of what Austin et al. 2025 (How To Scale
# Your Model, chapter 2) give for a chip's PCIe.
HOST_LINK = 8e9

# Models that are loaded: the base, those that the iteration before and the one before that made, the one that verbose
# cloning learns from, and a judge that is none of them.
BASE, MADE, MADE_BEFORE, ENGRAVED, FOREIGN = "base", "made", "made before", "engraved", "foreign"
_OWN_JUDGES = {"base": BASE, "current": MADE, "previous": MADE_BEFORE}
# Who is asked in each stage; None: a training.
_ASKED = {
    judge_check.STAGE: "judge",
    "instructions": "writer",
    "responses": "writer",
    "scores": "judge",
    "vectors": "judge",
    "agreement": "second judge",
    "follow_ups": "writer",
    "engraved": None,
    "thorough": "engraved model",
    "model": None,
}


@dataclass(frozen=True)
class Between:
    """What is done between stages. assumption: how the seconds come about."""

    name: str
    seconds: float
    assumption: str


@dataclass(frozen=True)
class Hosts:
    """The machines that the devices are attached to, and the weights that they load and save.

    count: machines.
    devices: of each machine.
    model_bytes: of a model in files.
    adapter_bytes: of an adapter in files; 0 where all weights are trained.
    memory: bytes that a machine may keep the base in; 0 where that is not known.
    one_layout: whether training splits the weights as decoding does, so that what is kept serves both.
    """

    count: int
    devices: int
    model_bytes: float
    adapter_bytes: float = 0.0
    memory: float = 0.0
    one_layout: bool = False

    @property
    def share(self) -> float:
        """Bytes of a model that one machine reads and places on its devices."""
        return self.model_bytes / self.count

    def kept(self, layout: Layout) -> float:
        """Returns the bytes of the base, as a layout splits it, that a machine's memory holds; decoding comes first."""
        if layout == "decode" or self.one_layout:
            return min(self.share, self.memory)
        return min(self.share, self.memory - self.kept("decode"))

    def __str__(self) -> str:
        return f"each of {self.count} hosts" if self.count > 1 else "the host"


@dataclass(frozen=True)
class Load:
    """A model that is put on the devices. who: for whom. model: one of the names above."""

    who: str
    model: str
    layout: Layout


def adapter_bytes(architecture: Architecture, sft: SFTConfig) -> float:
    """Returns the bytes of an adapter in files, which are float32; 0 where all weights are trained."""
    if sft.method == "full":
        return 0.0
    return 4.0 * sum(math.prod(spec.shape) for _, spec in leaves(lora_table(architecture, sft.lora_rank)))


def loads(config: Config, stages: Iterable[str]) -> list[Load]:
    """Returns the models that an iteration after the first loads, one after the other.

    stages: their names in the loop's table, in their order.
    """
    models = {
        "writer": MADE,
        "judge": _judge(config, config.assess.judge),
        "second judge": _judge(config, second_judge(config)),
        "engraved model": ENGRAVED,
    }
    # Of iterations 3 and on, of which each has a new judge if it is one that the run makes.
    checks = [judge_check.STAGE] if judge_check.is_needed(config, 3) else []
    found: list[Load] = []
    for who in (_ASKED[stage] for stage in (*checks, *stages)):
        if who is None:
            found.append(Load("training", BASE if config.sft.start == "base" else MADE, "train"))
        # The devices have what was loaded last, until a training takes their memory.
        elif not found or (models[who], "decode") != (found[-1].model, found[-1].layout):
            found.append(Load(who, models[who], "decode"))
    return found


def _judge(config: Config, judge: str) -> str:
    return BASE if judge == config.model.path else _OWN_JUDGES.get(judge, FOREIGN)


def between_stages(config: Config, hosts: Hosts, stages: Iterable[str]) -> list[Between]:
    """Returns what an iteration after the first does between its stages.

    A judge that is another model counts as one of the base's size. What the devices exchange among each other after the
    hosts have placed weights, and merging adapters, take fractions of a second and are left out.

    Args:
        config: settings.
        hosts: what loads and saves.
        stages: their names in the loop's table, in their order.
    """
    loaded = loads(config, stages)
    reads = [(load.who, _read(config, hosts, load)) for load in loaded]
    parts = ", ".join(f"{who} {size / 1e9:.1f} GB" for who, size in reads if size) or "nothing"
    rows = [
        Between(
            "read weights",
            sum(size for _, size in reads) / READ_RATE,
            f"{parts}, by {hosts} at an assumed {READ_RATE / 1e9:.0f} GB/s; {_whereabouts(hosts)}",
        ),
        Between(
            "place weights",
            len(loaded) * hosts.share / hosts.devices / HOST_LINK,
            f"{len(loaded)} times ({', '.join(load.who for load in loaded)}) {hosts.share / 1e9:.1f} GB from "
            f"{hosts} to its devices, at an assumed {HOST_LINK / 1e9:.0f} GB/s for each of these",
        ),
    ]
    trainings = sum(load.layout == "train" for load in loaded)
    if config.sft.save == "model":
        written = trainings * hosts.share
        rows.append(Between("save the model", written / WRITE_RATE, _written(hosts, written)))
    if hosts.adapter_bytes:
        written = trainings * hosts.adapter_bytes
        rate = f"{STREAM_RATE / 1e6:.0f} MB/s"
        note = f"{written / 1e9:.2f} GB from one host in a stream of {rate} (epam/cloud-pipeline#1374)"
        rows.append(Between("save the adapter", written / STREAM_RATE, note))
    return rows


def at_first(hosts: Hosts) -> list[Between]:
    """Returns what the first iteration reads of the base that later ones have in the hosts' memory."""
    kept = hosts.kept("decode") + (0.0 if hosts.one_layout else hosts.kept("train"))
    if not kept:
        return []
    split = "split alike" if hosts.one_layout else "each split in its own way"
    note = f"{kept / 1e9:.1f} GB of the base, which {hosts} keeps for decoding and training, {split}"
    return [Between("read and keep", kept / READ_RATE, f"{note}; the first iteration only")]


def at_end(config: Config, hosts: Hosts) -> list[Between]:
    """Returns what is saved once, as the run ends: the whole model, where iterations save their adapters alone."""
    if config.sft.save == "model":
        return []
    # Each host reads the base's tensors from files beside writing those that are merged.
    seconds = hosts.share / min(READ_RATE, WRITE_RATE)
    note = "; as the run ends, for its last iteration, and once more where the best is another"
    return [Between("merge and save", seconds, _written(hosts, hosts.share) + note)]


def _read(config: Config, hosts: Hosts, load: Load) -> float:
    """Returns the bytes that each host reads from files for a load."""
    if load.model == FOREIGN or (load.model != BASE and config.sft.save == "model"):
        return hosts.share
    # Each fine-tuning that starts from the previous model adds an adapter to those before.
    chain = 1 if config.sft.start == "base" else max(1, config.iterations - 1)
    # At most: the rows of its tensors are too few to be split over all hosts.
    adapters = 0 if load.model == BASE else chain * hosts.adapter_bytes
    return hosts.share - hosts.kept(load.layout) + adapters


def _whereabouts(hosts: Hosts) -> str:
    """Returns where the base is, as a clause."""
    layouts: tuple[Layout, ...] = ("decode", "train")
    kept = [hosts.kept(layout) for layout in layouts]
    if not any(kept):
        return "how much memory a host has for the base is not known"
    if min(kept) == hosts.share:
        return "the base is in the hosts' memory"
    return "as much of the base as fits is in the hosts' memory"


def _written(hosts: Hosts, size: float) -> str:
    return (
        f"{size / 1e9:.1f} GB from {hosts} in {STREAMS} streams of {STREAM_RATE / 1e6:.0f} MB/s "
        "(epam/cloud-pipeline#1374)"
    )
