"""Processes that a measurement starts: each leads a group of its own, so that what it started ends with it."""

import os


def with_group(pid: int, sign: int) -> None:
    """Send a signal to the group that process `pid` leads; nothing where the group has ended."""
    try:
        os.killpg(pid, sign)
    except ProcessLookupError:
        return
