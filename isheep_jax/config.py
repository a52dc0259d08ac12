"""Every setting of a run, as frozen dataclasses whose docstrings are the texts of `--help` and `docs/settings.md`."""

import dataclasses
import json
from collections.abc import Collection
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
    """Directory in Hugging Face format (config.json, *.safetensors, tokenizer files), hub id, or GGUF file (with the
    extra 'gguf'). 'tiny': the embedded model."""
    chat_template: ChatTemplate = "auto"
    """Chat template for answers, training and evaluation. 'auto': the tokenizer's own; base models without one need a
    name, such as 'plain', which suits every vocabulary."""
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """dtype of activations, and of the weights while decoding. Full fine-tuning keeps float32 master weights."""


@dataclass(frozen=True)
class MeshConfig:
    """The device mesh. The product of the axes data, fsdp and tensor is the number of devices."""

    data: int = 1
    """Replicas of the weights, each with a share of the batch (count; -1: all devices that remain)."""
    fsdp: int = -1
    """Shards of weights, optimizer state and batch while training (count; -1: all devices that remain)."""
    tensor: int = 1
    """Tensor parallelism while training: shards of heads and feed-forward units (count; -1: all devices that
    remain)."""
    decode_tensor: int = 1
    """Tensor parallelism while decoding: shards of heads and feed-forward units (count); the other devices hold
    replicas of the weights."""
    topology: str = ""
    """TPU slice that the config is for, such as v4-256 or v5e-16: `python -m isheep_jax.plan` compiles for it, while
    training uses the devices that it finds. Empty: the devices of this machine."""
    slices: int = 1
    """TPU slices of this topology (count); the axis `data` is split over them first."""


@dataclass(frozen=True)
class SynthesizeConfig:
    """New instructions, written by the model from a few seeds in its context."""

    seeds: str = "builtin"
    """Seed tasks: a JSON Lines file (or a JSON array) with the fields instruction, input and output (or
    Self-Instruct's fields, or question and answer). 'builtin': the set that comes with the prompts; 'builtin:NAME':
    their file NAME.jsonl. Tasks that an evaluation task measures with are left out."""
    instructions: int = 10_000
    """New instructions per iteration (count, after rules and novelty)."""
    method: Literal["few_shot", "topics", "retrieved"] = "few_shot"
    """'few_shot': the model continues a list of seed tasks. 'topics': for a share of the instructions it first collects
    topics for each type of question in the prompts' topics.jsonl, and then asks about each topic (SELF-ALIGN).
    'retrieved': it writes one more question after a pair of the `retrieval` pool and its nearest neighbors (ISARA)."""
    topic_share: float = 0.27
    """Share of the instructions that the method 'topics' writes by topic (0 to 1); the rest is 'few_shot'."""
    shots: int = 5
    """Seed tasks in each prompt (count), all different."""
    choose: Literal["random", "nearest", "diverse"] = "random"
    """Which seed tasks a prompt shows. 'nearest': a random one and those most similar to it, by the mean last hidden
    states in the model that writes. 'diverse': ones that are little similar to each other."""
    temperature: float = 1.0
    """Sampling temperature."""
    other_shots: tuple[int, ...] = ()
    """Values besides `shots` to try: the first prompts try all combinations with the temperatures equally, the later
    ones use the one that gave the most kept instructions per token so far."""
    other_temperatures: tuple[float, ...] = ()
    """Values besides `temperature` to try in the same way."""
    trial_prompts: int = 16
    """Prompts by which each combination of the shots and temperatures is tried (count)."""
    top_p: float = 0.95
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 1000
    """New tokens per completion (count). A completion holds several instructions."""
    rules: Literal["paper", "strict", "basic"] = "paper"
    """Text rules for instructions. 'paper': limits on length, no tasks beyond text, English only, no remains of the
    prompt's format. 'strict': also nothing that weak models write in the place of a task, such as loops, statements and
    inputs that repeat the instruction (docs/instructions.md). 'basic': well-formed and not empty."""
    drop_lowest: float = 0.0
    """Share of the well-formed instructions of every 64 prompts that is dropped (0 to 1): those that the
    announcement of a task makes least likelier, in the eyes of the model that writes."""
    novelty: float = 0.7
    """Highest ROUGE-L F1 (0 to 1) to any earlier instruction, seeds included; an instruction above it is dropped."""
    novelty_scope: Literal["run", "iteration", "hundred"] = "run"
    """Which earlier instructions count besides the seeds: all that the run has kept, or this iteration. 'hundred': the
    list starts again from the seeds after every hundred that are kept (the authors' driver for the 72B models, which
    lets repeats in)."""
    turns: Literal[1, 2] = 1
    """Turns of a conversation (count). 2: after each kept pair the model also writes what a user might say next, and
    answers it. Second turns are scored and selected like the first, and trained on as one conversation with it."""


