"""Threads that share the lanes of a step.

A step takes a few hundred microseconds, so the hand-over counts: a lock each way takes half the time of
`concurrent.futures`, whose futures and queues are made anew for each task.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any


class Crew:
    """Run one function on several shares of work at once, the first on the calling thread.

    Args:
        shares: what the function gets behind its common arguments, one tuple a thread.
    """

    def __init__(self, shares: Sequence[tuple]) -> None:
        self._first = shares[0]
        self._members = [_Member(share) for share in shares[1:]]

    def run(self, function: Callable, *args: Any) -> None:
        """Call `function(*args, *share)` for every share, and return when all are done."""
        for member in self._members:
            member.start_work(function, args)
        try:
            function(*args, *self._first)
        finally:
            errors = [member.finish_work() for member in self._members]
        for error in filter(None, errors):
            raise error

    def close(self) -> None:
        """End the threads."""
        for member in self._members:
            member.start_work(None, ())
        self._members = []


class _Member(threading.Thread):
    """A thread that waits for work at one lock and says at another that it is done."""

    def __init__(self, share: tuple) -> None:
        super().__init__(daemon=True, name="servegym-lanes")
        self._share = share
        self._work: tuple[Callable | None, tuple] = (None, ())
        self._error: BaseException | None = None
        self._begin, self._done = threading.Lock(), threading.Lock()
        self._begin.acquire()
        self._done.acquire()
        self.start()

    def start_work(self, function: Callable | None, args: tuple) -> None:
        self._work = (function, args)
        self._begin.release()

    def finish_work(self) -> BaseException | None:
        self._done.acquire()
        return self._error

    def run(self) -> None:
        while True:
            self._begin.acquire()
            function, args = self._work
            if function is None:
                return
            self._error = None
            try:
                function(*args, *self._share)
            except BaseException as error:
                self._error = error
            self._done.release()
