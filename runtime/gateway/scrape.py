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

_Found = str | Exception | None
_GONE = (aiohttp.ClientConnectorError, aiohttp.ServerDisconnectedError, aiohttp.ClientOSError)


class Watchman:
    """Scrapes all engines into the books.

    Args:
        now: seconds on the view's clock.
        changed: called when an engine has come or gone.
    """

    def __init__(
        self,
        books: Books,
        settings: Settings,
        telemetry: Telemetry,
        now: Callable[[], float],
        changed: Callable[[], None],
    ) -> None:
        self._books, self._settings, self._telemetry, self._now = books, settings, telemetry, now
        self._changed = changed
        self._watched: set[Engine] = set()

    async def run(self, looked: asyncio.Event) -> None:
        """Watch until cancelled; `looked` is set when every engine was asked once."""
        timeout = aiohttp.ClientTimeout(total=self._settings.probe_timeout_s)
        async with aiohttp.ClientSession(timeout=timeout) as session, asyncio.TaskGroup() as group:
            firsts = [group.create_task(self.look(session, engine, True)) for engine in self._books.engines]
            await asyncio.gather(*firsts)
            looked.set()
            while True:
                self._books.advance(self._now())
                for engine in self._books.engines:
                    if engine.is_listed and engine not in self._watched:
                        self._watched.add(engine)
                        group.create_task(self._watch(session, engine))
                await asyncio.sleep(TICK_S)

    async def _watch(self, session: aiohttp.ClientSession, engine: Engine) -> None:
        period = self._settings.scrape_s
        # Not all at one instant, which would make every decision wait for all answers' parsing.
        await asyncio.sleep(period * engine.number / len(self._books.engines))
        checked = 0.0
        while engine.is_listed:
            begin = self._now()
            check = begin - checked >= HEALTH_S or not self._is_up(engine)
            checked = begin if check else checked
            await self.look(session, engine, check)
            pause = period if self._is_up(engine) else max(period, DOWN_S)
            await asyncio.sleep(max(pause - (self._now() - begin), 0.001))
        self._watched.discard(engine)

    def _is_up(self, engine: Engine) -> bool:
        return self._books.view.instances[engine.number].available

    async def look(self, session: aiohttp.ClientSession, engine: Engine, health: bool) -> None:
        """One scrape of an engine, and what follows from it, if it is still listed then."""
        found = await self._ask(session, engine, health)
        if not engine.is_listed:
            return
        if found is None:
            self._down(engine, "unhealthy")
        elif isinstance(found, _GONE):
            self._down(engine, f"gone: {found}")
            self._books.lost(engine)
        elif isinstance(found, Exception):
            engine.failures += 1
            if engine.failures >= self._settings.down_after or not engine.is_told:
                self._down(engine, f"silent: {type(found).__name__}")
        else:
            engine.is_known = True
            if self._books.up(engine):
                self._telemetry.event("engine_up", engine=engine.endpoint.address)
                self._changed()
            with suppress(ValueError):  # what cannot be read grows stale
                self._books.read(engine, parse_metrics(found), self._now())

    async def _ask(self, session: aiohttp.ClientSession, engine: Engine, health: bool) -> _Found:
        """Its metrics; or what went wrong; or None where it says that it is ill."""
        try:
            if health and await self._is_ill(session, engine):
                return None
            async with session.get(f"http://{engine.endpoint.address}/metrics") as response:
                return (await _read(response)).decode("utf-8", "replace")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            return error

    async def _is_ill(self, session: aiohttp.ClientSession, engine: Engine) -> bool:
        async with session.get(f"http://{engine.endpoint.address}/health") as response:
            return response.status >= 500

    def _down(self, engine: Engine, why: str) -> None:
        is_news, engine.is_known = self._books.down(engine) or not engine.is_known, True
        if is_news:
            self._telemetry.event("engine_down", engine=engine.endpoint.address, why=why)
            self._changed()


async def _read(response: aiohttp.ClientResponse) -> bytes:
    """A body, as far as it is of a size that metrics have."""
    body = bytearray()
    async for chunk in response.content.iter_chunked(1 << 16):
        body += chunk
        if len(body) > MOST_BYTES:
            response.close()
            break
    return bytes(body)