@dataclass(frozen=True)
class RespondConfig:
    """A response to each instruction."""

    method: Literal["zero_shot", "principles", "retrieved"] = "zero_shot"
    """'zero_shot': the prompt is the instruction alone. 'principles': the prompt has rules of good answers and a few
    conversations that follow them; the model writes its thoughts and then the answer, and only the answer is trained on
    (SELF-ALIGN). 'retrieved': the prompt has the pairs of the `retrieval` pool nearest to the instruction (ISARA)."""
    samples: int = 1
    """Responses per instruction (count). With more than one, the best by score is used."""
    temperature: tuple[float, ...] = (1.0,)
    """Sampling temperature of iteration 1, 2, ...; later iterations use the last value."""
    top_p: float = 0.95
    """Sampling keeps the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 1000
    """New tokens per response (count)."""
    base_prompt: Literal["bare", "chat"] = "bare"
    """Prompt of the base model in iteration 1: the bare instruction, or the chat template as in later iterations."""
    rules: Literal["paper", "basic"] = "paper"
    """Text rules for responses. 'paper': no role lines, option labels, counter-questions or foreign script. 'basic':
    finished and not empty."""


@dataclass(frozen=True)
class RetrievalConfig:
    """Pairs of question and answer that the methods 'retrieved' put into prompts by similarity: the cosine between the
    questions' mean last hidden states in the model that writes."""

    examples: int = 5
    """Pairs in each prompt (count)."""
    pool: Literal["seeds", "seeds_and_kept"] = "seeds"
    """Source of the pairs: the seeds, or also what earlier iterations have kept."""
    choose: Literal["nearest", "random"] = "nearest"
    """'nearest': by similarity. 'random': regardless of it, as a baseline."""


# How a pair is read; `isheep_jax.loop.judging.readings.READINGS` holds what each one does.
ReadingName = Literal[
    "rubric",
    "lift",
    "backward_lift",
    "likelihood",
    "ending",
    "self_consistency",
    "pairwise",
]
# Which prompt the judge gets; `criteria_of` in `isheep_jax.loop.judging.scores` names its templates.
JudgePrompt = Literal["standard", "simple", "joint", "few_shot"]


@dataclass(frozen=True)
class AssessConfig:
    """What the judge thinks of each pair."""

    readings: tuple[ReadingName, ...] = ("rubric",)
    """How the judge's opinion of a pair is read. 'rubric': scores from 1 to 10 (the paper's). 'lift': how much likelier
    the instruction makes the response than an empty turn does, over what is not copied from the instruction.
    'backward_lift': how much likelier the response makes the instruction. 'likelihood': of the response. 'ending': how
    likely it ends where it does.
    'self_consistency': agreement with the other responses to the instruction. 'pairwise': how often it is preferred to
    them, in both orders. Empty: none, so that 'threshold' and 'top_fraction' keep everything that passed the text
    rules. docs/judging.md says when which one works."""
    level: Literal["quality", "following", "both"] = "both"
    """Which scores of the rubric are computed and used."""
    framing: Literal["auto", "text", "chat"] = "auto"
    """How the judge is asked. 'text': the prompt is text to be continued. 'chat': it is a user's turn, and the
    assistant's first words are given; likelihoods are of responses to a user's turn, too. 'auto': text for a base model
    that answers bare instructions (respond.base_prompt), otherwise chat."""
    prompt: JudgePrompt = "standard"
    """Prompt of the judge. 'standard': each criterion spelled out in several aspects (the paper's combined prompt).
    'simple': one aspect each. 'joint': both criteria in one prompt, with one score. 'few_shot': no criteria but three
    scored examples, with one score. A single score is recorded as quality."""
    judge: str = "current"
    """Model that scores: 'current' (the model that wrote the responses), 'previous' (the one before it), 'base',
    another model (a directory, a run's directory, gs://..., a hub id, a GGUF file), or the URL of an OpenAI-compatible
    server, such as http://localhost:8000/v1."""
    judge_model: str = ""
    """Name of the model on the server of `judge`."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's API key. When it is not set, no key is sent."""
    judge_requests: int = 16
    """Concurrent requests to the server (count)."""
    read: Literal["expected", "sampled"] = "expected"
    """'expected': the mean of the score under the model's distribution over 1..10, by prefill alone. 'sampled': the
    first number of a sampled judgment; a judgment without one drops the pair."""
    samples: int = 1
    """Judgments per score of 'sampled' (count); the score is the mean of those with a number."""
    parser: Literal["strict", "paper"] = "strict"
    """How 'sampled' parses the number at the start of a judgment. 'strict': rounds halves up, takes a label ("Rating:
    8") and what follows a thought, and no number that is none of a scale to ten: "-3", "1-10", "8 out of 100", "3
    errors". 'paper': as the authors' code, rounds halves to even, reads "-3" as 3 and "1-10" as 1."""
    temperature: float = 1.0
    """Sampling temperature of 'sampled'."""
    top_p: float = 0.95
    """Nucleus sampling of 'sampled': the most probable tokens up to this share of the probability (0 to 1)."""
    max_tokens: int = 16
    """New tokens per sampled judgment (count). Only a number at its start is read."""
    agreement: int = 0
    """Random pairs per iteration (count) that a second judge scores, too: the base model, or the current one where the
    base model is the judge. Their agreement goes into summary.json."""


