"""One leg of a request: the stream of one vLLM server, from its request to its end, move or death."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

import aiohttp

from servegym.runtime.vllm.pulse import PATIENT, Pulse

PATH = "/v1/completions"
WINDOW = 8  # tokens whose end tells whether a character is complete
UNKNOWN = "\ufffd"  # for bytes that are no character
# Asks a server that runs the NIXL connector to keep the KV of this request for another one.
KEEP_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


class EngineLostError(Exception):
    """The engine cannot be reached, died, hangs or talks nonsense; another one may answer."""


class EngineRefusedError(Exception):
    """The engine answered that it will not serve the request.

    Attributes:
        status, body: its answer.
    """

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(f"HTTP {status}")
        self.status, self.body = status, body

    @property
    def is_busy(self) -> bool:
        """Whether another engine may take the request."""
        return self.status == 429 or self.status >= 500


class Leg:
    """An open stream of chunks from an engine with this pulse."""

    def __init__(self, response: aiohttp.ClientResponse, pulse: Pulse) -> None:
        self._response, self._pulse = response, pulse
        self._rest = b""
        self._first: list[dict[str, Any]] | None = None

    async def begin(self) -> None:
        """Wait for the first chunks, which `read` then returns.

        Raises:
            EngineLostError: as `read`.
        """
        self._first = await self.read()

    async def read(self) -> list[dict[str, Any]] | None:
        """The chunks that have come since, at least one; None behind the last.

        Raises:
            EngineLostError: the stream broke off or tells of an error, or the engine hangs.
        """
        if self._first:
            first, self._first = self._first, None
            return first
        while True:
            try:
                async with self._pulse.listening():
                    data = await self._response.content.readany()
            except (aiohttp.ClientError, OSError, TimeoutError) as error:
                raise EngineLostError(f"stream broke off: {error!r}") from error
            if not data:
                raise EngineLostError("stream ended early")
            *events, self._rest = (self._rest + data).split(b"\n\n")
            chunks = [chunk for event in events if (chunk := _parse(event)) is not None]
            if chunks and chunks[-1] is _DONE:
                return chunks[:-1] or None
            if chunks:
                return chunks

    def close(self) -> None:
        """Drop the stream; the server aborts the request."""
        self._response.close()


_DONE: dict[str, Any] = {}


def _parse(event: bytes) -> dict[str, Any] | None:
    """The chunk in a server-sent event; None for a comment."""
    if not event.startswith(b"data:"):
        return None
    data = event[5:].strip()
    if data == b"[DONE]":
        return _DONE
    try:
        chunk = json.loads(data)
    except ValueError as error:
        raise EngineLostError(f"chunk {data[:40]!r} is no JSON") from error
    if not isinstance(chunk, dict) or "error" in chunk:
        raise EngineLostError(f"error in the stream: {data[:200]!r}")
    return chunk


async def open_leg(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    pulse: Pulse,
) -> Leg:
    """Send a request to an engine and wait, for as long as that makes progress, until it begins to answer.

    Raises:
        EngineLostError, EngineRefusedError: it does not.
    """
    try:
        async with pulse.listening():
            return Leg(await _post(session, url + PATH, body, headers, timeout=PATIENT), pulse)
    except TimeoutError as error:
        raise EngineLostError(repr(error)) from error


async def keep_kv(
    session: aiohttp.ClientSession, url: str, body: Mapping[str, Any], headers: Mapping[str, str]
) -> dict[str, Any]:
    """Have an engine compute, or find in its cache, the KV of a leg's prompt and keep it for another engine.

    Returns:
        `kv_transfer_params` for a leg of the same prompt at that other engine.

    Raises:
        EngineLostError, EngineRefusedError: it does not.
    """
    body = {**body, "max_tokens": 1, "min_tokens": 0, "stream": False, "kv_transfer_params": KEEP_KV}
    response = await _post(session, url + PATH, body, headers)
    try:
        params = (await response.json())["kv_transfer_params"]
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
        raise EngineLostError(f"no KV hand-off: {error!r}") from error
    if not isinstance(params, dict):
        raise EngineLostError("no KV hand-off: the server runs no connector")
    return params


async def count_partial(
    session: aiohttp.ClientSession, url: str, tokens: Sequence[int], most: int, headers: Mapping[str, str]
) -> int:
    """How many of the last `most` tokens have no text yet, because they do not end a character.

    Special tokens may stand behind such a one, where an answer goes on behind them.

    Raises:
        EngineLostError, EngineRefusedError: the engine does not say.
    """
    begin, told = max(0, len(tokens) - most - WINDOW), len(tokens) - most

    async def text_until(end: int) -> str:
        if end == begin:
            return ""
        body = {"tokens": list(tokens[begin:end])}
        response = await _post(session, url + "/detokenize", body, headers)
        try:
            return str((await response.json())["prompt"])
        except (aiohttp.ClientError, OSError, TimeoutError, ValueError, KeyError, TypeError) as error:
            raise EngineLostError(f"cannot detokenize: {error!r}") from error

    texts = await asyncio.gather(*(text_until(end) for end in range(told, len(tokens) + 1)))
    is_open, count = texts[0].endswith(UNKNOWN), most
    for left, (before, text) in zip(reversed(range(most)), pairwise(texts), strict=True):
        # What ends a character changes the sign that stood for its beginning.
        is_open = text.endswith(UNKNOWN) or (is_open and text.startswith(before))
        if not is_open:
            count = left
    return count


async def _post(
    session: aiohttp.ClientSession,
    url: str,
    body: Mapping[str, Any],
    headers: Mapping[str, str],
    **options: Any,
) -> aiohttp.ClientResponse:
    try:
        response = await session.post(url, json=body, headers=headers, **options)
        if response.status == 200:
            return response
        async with response:
            raise EngineRefusedError(response.status, await response.read())
    except (aiohttp.ClientError, OSError, TimeoutError) as error:
        raise EngineLostError(repr(error)) from error
