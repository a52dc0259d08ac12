"""Describes a command: its options, and the words of its `--help`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from isheep_jax.cli.settings import WITHOUT_PREFIX, Setting, settings_of
from isheep_jax.config import Config


@dataclass(frozen=True)
class ConfigOptions:
    """Options of a command that works on a config; a preset changes the config, and single settings change both."""

    config: str = ""
    """Named config to start from."""
    preset: str = ""
    """Method whose settings replace those of the config."""
    settings: Config = field(default_factory=Config, metadata=WITHOUT_PREFIX)


@dataclass(frozen=True)
class CommandDescription:
    """A command: what its command line may hold, and what `--help` says.

    module: as in `python -m MODULE`.
    options: dataclass of its options; a `ConfigOptions` takes --config, --preset and every setting of a config.
    usage: what may follow the module, one form per line.
    about: what the command does.
    example: arguments that work, for messages.
    positional: options that may also be given without their names, in this order.
    required: options that must not be empty.
    instead_of_config: an option that makes --config unnecessary.
    everyday: options that `--help` lists first; the others follow as further options.
    hidden: settings that this command does not have.
    ranges: intervals of its own options, written as in `config_checks.RANGES`.
    closing: returns the last paragraphs of `--help`.
    """

    module: str
    options: type
    usage: tuple[str, ...]
    about: str
    example: str
    positional: tuple[str, ...] = ()
    required: tuple[str, ...] = ()
    instead_of_config: str = ""
    everyday: tuple[str, ...] = ()
    hidden: tuple[str, ...] = ()
    ranges: Mapping[str, str] = field(default_factory=dict)
    closing: Callable[[], str] = lambda: ""

    def settings(self) -> dict[str, Setting]:
        """Returns all settings of the command line by name."""
        return {name: s for name, s in settings_of(self.options).items() if name not in self.hidden}
