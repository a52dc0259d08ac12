"""Writes `docs/settings.md`, from the same texts as `--help`.

python -m isheep_jax.cli.settings_page docs/settings.md
"""

import sys
from collections.abc import Iterable
from pathlib import Path

from isheep_jax.cli.help import by_section
from isheep_jax.cli.settings import Setting, sections_of, settings_of, written
from isheep_jax.config import EVERYDAY, Config
from isheep_jax.config_checks import RANGES, describe_range
from isheep_jax.presets import PRESETS

_INTRODUCTION = """# Settings

Every setting of a run, with its default. A named config (`--config=NAME`, a file in `configs/`) changes the defaults, a
preset (`--preset=NAME`) lays a method over the config, and `--section.field=value` on the command line changes both.
`python -m isheep_jax.train --config=NAME --help` shows the values of a config. A list is written with commas, such as
`--respond.temperature=0.6,0.3`.

This page is generated: `python -m isheep_jax.cli.settings_page docs/settings.md`.
"""


def page() -> str:
    """Returns the page: everyday settings, then the details by section, then the presets."""
    settings = settings_of(Config)
    parts = [_INTRODUCTION, "## Everyday settings\n", _table(settings[name] for name in EVERYDAY)]
    sections = sections_of(Config)
    for section, names in by_section(name for name in settings if name not in EVERYDAY).items():
        title = f"## Details: `{section}`\n\n{sections[section + '.']}\n" if section else "## Details: the run\n"
        parts += [title, _table(settings[name] for name in names)]
    parts += ["## Presets\n", "\n".join(f"- `--preset={name}`: {p.description}." for name, p in PRESETS.items()) + "\n"]
    return "\n".join(parts)


def _table(settings: Iterable[Setting]) -> str:
    defaults = Config()
    rows = ["| setting | default | values | meaning |", "|---|---|---|---|"]
    for setting in settings:
        default = written(setting.value_of(defaults))
        values = f"`{setting.values}`".replace("|", "\\|")
        if setting.name in RANGES:
            values += f", {describe_range(RANGES[setting.name])}"
        meaning = setting.text.replace("|", "\\|").replace("<", "&lt;")
        rows.append(f"| `{setting.name}` | {f'`{default}`' if default else 'empty'} | {values} | {meaning} |")
    return "\n".join(rows) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(page(), encoding="utf-8")
