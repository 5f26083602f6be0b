"""CPU threads: how many compute, and how idle ones wait. Several processes then share a machine.

torch computes on OpenMP threads. Its OpenMP library (libgomp in the wheels) reads the environment once, when torch is
imported. Without OMP_WAIT_POLICY an idle thread spins for some milliseconds before it sleeps: it takes a core from the
process beside it. `prepare` asks for sleep instead, and `settle` gives a model no more threads than its work feeds.

The user's choice counts: OMP_WAIT_POLICY and OMP_NUM_THREADS in the environment, and `threads` in a call. Where a
program imported torch before the engine, only `threads` in a call changes its number of threads.
"""

import os
import sys
from pathlib import Path

# Multiply-adds that feed one thread, about a quarter of a millisecond: waking and joining a thread costs some 10 us.
GRAIN = 1 << 23
_CGROUPS, _OWN_CGROUP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")

# Of a process whose torch this module imported: torch's own number of threads, and what `settle` made of it. None where
# torch was there already, or where the user chose.
_default: int | None = None
_settled: int | None = None


def prepare() -> None:
    """Import torch so that its idle threads sleep. Every entry point imports the engine, and so calls this, first."""
    global _default
    if "torch" in sys.modules:
        return
    os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # child processes inherit it
    import torch

    _default = torch.get_num_threads()


def settle(threads: int | None, work: int) -> int:
    """Set torch's number of threads for a model on a CPU; returns how many threads the model is to have.

    threads  the user's choice; None chooses by `work` (see `work_of`) and by the cores that this process may use
    """
    global _settled
    import torch

    if threads is not None:
        use(threads)
        return threads
    current = torch.get_num_threads()
    if "OMP_NUM_THREADS" in os.environ:
        return current
    if _default is None or current != (_settled or _default):
        return count(work, min(current, cores()))
    worth = count(work, min(_default, cores()))
    _settled = max(worth, _settled or 1)  # several models of one process share torch's number
    torch.set_num_threads(_settled)
    return worth


def use(threads: int) -> None:
    """Set torch's number of threads to the user's choice; a later `settle` leaves it."""
    global _default
    import torch

    if threads < 1:
        raise ValueError(f"threads: got {threads}, expected at least 1")
    torch.set_num_threads(threads)
    _default = None


def work_of(tokens: int, dim: int, ffn_dim: int) -> int:
    """Multiply-adds of the largest product in a transformer's pass over one chunk."""
    return tokens * dim * ffn_dim


def count(work: int, cores: int) -> int:
    """Threads that `work` feeds, at least 1 and at most `cores`."""
    return max(1, min(cores, work // GRAIN))


def cores() -> int:
    """Cores that this process may use: its CPU affinity, and the quota of its container."""
    affinity = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min(affinity, _quota(_CGROUPS, _OWN_CGROUP) or affinity)


def _quota(root: Path, own: Path) -> int | None:
    """Whole cores that the control groups of this process grant, rounded down but to at least 1; None is no limit."""
    try:
        lines = [line.split(":", 2) for line in own.read_text().splitlines()]
    except OSError:
        return None
    limits = []
    for _, controllers, path in (line for line in lines if len(line) == 3):
        if controllers and "cpu" not in controllers.split(","):
            continue
        mount = root / controllers if controllers else root  # version 1 has a tree for each controller
        place = mount / path.lstrip("/")
        # Inside a container the path may name a folder that only the host sees; its own limits lie at the mount.
        for folder in (place, *place.parents):
            if folder.is_relative_to(mount):
                limits.append(_limit(folder))
    return min((max(1, int(limit)) for limit in limits if limit is not None), default=None)


def _limit(folder: Path) -> float | None:
    """Cores that one control group grants; None is no limit."""
    try:
        if (folder / "cpu.max").is_file():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = ((folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        return None if quota in ("max", "-1") else float(quota) / float(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None
