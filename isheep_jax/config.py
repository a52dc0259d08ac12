"""Every setting of a run, as frozen dataclasses whose docstrings are the texts of `--help` and `docs/settings.md`."""

import dataclasses
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from etils import epath

# "auto" is the tokenizer's own template, the others are keys of `text.chat_template.CHAT_TEMPLATES`.
ChatTemplate = Literal["auto", "chatml", "gemma", "llama3", "plain"]


@dataclass(frozen=True)
class ModelConfig:
    """The base model."""

    path: str = "tiny"
    """Directory in Hugging Face format (config.json, *.safetensors, tokenizer files). 'tiny': the embedded model."""
    chat_template: ChatTemplate = "auto"
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
    Self-Instruct's fields, or question and answer). 'builtin': the set that comes with the prompts; 'builtin:NAME':
    their file NAME.jsonl."""
    instructions: int = 10_000
    """New instructions per iteration (count, after rules and novelty)."""
    method: Literal["few_shot", "topics", "retrieved"] = "few_shot"
    """'few_shot': the model continues a list of seed tasks. 'topics': for a share of the instructions it first collects
    topics for each type of question in the prompts' topics.jsonl, and then asks about each topic (SELF-ALIGN).
    'retrieved': it writes one more question after a pair of the `retrieval` pool and those nearest to it (ISARA)."""
    topic_share: float = 0.27
    """Share of the instructions that 'topics' asks for by topic (0 to 1); the rest is 'few_shot'."""
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
    novelty_scope: Literal["run", "iteration", "hundred"] = "run"
    """Which earlier instructions those are beside the seeds: what the run, or this iteration, has kept. 'hundred':
    those since a hundred were kept, then none again (the authors' driver of the 72B models; it lets repeats in)."""
    turns: Literal[1, 2] = 1
    """Turns of a conversation (count). 2: the model also writes what a user might say next to each kept pair and
    answers that; scored and selected like the first turn, and trained on as one conversation with it."""


@dataclass(frozen=True)
class RespondConfig:
    """A response to each instruction."""

    method: Literal["zero_shot", "principles", "retrieved"] = "zero_shot"
    """'zero_shot': the model is shown the instruction alone. 'principles': after rules of good answers and a few
    conversations that keep them, it writes down its thoughts and then the answer; only the answer is trained on
    (SELF-ALIGN). 'retrieved': after the pairs of the `retrieval` pool that are nearest to the instruction (ISARA)."""

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
class RetrievalConfig:
    """Pairs of question and answer that prompts show by similarity, for the methods 'retrieved'. Nearness is the cosine
    of the writing model's mean last hidden states of the questions."""

    examples: int = 5
    """Pairs in each prompt (count)."""
    pool: Literal["seeds", "seeds_and_kept"] = "seeds"
    """Where they come from: the seeds, or also what the iterations before have kept."""
    choose: Literal["nearest", "random"] = "nearest"
    """'random': drawn without looking at similarity, to compare with."""


@dataclass(frozen=True)
class AssessConfig:
    """The model's own scores of each pair, from 1 to 10, for quality and for following the instruction."""

    level: Literal["none", "quality", "following", "both"] = "both"
    """Which scores are asked for and used. 'none': no score at all, so that the rules 'threshold' and 'top_fraction'
    keep everything that passed the text rules."""
    prompt: Literal["standard", "simple", "joint", "few_shot"] = "standard"
    """How a score is asked for. 'standard': each criterion spelled out in several aspects (the paper's combined
    prompt). 'simple': one aspect each. 'joint': both criteria in one prompt, one score. 'few_shot': no criteria but
    three scored examples, one score. A single score is recorded as quality."""
    judge: str = "current"
    """Who scores: 'current' (the model that wrote the responses), 'previous' (the one before it), 'base', another model
    (a directory, a run's directory, gs://..., a hub id), or the URL of an OpenAI-compatible server, such as
    http://localhost:8000/v1."""
    judge_model: str = ""
    """Name of the model on that server."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's API key; none is sent where it is not set."""
    judge_requests: int = 16
    """Requests to the server at the same time (count)."""
    read: Literal["expected", "sampled"] = "expected"
    """'expected': the mean of the score under the model's distribution over 1..10, by prefill alone. 'sampled': the
    first number of a sampled judgment; a judgment without one drops the pair."""
    samples: int = 1
    """Judgments per score of 'sampled' (count); the score is the mean of those with a number."""
    parser: Literal["strict", "paper"] = "strict"
    """How 'sampled' reads the number that a judgment begins with. 'strict': halves go up; a number below zero and the
    end of a range are none. 'paper': the authors' way; halves go to the even number, "-3" is 3 and "1-10" is 1."""
    temperature: float = 1.0
    """Sampling temperature of 'sampled'."""
    top_p: float = 0.95
    """Nucleus of 'sampled' (0 to 1)."""
    max_tokens: int = 16
    """New tokens per sampled judgment (count); only a number at the start counts."""
    agreement: int = 0
    """Pairs per iteration (count, drawn at random) that a second judge scores, too: the base model, or the current one
    where the base model is the judge. How far the two agree goes into summary.json."""


# The rules of selection.
Rule = Literal[
    "threshold",
    "top_fraction",
    "random",
    "random_threshold",
    "perplexity",
    "density",
    "density_perplexity",
    "none",
]


@dataclass(frozen=True)
class SelectConfig:
    """Which scored pairs the model learns from."""

    rule: Rule = "threshold"
    """'threshold': every score above it. 'top_fraction': the best by `ranking`. 'random', 'random_threshold': as many
    as top_fraction or threshold would keep, drawn without looking at scores. 'perplexity': the response is not too
    surprising to the judge. 'density': one pair per cluster of instructions, drawn at random. 'density_perplexity': the
    pair of lowest perplexity of each cluster. 'none': everything that passed the text rules."""
    threshold: float = 8.0
    """Each score must be strictly above this (-1 to 10). 0: pairs without a score stay, too. -1: also those that
    respond.rules dropped, other than unfinished and empty ones."""
    fraction: float = 0.3
    """Share of the instructions that top_fraction and random keep (0 to 1)."""
    ranking: Literal["sum", "probability"] = "sum"
    """What makes a pair better than another: the sum of its scores, or the probability that all of them, sampled, would
    be above the threshold (needs assess.read=expected)."""
    perplexity: float = 50.0
    """Highest perplexity per token of a response, given its instruction, that the rule 'perplexity' keeps."""
    clusters: int = 3000
    """Clusters of the instructions' mean last-layer vectors by k-means (count), for the density rules and for
    buckets=clusters, where some tens are enough."""
    buckets: Literal["none", "sentences", "opening", "clusters"] = "none"
    """Groups of instructions of which top_fraction and random keep the same share, so that no kind that scores well
    crowds out the others. 'sentences': by number of sentences (1, 2, 3, more). 'opening': also by first word.
    'clusters': by meaning."""
    bucket_share: float = 1.0
    """Largest share of what the rule keeps that one bucket may have (0 to 1); the rest of it is dropped, so that no
    topic takes over."""
    following_ceiling: float = 10.0
    """A following score above this counts as this (1 to 10), so that quality decides among pairs that all follow."""
    top_up_to: int = 0
    """Where a rule that ranks keeps fewer pairs, the best of the others join until there are this many (count)."""
    min_pairs: int = 1
    """The run stops, resumable, when fewer pairs are kept (count)."""
    max_pairs: int = 3000
    """At most this many pairs are kept (count)."""
    max_pairs_order: Literal["best", "first"] = "best"
    """Which pairs stay when max_pairs cuts: the best by score, or the first in the order of generation (as always with
    the rules that draw and with 'none', which never look at scores)."""


@dataclass(frozen=True)
class GuardConfig:
    """What happens when an iteration collapses, and when it counts as collapsed."""

    action: Literal["warn", "stop", "off"] = "warn"
    """'stop': the run ends; the same command with a lower limit goes on from there."""
    min_novelty: float = 0.05
    """Lowest share of the well-formed instructions that are new (0 to 1)."""
    min_score_mass: float = 0.5
    """Lowest median probability that the judge gives to the ten scores together (0 to 1), where it is known."""
    min_yield: float = 0.02
    """Lowest share of synthesize.instructions that is kept in the end (0 to 1)."""


@dataclass(frozen=True)
class StopConfig:
    """When the run ends before its last iteration."""

    measure: Literal["none", "accuracy", "validation_loss"] = "none"
    """'none': after all iterations. 'accuracy': when the mean over evaluate.tasks rises no more. 'validation_loss':
    when the fine-tuning's falls no more (needs sft.validation_fraction)."""
    patience: int = 1
    """Iterations without a better value before the run ends (count)."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on the kept pairs."""

    start: Literal["base", "previous"] = "base"
    """Weights to start from: the base model's, or the previous iteration's."""
    data: Literal["iteration", "all"] = "iteration"
    """Pairs to learn from: those that this iteration kept, or those of all iterations so far. With `start` these are
    the paper's One_base, One_last, Total_base and Total_last."""
    seeds: Literal["none", "added", "alone"] = "none"
    """Whether the seed tasks are learned from, too; all need an output. 'alone': nothing else is, to compare with."""
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
    batch_size: int = 16
    """Rows per update (count), over all devices."""
    packing: bool = True
    """Whether as many pairs share a row as fit. Without it a row is one pair, so that an update learns from batch_size
    pairs, as in the paper; most of a row is then empty."""
    validation_fraction: float = 0.1
    """Share of the pairs held out of training to choose the best checkpoint (0 to 1)."""
    checkpoint_every: int = 100
    """Updates between validations and checkpoints (count)."""
    remat: Literal["none", "full"] = "full"
    """'full': recompute each layer's activations in the backward pass, to save memory."""


@dataclass(frozen=True)
class CloneConfig:
    """Verbose cloning (SELF-ALIGN): the fine-tuned model answers all instructions again, asked to be thorough, and the
    iteration's model is fine-tuned on these answers, from the same weights as the first."""

    enabled: bool = False
    """Whether there is this second fine-tuning; the first model is then the iteration's `engraved/model`."""
    temperature: float = 0.3
    """Sampling temperature."""
    top_p: float = 0.7
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 512
    """New tokens per answer (count)."""


@dataclass(frozen=True)
class DecodeConfig:
    """The decode engine."""

    slots: int = 0
    """Sequences decoded at the same time (count, over all devices). 0: as many as the free memory holds, and on a CPU
    at most 256."""
    steps_per_call: int = 32
    """Decode steps between two looks of the host at the results (count)."""
    max_length: int = 0
    """Longest prompt plus completion (tokens). 0: the model's context. The cache is only as long as the longest request
    of a stage may become."""
    weights_dtype: Literal["model", "int8"] = "model"
    """How weights are stored while decoding and scoring. 'model': as model.compute_dtype. 'int8': matrices as 8-bit
    integers with a scale for each output (for each token of the embeddings): half the memory of bfloat16."""
    kv_cache_dtype: Literal["model", "int8"] = "model"
    """How keys and values of the sequences in the slots are stored. 'model': as model.compute_dtype. 'int8': as 8-bit
    integers with a scale for each token and head: about half the memory of bfloat16, so twice the slots."""


@dataclass(frozen=True)
class TinyTaskConfig:
    """Settings of a task on the tiny world."""

    split: Literal["development", "selection", "test"] = "development"
    """Which held-out prompts to use. Settings are chosen on 'development', final figures are of 'test'."""


# The evaluation tasks; `isheep_jax.evaluation.tasks.TASKS` holds what each one does.
TaskName = Literal["tiny", "tiny_domain"]


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurements of the base model and of every iteration. A section with a task's name has the settings
    that only this task has."""

    tasks: tuple[TaskName, ...] = ()
    """Tasks to evaluate on. 'tiny': held-out instructions of the tiny world. 'tiny_domain': those of one domain of it,
    which `--config=tiny_domain` is about."""
    limit: int = 512
    """Prompts per task (count); the first of each task's fixed order."""
    tiny: TinyTaskConfig = field(default_factory=TinyTaskConfig)
    tiny_domain: TinyTaskConfig = field(default_factory=TinyTaskConfig)


@dataclass(frozen=True)
class Config:
    """One run of the loop."""

    name: str = "custom"
    """Name of the run; results go to runs/NAME unless workdir is set."""
    workdir: str = ""
    """Directory of the run, local or gs://bucket/path. The same command on the same directory resumes."""
    iterations: int = 3
    """Rounds of synthesize, respond, assess, select and fine-tune (count)."""
    seed: int = 0
    """Seed of every random number of the run."""
    prompts: str = "standard"
    """Prompt templates: 'standard', 'tiny', or a directory with the same files."""
    model: ModelConfig = field(default_factory=ModelConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    synthesize: SynthesizeConfig = field(default_factory=SynthesizeConfig)
    respond: RespondConfig = field(default_factory=RespondConfig)
    retrieval: RetrievalConfig = field(default_factory=RetrievalConfig)
    assess: AssessConfig = field(default_factory=AssessConfig)
    select: SelectConfig = field(default_factory=SelectConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    sft: SFTConfig = field(default_factory=SFTConfig)
    clone: CloneConfig = field(default_factory=CloneConfig)
    decode: DecodeConfig = field(default_factory=DecodeConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    stop: StopConfig = field(default_factory=StopConfig)

    @property
    def directory(self) -> "epath.Path":
        """Where the run lives."""
        from etils import epath  # here, so that --help does not wait for it

        return epath.Path(self.workdir or f"runs/{self.name}")


# The settings that most runs change. `--help` and `docs/settings.md` list them before the details of the method.
EVERYDAY = (
    "workdir",
    "iterations",
    "seed",
    "prompts",
    "model.path",
    "model.chat_template",
    "model.compute_dtype",
    "mesh.fsdp",
    "mesh.tensor",
    "mesh.decode_tensor",
    "synthesize.seeds",
    "synthesize.instructions",
    "respond.samples",
    "assess.judge",
    "select.rule",
    "select.threshold",
    "select.fraction",
    "sft.method",
    "sft.start",
    "sft.learning_rate",
    "sft.epochs",
    "sft.sequence_length",
    "sft.batch_size",
    "decode.slots",
    "decode.max_length",
    "evaluate.tasks",
    "evaluate.limit",
)


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


def is_server(judge: str) -> bool:
    """Whether the setting assess.judge is the URL of a server."""
    return judge.startswith(("http://", "https://"))
