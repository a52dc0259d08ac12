"""The one exception that a person at the terminal is meant to read."""


class UserError(Exception):
    """Bad input. The message is one line that names the setting or file and what would be right.

    Commands print it to stderr without a traceback and exit with code 2.
    """
