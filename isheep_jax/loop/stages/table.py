"""The stages of an iteration, once: what each writes, what it reads, which settings it depends on, where it lies.

Skipping finished stages, progress, the digests in DONE manifests, resuming with changed settings, sharing between the
runs of a study and the planner all read this table. A new stage is a new row and a module with its work.
"""

from dataclasses import dataclass

from isheep_jax.decode.requests import TextLogprob
from isheep_jax.loop.records import Instruction, Pair, Scores, Selected, ShownExamples, Topic, Vector

# The levels of an iteration in their order, each with the sections of the config that it is the first to read. A result
# depends on the settings of its own level and of all levels before it.
LEVELS = {
    "synthesize": ("synthesize",),
    "respond": ("respond",),
    "assess": ("assess",),
    "select": ("select",),
    "train": ("sft", "clone"),
}


@dataclass(frozen=True)
class StageSpec:
    """One stage.

    name: key in `STAGES`.
    record: type of its records; None for a stage that leaves a model or measurements, not records.
    title: name in the progress of a run and in plans.
    unit: what its progress counts.
    level: key in `LEVELS`.
    reads: stages whose results it uses, beside the model of the iteration before.
    directory: where it lies, in the directory of its iteration (or of the iteration's second turn).
    inputs: beginnings of the names of input files that no earlier stage reads.
    turns: turns of a conversation that it takes part in.
    """

    name: str
    record: type | None
    title: str
    unit: str
    level: str
    reads: tuple[str, ...] = ()
    directory: str = ""
    inputs: tuple[str, ...] = ()
    turns: tuple[int, ...] = (1,)

    def __post_init__(self):
        if not self.directory:
            object.__setattr__(self, "directory", self.name)

    def title_of(self, turn: int) -> str:
        """Returns the title of its part in a turn of the conversation."""
        return f"{self.title} (second turn)" if turn == 2 and 1 in self.turns else self.title


_BOTH = (1, 2)
_JUDGE_INPUTS = ("assess.judge", "prompts/quality", "prompts/following", "prompts/joint", "prompts/few_shot")
_ROWS = (
    StageSpec("topics", Topic, "topics", "topics", "synthesize"),
    StageSpec("pool", Vector, "embed pool", "pairs", "synthesize"),
    StageSpec("instructions", Instruction, "synthesize", "instructions", "synthesize", ("topics", "pool")),
    StageSpec("examples", ShownExamples, "examples", "instructions", "respond", ("pool", "instructions")),
    StageSpec(
        "responses",
        Pair,
        "respond",
        "responses",
        "respond",
        ("instructions", "examples"),
        inputs=("prompts/principles",),
        turns=_BOTH,
    ),
    StageSpec("scores", Scores, "assess", "pairs", "assess", ("responses",), inputs=_JUDGE_INPUTS, turns=_BOTH),
    StageSpec("likelihoods", TextLogprob, "likelihood", "pairs", "assess", ("responses",), turns=_BOTH),
    StageSpec("vectors", Vector, "embed", "instructions", "assess", ("responses",), turns=_BOTH),
    StageSpec(
        "selected",
        Selected,
        "select",
        "pairs",
        "select",
        ("responses", "scores", "likelihoods", "vectors"),
        turns=_BOTH,
    ),
    StageSpec("agreement", Scores, "second judge", "pairs", "assess", ("scores", "selected")),
    StageSpec(
        "follow_ups",
        Instruction,
        "follow up",
        "pairs",
        "synthesize",
        ("selected",),
        directory="instructions",
        turns=(2,),
    ),
    StageSpec("engraved", None, "engrave", "updates", "train", ("selected",)),
    StageSpec(
        "thorough",
        Pair,
        "answer again",
        "answers",
        "train",
        ("instructions", "engraved"),
        inputs=("prompts/thorough",),
    ),
    StageSpec("model", None, "fine-tune", "updates", "train", ("selected", "thorough")),
    StageSpec("evaluation", None, "evaluate", "prompts", "train", ("model",)),
)
STAGES = {row.name: row for row in _ROWS}


def later_sections(level: str) -> set[str]:
    """Returns the sections of the config that are read only after a level."""
    names = list(LEVELS)
    return {section for name in names[names.index(level) + 1 :] for section in LEVELS[name]}


def inputs_after(level: str) -> tuple[str, ...]:
    """Returns beginnings of the names of input files that are read only after a level."""
    names = list(LEVELS)
    later = names[names.index(level) + 1 :]
    return tuple(prefix for spec in STAGES.values() if spec.level in later for prefix in spec.inputs)
