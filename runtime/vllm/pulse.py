"""Whether an engine still works, where a request that waits for it hears nothing.

Silence alone says little: a request may wait in a queue, or its answer comes all at once. Nor do fresh
/metrics prove anything, for vLLM answers them even while its engine core hangs; but that core alone lets
the count of generated tokens rise.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp

CONNECT_S = 5.0  # a server that computes on all cores may take seconds to accept
PATIENT = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S)  # of requests that `listening` bounds


class Pulse:
    """One engine's.

    Args:
        stall_s: seconds without progress after which the engine counts as hung.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s
        self._generated = 0.0
        self._progressed_at = time.monotonic()

    def told(self, generated: float) -> None:
        """The engine's count of generated tokens came; where it tells none, 0 each time."""
        if generated > self._generated:
            self._progressed_at = time.monotonic()
        self._generated = generated

    @asynccontextmanager
    async def listening(self) -> AsyncIterator[None]:
        """Around what waits for the engine to say something.

        Raises:
            TimeoutError: for `stall_s` it has said nothing here, and its count has not risen.
        """
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(None) as limit:
                timer: asyncio.TimerHandle

                def look() -> None:
                    nonlocal timer
                    left_s = self._progressed_at + self._stall_s - time.monotonic()
                    if left_s > 0:
                        timer = loop.call_later(left_s, look)
                    else:
                        limit.reschedule(loop.time())

                timer = loop.call_later(self._stall_s, look)
                try:
                    yield
                finally:
                    timer.cancel()
        except TimeoutError as error:
            if limit.expired():
                raise TimeoutError(f"no answer and no progress for {self._stall_s:g} s") from error
            raise
