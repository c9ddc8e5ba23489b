"""A gateway with a real Envoy in front of fake engines, and what a client sees of it."""

import asyncio
import json
from asyncio import StreamReader, StreamWriter
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import replace

import aiohttp

from servegym.runtime.gateway.serve import Gateway
from tests.runtime.gateway.engines import FakeEngine
from tests.runtime.gateway.running import QUICK, free_port


class Client:
    """What a client of the gateway sees."""

    def __init__(self, gateway: Gateway, session: aiohttp.ClientSession) -> None:
        self._url, self._session = f"http://127.0.0.1:{gateway.settings.port}", session

    async def post(self, ask: dict | bytes, **headers: str) -> tuple[int, bytes, bool]:
        """Status, body, and whether it is whole."""
        data = ask if isinstance(ask, bytes) else json.dumps(ask).encode()
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        async with self._session.post(f"{self._url}/v1/completions", data=data, headers=named) as answer:
            body = b""
            try:
                async for piece in answer.content.iter_any():
                    body += piece
            except aiohttp.ClientPayloadError:
                return answer.status, body, False
            self.headers = answer.headers
            return answer.status, body, True

    async def get(self, path: str) -> int:
        async with self._session.get(self._url + path) as answer:
            return answer.status


@asynccontextmanager
async def behind_envoy(*engines: FakeEngine, policy="least_request", **flags) -> AsyncIterator[tuple]:
    for engine in engines:
        await engine.start()
    flags = {"engines": tuple(engine.url for engine in engines), **flags}
    ports = {name: free_port() for name in ("port", "picker_port", "metrics_port")}
    settings = replace(QUICK, envoy=True, **ports, **flags)
    gateway, ready = Gateway(settings, policy), asyncio.Event()
    task = asyncio.create_task(gateway.run(ready.set))
    waiting = asyncio.create_task(ready.wait())
    await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        waiting.cancel()
        await task
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        try:
            yield gateway, Client(gateway, session), task
        finally:
            gateway.stop()
            try:
                await asyncio.wait_for(task, 30)
            finally:
                for engine in engines:
                    await engine.stop()


async def begin(gateway: Gateway, size: int, *headers: bytes) -> tuple[StreamReader, StreamWriter]:
    """A connection over which the head of a request of so many bytes was sent, with these headers."""
    reader, writer = await asyncio.open_connection("127.0.0.1", gateway.settings.port, limit=1 << 16)
    head = (b"POST /v1/completions HTTP/1.1", b"host: g", b"content-length: %d" % size, *headers)
    writer.write(b"\r\n".join(head) + b"\r\n\r\n")
    return reader, writer


async def until_done(reader: StreamReader, pause_s: float = 0.0) -> None:
    """Read a stream of events to its last one, with a pause behind each piece."""
    last = b""
    while b"[DONE]" not in last:
        piece = await asyncio.wait_for(reader.read(1 << 16), 10)
        assert piece, "the stream was cut"
        last = last[-20:] + piece
        await asyncio.sleep(pause_s)
