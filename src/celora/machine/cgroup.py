"""What Linux's control groups allow this process: a container's, a job's of a cluster, or a slice's of systemd.

A process may use no more than each group around its own allows. Both versions are read: version 1 has a tree of groups
for each resource, version 2 has one for all (Linux's documentation, admin-guide/cgroup-v1 and cgroup-v2.rst).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

_ROOT, _MINE = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_OF_MEMORY = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def free_memory() -> int | None:
    """Bytes that this process may still allocate; None where no group has a limit. Version 1 always has one."""
    free = []
    for group in _groups("memory"):
        for limit, taken, cached in _OF_MEMORY:
            with contextlib.suppress(OSError, ValueError, KeyError):
                left = int(_read(group / limit)) - int(_read(group / taken))
                counted = dict(line.split() for line in _read(group / "memory.stat").splitlines())
                free.append(left + int(counted[cached]))  # files in memory make way
    return min(free, default=None)


def allowed_cpus() -> int | None:
    """Whole CPUs whose time this process may use, at least one; None without a limit."""
    allowed = []
    for group in _groups("cpu"):
        for files in (("cpu.max",), ("cpu.cfs_quota_us", "cpu.cfs_period_us")):
            with contextlib.suppress(OSError, ValueError):
                quota, period = (int(number) for file in files for number in _read(group / file).split())
                if quota > 0:  # version 1 writes -1 for no limit
                    allowed.append(max(1, quota // period))
    return min(allowed, default=None)


def _groups(controller: str) -> Iterator[Path]:
    """The groups that this process is in, the outermost first. Those that a container does not see are left out."""
    try:
        lines = [line.split(":", 2) for line in _read(_MINE).splitlines()]
    except OSError:
        lines = [["0", "", "/"]]
    for _, controllers, path in lines:
        if controllers and controller not in controllers.split(","):
            continue
        group = _ROOT / controller if controllers else _ROOT
        yield group
        for part in Path(path).parts[1:]:
            if part == "..":  # outside of what this container sees
                break
            yield (group := group / part)


def _read(file: Path) -> str:
    return file.read_text(encoding="utf-8", errors="replace")
