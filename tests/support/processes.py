"""The environment of commands that tests start."""

import os


def one_device(**variables: str) -> dict[str, str]:
    """Returns the environment of this process with the variables, and with one device, as on a user's machine."""
    flags = [flag for flag in os.environ["XLA_FLAGS"].split() if "device_count" not in flag]
    return os.environ | {"XLA_FLAGS": " ".join(flags)} | variables
