"""A serving engine as a `Bench`: its iterations seen from outside, as gaps between the tokens of its streams.

An engine that batches continuously gives every request that decodes one token an iteration. So a few requests
are brought to decode at the contexts of a shape, and the iteration's time is the gap between their tokens:
over a window of iterations, or, with a prompt sent beside them, the one gap in which its chunk was computed.
What the server's front end takes for a request is in no gap.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import time
from collections.abc import Coroutine, Sequence
from statistics import median
from typing import Any, Self

import aiohttp
import numpy as np

from servegym.errors import InputError
from servegym.runtime.calibrate.shapes import Limits, Shape
from servegym.runtime.vllm.leg import PATH, EngineLostError
from servegym.runtime.vllm.player import SILENCE_S, scrape

WINDOW = 8  # iterations of decodes, measured together
SLACK = 64  # tokens that a request may generate beyond its context, before it ends by itself
SETTLE_S, SETTLE_POLL_S = 10.0, 0.01  # for the last shape's requests to leave the engine


class StreamBench:
    """Runs single shapes on an engine that nobody else uses; chunks have a decode beside them.

    Args:
        url: of the engine.
        model: its name there.
        limits: what the engine can hold.
        vocabulary: token ids are below it.
        seed: of the token ids. Prompts are never the same, so that no prefix is cached unless it is meant.

    Raises:
        InputError: naming the engine that failed.
    """

    def __init__(self, url: str, model: str, limits: Limits, vocabulary: int, seed: int = 0) -> None:
        self._url, self._model, self._limits, self._vocabulary = url, model, limits, vocabulary
        self._rng = np.random.default_rng(seed)
        self._prefix = self._tokens(limits.max_context)  # what chunks with a past begin with
        self._runner = asyncio.Runner()

    def __enter__(self) -> Self:
        self._runner.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._session.close())
        self._runner.close()

    async def _open(self) -> None:
        timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
        # A server closes connections that were idle for seconds, perhaps just as one is used again.
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        self._session = aiohttp.ClientSession(timeout=timeout, connector=connector)

    def run(self, shape: Shape) -> float:
        """Seconds of one iteration of that shape."""
        return self._call(self._run(shape))

    def first_token(self) -> float:
        """Seconds from a request of one prompt token to its answer of one token."""
        return self._call(self._alone())

    def _call(self, work: Coroutine[Any, Any, float]) -> float:
        try:
            return self._runner.run(work)
        except ExceptionGroup as group:
            raise self._failed(group.exceptions[0]) from group
        except (EngineLostError, aiohttp.ClientError, TimeoutError) as error:
            raise self._failed(error) from error

    def _failed(self, error: BaseException) -> InputError:
        if isinstance(error, InputError):
            return error
        hint = "the engine must go on serving while it is measured"
        return InputError(self._url, "engine", str(error) or repr(error), hint)

    # --- shapes -----------------------------------------------------------------------------------------

    async def _run(self, shape: Shape) -> float:
        await self._settled()
        past = max((past for _, past in shape.chunks), default=0)
        if past:
            await self._first_token_s(self._prefix[:past])  # cached from now on
        lengths = prompt_lengths(shape.contexts, self._limits.token_budget)
        streams = [_Stream(self._tokens(length)) for length in lengths]
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(self._decode(stream)) for stream in streams]
            await asyncio.gather(*(stream.reach(2) for stream in streams))
            seconds = await (self._beside(streams, shape) if shape.chunks else self._window(streams))
            for task in reading:
                task.cancel()
        return seconds

    async def _alone(self) -> float:
        await self._settled()
        begin = time.perf_counter()
        return await self._first_token_s(self._tokens(1)) - begin

    async def _window(self, streams: Sequence[_Stream]) -> float:
        """Seconds of an iteration, the mean over a window in which all decode."""
        begin = [len(stream.at) for stream in streams]
        await asyncio.gather(*(stream.reach(n + WINDOW) for stream, n in zip(streams, begin, strict=True)))
        return median(
            (stream.at[n + WINDOW - 1] - stream.at[n - 1]) / WINDOW
            for stream, n in zip(streams, begin, strict=True)
        )

    async def _beside(self, streams: Sequence[_Stream], shape: Shape) -> float:
        """Seconds of the iteration that computes a chunk beside the decodes."""
        ((new, past),) = shape.chunks
        came = await self._first_token_s([*self._prefix[:past], *self._tokens(new)])
        await asyncio.gather(*(stream.reach(len(stream.at) + 2) for stream in streams))
        return median(stream.gap_at(came) for stream in streams)

    # --- requests ---------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(self._vocabulary, size=count).tolist()

    async def _settled(self) -> None:
        """Return when the engine has nothing to do. It counts at each iteration only, so it is given one."""
        until = time.monotonic() + SETTLE_S
        while True:
            await self._first_token_s(self._tokens(1))
            reading = await scrape(self._session, self._url)
            if not reading.running and not reading.waiting:
                return
            if time.monotonic() > until:
                busy = f"{reading.running + reading.waiting:.0f}"
                raise InputError(self._url, "requests", busy, "others use the engine; measure an idle one")
            await asyncio.sleep(SETTLE_POLL_S)

    async def _first_token_s(self, prompt: list[int]) -> float:
        """When the only token of a request came."""
        stream = _Stream(prompt)
        await self._follow(stream, 1)
        return stream.at[0]

    async def _decode(self, stream: _Stream) -> None:
        """Follow a request that is to be cancelled once it was measured."""
        await self._follow(stream, self._limits.max_context + SLACK - len(stream.prompt))
        raise EngineLostError(f"{len(stream.at)} tokens came before the iteration to be measured")

    async def _follow(self, stream: _Stream, tokens: int) -> None:
        """Note when the tokens of a request come."""
        body = {
            "model": self._model, "prompt": stream.prompt, "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "stream": True, "return_token_ids": True,
        }  # fmt: skip
        async with self._session.post(self._url + PATH, json=body) as response:
            if response.status != 200:
                raise EngineLostError(f"HTTP {response.status}: {await response.text()}")
            async for line in response.content:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices", ())
                    stream.came(sum(len(choice.get("token_ids") or ()) for choice in choices))
        if len(stream.at) < tokens:
            raise EngineLostError(f"{len(stream.at)} of {tokens} tokens came")


class _Stream:
    """A request that decodes.

    Attributes:
        at: when each of its tokens came.
    """

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.at: list[float] = []
        self._goal, self._reached = 0, asyncio.Event()

    def came(self, tokens: int) -> None:
        """So many tokens, just now."""
        self.at += [time.perf_counter()] * tokens
        if len(self.at) >= self._goal:
            self._reached.set()

    async def reach(self, tokens: int) -> None:
        """Return once it has so many tokens."""
        self._goal = tokens
        if len(self.at) < tokens:
            self._reached.clear()
            await self._reached.wait()

    def gap_at(self, moment: float) -> float:
        """Between the token nearest to that moment and the one before it."""
        last = min(range(1, len(self.at)), key=lambda k: abs(self.at[k] - moment))
        return self.at[last] - self.at[last - 1]


def prompt_lengths(contexts: Sequence[int], token_budget: int) -> list[int]:
    """Prompts for decodes to have these contexts in the midst of the window that is measured.

    They are computed in order, a budget of tokens an iteration, and whoever is through decodes meanwhile.
    """
    ends = [-(-end // token_budget) for end in itertools.accumulate(contexts)]
    ahead = WINDOW // 2 + 1
    return [max(context - (ends[-1] - end) - ahead, 1) for context, end in zip(contexts, ends, strict=True)]
