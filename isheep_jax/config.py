"""Every setting, once: frozen dataclasses whose docstrings are the `--help` texts, and the finder of named configs."""

import dataclasses
import difflib
import importlib.util
import inspect
import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from isheep_jax.errors import UserError

if TYPE_CHECKING:
    from etils import epath


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = "tiny"
    """Directory in Hugging Face format (config.json, *.safetensors, tokenizer files). 'tiny': the embedded model."""
    chat_template: Literal["auto", "chatml", "gemma", "llama3", "plain"] = "auto"
    """Chat template for answers, training and evaluation. 'auto': the tokenizer's own; base models without one need a
    name, such as 'plain', which suits every vocabulary."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Number format of activations and of the weights while decoding. Full fine-tuning keeps float32 master weights."""


@dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out. The product of the three axes is the number of devices."""

    data: int = 1
    """Replicas of the weights, each with its share of the batch (count; -1: all devices that remain)."""
    fsdp: int = -1
    """Shards of weights, optimizer state and batch while training (count; -1: all devices that remain)."""
    tensor: int = 1
    """Shards of heads and feed-forward units while training (count; -1: all devices that remain)."""
    decode_tensor: int = 1
    """Shards of heads and feed-forward units while decoding (count); the other devices hold replicas of the weights."""
    topology: str = ""
    """TPU slice that the config is for, such as v4-256 or v5e-16; `python -m isheep_jax.plan` compiles for it. Training
    uses the devices that it finds. Empty: the devices of this machine."""
    slices: int = 1
    """Slices of that topology (count); `data` is split over them first."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """New instructions, written by the model from a few seeds in its context."""

    seeds: str = "builtin"
    """Seed tasks: a JSON Lines file (or a JSON array) with the fields instruction, input and output (or
    Self-Instruct's fields). 'builtin': the set that comes with the prompts."""
    instructions: int = 10_000
    """New instructions per iteration (count, after rules and novelty)."""
    shots: int = 5
    """Seed tasks shown in each prompt (count), drawn afresh without replacement."""
    temperature: float = 1.0
    """Sampling temperature."""
    top_p: float = 0.95
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 1000
    """New tokens per completion (count); a completion holds several instructions."""
    rules: Literal["paper", "basic"] = "paper"
    """Rules for instructions. 'paper': length, tasks that text alone cannot do, English only, leftovers of the form.
    'basic': well-formed and not empty."""
    novelty: float = 0.7
    """Highest ROUGE-L F1 (0 to 1) to any earlier instruction, seeds included; an instruction above it is dropped."""


@dataclass(frozen=True)
class RespondConfig:
    """A response to each instruction, without examples."""

    samples: int = 1
    """Responses per instruction (count); with more than one, the best by score is used."""
    temperature: tuple[float, ...] = (1.0,)
    """Sampling temperature of iteration 1, 2, ...; the last value holds for all further iterations."""
    top_p: float = 0.95
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 1000
    """New tokens per response (count)."""
    base_prompt: Literal["bare", "chat"] = "bare"
    """What the base model is shown in iteration 1: the bare instruction, or the chat template as later iterations."""
    rules: Literal["paper", "basic"] = "paper"
    """Rules for responses. 'paper': no role lines, option labels, questions back or foreign script. 'basic': finished
    and not empty."""


@dataclass(frozen=True)
class AssessConfig:
    """The model's own scores of each pair, from 1 to 10, for quality and for following the instruction."""

    judge: Literal["base", "current"] = "current"
    """Which weights score: the base model's, or those that wrote the responses."""
    read: Literal["expected", "sampled"] = "expected"
    """'expected': the mean of the score under the model's distribution over 1..10, by prefill alone. 'sampled': the
    first number of a sampled judgement; a judgement without one drops the pair."""
    temperature: float = 1.0
    """Sampling temperature of 'sampled'."""
    top_p: float = 0.95
    """Nucleus of 'sampled' (0 to 1)."""
    max_tokens: int = 16
    """New tokens per sampled judgement (count); only a number at the start counts."""


@dataclass(frozen=True)
class SelectConfig:
    """Which scored pairs the model learns from."""

    rule: Literal["threshold", "top_fraction", "random", "none"] = "threshold"
    """'threshold': every score above it. 'top_fraction': the best by the sum of the scores. 'random': as many as
    top_fraction would keep, drawn without looking at scores. 'none': everything that passed the rules."""
    threshold: float = 8.0
    """Each score must be strictly above this (1 to 10)."""
    fraction: float = 0.3
    """Share of the instructions that top_fraction and random keep (0 to 1)."""
    buckets: Literal["none", "sentences", "opening"] = "none"
    """Groups of instructions of which top_fraction and random keep the same share, so that no kind that scores well
    crowds out the others. 'sentences': by number of sentences (1, 2, 3, more). 'opening': also by first word."""
    following_ceiling: float = 10.0
    """A following score above this counts as this (1 to 10), so that quality decides among pairs that all follow."""
    at_least: int = 1
    """The run stops, resumable, when fewer pairs are kept (count)."""
    at_most: int = 3000
    """At most this many pairs are kept (count)."""
    at_most_order: Literal["best", "first"] = "best"
    """Which pairs stay when at_most cuts: the best by score, or the first in the order of generation (as always with
    the rules 'random' and 'none', which never look at scores)."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on the kept pairs."""

    start: Literal["base", "previous"] = "base"
    """Weights to start from: the base model's, or the previous iteration's."""
    method: Literal["lora", "full"] = "lora"
    """'lora': low-rank adapters on all linear layers, merged at the end. 'full': all weights."""
    lora_rank: int = 8
    """Rank of the adapters (count)."""
    lora_alpha: float = 16.0
    """The adapters' product is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout on the adapters' input (0 to 1)."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW; it falls along a cosine to zero."""
    warmup_steps: int = 20
    """Updates of linear warm-up (count)."""
    weight_decay: float = 0.0
    """AdamW's weight decay on matrices."""
    clip_norm: float = 1.0
    """Gradients are scaled down to this global norm."""
    epochs: int = 2
    """Passes over the kept pairs (count)."""
    sequence_length: int = 1024
    """Tokens per packed row (count); a longer pair is cut."""
    batch_rows: int = 16
    """Packed rows per update (count), over all devices."""
    validation_fraction: float = 0.1
    """Share of the pairs held out of training to choose the best checkpoint (0 to 1)."""
    checkpoint_every: int = 100
    """Updates between validations and checkpoints (count)."""
    remat: Literal["none", "full"] = "full"
    """'full': recompute each layer's activations in the backward pass, to save memory."""


@dataclass(frozen=True)
class DecodeConfig:
    """The decode engine."""

    slots: int = 64
    """Sequences decoded at the same time (count, over all devices)."""
    chunk: int = 32
    """Decode steps between two looks of the host at the results (count)."""
    context: int = 2048
    """Longest prompt plus completion (tokens)."""
    score_batch: int = 64
    """Prompts scored at the same time (count, over all devices)."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurements of the base model and of every iteration."""

    tasks: tuple[Literal["tiny"], ...] = ()
    """Benchmarks to run. 'tiny': held-out instructions of the tiny world."""
    split: Literal["development", "selection", "test"] = "development"
    """Which held-out prompts of the tiny world to use."""
    prompts: int = 512
    """Prompts per benchmark (count)."""


@dataclass(frozen=True)
class Config:
    """One run of the loop."""

    name: str = "custom"
    """Name of the run; results go to runs/NAME unless workdir is set."""
    workdir: str = ""
    """Directory of the run, local or gs://bucket/path. The same command on the same directory resumes."""
    iterations: int = 3
    """Rounds of synthesise, respond, assess, select and fine-tune (count)."""
    seed: int = 0
    """Seed of every random number of the run."""
    prompts: str = "standard"
    """Prompt templates: 'standard', 'tiny', or a directory with the same files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    assess: AssessConfig = field(default_factory=AssessConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)

    @property
    def directory(self) -> "epath.Path":
        """Where the run lives."""
        from etils import epath  # here, so that --help does not wait for it

        return epath.Path(self.workdir or f"runs/{self.name}")


def configs_directory() -> Path:
    """The directory of named configs: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parent
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def config_names() -> list[str]:
    return sorted(p.stem for p in configs_directory().glob("*.py") if not p.stem.startswith("_"))


def named_config(name: str) -> Config:
    """The config that `configs/NAME.py` returns from its `config()`.

    Raises `UserError` with the nearest name when there is no such file.
    """
    path = configs_directory() / f"{name}.py"
    if name not in config_names():
        near = difflib.get_close_matches(name, config_names(), n=1, cutoff=0.4)
        hint = f"did you mean '{near[0]}'? " if near else ""
        raise UserError(f"--config: there is no config '{name}'; {hint}known: {', '.join(config_names())}")
    return _load(path).config()


def config_description(name: str) -> str:
    """The docstring of `configs/NAME.py`: command, hardware, memory and the result to expect."""
    return inspect.cleandoc(_load(configs_directory() / f"{name}.py").__doc__ or "")


def _load(path: Path):
    spec = importlib.util.spec_from_file_location(f"isheep_jax_config_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def to_json(config: Config) -> str:
    return json.dumps(dataclasses.asdict(config), indent=2) + "\n"


def flatten(config: Config) -> dict[str, object]:
    """Settings by their command-line names: {"sft.learning_rate": 5e-05, ...}."""

    def walk(value, prefix):
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            if dataclasses.is_dataclass(v):
                yield from walk(v, f"{prefix}{f.name}.")
            else:
                yield f"{prefix}{f.name}", list(v) if isinstance(v, tuple) else v

    return dict(walk(config, ""))


# What a number may be, as an interval: a square bracket includes the end, a round one does not.
RANGES = {
    "iterations": "[1, inf)",
    "mesh.slices": "[1, inf)",
    "synthesize.instructions": "[1, inf)",
    "synthesize.shots": "[1, inf)",
    "synthesize.temperature": "[0, inf)",
    "synthesize.top_p": "(0, 1]",
    "synthesize.max_tokens": "[1, inf)",
    "synthesize.novelty": "[0, 1]",
    "respond.samples": "[1, inf)",
    "respond.temperature": "[0, inf)",
    "respond.top_p": "(0, 1]",
    "respond.max_tokens": "[1, inf)",
    "assess.temperature": "[0, inf)",
    "assess.top_p": "(0, 1]",
    "assess.max_tokens": "[1, inf)",
    "select.threshold": "[0, 10]",
    "select.fraction": "(0, 1]",
    "select.following_ceiling": "[1, 10]",
    "select.at_least": "[0, inf)",
    "select.at_most": "[1, inf)",
    "sft.lora_rank": "[1, inf)",
    "sft.lora_alpha": "(0, inf)",
    "sft.lora_dropout": "[0, 1)",
    "sft.learning_rate": "(0, inf)",
    "sft.warmup_steps": "[0, inf)",
    "sft.weight_decay": "[0, inf)",
    "sft.clip_norm": "(0, inf)",
    "sft.epochs": "[1, inf)",
    "sft.sequence_length": "[2, inf)",
    "sft.batch_rows": "[1, inf)",
    "sft.validation_fraction": "[0, 1)",
    "sft.checkpoint_every": "[1, inf)",
    "decode.slots": "[1, inf)",
    "decode.chunk": "[1, inf)",
    "decode.context": "[2, inf)",
    "decode.score_batch": "[1, inf)",
    "evaluate.prompts": "[1, inf)",
}


def check_values(config: Config) -> None:
    """Raises `UserError` for a number out of its range and for an empty list that needs an item."""
    settings = flatten(config)
    for name, interval in RANGES.items():
        value = settings[name]
        for number in value if isinstance(value, list) else [value]:
            check_range(name, number, interval)
    if not settings["respond.temperature"]:
        raise UserError("--respond.temperature: the list is empty; it needs a temperature for iteration 1")


def check_range(name: str, number: float, interval: str) -> None:
    """Raises `UserError` when the number is outside the interval, written as in `RANGES`."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    inside = low < number < high or (interval[0] == "[" and number == low) or (interval[-1] == "]" and number == high)
    if not inside:
        parts = [f"at least {low:g}" if interval[0] == "[" else f"above {low:g}"]
        if math.isfinite(high):
            parts.append(f"at most {high:g}" if interval[-1] == "]" else f"below {high:g}")
        raise UserError(f"--{name}: {number} is out of range; it must be {' and '.join(parts)}")
