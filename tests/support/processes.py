"""What a test starts ends with it, however the test ends.

On Linux this process adopts what its children leave behind (PR_SET_CHILD_SUBREAPER), so a shell or
a torchrun that is killed leaves nothing that is out of reach.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import signal
from pathlib import Path

SUBREAPER = 36  # PR_SET_CHILD_SUBREAPER of linux/prctl.h
LIVES_ON = b"multiprocessing.resource_tracker"  # started once, by whoever needs it first


def adopt() -> None:
    """Make orphans of this process its own children."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(SUBREAPER, 1, 0, 0, 0)


def children() -> set[int]:
    """The processes that this one has started or adopted and that still have an entry."""
    found: set[int] = set()
    for path in Path("/proc/self/task").glob("*/children"):
        with contextlib.suppress(OSError):  # a thread that has just ended
            found.update(map(int, path.read_text().split()))
    return found


def end_children(before: set[int]) -> None:
    """Kill all children that are not in `before`, and what they started."""
    while new := {pid for pid in children() - before if not _lives_on(pid)}:
        for pid in new:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        for pid in new:  # its children become ours when it is gone
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, 0)


def _lives_on(pid: int) -> bool:
    try:
        return LIVES_ON in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False
