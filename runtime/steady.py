"""What keeps timing in this process steady: its memory, no pauses of the interpreter, one core a thread."""

from __future__ import annotations

import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

SWITCH_S = 0.0005
_MMAP_THRESHOLD, _TRIM_THRESHOLD = -3, -1  # of mallopt


def take_core(number: int, threads: int) -> None:
    """Keep this thread, one of so many, on a core of its own where there are enough.

    The cores of a shared machine differ in speed by tens of percent, for seconds: whoever is measured on one
    and plays on the other is predicted wrong.
    """
    cores = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
    if threads <= len(cores):
        os.sched_setaffinity(0, {cores[number]})


@contextmanager
def undisturbed() -> Iterator[None]:
    """No collection of garbage meanwhile: a pause of tens of milliseconds would be measured.

    And threads that want the interpreter get it soon: the default lets the router wait for 5 ms.
    """
    was_enabled, interval = gc.isenabled(), sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_S)
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.unfreeze()
        if was_enabled:
            gc.enable()


def keep_freed_memory() -> None:
    """Have glibc keep what torch frees: fresh pages would cost more time than what is computed in them."""
    if sys.platform == "linux":
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(_MMAP_THRESHOLD, 32 << 20)  # the most that glibc takes
            libc.mallopt(_TRIM_THRESHOLD, 1 << 30)
