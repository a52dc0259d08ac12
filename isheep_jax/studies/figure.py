"""Draws a study as a PNG or SVG: each row's figures by iteration, and the paper's numbers in a panel of their own."""

from collections.abc import Sequence
from pathlib import Path

from isheep_jax.errors import UserError
from isheep_jax.studies.definitions import Row, Study
from isheep_jax.studies.report import Results, estimates

# Okabe and Ito's palette, which color-blind readers can tell apart; the marks differ as well.
_COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKS = "os^Dv<>"
# Width over which the marks of one iteration are spread (iterations).
_WIDTH = 0.16


def check(path: Path) -> None:
    """Raises `UserError` when no picture can be drawn into this file."""
    if path.suffix not in (".png", ".svg"):
        raise UserError(f"--figure: {path} should end with .png or .svg")
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise UserError("--figure: pictures need matplotlib: pip install matplotlib") from None


def draw(path: Path, study: Study, rows: Sequence[Row], results: Results) -> None:
    """Writes a PNG or SVG: a panel per base model, and one for the paper if it has numbers.

    Error bars are 95 % intervals over the seeds.

    Args:
        path: the file; its suffix decides the format.
        study: the study.
        rows: those to draw.
        results: of the runs that there are.
    """
    # Without pyplot, which needs a window system or global state.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with_paper = any(row.paper for row in rows)
    panels = len(results) + with_paper
    figure = Figure(figsize=(4.2 * panels + 0.4, 4.0 + 0.22 * len(rows)), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, panels, squeeze=False)[0]
    style = {row.name: {"color": _COLORS[i % 7], "marker": _MARKS[i % 7]} for i, row in enumerate(rows)}
    for axis, (base, by_row) in zip(axes, results.items()):
        count = max((len(runs) for runs in by_row.values()), default=0)
        axis.set_title(f"base {base}, {count} seed{'s' if count > 1 else ''}", fontsize=10)
        axis.set_ylabel(study.measure or "held-out accuracy")
        for i, row in enumerate(rows):
            if by_row.get(row.name):
                points = sorted(estimates(row, by_row[row.name], study.measure).items())
                # A single round of more instructions is one point, without a line from the base model.
                points = [(x, y) for x, y in points if x or row.column == 1]
                means, halves = [y.mean for _, y in points], [y.half or 0.0 for _, y in points]
                # Marks are spread, so that equal figures and their bars stay visible.
                xs = [x + _WIDTH * (i - (len(rows) - 1) / 2) / len(rows) for x, _ in points]
                axis.errorbar(xs, means, halves, capsize=3, label=row.title, **style[row.name])
        low, high = axis.get_ylim()
        axis.set_ylim(max(low, -0.02), min(high, 1.02))
    if with_paper:
        axes[-1].set_title("the paper: Qwen1.5-72B, one run", fontsize=10)
        axes[-1].set_ylabel("IFEval, prompt-level strict (%)")
        for row in rows:
            if row.paper:
                axes[-1].plot(list(row.paper), list(row.paper.values()), **style[row.name])
    for axis in axes:
        axis.set_xlabel("iteration")
        axis.xaxis.get_major_locator().set_params(integer=True)
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=1 if panels == 1 else 2, fontsize=9, frameon=False)
    figure.suptitle(study.title)
    figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)
