"""What a person sees while a run goes on: what will happen, progress, a row per iteration, and what came of it."""

import json
import math
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TextIO

from etils import epath
from rich.console import Console as RichConsole
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn

from isheep_jax import distributed
from isheep_jax.config import Config
from isheep_jax.files import on_object_store
from isheep_jax.loop.selection.select import describe
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.named_configs import config_description, config_names

# Progress lines where there is no terminal: often enough to see life, seldom enough for a log file.
SECONDS_BETWEEN_LINES = 10.0

# Kept answers this many times shorter than the first iteration's are worth a warning.
MUCH_SHORTER = 1.5

# Half the width of a 95 % interval of a mean, in standard errors.
NINETY_FIVE_PERCENT = 1.96


class Console:
    """The `Reporter` of the loop for a terminal (bars), or for a pipe or file (plain lines).

    Of several processes, the first speaks. interactive: whether the stream is a terminal (None: look). directory: the
    run directory; plain lines also go to its log.txt, once the loop has accepted the directory.
    """

    def __init__(
        self,
        directory: epath.PathLike,
        *,
        stream: TextIO | None = None,
        interactive: bool | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        self._directory = epath.Path(directory)
        self._speaks = distributed.is_primary()
        self._rich = RichConsole(file=stream or sys.stdout, force_terminal=interactive, highlight=False, soft_wrap=True)
        self._clock = clock
        self._waiting_for_log: list[str] = []
        self._log: _Log | None = None
        self._rows: list[IterationSummary] = []
        self._worked = False  # a stage has run since the last table
        self._shown = False  # the table holds all rows

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, *_) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None

    def opening(self, config: Config, description: str) -> None:
        """The first screen. description: the model and the devices, in one line."""
        answers = f", {config.respond.samples} answers each" if config.respond.samples > 1 else ""
        self.note(f"I-SHEEP run '{config.name}': a model writes instructions, answers them, grades the answers itself")
        self.note("and learns from the best; then the new model does the same.")
        self.note(f"  model       {description}")
        self.note(
            f"  iterations  {config.iterations}, each with {config.synthesize.instructions} new instructions{answers}; "
            f"keeps {describe(config)}"
        )
        if config.evaluate.tasks:
            self.note(
                f"  measured    on {config.evaluate.limit} held-out prompts of {', '.join(config.evaluate.tasks)}"
            )
        self.note(f"  results     {config.directory}  (stop it at any time: the same command goes on)")
        for line in _time_lines(config):
            self.note(f"  {line}")

    @contextmanager
    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> Iterator["StageProgress"]:
        self._open_log()
        self._worked = True
        title = f"iteration {iteration} · {name}"
        progress = StageProgress(total, unit, self._clock)
        if self._speaks and self._rich.is_terminal:
            with self._bar(title, progress):
                yield progress
        else:
            last = None

            def say_sometimes() -> None:
                nonlocal last
                if last is None:
                    last = self._clock()
                    self._say(f"{title}: {progress.total} {unit}")
                elif self._clock() - last >= SECONDS_BETWEEN_LINES and progress.done < progress.total:
                    last = self._clock()
                    self._say(f"{title}: {progress.line()}")

            if total is not None:
                say_sometimes()
            progress.changed = say_sometimes
            yield progress
        if progress.total is None:
            return
        self._say(f"{title}: {progress.ending()}")
        if self._log is not None:
            self._log.save()

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
        self._say(text)

    def warn(self, text: str) -> None:
        self._say(f"warning: {text}", style="yellow")

    def closing(self, rows: Sequence[IterationSummary]) -> None:
        """After the last row: three held-out instructions answered before and after, and the next command."""
        if not self._speaks:
            return
        self._open_log()
        if self._rows and not self._shown:
            self._table()
        self._say("")
        for line in before_and_after(self._directory, rows):
            self._say(line)
        self._say(f"results: {self._directory}")
        self._say(f'try it:  python -m isheep_jax.generate --model {self._directory} --prompt "..."')

    def _table(self) -> None:
        table = [row_cells(row) for row in self._rows]
        columns = list(max(table, key=len))
        self._say(_line(columns, columns), style="bold")
        for cells in table:
            self._say(_line([cells.get(column, "") for column in columns], columns))
        self._worked, self._shown = False, True

    @contextmanager
    def _bar(self, title: str, progress: "StageProgress") -> Iterator[None]:
        bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            console=self._rich,
            transient=True,
        )
        with bar:
            task = bar.add_task(escape(title), total=progress.total, line=escape(progress.line()))
            progress.changed = lambda: bar.update(
                task, total=progress.total, completed=progress.done, line=escape(progress.line())
            )
            yield

    def _say(self, line: str, style: str | None = None) -> None:
        if not self._speaks:
            return
        self._rich.print(escape(line), style=style)
        if self._log is None:
            self._waiting_for_log.append(line)
        else:
            self._log.write(line)

    def _open_log(self) -> None:
        # The loop opens its first stage after it has accepted or made the directory: before that nothing may be
        # written there, because it may be another run's.
        if self._log is None and self._speaks:
            self._log = _Log(self._directory / "log.txt")
            for line in self._waiting_for_log:
                self._log.write(line)
            self._waiting_for_log.clear()


