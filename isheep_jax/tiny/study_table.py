"""The study's figures as text and as a picture."""

import html
import math
import statistics
from collections.abc import Sequence

# base -> variant -> seed of the loop -> evaluations of iterations 0, 1, ...
Results = dict[str, dict[str, dict[int, list[dict]]]]

# Two-sided 95 % points of Student's t distribution, by the number of values.
_STUDENT = {2: 12.706, 3: 4.303, 4: 3.182, 5: 2.776, 6: 2.571, 7: 2.447, 8: 2.365, 9: 2.306, 10: 2.262}


def line(rows: Sequence[dict]) -> str:
    """One run: accuracies, then content accuracies."""
    accuracy = " ".join(f"{row['accuracy']:.3f}" for row in rows)
    content = " ".join(f"{row['content']:.3f}" for row in rows)
    return f"accuracy {accuracy}  content {content}"


def mean_interval(values: Sequence[float]) -> str:
    """The mean, with half the width of its 95 % interval over the seeds."""
    if len(values) < 2:
        return f"{statistics.fmean(values):.3f}"
    half = _STUDENT[len(values)] * statistics.stdev(values) / math.sqrt(len(values))
    return f"{statistics.fmean(values):.3f} ± {half:.3f}"


def table(results: Results, titles: dict[str, str]) -> str:
    """Markdown: per base a row for each variant (mean ± 95 % interval over the seeds), and below it every run."""
    lines = []
    for base, variants in results.items():
        count = next(iter(next(iter(variants.values())).values()))[0]["count"]
        lines += [
            f"Base `{base}`, {count} prompts:",
            "",
            "| variant | seeds | base | iteration 1 | iteration 2 | iteration 3 | content, base to last |",
            "|---|---|---|---|---|---|---|",
        ]
        for variant, runs in variants.items():
            columns = list(zip(*runs.values()))
            cells = [f"{columns[0][0]['accuracy']:.3f}"]
            cells += [mean_interval([row["accuracy"] for row in column]) for column in columns[1:]]
            cells += [""] * (4 - len(cells))
            content = f"{columns[0][0]['content']:.3f} → {mean_interval([row['content'] for row in columns[-1]])}"
            lines.append(f"| {titles[variant]} | {len(runs)} | {' | '.join(cells)} | {content} |")
        lines += ["", "Every run (accuracy of iterations 1, 2, ...; content at the last):", ""]
        for variant, runs in variants.items():
            each = []
            for seed, rows in runs.items():
                accuracy = " ".join(f"{row['accuracy']:.3f}" for row in rows[1:])
                each.append(f"{seed}: {accuracy}; {rows[-1]['content']:.3f}")
            lines.append(f"- {titles[variant]}: {' | '.join(each)}")
        lines.append("")
    return "\n".join(lines)


_WIDTH, _HEIGHT, _LEFT, _TOP, _PANEL, _PLOT = 400, 330, 52, 44, 290, 230
_STYLES = {
    "loop": ("#0b6e4f", "the loop"),
    "once_pairs": ("#c17817", "one round, 3 x, as many pairs"),
    "once_fraction": ("#e0a458", "one round, 3 x, same fraction"),
    "reference": ("#5b5f97", "the reference's rule"),
    "random": ("#8d99ae", "random selection"),
    "unfiltered": ("#b23a48", "no filter"),
}


def figure(results: Results) -> str:
    """An SVG: held-out accuracy by iteration, a panel for each base; thin lines are single seeds of the loop."""
    width = _WIDTH * len(results)
    drawn = [name for name in _STYLES if any(name in variants for variants in results.values())]
    height = _HEIGHT + 18 * math.ceil(len(drawn) / 2)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" viewBox="0 0 {width} {height}" '
        'font-family="sans-serif" font-size="12">',
        '<rect width="100%" height="100%" fill="#ffffff"/>',
    ]
    for index, (base, variants) in enumerate(results.items()):
        parts += _panel(index * _WIDTH, base, variants)
    for i, name in enumerate(drawn):
        x, y = _LEFT + (i % 2) * 215, _HEIGHT + 6 + 18 * (i // 2)
        color, text = _STYLES[name]
        parts.append(f'<line x1="{x}" y1="{y}" x2="{x + 20}" y2="{y}" stroke="{color}" stroke-width="3"/>')
        parts.append(f'<text x="{x + 26}" y="{y + 4}" fill="#222222">{html.escape(text)}</text>')
    return "\n".join([*parts, "</svg>\n"])


def _panel(left: int, base: str, variants: dict[str, dict[int, list[dict]]]) -> list[str]:
    def x(iteration: int) -> float:
        return left + _LEFT + iteration * _PANEL / 3

    def y(accuracy: float) -> float:
        return _TOP + (1 - accuracy) * _PLOT

    def path(values: Sequence[float], color: str, stroke: float, opacity: float) -> str:
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(values))
        return (
            f'<polyline points="{points}" fill="none" stroke="{color}" stroke-width="{stroke}" opacity="{opacity}" '
            'stroke-linejoin="round"/>'
        )

    title = f"Held-out accuracy by iteration, base {html.escape(base)}"
    parts = [f'<text x="{left + _LEFT}" y="24" font-size="14" fill="#222222">{title}</text>']
    for tick in range(0, 11, 2):
        height = y(tick / 10)
        parts.append(
            f'<line x1="{x(0)}" y1="{height:.1f}" x2="{x(3)}" y2="{height:.1f}" stroke="#dddddd"/>'
            f'<text x="{x(0) - 8}" y="{height + 4:.1f}" text-anchor="end" fill="#555555">{tick / 10:.1f}</text>'
        )
    for i, name in enumerate(("base", "1", "2", "3")):
        parts.append(f'<text x="{x(i)}" y="{y(0) + 18:.1f}" text-anchor="middle" fill="#555555">{name}</text>')
    for name, (color, _) in reversed(_STYLES.items()):
        runs = variants.get(name, {})
        curves = [[row["accuracy"] for row in rows] for rows in runs.values()]
        if not curves:
            continue
        if name == "loop":
            parts += [path(curve, color, 1, 0.35) for curve in curves]
        means = [statistics.fmean(values) for values in zip(*curves)]
        parts.append(path(means, color, 3, 1))
        parts += [f'<circle cx="{x(i):.1f}" cy="{y(v):.1f}" r="3.5" fill="{color}"/>' for i, v in enumerate(means)]
    return parts
