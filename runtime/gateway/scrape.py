"""The watch over the engines: each is scraped on its own clock, and marked down while it does not answer.

    answers /metrics          up, and its readings are young, if they can be read; else they grow stale
    answers neither in time   down after so many scrapes in a row
    refuses the connection    down at once; what had not begun there is on its way to another engine
    /health says 5xx          down

An engine that is down is asked again at the same pace, and is up with its first answer.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from contextlib import suppress

import aiohttp

from servegym.runtime.gateway.books import Books, Engine
from servegym.runtime.gateway.readings import parse_metrics
from servegym.runtime.gateway.settings import Settings
from servegym.runtime.gateway.telemetry import Telemetry

HEALTH_S = 1.0
DOWN_S = 0.5  # pause between two looks at an engine that is down, at least
TICK_S = 0.05
MOST_BYTES = 4 << 20  # of /metrics

_GONE = (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class Watchman:
    """Scrapes all engines into the books.

    Args:
        now: seconds on the view's clock.
    """

    def __init__(
        self, books: Books, settings: Settings, telemetry: Telemetry, now: Callable[[], float]
    ) -> None:
        self._books, self._settings, self._telemetry, self._now = books, settings, telemetry, now

    async def run(self, looked: asyncio.Event) -> None:
        """Watch until cancelled; `looked` is set when every engine was asked once."""
        timeout = aiohttp.ClientTimeout(total=self._settings.probe_timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            firsts = [group.create_task(self.look(session, engine, True)) for engine in self._books.engines]
            await asyncio.gather(*firsts)
            looked.set()
            group.create_task(self._tick())
            for engine in self._books.engines:
                group.create_task(self._watch(session, engine))

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(TICK_S)
            self._books.advance(self._now())

    async def _watch(self, session: aiohttp.ClientSession, engine: Engine) -> None:
        period = self._settings.scrape_s
        # Not all at one instant, which would make every decision wait for all answers' parsing.
        await asyncio.sleep(period * engine.number / len(self._books.engines))
        checked = 0.0
        while True:
            begin = self._now()
            check = begin - checked >= HEALTH_S
            checked = begin if check else checked
            await self.look(session, engine, check)
            is_up = self._books.view.instances[engine.number].available
            pause = period if is_up else max(period, DOWN_S)
            await asyncio.sleep(max(pause - (self._now() - begin), 0.001))

    async def look(self, session: aiohttp.ClientSession, engine: Engine, health: bool) -> None:
        """One scrape of an engine, and what follows from it."""
        try:
            if health and await self._is_ill(session, engine):
                self._down(engine, "unhealthy")
                return
            async with session.get(f"{engine.endpoint.url}/metrics") as response:
                text = (await _read(response)).decode("utf-8", "replace")
        except _GONE as error:
            self._down(engine, f"gone: {error}")
            self._books.lost(engine)
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            engine.failures += 1
            if engine.failures >= self._settings.down_after or not engine.is_told:
                self._down(engine, f"silent: {type(error).__name__}")
        else:
            if self._books.up(engine):
                self._telemetry.event("engine_up", engine=engine.endpoint.address)
            with suppress(ValueError):  # what cannot be read grows stale
                self._books.read(engine, parse_metrics(text), self._now())

    async def _is_ill(self, session: aiohttp.ClientSession, engine: Engine) -> bool:
        async with session.get(f"{engine.endpoint.url}/health") as response:
            return response.status >= 500

    def _down(self, engine: Engine, why: str) -> None:
        if self._books.down(engine):
            self._telemetry.event("engine_down", engine=engine.endpoint.address, why=why)


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """A body, as far as it is of a size that metrics have."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MOST_BYTES:
            response.close()
            break
    return bytes(body)
