"""Few-shot prompts: the model continues a list of tasks that begins with a few seed tasks (I-SHEEP section 3.1)."""

import re
from collections.abc import Sequence

from isheep_jax.decode.requests import Completion, Request
from isheep_jax.loop.context import StageContext
from isheep_jax.loop.filters.labels import ITEM, is_no_input, label, line_label
from isheep_jax.loop.filters.verdicts import UNFINISHED
from isheep_jax.loop.prompting.protocols import ParsedInstruction
from isheep_jax.loop.prompting.shown import SeedPool, choose_seeds
from isheep_jax.loop.prompting.ways import Way

_LABEL = label("Instruction")
# "###" at the start of a line or before a label; elsewhere it may belong to the task.
_SEPARATOR = re.compile(rf"(?:^|\n)[ \t]*#{{3,}}|(?<!#)#{{3,}}+(?=\s*{_LABEL})", re.IGNORECASE)
_INSTRUCTION = re.compile(rf"\s*{ITEM}?{_LABEL}", re.IGNORECASE)
_INPUT = re.compile(line_label("Input"), re.IGNORECASE)
# A label in the middle of a task: at the start of a line, or after a number.
_STRAY_LABEL = re.compile(
    rf"{line_label('Instruction|Input')}|(?<!\d)\d+\s*[.:)]\s*{label('Instruction|Input')}", re.IGNORECASE
)
_ONLY_NUMBER = re.compile(r"\s*(?:\d+\s*[.:)]\s*)?")


class FewShot:
    """Prompts that show some seed tasks each."""

    limit = None

    def __init__(self, context: StageContext, pool: SeedPool):
        self.stop = context.templates.synthesize_stop
        self.target = context.config.synthesize.instructions
        self._context, self._pool = context, pool
        self._shown: dict[int, tuple[str, ...]] = {}

    def requests(self, numbers: Sequence[int], ways: Sequence[Way]) -> list[Request]:
        return [self._request(number, way.shots) for number, way in zip(numbers, ways, strict=True)]

    def parse(self, number: int, completion: Completion) -> list[ParsedInstruction]:
        return parse(completion.text, completion.finish_reason == "stop")

    def shown(self, number: int) -> tuple[str, ...]:
        return self._shown[number]

    def _request(self, number: int, shots: int) -> Request:
        templates = self._context.templates
        seeds = choose_seeds(self._context, self._pool, number, shots)
        self._shown[number] = tuple(seed.id for seed in seeds)
        examples = [{"instruction": s.instruction, "input": s.input, "output": s.output} for s in seeds]
        id = self._context.request_id("synthesize", number)
        return Request(id, templates.render("synthesize", examples=examples), templates.prefix("synthesize"))


def parse(text: str, finished: bool) -> list[ParsedInstruction]:
    """Returns the tasks of a completion: segments between "###", each an instruction and perhaps an input.

    The first segment needs no label, since the prompt may end with it. A segment with more than one task in it, or with
    a label in the wrong place, is not in the form: which texts belong together is not known.

    Args:
        text: The completion.
        finished: Whether it ended by itself. Otherwise its last segment may be cut off and does not count.
    """
    segments = _SEPARATOR.split(text.replace("\r\n", "\n"))
    tasks = []
    for index, segment in enumerate(segments):
        labeled = _INSTRUCTION.match(segment)
        body = segment[labeled.end() :] if labeled else segment
        last = index == len(segments) - 1
        if not segment.strip() or ((index == 0 or last) and _ONLY_NUMBER.fullmatch(segment)):
            continue
        if last and not finished:
            tasks.append(ParsedInstruction(segment.strip(), "", UNFINISHED))
            continue
        # The line break lets an input label count on the first line, too.
        fields = _INPUT.split("\n" + body)
        stray = len(fields) > 2 or any(map(_STRAY_LABEL.search, fields))
        if stray or (not labeled and index > 0):
            tasks.append(ParsedInstruction(segment.strip(), "", "not in the form"))
            continue
        instruction, input = fields[0].strip(), fields[1].strip() if len(fields) == 2 else ""
        tasks.append(ParsedInstruction(instruction, "" if is_no_input(input) else input))
    return tasks
