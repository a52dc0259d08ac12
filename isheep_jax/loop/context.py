"""What a stage works with: the run's settings and files, its iteration and turn, and the stage that it has open."""

import contextlib
import dataclasses
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from isheep_jax.config import Config
from isheep_jax.decode.requests import Completion, Embedding, Request, TextLogprob
from isheep_jax.loop import guards
from isheep_jax.loop.prompting.seeds import Seed
from isheep_jax.loop.prompting.templates import Templates
from isheep_jax.loop.protocols import Reporter, StageReporter
from isheep_jax.loop.records import counts
from isheep_jax.loop.run_directory import RunDirectory
from isheep_jax.loop.stage_files import StageFiles
from isheep_jax.loop.stages.table import STAGES

T = TypeVar("T")
Item = TypeVar("Item")
Result = TypeVar("Result", Completion, TextLogprob, Embedding)

# Records per part: what a kill can cost.
PART = 256
# The same of a judge on a server, whose every answer may be paid for.
SERVER_PART = 16
# Items that are read at a time where log-probabilities are asked for, which come in an order of their own.
BLOCK = 8 * PART


@dataclass(frozen=True)
class StageContext:
    """The place of a stage in a run.

    config: settings of the run.
    templates: the run's prompt templates.
    seeds: the seed tasks.
    held_out: normalized instructions of evaluation sets, which must not be learned from.
    directory: the run's directory.
    reporter: shows progress and warnings to the user.
    iteration: number of the iteration, from 1.
    turn: turn of the conversations that are being written, 1 or 2.
    meter: starts to measure what the devices do, see `Backend.meter`.
    """

    config: Config
    templates: Templates
    seeds: Sequence[Seed]
    held_out: frozenset[str]
    directory: RunDirectory
    reporter: Reporter
    iteration: int
    turn: int = 1
    meter: Callable[[], Callable[[], Mapping[str, float]]] = lambda: dict

    def second_turn(self) -> "StageContext":
        """Returns the same place, in the second turn of the conversations."""
        return dataclasses.replace(self, turn=2)

    def request_id(self, *parts: object) -> str:
        """Returns an id such as "2/respond/2-000042/0"; a request's random numbers follow from it."""
        return "/".join(map(str, (self.iteration, *parts)))

    def random(self, *purpose: object) -> random.Random:
        """Returns the random numbers of one purpose, which follow from the run's seed and the iteration."""
        return random.Random(f"{self.config.seed}/{self.request_id(*purpose)}")

    def files(self, name: str, iteration: int | None = None) -> StageFiles:
        """Returns the files of a stage, in this iteration or another one."""
        return self.directory.stage(self.iteration if iteration is None else iteration, STAGES[name], self.turn)

    def is_done(self, name: str) -> bool:
        """Returns whether a stage has finished."""
        return self.files(name).done() is not None

    @contextlib.contextmanager
    def open(self, name: str, total: int, *, part: int = 0) -> Iterator["OpenStage"]:
        """Opens a stage of `total` units; when the context ends without an error, the stage is DONE.

        part: records per part, of which a kill may cost one; 0: `PART`.

        A stage that was DONE before has its records and nothing left to do.
        """
        spec, files = STAGES[name], self.files(name)
        if files.done():
            yield OpenStage(files, parts=files.parts())
            return
        with self.reporter.stage(self.iteration, spec.title_of(self.turn), total, spec.unit) as progress:
            speed = self.meter()
            stage = OpenStage(files, progress, files.parts(), part=part or PART)
            if files.damaged:
                self.reporter.warn(f"{files.directory / files.damaged} was damaged; it and what follows are made again")
            yield stage
            files.finish({**counts(stage.records), **stage.summary}, stage.beside, speed())

    def guard(self, name: str, value: float | None, *, hint: str, fresh: bool) -> None:
        """Warns, or raises NothingLeftError, where a measured share is below its limit `guard.NAME`.

        hint: what may raise the share.
        fresh: whether the stage was made by this process; the user is warned once.
        """
        guards.check(
            self.config.guard,
            name,
            value,
            hint=hint,
            iteration=self.iteration,
            fresh=fresh,
            reporter=self.reporter,
        )


@dataclass
class OpenStage(Generic[T]):
    """A stage that is being worked on, part by part, or that was DONE before.

    files: where its parts go.
    progress: shows how far it is; None for a stage that was DONE before.
    parts: records of the parts that are in place.
    summary: figures for DONE, besides the counts.
    beside: name of a directory that the stage writes besides its parts.
    part: records per part that is written.
    """

    files: StageFiles[T]
    progress: StageReporter | None = None
    parts: list[list[T]] = field(default_factory=list)
    summary: dict[str, Any] = field(default_factory=dict)
    beside: str = ""
    part: int = PART

    def __post_init__(self):
        # The block that is being worked on: its records by index, how many it has, how many are committed.
        self._block: dict[int, T] = {}
        self._size = self._committed = 0

    @property
    def fresh(self) -> bool:
        """True where this process makes the stage, or a part of it."""
        return self.progress is not None

    @property
    def records(self) -> list[T]:
        """All records so far, in their order."""
        return [record for part in self.parts for record in part]

    def advance(self, n: int = 1, **notes: object) -> None:
        """Shows that `n` more units are done, with notes next to the count."""
        self.progress.advance(n, **notes)

    def blocks(self, items: Sequence[Item], *, whole: bool = False) -> Iterator[Sequence[Item]]:
        """Yields the items that have no record yet, some at a time; `put` takes one record for each of them.

        A part is committed as soon as all its records and all before them are there. A stage that resumes continues
        after the parts that are in place.

        whole: yields all of them at once, for what is decoded, so that slots run empty only at the end.
        """
        if not self.fresh:
            return
        first = len(self.records)
        if first:
            self.advance(first)
        while first < len(items):
            block = items[first:] if whole else items[first : first + BLOCK]
            self._block, self._size, self._committed = {}, len(block), 0
            yield block
            if self._committed < self._size:
                raise RuntimeError(f"the model answered {len(self._block)} of {self._size} requests")
            first += len(block)

    def put(self, index: int, record: T) -> None:
        """Takes the record of the item with this index in the last block; they come in any order."""
        self._block[index] = record
        self.advance()
        while self._committed < self._size:
            part = range(self._committed, min(self._committed + self.part, self._size))
            if not all(i in self._block for i in part):
                break
            self.write_part([self._block[i] for i in part])
            self._committed += len(part)

    def write_part(self, records: Sequence[T]) -> None:
        """Commits the next part."""
        self.files.write_part(len(self.parts), records)
        self.parts.append(list(records))


def by_request(requests: Sequence[Request], results: Iterable[Result]) -> Iterator[tuple[int, Result]]:
    """Yields the index of its request with each result, in the order of the results."""
    index = {request.id: i for i, request in enumerate(requests)}
    for result in results:
        yield index[result.id], result
