"""The documentation agrees with the code: links, commands, settings, file names, generated tables."""

import dataclasses
import importlib
import importlib.util
import io
import math
import re
import shlex
from functools import cache
from pathlib import Path

import pytest

from isheep_jax.cli.arguments import Command
from isheep_jax.cli.console import Console
from isheep_jax.config import Config, flatten
from isheep_jax.errors import UserError
from isheep_jax.loop.stages.table import STAGES
from isheep_jax.loop.summary import IterationSummary
from isheep_jax.named_configs import config_names, named_config
from isheep_jax.studies.definitions import STUDIES
from isheep_jax.train import COMMAND as TRAIN

ROOT = Path(__file__).parent.parent
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "tpu_scripts/README.md", "tests/benchmarks/RESULTS.md")),
    *sorted((ROOT / "docs").rglob("*.md")),
]
TEXTS = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}
SETTINGS = flatten(Config())
SECTIONS = {name[: dot.start()] for name in SETTINGS for dot in re.finditer(r"\.", name)}
# Where a file that a page names may lie, besides next to the page.
FOLDERS = ("", "isheep_jax/")
# The config that a reader writes.
EXAMPLE = "configs/mine.py"
COMMANDS = ("train", "generate", "evaluate", "judge", "export", "fetch", "plan", "benchmark", "study")


def load_update():
    spec = importlib.util.spec_from_file_location("update", ROOT / "docs" / "update.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


update = load_update()


def without_code(text: str) -> str:
    return re.sub(r"^```.*?^```", "", text, flags=re.MULTILINE | re.DOTALL)


def spans(text: str) -> list[str]:
    """Inline code."""
    return re.findall(r"`([^`\n]+)`", without_code(text))


def commands(text: str) -> list[list[str]]:
    """Words after `python -m isheep_jax.` of each command, in code blocks and inline."""
    blocks = re.findall(r"^```bash\n(.*?)^```", text, flags=re.MULTILINE | re.DOTALL)
    blocks += re.findall(r"^    (python .*)$", text, flags=re.MULTILINE)
    lines = "\n".join(blocks).replace("\\\n", " ").splitlines() + spans(text)
    found = [match[1] for line in lines if (match := re.search(r"python -m isheep_jax\.([a-z][^#;|&]+)", line))]
    # A command may itself stand between the quotes of another.
    return [shlex.split(words if words.count('"') % 2 == 0 else words.rpartition('"')[0]) for words in found]


def command_named(name: str) -> Command:
    return importlib.import_module(f"isheep_jax.{name}").COMMAND


@cache
def options(command: str) -> set[str]:
    """Names of a command's options, without dashes; of a module in a room, those that its source names."""
    if command in COMMANDS:
        return {*command_named(command).settings(), "help"}
    path = ROOT / "isheep_jax" / f"{command.replace('.', '/')}.py"
    assert path.exists(), f"there is no command isheep_jax.{command}"
    text = path.read_text()
    return {*re.findall(r"--([a-z_]+)", text), *re.findall(r"^    ([a-z_]+): ", text, flags=re.MULTILINE), "help"}


@pytest.mark.parametrize("name", TEXTS)
def test_relative_links_and_anchors_resolve(name):
    page = ROOT / name
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(TEXTS[name])):
        if target.startswith(("http://", "https://")):
            continue
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), f"{name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", without_code(file.read_text()), flags=re.MULTILINE)
            assert anchor in [update.slug(heading) for heading in headings], f"{name}: {target}"


@pytest.mark.parametrize("name", TEXTS)
def test_commands_are_accepted(name):
    for command, *words in commands(TEXTS[name]):
        given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(command), f"{name}: {command} {given - options(command)}"
        whole = words and "--help" not in words and not re.search(r"NAME|\$|\.\.\.(?!\Z)", " ".join(words))
        if command in COMMANDS and whole:
            # The reader's own config stands for any.
            command_named(command).parse([word.replace("=mine", "=tiny") for word in words])


@pytest.mark.parametrize("name", TEXTS)
def test_settings_in_prose_exist(name):
    known = set(SETTINGS) | {option for command in COMMANDS for option in options(command)}
    for span in spans(TEXTS[name]):
        for word in re.findall(r"(?<![\w/-])--([a-z][a-z_.*]+)", span):
            if name.startswith("tpu_scripts") and "." not in word:
                continue  # an option of a script; tests/tpu_scripts checks those
            if word in ("section.field", "section.setting"):
                continue
            if word.endswith(".*"):
                assert word[:-2] in SECTIONS, f"{name}: --{word}"
            else:
                assert word in known, f"{name}: --{word}"
        if re.fullmatch(rf"({'|'.join(SECTIONS)})\.[a-z_.]+(=.*)?", span) and not span.endswith((".py", ".sh")):
            setting = span.partition("=")[0]
            assert (
                setting in SETTINGS
                or setting in SECTIONS
                or (ROOT / "isheep_jax" / f"{setting.replace('.', '/')}.py").exists()
            ), span