class _Log:
    """A file that grows by lines. A bucket cannot append: there all of it is written again at each `save`."""

    def __init__(self, path: epath.Path):
        self._path = path
        self._file: TextIO | None = None
        self._text = ""
        if on_object_store(path):
            self._text = path.read_text() if path.exists() else ""
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a")

    def write(self, line: str) -> None:
        if self._file is None:
            self._text += line + "\n"
        else:
            self._file.write(line + "\n")
            self._file.flush()

    def save(self) -> None:
        if self._file is None:
            self._path.write_text(self._text)

    def close(self) -> None:
        self.save()
        if self._file is not None:
            self._file.close()


class StageProgress:
    """Counts a stage's units and estimates its rate."""

    def __init__(self, total: int | None, unit: str, clock: Callable[[], float] = time.monotonic):
        self.total = total  # None until the work tells
        self.unit = unit
        self.done = 0
        self.notes: dict[str, object] = {}
        self.changed: Callable[[], None] = lambda: None
        self._clock = clock
        self._start = clock()
        self._first: tuple[float, int] | None = None

    def advance(self, n: int = 1, **notes: object) -> None:
        """`n` more units are done; notes are shown beside the count."""
        self.done += n
        self.notes |= notes
        if self._first is None:
            # What an earlier process did, and the wait for the compiler, must not count in the rate.
            self._first = (self._clock(), self.done)
        self.changed()

    def update(self, done: int, total: int, **notes: object) -> None:
        """Sets how many of how many units are done, for work whose total is known only when it runs."""
        self.total = total
        self.advance(done - self.done, **notes)

    @property
    def rate(self) -> float:
        """Units per second since the first report; 0 while unknown."""
        if self._first is None:
            return 0.0
        seconds = self._clock() - self._first[0]
        return (self.done - self._first[1]) / seconds if seconds > 0 else 0.0

    def line(self) -> str:
        """The state in the middle of the stage: count, rate, time left."""
        rate = self.rate
        pace = f", {rate:.3g}/s, {duration((self.total - self.done) / rate)} left" if rate > 0 and self.total else ""
        total = "?" if self.total is None else self.total
        return f"{self.done}/{total} {self.unit}{pace}{self._notes()}"

    def ending(self) -> str:
        """The state after the stage: count and duration."""
        return f"{self.done} {self.unit} in {duration(self._clock() - self._start)}{self._notes()}"

    def _notes(self) -> str:
        if not self.notes:
            return ""
        facts = (f"{k.replace('_', ' ')} {f'{v:.4g}' if isinstance(v, float) else v}" for k, v in self.notes.items())
        return f" ({', '.join(facts)})"


def duration(seconds: float) -> str:
    """1.2 s, 42 s, 3 min 20 s, 1 h 5 min."""
    if not math.isfinite(seconds):
        return "?"
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def row_cells(summary: IterationSummary) -> dict[str, str]:
    """Returns the columns of an iteration's row, as text."""

    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    cells = {
        "iteration": f"{summary.iteration}" if summary.iteration else "0 (base)",
        "instructions": number(summary.instructions, "d"),
        "kept": number(summary.kept, "d"),
        "quality": number(summary.mean_quality, ".2f"),
        "following": number(summary.mean_following, ".2f"),
        "loss": number(summary.train_loss, ".3f"),
    }
    for task, result in summary.evaluation.items():
        cells[f"{task} accuracy ± 95 %"] = (
            f"{result['accuracy']:.3f} ± {NINETY_FIVE_PERCENT * result.get('stderr', 0.0):.3f}"
        )
    return cells


def _line(values: Iterable[str], columns: Iterable[str]) -> str:
    return "  ".join(value.rjust(max(len(column), 6)) for value, column in zip(values, columns, strict=True))


def row_warnings(rows: Sequence[IterationSummary]) -> list[str]:
    """Returns warnings about the last of the rows: the kept answers get much shorter."""
    lengths = [row.kept_characters for row in rows if row.kept_characters]
    if len(lengths) < 2 or not rows[-1].kept_characters or lengths[-1] > lengths[0] / MUCH_SHORTER:
        return []
    return [
        f"iteration {rows[-1].iteration}: the kept answers are much shorter than in the first iteration "
        f"({lengths[-1]:.0f} characters on average, then {lengths[0]:.0f})"
    ]


def before_and_after(directory: epath.Path, rows: Sequence[IterationSummary], count: int = 3) -> list[str]:
    """Held-out instructions with the base model's answer and the last iteration's, as lines.

    They are spread evenly over the held-out set, not chosen by how they were answered.
    """
    last = max((row.iteration for row in rows), default=0)
    before, after = (_examples(directory / f"iteration_{i}" / "evaluation.json") for i in (0, last))
    if last == 0 or not before or len(before) != len(after):
        return []
    lines = [f"Held-out instructions, answered by the base model and after iteration {last}:"]
    for k in range(min(count, len(before))):
        index = k * len(before) // min(count, len(before))
        lines.append(f"  {before[index]['instruction']}")
        for name, example in (("before", before[index]), ("after ", after[index])):
            mark = "right" if example["correct"] else "wrong"
            lines.append(f"    {name} ({mark})  {' / '.join(example['response'].split(chr(10)))}")
    return [*lines, ""]


def _examples(path: epath.Path) -> list[dict]:
    if not path.exists():
        return []
    tasks = json.loads(path.read_text())
    return next((result["examples"] for result in tasks.values() if result.get("examples")), [])


def _time_lines(config: Config) -> list[str]:
    if config.name not in config_names():
        return []
    return [
        f"time        {line.partition(':')[2].strip()}"
        for line in config_description(config.name).splitlines()
        if line.startswith("Time:")
    ]
