"""The exceptions that a person at the terminal is meant to read."""


class UserError(Exception):
    """Bad input. The message is one line that names the setting or file and what would be right.

    Commands print it to stderr without a traceback and exit with code 2.
    """


class NothingLeftError(UserError):
    """The input is good, but the model's own data has run out: nothing new is written, or too little is kept."""
