"""How many cores an engine should compute on."""

from __future__ import annotations

import math
import os
from functools import cache
from pathlib import Path


@cache
def physical_cores() -> int:
    """Physical cores that this process may use: at least 1. Hyper-threads, other processes' cores (taskset) and more
    than a container's CPU quota do not count."""
    try:
        allowed = sorted(os.sched_getaffinity(0))
    except AttributeError:  # macOS, Windows: the system does not say; half of the threads is right for most
        return max(1, (os.cpu_count() or 2) // 2)
    cores = {_siblings(cpu) for cpu in allowed}
    return max(1, min(len(cores), _container_cores()))


def _siblings(cpu: int) -> str:
    """The hyper-threads of this one's core, as the kernel writes them ("0,4"); the number itself where it does not."""
    try:
        return Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list").read_text(encoding="ascii")
    except (OSError, ValueError):
        return str(cpu)


def _container_cores() -> int:
    """Cores that the control group grants, rounded up; very many where there is no limit."""
    unlimited = 1 << 20
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="ascii").split()
        return unlimited if quota == "max" else max(1, math.ceil(int(quota) / int(period)))
    except (OSError, ValueError, ZeroDivisionError):
        return unlimited
