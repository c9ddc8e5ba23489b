"""A picker that runs in the test's event loop, between fake engines and a fake Envoy."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace

from servegym.runtime.gateway.serve import Gateway
from servegym.runtime.gateway.settings import Settings
from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.envoys import ONCE, FakeEnvoy

# Patient, so that no test depends on how busy the machine is.
QUICK = Settings(engines=(), envoy=False, scrape_s=0.05, probe_timeout_s=2.0, budget_ms=2000.0, drain_s=5.0)


def free_port() -> int:
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@asynccontextmanager
async def running(
    *engines: FakeEngine, policy: str = "least_request", mode: str = ONCE, **flags: object
) -> AsyncIterator[tuple[Gateway, FakeEnvoy]]:
    """A gateway without Envoy in front of these engines, and who asks it."""
    for engine in engines:
        await engine.start()
    urls = tuple(engine.url for engine in engines)
    flags = {"engines": urls, **flags}
    settings = replace(QUICK, picker_port=free_port(), metrics_port=free_port(), **flags)
    gateway, ready = Gateway(settings, policy), asyncio.Event()
    task = asyncio.create_task(gateway.run(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    envoy = FakeEnvoy(settings.picker_port, mode)
    try:
        yield gateway, envoy
    finally:
        await envoy.close()
        gateway.stop()
        try:
            assert await asyncio.wait_for(task, 20) == 0
        finally:
            for engine in engines:
                await engine.stop()


async def until(condition, seconds: float = 10.0) -> None:
    """Wait until something holds."""
    async with asyncio.timeout(seconds):
        while not condition():
            await asyncio.sleep(0.01)
