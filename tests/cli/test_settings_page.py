"""docs/settings.md is what the settings say."""

from pathlib import Path

from isheep_jax.cli.settings_page import page

PAGE = Path(__file__).parents[2] / "docs" / "settings.md"


def test_page_of_settings_is_current():
    assert PAGE.read_text(encoding="utf-8") == page(), "python -m isheep_jax.cli.settings_page docs/settings.md"
