"""How much memory of this host is free, and what of it may hold the base's weights."""

from pathlib import Path

# Of the free memory, what the base may take.
KEPT_SHARE = 0.5
_MEMORY = Path("/proc/meminfo")
# Of the container that the process is in: its limit, and what is used of it.
_GROUP = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def free_host_memory() -> int:
    """Returns the bytes that processes may still take without swapping; 0 where that cannot be known."""
    try:
        lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
        free = 1024 * int(lines["MemAvailable"].split()[0])
    except (OSError, KeyError, ValueError):
        return 0
    try:
        limit, used = (int(path.read_text()) for path in _GROUP)
    except (OSError, ValueError):  # there is none, or its limit is "max"
        return free
    return max(min(free, limit - used), 0)