# The rules of selection; `isheep_jax.loop.selection.rules.RULES` holds what each one does.
RuleName = Literal[
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
    """Selection of the scored pairs that the model learns from."""

    rule: RuleName = "threshold"
    """'threshold': every score above it. 'top_fraction': the best by `ranking`. 'random', 'random_threshold': as many
    as top_fraction or threshold would keep, drawn without looking at scores. 'perplexity': the response is not too
    surprising to the judge. 'density': one pair per cluster of instructions, drawn at random. 'density_perplexity': the
    pair of lowest perplexity of each cluster. 'none': everything that passed the text rules."""
    threshold: float = 8.0
    """Each score must be strictly above this (-1 to 10). 0: pairs without a score are kept, too. -1: also pairs that
    respond.rules dropped, except unfinished and empty responses."""
    fraction: float = 0.3
    """Share of the instructions that 'top_fraction' and 'random' keep (0 to 1)."""
    ranking: Literal["sum", "probability", "lexicographic"] = "sum"
    """Order of the pairs. 'sum': by the value of the reading (the rubric's is the sum of its scores); of several
    readings, by the weighted sum of the pair's standing in each (0 to 1). 'lexicographic': by the first reading, in
    tenths; in the same tenth by the next, and so on. 'probability': by the probability that all sampled scores of the
    rubric would be above the threshold (needs assess.read=expected)."""
    weights: tuple[float, ...] = ()
    """Weight of each of assess.readings in 'sum' (at least 0). Empty: 2 for the two lifts, 1 for the others."""
    per: Literal["token", "total"] = "token"
    """Whether a log-likelihood counts per token or in total."""
    length_control: Literal["none", "regression", "buckets"] = "none"
    """How the length of a response is taken out of a reading. 'regression': less what a straight line through the
    logarithm of the length predicts. 'buckets': the standing among pairs of about the same length."""
    consistency: tuple[float, float] = (0.0, 1.0)
    """Lowest and highest mean agreement between the responses to an instruction (0 to 1; needs the reading
    'self_consistency'). Tasks near the middle are neither trivial nor hopeless."""
    perplexity: float = 50.0
    """Highest perplexity per token of a response given its instruction that the rule 'perplexity' keeps."""
    clusters: int = 3000
    """k-means clusters of the instructions' mean last hidden states (count), for the density rules and for
    buckets=clusters, where a few dozen are enough."""
    buckets: Literal["none", "sentences", "opening", "clusters"] = "none"
    """Groups of instructions from which 'top_fraction' and 'random' keep the same share each, so that no kind of
    instruction that scores well crowds out the others. 'sentences': by number of sentences (1, 2, 3, more). 'opening':
    also by first word. 'clusters': by meaning."""
    bucket_share: float = 1.0
    """Largest share of the kept pairs that may come from one bucket (0 to 1); the excess is dropped, so that no topic
    takes over."""
    following_ceiling: float = 10.0
    """Cap on the following score (1 to 10), so that quality decides among pairs that all follow the instruction."""
    top_up_to: int = 0
    """Fewest pairs that a rule that ranks should keep (count): below it, the best of the other pairs are added."""
    min_pairs: int = 1
    """Fewest pairs to train on (count). With fewer, the run stops and can be resumed with other settings."""
    max_pairs: int = 3000
    """Most pairs that are kept (count)."""
    max_pairs_order: Literal["best", "first"] = "best"
    """Which pairs remain when there are more than max_pairs: the best by score, or the first in the order of generation
    (always so for random rules and for 'none', which do not look at scores)."""


@dataclass(frozen=True)
class GuardConfig:
    """When an iteration counts as collapsed, and what happens then."""

    action: Literal["warn", "stop", "off"] = "warn"
    """'stop': the run ends; the same command with a lower limit resumes it."""
    judge: Literal["stop", "warn", "off"] = "stop"
    """What happens where the judge cannot tell good pairs from damaged ones, which is checked before each iteration
    that a new judge reads. 'off': it is not checked."""
    min_auc: float = 0.7
    """Lowest chance (0 to 1) that the judge puts a good pair above a damaged one, as the mean over those kinds of
    damage that no text rule finds; 0.5 is a coin."""
    pairs: str = ""
    """JSON Lines file of the check's pairs, with the fields instruction, input (optional), better and worse. Empty: the
    seeds' outputs and damaged ones."""
    min_novelty: float = 0.05
    """Lowest share of the well-formed instructions that are new (0 to 1)."""
    min_score_mass: float = 0.5
    """Lowest median probability that the judge gives to the ten scores together (0 to 1), if it is known."""
    min_yield: float = 0.02
    """Lowest share of synthesize.instructions that is selected for training (0 to 1)."""


@dataclass(frozen=True)
class StopConfig:
    """When the run ends before its last iteration."""

    measure: Literal["none", "accuracy", "validation_loss"] = "none"
    """'none': never. 'accuracy': when the mean accuracy over evaluate.tasks stops rising. 'validation_loss': when the
    validation loss of fine-tuning stops falling (needs sft.validation_fraction)."""
    patience: int = 1
    """Iterations without a better value before the run ends (count)."""


@dataclass(frozen=True)
class SFTConfig:
    """Supervised fine-tuning on the kept pairs."""

    start: Literal["base", "previous"] = "base"
    """Weights to start from: the base model's, or the previous iteration's."""
    data: Literal["iteration", "all"] = "iteration"
    """Pairs to train on: those that this iteration kept, or those of all iterations so far. Together with `start` these
    are the paper's One_base, One_last, Total_base and Total_last."""
    seeds: Literal["none", "added", "alone"] = "none"
    """Whether to train on the seed tasks, too, all of which need an output. 'alone': on nothing else, as a baseline."""
    method: Literal["lora", "full"] = "lora"
    """'lora': low-rank adapters on all linear layers, merged at the end. 'full': all weights."""
    save: Literal["model", "adapter"] = "model"
    """What an iteration stores. 'model': the whole model. 'adapter': with LoRA, the adapter alone, which whoever loads
    the iteration merges into the base; the last and the best iteration get their whole model when the run ends. Of a
    model of 70 billion parameters that is 0.4 GB in place of 141."""
    lora_rank: int = 8
    """Rank of the adapters (count)."""
    lora_alpha: float = 16.0
    """The adapters' output is scaled by lora_alpha / lora_rank."""
    lora_dropout: float = 0.05
    """Dropout on the adapters' input (0 to 1)."""
    learning_rate: float = 5e-5
    """Peak learning rate of AdamW, which decays along a cosine to zero."""
    warmup_steps: int = 20
    """Linear warmup (updates)."""
    weight_decay: float = 0.0
    """Weight decay of AdamW on matrices."""
    clip_norm: float = 1.0
    """Global norm to which gradients are clipped."""
    epochs: int = 2
    """Epochs over the kept pairs (count)."""
    sequence_length: int = 1024
    """Tokens per packed row (count). A longer pair is truncated."""
    batch_size: int = 16
    """Packed rows per update over all devices (count)."""
    packing: bool = True
    """Whether to pack as many pairs into a row as fit. Without packing a row is one pair, so that an update is over
    batch_size pairs, as in the paper, and most of a row is padding."""
    validation_fraction: float = 0.1
    """Share of the pairs that is held out to choose the best checkpoint (0 to 1)."""
    checkpoint_every: int = 100
    """Updates between validations and checkpoints (count)."""
    remat: Literal["none", "selective", "full"] = "full"
    """Rematerialization, to save memory in the backward pass. 'full': recompute each layer's activations. 'selective':
    all but the results of its linear layers, so that no large product is computed again."""


@dataclass(frozen=True)
class CloneConfig:
    """Verbose cloning (SELF-ALIGN): the fine-tuned model answers all instructions again, asked to be thorough, and the
    iteration's model is fine-tuned on these answers, from the same weights as the first."""

    enabled: bool = False
    """Whether to do this second fine-tuning. The first model is then the iteration's `engraved/model`."""
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
    """Slots: sequences decoded together, over all devices (count). 0: as many as the free memory holds, on a CPU at
    most 256."""
    steps_per_call: int = 32
    """Decode steps per device call (count); the host refills free slots in between."""
    max_length: int = 0
    """Longest prompt plus completion (tokens). 0: the model's context length. The KV cache is only as long as the
    longest request of a stage may become."""
    weights_dtype: Literal["model", "int8"] = "model"
    """dtype of the weights while decoding and scoring. 'model': the model's compute dtype. 'int8': matrices are
    quantized with a scale per output (embeddings: per token), which takes half the memory of bfloat16."""
    kv_cache_dtype: Literal["model", "int8"] = "model"
    """dtype of the KV cache. 'model': the model's compute dtype. 'int8': quantized with a scale per token and head,
    which takes about half the memory of bfloat16, so that there are twice the slots."""


@dataclass(frozen=True)
class TinyTaskConfig:
    """Settings of a task on the tiny world."""

    split: Literal["development", "selection", "test"] = "development"
    """Which held-out prompts to use. Settings are chosen on 'development', final figures are of 'test'."""


@dataclass(frozen=True)
class EvaluateConfig:
    """Held-out measurements of the base model and of every iteration. A section with a task's name has the settings
    that only this task has."""

    tasks: tuple[str, ...] = ()
    """Tasks to evaluate on, such as ifeval,humaneval,mbpp,squad,triviaqa; docs/evaluation.md lists them. 'tiny':
    held-out instructions of the tiny world. 'lm_eval:NAME': a task of lm-evaluation-harness (extra 'eval')."""
    limit: int = 0
    """Most samples per task (count; 0: all): always the same ones. Results say how many were used."""
    task_data: str = ""
    """Directory with the tasks' published files, as TASK/FILE. Empty: they are downloaded once, and kept in the user's
    cache directory."""
    prompt_format: Literal["auto", "chat", "completion"] = "auto"
    """'chat': prompts are a user's turn. 'completion': texts to continue, with worked examples where the benchmark has
    some. 'auto': chat where the model has a chat template."""
    max_tokens: int = 0
    """New tokens per response (count; 0: the task's own limit)."""
    attempts: int = 1
    """Responses per problem of humaneval and mbpp (count). 1: greedy. More are sampled at temperature 0.8, and give
    pass@1, pass@8 and pass@64 as far as there are enough."""
    allow_code_execution: bool = False
    """Whether humaneval and mbpp may run the programs that the model writes, each in a sandbox without network."""
    judge: str = ""
    """Judge of alpaca_eval and mt_bench: the URL of an OpenAI-compatible server, or a model as in --model. Empty: their
    answer files are written, for the official judges."""
    judge_model: str = ""
    """Name of the model on the server of `judge`."""
    judge_key: str = "OPENAI_API_KEY"
    """Environment variable that holds the server's API key. When it is not set, no key is sent."""
    judge_requests: int = 16
    """Concurrent requests to the server (count)."""
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
        """The run directory."""
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


# What the program did before a setting came, by the setting's name, where that is not what its default does now. A run
# of an earlier version goes on with these values.
BEFORE_THEY_CAME: dict[str, object] = {}


def to_json(config: Config, names: Collection[str] | None = None) -> str:
    """Returns the config as the text of a run's config.json. names: of the settings to leave in; None: all."""

    def chosen(tree: dict, prefix: str = "") -> dict:
        values = {n: chosen(v, f"{prefix}{n}.") if isinstance(v, dict) else v for n, v in tree.items()}
        return {n: v for n, v in values.items() if v != {} and (isinstance(v, dict) or f"{prefix}{n}" in names)}

    tree = dataclasses.asdict(config)
    return json.dumps(tree if names is None else chosen(tree), indent=2) + "\n"


def flatten(config: Config) -> dict[str, object]:
    """Returns the settings by their command-line names: {"sft.learning_rate": 5e-05, ...}."""

    def walk(value, prefix):
        for f in dataclasses.fields(value):
            v = getattr(value, f.name)
            if dataclasses.is_dataclass(v):
                yield from walk(v, f"{prefix}{f.name}.")
            else:
                yield f"{prefix}{f.name}", list(v) if isinstance(v, tuple) else v

    return dict(walk(config, ""))


# Values of assess.judge that name models of the run itself.
OWN_JUDGES = ("current", "previous", "base")


def is_server(judge: str) -> bool:
    """Returns whether a value of assess.judge is the URL of a server."""
    return judge.startswith(("http://", "https://"))
