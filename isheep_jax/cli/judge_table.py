"""The table of a judge check as lines of text: a column per reading, a row per kind of damage."""

from collections.abc import Mapping, Sequence

from isheep_jax.cli.results import table_line
from isheep_jax.config import GuardConfig
from isheep_jax.loop.judging.check import JudgeCheck, ReadingCheck
from isheep_jax.loop.judging.damages import DAMAGES


def judge_lines(check: JudgeCheck, guard: GuardConfig) -> list[str]:
    """Returns the table of a check, what its rows mean, and whether what is selected by passes."""
    labels, columns = list(check.readings), list(check.readings.values())
    kinds = list(columns[0].kinds)
    rows = {
        "mean": [str(column.auc) for column in columns],
        **{kind: [_kind(column, kind) for column in columns] for kind in kinds},
        "above its own damaged one": [_number(column.wins) for column in columns],
        "ties": [_number(column.ties) for column in columns],
        "correlation with length": [_number(column.length) for column in columns],
    }
    if any(column.lost for column in columns):
        rows["good ones dropped by rules"] = [_number(column.lost) for column in columns]
    if any(column.unread for column in columns):
        rows["without a value"] = [_number(column.unread) for column in columns]
    if any(column.mass is not None for column in columns):
        rows["mass on the ten scores"] = [_number(column.mass) for column in columns]
    rows["verdict"] = ["passes" if column.passes(guard) else "fails" for column in columns]
    lines = [
        f"{check.tasks} tasks, {check.pairs} responses: the chance that a good one stands above a damaged one (AUC; "
        f"0.5 is a coin), with its interval of 95 %; the mean is over {', '.join(check.counted)}",
        *_table(labels, rows),
    ]
    if check.agreement:
        pairs = ", ".join(f"{names} {_number(value)}" for names, value in check.agreement.items())
        lines.append(f"agreement (rank correlation over all responses): {pairs}")
    if any(column.by_rule for column in columns):
        lines.append("by rules: rules on the text drop most of these, whatever the judge says (docs/judging.md)")
    described = [f"{kind}: {DAMAGES[kind].describe}" for kind in kinds if kind in DAMAGES]
    if described:
        lines.append(f"damages: {'; '.join(described)}")
    return [*lines, check.line(guard)]


def _table(labels: Sequence[str], rows: Mapping[str, Sequence[str]]) -> list[str]:
    columns = [max(cells, key=len) for cells in zip(labels, *rows.values(), strict=True)]
    width = max(map(len, rows))
    lines = {"": labels, **rows}
    return [f"  {name:{width}}  {table_line(cells, columns)}".rstrip() for name, cells in lines.items()]


def _kind(check: ReadingCheck, kind: str) -> str:
    estimate = check.kinds[kind]
    return f"{estimate.value:.2f} by rules" if kind in check.by_rule else str(estimate)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"
