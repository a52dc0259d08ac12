"""Shows a run in the terminal: what it will do, the progress of its stages, a row per iteration, and its results."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import BinaryIO, TextIO

from etils import epath
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from isheep_jax import distributed
from isheep_jax.cli.progress import StageProgress
from isheep_jax.cli.results import before_and_after, row_cells, row_warnings, table_line
from isheep_jax.config import Config
from isheep_jax.errors import one_line, printable
from isheep_jax.files import on_object_store, utf8
from isheep_jax.loop.selection.select import describe
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.named_configs import config_description, config_names

# Seconds between lines of progress where there is no terminal: often enough to see that the run is alive.
SECONDS_BETWEEN_LINES = 10.0


class Console:
    """The `Reporter` of the loop for a terminal (bars), or for a pipe or file (plain lines).

    Only process 0 prints.

    directory: the run directory. Its log.txt gets the plain lines, once the loop has accepted the directory. None: no
        log is kept.
    stream: where to print; None: standard output.
    interactive: whether the stream is a terminal; None: ask the stream.
    clock: returns seconds, for rates and durations.
    """

    def __init__(
        self,
        directory: epath.PathLike | None,
        *,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory = None if directory is None else epath.Path(directory)
        self._is_primary = distributed.is_primary()
        self._rich = RichConsole(file=stream or sys.stdout, force_terminal=interactive, highlight=False, soft_wrap=True)
        self._clock = clock
        self._opening: list[str] = []
        self._waiting_for_log: list[str] = []
        self._log: _Log | None = None
        self._rows: list[IterationSummary] = []
        self._worked = False  # a stage has run since the last table
        self._shown = False  # the table holds all rows

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        if self._log is not None:
            self._write_log(_Log.save)
            self._log.close()
            self._log = None

    def opening(self, config: Config, description: str) -> None:
        """Keeps the first lines of a run until something happens: of a run that is refused, only the reason is shown.

        description: the model and the devices, in one line.
        """
        answers = f", {config.respond.samples} answers each" if config.respond.samples > 1 else ""
        self._opening = [
            f"I-SHEEP run '{config.name}': a model writes instructions, answers them, grades the answers itself",
            "and learns from the best; then the new model does the same.",
            f"  model       {description}",
            f"  iterations  {config.iterations}, each with {config.synthesize.instructions} new instructions{answers}; "
            f"keeps {describe(config)}",
        ]
        if config.evaluate.tasks:
            tasks = ", ".join(config.evaluate.tasks)
            limit = config.evaluate.limit
            count = f"up to {limit} held-out prompts each" if limit else "all held-out prompts"
            self._opening.append(f"  measured    on {tasks}: {count}")
        self._opening.append(f"  results     {config.directory}  (stop it at any time: the same command goes on)")
        self._opening += [f"  {line}" for line in _time_lines(config)]

    @contextmanager
    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> Iterator[StageProgress]:
        self._open_log()
        self._worked = True
        with self.progress(f"iteration {iteration} · {name}", total, unit) as progress:
            yield progress
        if self._log is not None:
            self._write_log(_Log.save)

    @contextmanager
    def progress(self, title: str, total: int | None, unit: str) -> Iterator[StageProgress]:
        """Shows the progress of some work, and in the end how long it took."""
        progress = StageProgress(total, unit, self._clock)
        if self._is_primary and self._rich.is_terminal:
            with self._bar(title, progress):
                yield progress
        else:
            last = None

            def print_sometimes() -> None:
                nonlocal last
                if last is None:
                    last = self._clock()
                    self._print(f"{title}: {progress.total} {unit}")
                elif self._clock() - last >= SECONDS_BETWEEN_LINES and progress.done < progress.total:
                    last = self._clock()
                    self._print(f"{title}: {progress.line()}")

            if total is not None:
                print_sometimes()
            progress.changed = print_sometimes
            yield progress
        if progress.total is not None:
            self._print(f"{title}: {progress.ending()}")

    def row(self, summary: IterationSummary) -> None:
        self._open_log()
        self._rows.append(summary)
        self._shown = False
        # A run that resumes reports its finished iterations at once: one table shows them all.
        if self._worked:
            self._table()
        for warning in row_warnings(self._rows):
            self.warn(warning)

    def note(self, text: str) -> None:
        self._print(text)

    def warn(self, text: str) -> None:
        self._print(f"warning: {text}", style="yellow")

    def closing(self, rows: Sequence[IterationSummary]) -> None:
        """Prints three held-out instructions answered before and after, and the next command."""
        if not self._is_primary:
            return
        self._open_log()
        if self._rows and not self._shown:
            self._table()
        self._print("")
        for line in before_and_after(self._directory, rows):
            self._print(line)
        self._print(f"results: {self._directory}")
        self._print(f'try it:  python -m isheep_jax.generate --model {self._directory} --prompt "..."')

    def _table(self) -> None:
        table = [row_cells(row) for row in self._rows]
        columns = [name for name in max(table, key=len) if any(cells.get(name, "-") != "-" for cells in table)]
        self._print(table_line(columns, columns), style="bold")
        for cells in table:
            self._print(table_line([cells.get(column, "") for column in columns], columns))
        self._worked, self._shown = False, True

    @contextmanager
    def _bar(self, title: str, progress: StageProgress) -> Iterator[None]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            console=self._rich,
            transient=True,
        )
        with bar:
            task = bar.add_task(escape(printable(title)), total=progress.total, line=escape(printable(progress.line())))
            progress.changed = lambda: bar.update(
                task, total=progress.total, completed=progress.done, line=escape(printable(progress.line()))
            )
            yield

    def _print(self, line: str, style: str | None = None) -> None:
        """Prints a line, and writes it to the log."""
        if not self._is_primary:
            return
        opening, self._opening = self._opening, []
        for first in opening:
            self._print(first)
        line = printable(line)
        self._rich.print(line, style=style, markup=False, emoji=False)
        if self._log is None:
            self._waiting_for_log.append(line)
        else:
            self._write_log(lambda log: log.write(line))

    def _open_log(self) -> None:
        # The loop opens its first stage after it has accepted or made the directory: before that nothing may be
        # written there, because it may be another run's.
        if self._log is None and self._is_primary and self._directory is not None:
            self._log = _Log(self._directory / "log.txt")
            waiting, self._waiting_for_log = self._waiting_for_log, []
            self._write_log(lambda log: [log.write(line) for line in waiting])

    def _write_log(self, write: Callable[["_Log"], None]) -> None:
        """Calls `write` on the log. A log that cannot be written is given up: the run matters more."""
        try:
            write(self._log)
        except Exception as error:  # each kind of bucket has errors of its own
            self._log.gave_up = True
            self.warn(f"{self._log.path}: {getattr(error, 'strerror', None) or one_line(error)}; no log from here on")


class _Log:
    """A file that grows by lines. An object store cannot append, so `save` writes the whole file there.

    gave_up: whether writing has failed; then nothing is written any more.
    """

    def __init__(self, path: epath.Path):
        self.path = path
        self.gave_up = False
        self._file: BinaryIO | None = None
        self._text: str | None = None

    def write(self, line: str) -> None:
        if self.gave_up:
            return
        if on_object_store(self.path):
            self._text = (self._text if self._text is not None else self._stored()) + line + "\n"
            return
        if self._file is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self.path.open("ab")
        self._file.write(utf8(line + "\n"))
        self._file.flush()

    def save(self) -> None:
        if self._text is not None and not self.gave_up:
            self.path.write_bytes(utf8(self._text))

    def close(self) -> None:
        if self._file is not None:
            with suppress(OSError):  # what could not be written is still in its buffer
                self._file.close()

    def _stored(self) -> str:
        return self.path.read_bytes().decode("utf-8", "replace") if self.path.exists() else ""


def _time_lines(config: Config) -> list[str]:
    """Returns what the docstring of a named config says about its time."""
    if config.name not in config_names():
        return []
    return [
        f"time        {line.partition(':')[2].strip()}"
        for line in config_description(config.name).splitlines()
        if line.startswith("Time:")
    ]
