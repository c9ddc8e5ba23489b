"""One request on its way from engine to engine; its client sees one answer.

    place -> leg -> [move: drop the stream, (keep KV,) next leg] -> [engine lost: next leg elsewhere] -> end

Every leg after the first sends prompt and generated tokens as its prompt, so that greedy answers do not
depend on the way. With a hand-off the engine that is left keeps the KV of these tokens and the next one reads
it; without, or where that fails or takes too long, the next one computes it again.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import suppress
from typing import Any, Protocol

import aiohttp

from servegym.runtime.view import RequestView
from servegym.runtime.vllm.completion import Completion
from servegym.runtime.vllm.leg import (
    EngineLostError,
    EngineRefusedError,
    Leg,
    count_partial,
    keep_kv,
    open_leg,
)
from servegym.runtime.vllm.pulse import Pulse
from servegym.runtime.vllm.splice import Piece, Splice

POLL_S = 0.05


class Desk(Protocol):
    """Who decides where requests go, and keeps the books.

    Attributes:
        session: to talk to engines with.
        urls: of the engines, by instance.
        pulses: of the engines, by instance.
        handoff: whether KV is read from the engine that is left.
        handoff_s: for which the next engine, and before it the one that is left, may let a hand-off wait.
        patience_s: for which an answer that has begun waits for an engine.
    """

    session: aiohttp.ClientSession
    urls: list[str]
    pulses: list[Pulse]
    handoff: bool
    handoff_s: float
    patience_s: float

    def place(self, relay: Relay, without: set[int]) -> bool:
        """Send the request to an engine that is not in `without`; False where there is none."""
        ...

    def streamed(self, relay: Relay, tokens: int) -> None:
        """Tokens came."""
        ...

    def moved(self, relay: Relay, target: int) -> None:
        """The request goes on at another engine."""
        ...

    def lost(self, instance: int, error: EngineLostError) -> None:
        """An engine failed."""
        ...

    def settled(self, relay: Relay, seconds: float | None) -> None:
        """The first token behind a move came so long after its order; None: the move was given up."""
        ...

    def note(self, event: str) -> None:
        """Count an event."""
        ...


class Relay:
    """One request.

    Attributes:
        completion: what the client asked for.
        request: its row in the books.
        splice: the answer so far.
        model: the model's name, as engines tell it.
    """

    def __init__(self, completion: Completion, request: RequestView, desk: Desk) -> None:
        self.completion, self.request, self._desk = completion, request, desk
        self.splice = Splice(completion.stops, completion.keeps_stop, completion.max_tokens)
        self.model = ""
        self._failed: set[int] = set()  # engines that failed since the last token
        self._target: int | None = None
        self._reading: asyncio.Future[list[dict[str, Any]] | None] | None = None
        self._ordered_at = self._waits_until = 0.0

    def move(self, target: int) -> bool:
        """Have the request go on at another engine as soon as possible; False where it cannot.

        It cannot before its first token behind an earlier move, or it might move for ever.
        """
        moves = self._ordered_at > 0
        if self.completion.pinned or moves or target == self.request.instance or self.splice.finished:
            return False
        self._target, self._ordered_at = target, time.perf_counter()
        if self._reading is not None:
            self._reading.cancel()
        return True

    async def pieces(self) -> AsyncGenerator[Piece, None]:
        """The answer, piece by piece; the request stands placed.

        Raises:
            EngineRefusedError: an engine says that the request is bad, or that all are busy.
            EngineLostError: no engine is left.
        """
        params: dict[str, Any] | None = None
        while not self.splice.finished:
            try:
                await self._settle()
                if self.splice.is_exhausted():
                    yield self.splice.exhaust()
                    return
                leg = await self._open(params)
                try:
                    async for piece in self._read(leg):
                        yield piece
                finally:
                    leg.close()
            except (EngineLostError, EngineRefusedError) as error:
                if not self.splice.is_exhausted():
                    await self._replace(error)
            ended = self.splice.finished or self.splice.is_exhausted()
            params = None if ended else await self._switch()

    async def _open(self, params: dict[str, Any] | None) -> Leg:
        self.splice.begin_leg()
        if params is not None:
            try:
                return await asyncio.wait_for(self._open_with_kv(params), self._desk.handoff_s)
            except TimeoutError:  # this engine may well be able to compute what it cannot read
                self._desk.note("handoff_failed")
        return await self._open_with(self._body())

    async def _open_with_kv(self, params: dict[str, Any]) -> Leg:
        """A leg that reads its prompt's KV elsewhere, and has begun to answer."""
        leg = await self._open_with({**self._body(), "kv_transfer_params": params})
        try:
            await leg.begin()
        except BaseException:
            leg.close()
            raise
        return leg

    async def _open_with(self, body: dict[str, Any]) -> Leg:
        desk, at = self._desk, self.request.instance
        return await open_leg(desk.session, desk.urls[at], body, self.completion.headers, desk.pulses[at])

    async def _settle(self) -> None:
        """Take back tokens whose text the last engine did not tell any more."""
        splice, desk = self.splice, self._desk
        if not splice.doubtful:
            return
        count = 0
        with suppress(EngineRefusedError):  # a server without /detokenize: at worst a character is lost
            count = await count_partial(
                desk.session, self._url(), splice.tokens, splice.doubtful, self.completion.headers
            )
        splice.take_back(count)

    async def _read(self, leg: Leg) -> AsyncGenerator[Piece, None]:
        """The pieces of one leg, until the answer ends or the request is to move."""
        while not self.splice.finished and self._target is None:
            for chunk in await self._chunks(leg):
                self.model = str(chunk.get("model", self.model))
                for choice in chunk.get("choices") or ():
                    piece = self._push(choice)
                    if piece is not None:
                        yield piece
                    if self.splice.finished:
                        return

    async def _chunks(self, leg: Leg) -> list[dict[str, Any]]:
        """What comes next; nothing where the request is to move at once."""
        self._reading = asyncio.ensure_future(leg.read())
        try:
            chunks = await self._reading
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if self._target is None or (task is not None and task.cancelling()):
                raise
            return []
        finally:
            self._reading = None
        if chunks is None:
            raise EngineLostError("stream ended without a finish reason")
        return chunks

    def _push(self, choice: Any) -> Piece | None:
        try:
            piece = self.splice.push(choice)
        except (ValueError, AttributeError) as error:
            raise EngineLostError(f"malformed chunk: {error}") from error
        if piece is not None and piece.token_ids:
            self._failed.clear()
            self._waits_until = 0.0
            self._desk.streamed(self, len(piece.token_ids))
            if self._ordered_at and self._target is None:
                self._desk.settled(self, time.perf_counter() - self._ordered_at)
                self._ordered_at = 0.0
        return piece

    async def _switch(self) -> dict[str, Any] | None:
        """Carry out the ordered move, if there is one; returns the KV's address for the next leg."""
        if self._target is None:
            return None
        params = None
        if self._desk.handoff and self.splice.tokens:
            try:
                params = await asyncio.wait_for(self._keep_kv(), self._desk.handoff_s)
                self._desk.note("handed_off")
            except (EngineLostError, EngineRefusedError, TimeoutError):
                self._desk.note("handoff_failed")
        self._desk.moved(self, self._target)
        self._target = None
        return params

    async def _keep_kv(self) -> dict[str, Any]:
        await self._settle()
        return await keep_kv(self._desk.session, self._url(), self._body(), self.completion.headers)

    async def _replace(self, error: EngineLostError | EngineRefusedError) -> None:
        """Go on at another engine than the one that failed.

        Where none is left, an answer that has begun waits for one to come back; others raise the error.
        """
        if isinstance(error, EngineRefusedError) and not error.is_busy:
            raise error
        self._failed.add(self.request.instance)
        if isinstance(error, EngineLostError):
            self._desk.lost(self.request.instance, error)
        self._target, self._ordered_at = None, 0.0
        self._desk.settled(self, None)
        while not self._desk.place(self, self._failed):
            self._failed.clear()
            self._waits_until = self._waits_until or time.monotonic() + self._desk.patience_s
            if not self.splice.tokens or time.monotonic() > self._waits_until:
                raise error
            await asyncio.sleep(POLL_S)
        self._desk.note("recovered")

    def _url(self) -> str:
        return self._desk.urls[self.request.instance]

    def _body(self) -> dict[str, Any]:
        """The request for the rest of the answer."""
        splice = self.splice
        tokens = None if splice.prompt is None else splice.prompt + splice.tokens
        return self.completion.leg(tokens, len(splice.tokens))
