"""The stages of an iteration, once: what each writes, what it reads, which settings it depends on, where its files are.

Skipping finished stages, progress, the templates to load, the digests in DONE manifests, resuming with changed
settings, sharing between the runs of a study and the planner all read this table. A new stage is a new row and a module
with its work.
"""

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass, field
from typing import get_args

from isheep_jax.config import AssessConfig, Config, JudgePrompt
from isheep_jax.loop.judging.readings import READINGS
from isheep_jax.loop.judging.scores import criteria_of
from isheep_jax.loop.records import Checked, Instruction, Pair, Scores, Selected, ShownExamples, Topic, Vector

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
    reads: stages whose results it uses, besides the model of the iteration before.
    directory: where its files are, in the directory of its iteration (or of the iteration's second turn).
    turns: turns of a conversation that it takes part in.
    templates: prompt templates that no earlier stage reads, each with whether a config needs it.
    inputs: names of other inputs of a run that no earlier stage reads.
    """

    name: str
    record: type | None
    _: KW_ONLY
    title: str
    unit: str
    level: str
    reads: tuple[str, ...] = ()
    directory: str = ""
    turns: tuple[int, ...] = (1,)
    templates: Mapping[str, Callable[[Config], bool]] = field(default_factory=dict)
    inputs: tuple[str, ...] = ()

    def __post_init__(self):
        if not self.directory:
            object.__setattr__(self, "directory", self.name)

    def title_of(self, turn: int) -> str:
        """Returns the title of its part in a turn of the conversation."""
        return f"{self.title} (second turn)" if turn == 2 and 1 in self.turns else self.title


def _by_method(name: str) -> Callable[[Config], bool]:
    """Returns the condition that `synthesize.method` or `respond.method` is this one."""
    return lambda config: name in (config.synthesize.method, config.respond.method)


def _by_judge(name: str) -> Callable[[Config], bool]:
    """Returns the condition that the judge's prompts are made from this template."""
    return lambda config: name in criteria_of(config.assess).values()


def _by_reading(name: str) -> Callable[[Config], bool]:
    """Returns the condition that the judge's opinion is read in this way."""
    return lambda config: name in config.assess.readings


_BOTH = (1, 2)
_OF_RUBRIC = [name for prompt in get_args(JudgePrompt) for name in criteria_of(AssessConfig(prompt=prompt)).values()]
_OF_READINGS = {template: _by_reading(name) for name, reading in READINGS.items() for template in reading.templates}
_ROWS = (
    # It stands before all others, and no result depends on it: the settings of the judge may still change after it.
    StageSpec("judge_check", Checked, title="check the judge", unit="pairs", level="synthesize"),
    StageSpec(
        "topics",
        Topic,
        title="topics",
        unit="topics",
        level="synthesize",
        templates={"topics": _by_method("topics")},
    ),
    StageSpec("pool", Vector, title="embed pool", unit="pairs", level="synthesize"),
    StageSpec(
        "instructions",
        Instruction,
        title="synthesize",
        unit="instructions",
        level="synthesize",
        reads=("topics", "pool"),
        templates={
            "synthesize": lambda config: True,
            "guided": _by_method("topics"),
            "retrieved": _by_method("retrieved"),
        },
    ),
    StageSpec(
        "examples",
        ShownExamples,
        title="examples",
        unit="instructions",
        level="respond",
        reads=("pool", "instructions"),
    ),
    StageSpec(
        "responses",
        Pair,
        title="respond",
        unit="responses",
        level="respond",
        reads=("instructions", "examples"),
        turns=_BOTH,
        templates={"principles": _by_method("principles")},
    ),
    StageSpec(
        "scores",
        Scores,
        title="assess",
        unit="pairs",
        level="assess",
        reads=("responses",),
        turns=_BOTH,
        templates={name: _by_judge(name) for name in _OF_RUBRIC} | _OF_READINGS,
        inputs=("assess.judge",),
    ),
    StageSpec(
        "vectors",
        Vector,
        title="embed",
        unit="instructions",
        level="assess",
        reads=("responses",),
        turns=_BOTH,
    ),
    StageSpec(
        "selected",
        Selected,
        title="select",
        unit="pairs",
        level="select",
        reads=("responses", "scores", "vectors"),
        turns=_BOTH,
    ),
    StageSpec(
        "agreement",
        Scores,
        title="second judge",
        unit="pairs",
        level="assess",
        reads=("scores", "selected"),
    ),
    StageSpec(
        "follow_ups",
        Instruction,
        title="follow up",
        unit="pairs",
        level="synthesize",
        reads=("selected",),
        directory="instructions",
        turns=(2,),
        templates={"follow_up": lambda config: config.synthesize.turns == 2},
    ),
    StageSpec("engraved", None, title="engrave", unit="updates", level="train", reads=("selected",)),
    StageSpec(
        "thorough",
        Pair,
        title="answer again",
        unit="answers",
        level="train",
        reads=("instructions", "engraved"),
        templates={"thorough": lambda config: config.clone.enabled},
    ),
    StageSpec("model", None, title="fine-tune", unit="updates", level="train", reads=("selected", "thorough")),
    StageSpec("evaluation", None, title="evaluate", unit="responses", level="train", reads=("model",)),
)
STAGES = {row.name: row for row in _ROWS}


def later_sections(level: str) -> set[str]:
    """Returns the sections of the config that are read only after a level."""
    names = list(LEVELS)
    return {section for name in names[names.index(level) + 1 :] for section in LEVELS[name]}


def inputs_after(level: str) -> tuple[str, ...]:
    """Returns beginnings of the names of inputs that are read only after a level."""
    names = list(LEVELS)
    later = [spec for spec in STAGES.values() if spec.level in names[names.index(level) + 1 :]]
    templates = tuple(f"prompts/{name}." for spec in later for name in spec.templates)
    return (*templates, *(name for spec in later for name in spec.inputs))


def templates_of(config: Config) -> tuple[str, ...]:
    """Returns the names of the prompt templates that the stages of a config need."""
    return tuple(name for spec in STAGES.values() for name, needed in spec.templates.items() if needed(config))
