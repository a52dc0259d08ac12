"""Profiles one stage of a run: a `Reporter` that has a few device calls traced when the stage begins."""

from collections.abc import Iterator
from contextlib import contextmanager

from etils import epath

from isheep_jax import profiling
from isheep_jax.errors import UserError
from isheep_jax.loop.protocols import Reporter, StageReporter
from isheep_jax.loop.run_directory import PROFILE
from isheep_jax.loop.stages.table import STAGES
from isheep_jax.loop.summary import IterationSummary


def _name(title: str) -> str:
    return title.replace(" ", "-")


# Stages by the names that the command line takes. What shows by similarity and what selects computes nothing by itself.
PROFILED = {_name(spec.title): spec for spec in STAGES.values() if spec.name not in ("examples", "selected")}


def check_stage(name: str) -> None:
    """Raises `UserError` unless a stage has this name."""
    if name not in PROFILED:
        raise UserError(f"--profile={name}: there is no such stage; choose one of {', '.join(PROFILED)}")


class StageProfiler:
    """Passes everything on to another `Reporter`, and traces the first stage of a name, in any iteration or turn.

    reporter: shows the stages and where the trace is.
    name: key in `PROFILED`.
    workdir: the run's directory; the trace goes to `profile/NAME/` in it.
    """

    def __init__(self, reporter: Reporter, name: str, workdir: epath.Path):
        self._reporter, self._name = reporter, name
        self._directory = workdir / PROFILE / name
        self._begun = False

    @contextmanager
    def stage(self, iteration: int, name: str, total: int | None, unit: str) -> Iterator[StageReporter]:
        """Opens a stage, the first one of the name with a trace."""
        if self._begun or not self._is_meant(name):
            with self._reporter.stage(iteration, name, total, unit) as progress:
                yield progress
            return
        self._begun = True
        shown = self._reporter.stage(iteration, name, total, unit)
        with profiling.tracing(self._directory) as trace, shown as progress:
            yield progress
        if trace.written:
            self.note(f"profile: {self._directory}; show it with: xprof --logdir {self._directory}")
        elif trace.error:
            self.warn(f"--profile={self._name}: no trace: {trace.error}")
        else:
            self.warn(
                f"--profile={self._name}: no trace: there were {trace.calls} device calls, and the first "
                f"{profiling.WARM_UP} are left out"
            )

    def _is_meant(self, name: str) -> bool:
        spec = PROFILED[self._name]
        # An evaluation's name goes on with its task.
        is_part = spec is STAGES["evaluation"] and name.startswith(f"{spec.title} ")
        return is_part or name in map(spec.title_of, (1, 2))

    def row(self, summary: IterationSummary) -> None:
        """Shows the summary of an iteration."""
        self._reporter.row(summary)

    def note(self, text: str) -> None:
        """Shows a line of information."""
        self._reporter.note(text)

    def warn(self, text: str) -> None:
        """Shows a warning."""
        self._reporter.warn(text)

    def close(self) -> None:
        """Says so where the stage never ran."""
        if not self._begun:
            self.warn(
                f"--profile={self._name}: the run had nothing left to do in this stage, or has none; "
                "a run in another --workdir begins anew"
            )