@pytest.mark.parametrize("name", TEXTS)
def test_values_of_settings_in_prose_are_possible(name):
    for span in spans(TEXTS[name]):
        words = span.split()
        settings = [word for word in words if re.fullmatch(r"--[a-z_.]+=[^A-Z\s][^\s]*", word)]
        if not settings or "..." in span or not all(word[2:].partition("=")[0] in SETTINGS for word in settings):
            continue
        error = refusal(settings)
        # Prose may leave out what else a setting needs, but not misname a value.
        assert " is not " not in error, f"{name}: {error}"
        assert "out of range" not in error, f"{name}: {error}"


def refusal(settings: list[str]) -> str:
    """Returns the message with which the settings are refused, or ""."""
    try:
        TRAIN.parse(["--config=tiny", *settings])
    except UserError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("name", TEXTS)
def test_files_named_in_prose_exist(name):
    for span in spans(TEXTS[name]):
        if span == EXAMPLE or "NAME" in span:
            continue
        if re.fullmatch(r"(isheep_jax|tests|docs|configs|tpu_scripts)(/[\w.*-]+)+/?", span):
            assert list(ROOT.glob(span.rstrip("/"))), f"{name}: {span}"
        elif re.fullmatch(r"[\w/]+\.py", span):
            places = [(ROOT / name).parent, *(ROOT / folder for folder in FOLDERS)]
            found = any((place / span).exists() for place in places)
            assert found or list(ROOT.glob(f"isheep_jax/**/{span}")), f"{name}: {span}"


@pytest.mark.parametrize("name", TEXTS)
def test_tables_of_code_are_in_the_files_that_the_pages_name(name):
    for table, path in re.findall(r"`([A-Z_]{4,})`\s+in\s+`([\w/]+\.py)`", TEXTS[name]):
        assert re.search(rf"^{table}\b", (ROOT / path).read_text(), flags=re.MULTILINE), f"{name}: {table} in {path}"


def test_picture_of_the_run_directory_has_every_stage():
    picture = TEXTS["docs/architecture.md"].partition("## The run directory")[2].partition("\n## ")[0]
    directories = {spec.directory for spec in STAGES.values()}
    assert {name for name in directories if not re.search(rf" {name}[/.]", picture)} == set()


def test_index_names_every_page():
    linked = {(ROOT / "docs" / link).resolve() for link in re.findall(r"\]\(([^)#]+)\)", TEXTS["docs/index.md"])}
    assert {page for page in PAGES if page.name != "index.md"} <= linked


def test_promises_name_tests_that_there_are():
    promised = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", TEXTS["docs/reliability.md"])
    assert len(promised) > 30
    for path, name in promised:
        assert re.search(rf"^def {name}\(", (ROOT / path).read_text(), flags=re.MULTILINE), f"{path}::{name}"


def test_readme_is_short_and_begins_with_the_two_commands():
    readme = TEXTS["README.md"]
    assert len(readme.splitlines()) <= 150
    blocks = re.findall(r"^```bash\n(.*?)\n```", readme, flags=re.MULTILINE | re.DOTALL)
    assert blocks[:2] == [
        "pip install . && python -m isheep_jax.train --config=tiny",
        'pip install -e ".[test]" && pytest',
    ]


def test_readme_shows_a_table_as_the_command_prints_it(tmp_path):
    block = re.search(r"^```\n(iteration .*?)^best:", TEXTS["README.md"], flags=re.MULTILINE | re.DOTALL)[1]
    summaries = []
    for number, line in enumerate(block.splitlines()[1:]):
        *_, instructions, kept, quality, following, loss, accuracy, _, _ = line.split()
        summary = IterationSummary(number, evaluation={"tiny": interval(float(accuracy), 512)})
        if number:
            summary = dataclasses.replace(
                summary,
                instructions=int(instructions),
                kept=int(kept),
                mean_quality=float(quality),
                mean_following=float(following),
                train_loss=float(loss),
            )
        summaries.append(summary)
    stream = io.StringIO()
    with Console(tmp_path, stream=stream, interactive=False) as console:
        for summary in summaries[:-1]:
            console.row(summary)
        with console.stage(len(summaries) - 1, "evaluate", 512, "prompts"):
            pass
        console.row(summaries[-1])
    assert stream.getvalue().endswith(block)


def interval(accuracy: float, count: int) -> dict:
    return {"accuracy": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / count), "count": count}


@pytest.mark.parametrize("name", TEXTS)
def test_copied_tables_are_those_of_their_page(name):
    copied = {"copied from": update.table_of, "generated by": lambda _: ""}
    blocks = {m[0] for m in update.BLOCK.finditer(TEXTS[name]) if m[1] == "copied from"}
    assert blocks == {m[0] for m in update.BLOCK.finditer(update.update(TEXTS[name], copied)) if m[1] == "copied from"}


def test_a_block_is_replaced_by_what_its_command_prints():
    page = "a\n<!-- generated by: printf 'x | y\\n' -->\nold\n<!-- end -->\nb\n"
    assert update.update(page, update.SOURCES) == page.replace("old", "x | y")


