"""The command line and the terminal, shared by the commands at the root of the package.

`options` describes a command, `arguments` reads its command line into a dataclass, `help` renders `--help` and
`settings_page` the page docs/settings.md from the same docstrings, which `settings` reads; `errors` turns an error into
one line and an exit code, `signals` a signal, and `streams` makes standard output fit for both. `console` is the loop's
reporter for a terminal, with `progress` of a stage and `results` of a run; `chat` is a conversation. In: words. Out:
options, and text on the terminal. May import every room below it; only commands import it.
"""

import sys

from isheep_jax.cli import signals, streams

# Importing a command takes a moment, in which a signal may arrive; so this comes before all else that commands import.
if signals.running_command():
    streams.prepare(sys)
    signals.listen()