def generated(text: str, command: str) -> list[tuple[list[str], str]]:
    """Words and text of each block that a command generates."""
    blocks = update.BLOCK.findall(text)
    return [(shlex.split(source), body) for _, source, body in blocks if f"isheep_jax.{command} " in source]


def cells(row: str) -> list[str]:
    return [cell.strip() for cell in row.strip().strip("|").split("|")]


def tables(body: str) -> list[list[list[str]]]:
    """Cells of each table of a block, header first and without the line below it."""
    found = [part.splitlines() for part in body.split("\n\n") if part.startswith("|")]
    return [[cells(row) for row in [lines[0], *lines[2:]]] for lines in found]


STUDY_BLOCKS = {
    next(word.partition("=")[2] for word in words if word.startswith("--study=")): (words, body)
    for words, body in generated(TEXTS["docs/studies.md"], "study")
}


def test_every_study_is_on_the_page():
    # What is studied on real models takes hours, and has a page of its own.
    assert set(STUDY_BLOCKS) | {"real_model"} == set(STUDIES)
    assert "--study=real_model" in TEXTS["docs/real_models.md"]


@pytest.mark.parametrize("name", STUDY_BLOCKS)
def test_a_study_is_shown_as_it_is_defined(name):
    study, (words, body) = STUDIES[name], STUDY_BLOCKS[name]
    config = TRAIN.parse([word for word in words if re.match(r"--(config|evaluate\.)", word)]).settings
    study.check(config)
    assert f" on {config.evaluate.limit} held-out prompts (test); " in body
    header, *rows = tables(body)[0]
    assert [row[0] for row in rows] == [row.title for row in study.rows]
    assert set(study.also_shown) <= set(header)
    if any(row.paper for row in study.rows):
        shown = [row[header.index("paper (%)")] for row in rows]
        assert shown == [" → ".join(f"{x:.2f}" for _, x in sorted(row.paper.items())) for row in study.rows]
    assert body.rstrip().endswith(study.source)


@pytest.mark.parametrize("name", STUDY_BLOCKS)
def test_a_studys_tables_follow_from_its_runs(name):
    """1,000 prompts: the accuracies of the runs are exact, and everything else of a run's accuracy follows."""
    from isheep_jax.studies.report import Estimate

    study, (_, body) = STUDIES[name], STUDY_BLOCKS[name]
    (header, *rows), (_, *differences) = tables(body)
    runs = {}
    for row in study.rows:
        line = re.search(rf"^- {re.escape(row.title)}: (.*)$", body, flags=re.MULTILINE)[1]
        by_seed = [[float(x) for x in seed.split(": ")[1].split()] for seed in line.split(" | ")]
        runs[row.title] = [{row.column + i: x for i, x in enumerate(values)} for values in by_seed]
    iterations = [c for c in header if c.startswith("iteration ")]
    for title, *row in rows:
        for column in iterations:
            values = [run[n] for run in runs[title] if (n := int(column.split()[1])) in run]
            shown = row[header.index(column) - 1]
            assert shown == (Estimate.of(values).text() if values else ""), (title, column)
    first = runs[study.rows[0].title]
    for title, *row in differences:
        lasts = [run[max(run)] - one[max(one)] for run, one in zip(runs[title], first, strict=True)]
        estimate = Estimate.of(lasts)
        text = estimate.text("+")
        assert row[-1] == (f"**{text}**" if estimate.is_beyond_zero else text), title


def test_plan_table_shows_the_configs_as_they_are():
    from isheep_jax.planning import report

    ((_, body),) = generated(TEXTS["docs/tpu.md"], "plan")
    ((header, *rows),) = tables(body)
    assert header == list(report.TABLE_HEADS)
    assert {row[0] for row in rows} == {name for name in config_names() if named_config(name).mesh.topology}
    for row in rows:
        shown = dict(zip(header, row, strict=True))
        settings = flatten(named_config(row[0]))
        if shown["slice"].startswith(f"{settings['mesh.topology']}:"):
            assert shown["decode slots"] == f"{settings['decode.slots']:,}", row[0]
        assert shown["SFT: method, tokens"] == f"{settings['sft.method']}, {settings['sft.sequence_length']:,}", row[0]
        chips = int(re.search(r": (\d+) TPU", shown["slice"])[1])
        # Bound and forecast; a dash where there is no forecast.
        times = [shown[head].split(" / ") for head in ("iteration, minutes", "chip-hours")]
        for minutes, hours in zip(*times, strict=True):
            if minutes != "-":
                expected = float(minutes) / 60 * chips
                assert math.isclose(expected, float(hours), abs_tol=0.05 + 0.05 / 60 * chips), row[0]


def test_config_in_readme_is_one(tmp_path, monkeypatch):
    from isheep_jax import named_configs

    (tmp_path / "mine.py").write_text(re.search(r"^```python\n(.*?)^```", TEXTS["README.md"], flags=re.M | re.S)[1])
    monkeypatch.setattr(named_configs, "configs_directory", lambda: tmp_path)
    mine = TRAIN.parse(["--config=mine", "--preset=i_sheep"]).settings
    assert (mine.name, mine.synthesize.seeds, mine.assess.read) == ("mine", "seeds.jsonl", "sampled")
