"""A serving engine as a `Bench`: its iterations seen from outside, as gaps between the tokens of its streams.

An engine that batches continuously gives every request that decodes one token an iteration. So a few requests
are brought to decode at the contexts of a shape, and the iteration's time is the gap between their tokens:
over a window of iterations, or, with a prompt sent beside them, the one gap in which its chunk was computed.
What the server's front end takes before the first token of a request is in no gap; a front end or a client
that cannot keep up with the engine's tokens would be. So of a large batch only some requests are streamed, as
witnesses; the others answer when they end, and as many of their tokens are taken to be there as the nearest
witnesses before and behind them have.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import time
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Coroutine, Sequence
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple, Self, TypeVar

import aiohttp
import numpy as np

from servegym.errors import InputError
from servegym.runtime.calibrate.shapes import Limits, Shape
from servegym.runtime.gateway.readings import Reading
from servegym.runtime.vllm.leg import PATH, EngineLostError
from servegym.runtime.vllm.player import scrape

WINDOW = 8  # iterations of decodes, measured together
SLACK = 64  # tokens that a request may generate beyond its context, before it ends by itself
TRIES = 3  # of a shape, whose requests may fail or whose tokens may come several at once
SILENCE_S = 600.0  # from an engine that first computes the prompts of all
WITNESSES = 32  # requests of a batch that are streamed, at most
BUSY = 0.95  # share of the time at work from which on the client reads tokens later and later
SETTLE_S, SETTLE_POLL_S = 10.0, 0.01  # for the last shape's requests to leave the engine
KEY = "OPENAI_API_KEY"
_TOKENS = re.compile(rb'"completion_tokens": ?(\d{1,9})\b')

Number = TypeVar("Number", int, float)


class NotSeenError(EngineLostError):
    """The tokens of the iteration in question came together with others, or were read too late."""


class StreamBench:
    """Runs single shapes on an engine that nobody else uses; chunks have a decode beside them.

    Args:
        url: of the engine.
        model: its name there.
        limits: what the engine can hold.
        vocabulary: token ids are below it.
        seed: of the token ids. No prompt is found in the prefix cache, unless it is meant to be.

    Attributes:
        busiest: largest share of the time that this client worked or waited for a core while it measured;
            nearly 1 is refused.

    Raises:
        InputError: naming the engine that failed or refused.
    """

    def __init__(self, url: str, model: str, limits: Limits, vocabulary: int, seed: int = 0) -> None:
        self._url, self._model, self._limits, self._vocabulary = url, model, limits, vocabulary
        self._rng = np.random.default_rng(seed)
        self._salt = secrets.token_hex(8)  # another run may have had the same prompts
        self._prefix = self._tokens(limits.max_context)  # what chunks with a past begin with
        self._contexts: defaultdict[Shape, list[list[int]]] = defaultdict(list)
        self._runner = asyncio.Runner()
        self.busiest = 0.0

    def __enter__(self) -> Self:
        self._runner.run(self._open())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._session.close())
        self._runner.close()

    async def _open(self) -> None:
        self._session = open_session()

    def run(self, shape: Shape) -> float:
        """Seconds of one iteration of that shape, nearly: see `as_run`."""
        return self._tried(lambda: self._run(shape))

    def as_run(self, shape: Shape) -> Shape:
        """What ran in its place: requests do not begin to decode together. Medians over all runs."""
        contexts = np.median(self._contexts[shape], axis=0)
        return Shape(tuple(int(context) for context in contexts), shape.chunks)

    def first_token(self) -> float:
        """Seconds from a request of one prompt token to its answer of one token."""
        return self._tried(self._alone)

    def most_at_once(self) -> int:
        """Requests that the engine runs of one more than it should be able to."""
        return self._tried(self._most_at_once)

    def iterations(self, tokens: int) -> int:
        """Iterations in which the engine computes a prompt of so many tokens beside one decode."""
        return round(median(self._tried(lambda: self._iterations(tokens)) for _ in range(TRIES)))

    def _tried(self, work: Callable[[], Coroutine[Any, Any, Number]]) -> Number:
        """What the work returns; an engine that lost a request is asked again."""
        for _ in range(TRIES - 1):
            with suppress(EngineLostError):
                return self._done(work())
        try:
            return self._done(work())
        except EngineLostError as error:
            raise InputError(self._url, "engine", str(error), _hint(error)) from error

    def _done(self, work: Coroutine[Any, Any, Number]) -> Number:
        try:
            return self._runner.run(work)
        except (ExceptionGroup, aiohttp.ClientError, OSError) as error:
            cause: BaseException = error
            while isinstance(cause, BaseExceptionGroup):
                cause = cause.exceptions[0]
            if isinstance(cause, TimeoutError):
                silent = f"silent for {SILENCE_S:.0f} s"
                raise InputError(self._url, "engine", silent, "it hangs; start it again") from error
            if isinstance(cause, (aiohttp.ClientError, OSError)):
                raise EngineLostError(str(cause) or repr(cause)) from error
            raise cause from None

    # --- shapes -----------------------------------------------------------------------------------------

    async def _run(self, shape: Shape) -> float:
        past = max((past for _, past in shape.chunks), default=0)
        if past:
            await self._first_token_s(self._prefix[:past])  # cached from now on
        before = await self._settled()
        lengths = prompt_lengths(shape.contexts, self._limits.token_budget)
        streams = [_Stream(self._tokens(length)) for length in lengths]
        witnesses = _evenly(streams)
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(self._decode(s, is_silent=s not in witnesses)) for s in streams]
            await asyncio.gather(*(stream.reach(2) for stream in witnesses))
            if len(witnesses) < len(streams):
                await self._begun(before.begun + len(streams))
            begin = _all_tokens(streams, witnesses)
            seconds = await self._watched(
                self._beside(witnesses, shape) if shape.chunks else self._window(witnesses)
            )
            middle = (begin + _all_tokens(streams, witnesses)) // 2
            for task in reading:
                task.cancel()
        self._contexts[shape].append([len(s.prompt) + int(n) for s, n in zip(streams, middle, strict=True)])
        return seconds

    async def _watched(self, measuring: Coroutine[Any, Any, float]) -> float:
        """What it measures, unless this thread had too much to do to see tokens as they came."""
        begin, work_s = time.perf_counter(), _work_s()
        seconds = await measuring
        busy = (_work_s() - work_s) / (time.perf_counter() - begin)
        if busy > BUSY:
            raise NotSeenError(f"reading its tokens took {busy:.0%} of the time")
        self.busiest = max(self.busiest, busy)
        return seconds

    async def _begun(self, requests: float) -> None:
        """Return when so many requests had their first token: silent ones may be behind their witnesses."""
        until = time.monotonic() + SETTLE_S
        while (said := await scrape(self._session, self._url)).begun < requests:
            if time.monotonic() > until:
                raise EngineLostError(f"{requests - said.begun:.0f} requests do not begin")
            await asyncio.sleep(SETTLE_POLL_S)

    async def _window(self, streams: Sequence[_Stream]) -> float:
        """Seconds of an iteration, the mean over a window in which all decode."""
        begin = [len(stream.events) - 1 for stream in streams]
        await asyncio.gather(*(stream.reach(stream.tokens + WINDOW) for stream in streams))
        return median(stream.pace(n) for stream, n in zip(streams, begin, strict=True))

    async def _beside(self, streams: Sequence[_Stream], shape: Shape) -> float:
        """Seconds of the iteration that computes a chunk beside the decodes."""
        ((new, past),) = shape.chunks
        came = await self._first_token_s([*self._prefix[:past], *self._tokens(new)])
        await asyncio.gather(*(stream.reach(stream.tokens + 1) for stream in streams))
        gaps = [gap for stream in streams if (gap := stream.gap_before(came))]
        if not gaps:
            raise NotSeenError("tokens came several at once")
        return median(gaps)

    async def _alone(self) -> float:
        await self._settled()
        begin = time.perf_counter()
        return await self._first_token_s(self._tokens(1)) - begin

    # --- what the engine was started with -----------------------------------------------------------------

    async def _most_at_once(self) -> int:
        await self._settled()
        streams = [_Stream(self._tokens(1)) for _ in range(self._limits.max_seqs + 1)]
        async with asyncio.TaskGroup() as tasks:
            reading = [tasks.create_task(self._decode(stream, is_silent=True)) for stream in streams]
            running, until = -1.0, time.monotonic() + SETTLE_S
            while True:
                said = await scrape(self._session, self._url)
                everybody = said.running + said.waiting == len(streams) and said.running == running
                if everybody or time.monotonic() > until:
                    break
                running = said.running
                await asyncio.sleep(SETTLE_POLL_S)
            for task in reading:
                task.cancel()
        return int(said.running)

    async def _iterations(self, tokens: int) -> int:
        await self._settled()
        stream = _Stream(self._tokens(1))
        async with asyncio.TaskGroup() as tasks:
            reading = tasks.create_task(self._decode(stream))
            await stream.reach(WINDOW)
            sent = time.perf_counter()
            came = await self._first_token_s(self._tokens(tokens))
            await stream.reach(stream.tokens + 1)
            reading.cancel()
        return stream.long_gaps(sent, came)

    # --- requests ---------------------------------------------------------------------------------------

    def _tokens(self, count: int) -> list[int]:
        return self._rng.integers(self._vocabulary, size=count).tolist()

    async def _settled(self) -> Reading:
        """Its numbers when it has nothing to do. It counts at each iteration only, so it is given one."""
        until = time.monotonic() + SETTLE_S
        while True:
            await self._first_token_s(self._tokens(1))
            reading = await scrape(self._session, self._url)
            if not reading.running and not reading.waiting:
                return reading
            if time.monotonic() > until:
                busy = f"{reading.running + reading.waiting:.0f}"
                raise InputError(self._url, "requests", busy, "others use the engine; measure an idle one")
            await asyncio.sleep(SETTLE_POLL_S)

    async def _first_token_s(self, prompt: list[int]) -> float:
        """When the only token of a request came."""
        stream = _Stream(prompt)
        await self._follow(stream, 1)
        return stream.events[0].at

    async def _decode(self, stream: _Stream, is_silent: bool = False) -> None:
        """Follow a request that is to be cancelled once it was measured."""
        await self._follow(stream, self._limits.max_context + SLACK - len(stream.prompt), is_silent)
        hint = "it was started with less than --max-seqs or --token-budget say"
        raise InputError(self._url, "requests", f"one ended after {stream.tokens} tokens", hint)

    async def _follow(self, stream: _Stream, tokens: int, is_silent: bool = False) -> None:
        """Note when the tokens of a request come; of a silent one all in the end."""
        body = {
            "model": self._model, "prompt": stream.prompt, "max_tokens": tokens, "ignore_eos": True,
            "temperature": 0, "cache_salt": self._salt,
        }  # fmt: skip
        if not is_silent:
            usage = {"include_usage": True, "continuous_usage_stats": True}
            body |= {"stream": True, "stream_options": usage}
        async with self._session.post(self._url + PATH, json=body) as response:
            if response.status != 200:
                said = f"HTTP {response.status}: {(await response.text())[:300]}"
                raise InputError(self._url, "request", said, f"is --model what it serves? {KEY} its key?")
            if is_silent:
                stream.came(time.perf_counter(), _count(await response.read()))
            async for line in response.content:
                if line.startswith(b"data: {"):
                    now = time.perf_counter()
                    stream.came(now, _count(line[6:]))
        if stream.tokens < tokens:
            raise EngineLostError(f"{stream.tokens} of {tokens} tokens came")


def open_session() -> aiohttp.ClientSession:
    """A session for an engine, with the key of $OPENAI_API_KEY where there is one."""
    key = os.environ.get(KEY)
    # A server closes connections that were idle for seconds, perhaps just as one is used again.
    connector = aiohttp.TCPConnector(limit=0, force_close=True)
    timeout = aiohttp.ClientTimeout(total=None, sock_read=SILENCE_S)
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return aiohttp.ClientSession(timeout=timeout, connector=connector, headers=headers)


class _Event(NamedTuple):
    """Tokens that came together: when, and how many there were by then."""

    at: float
    tokens: int


class _Stream:
    """A request that decodes.

    Attributes:
        events: its tokens as they came, mostly one by one.
    """

    def __init__(self, prompt: list[int]) -> None:
        self.prompt = prompt
        self.events: list[_Event] = []
        self._goal, self._reached = 0, asyncio.Event()

    @property
    def tokens(self) -> int:
        """How many have come."""
        return self.events[-1].tokens if self.events else 0

    def came(self, now: float, tokens: int) -> None:
        """So many are there now; the end of a stream repeats its last count."""
        if tokens > self.tokens:
            self.events.append(_Event(now, tokens))
        if self.tokens >= self._goal:
            self._reached.set()

    async def reach(self, tokens: int) -> None:
        """Return once it has so many tokens."""
        self._goal = tokens
        if self.tokens < tokens:
            self._reached.clear()
            await self._reached.wait()

    def pace(self, begin: int) -> float:
        """Seconds a token from an event on, to the last one."""
        first, last = self.events[begin], self.events[-1]
        return (last.at - first.at) / (last.tokens - first.tokens)

    def gap_before(self, moment: float) -> float | None:
        """The gap that ended with the iteration of another request's token; None where it had two tokens.

        An engine hands out an iteration's tokens in the order of its batch, in which new prompts are last.
        """
        times = [event.at for event in self.events]
        late = float(np.median(np.diff(times))) / 4
        last = max(bisect_right(times, moment + late) - 1, 1)
        (_, before), (_, now) = self.events[last - 1 : last + 1]
        return times[last] - times[last - 1] if now - before == 1 else None

    def long_gaps(self, sent: float, came: float) -> int:
        """Iterations between two moments that took as long as those which compute most of a prompt."""
        times = np.array([event.at for event in self.events])
        gaps = np.diff(times)
        usual, late = float(np.median(gaps)), float(np.median(gaps)) / 4
        during = gaps[(times[1:] > sent) & (times[1:] <= came + late)]
        return int((during > (usual + during.max(initial=usual)) / 2).sum())


def _work_s() -> float:
    """Seconds that this thread has worked or, where Linux tells, waited for a core."""
    try:
        worked, waited, _ = Path("/proc/thread-self/schedstat").read_text(encoding="ascii").split()
        return (int(worked) + int(waited)) / 1e9
    except (OSError, ValueError):
        return time.thread_time()


def _evenly(streams: Sequence[_Stream]) -> list[_Stream]:
    """The witnesses among requests that were sent in this order: the first, the last, and some between."""
    places = np.linspace(0, len(streams) - 1, min(len(streams), WITNESSES))
    return [streams[int(place)] for place in places]


def _all_tokens(streams: Sequence[_Stream], witnesses: Sequence[_Stream]) -> np.ndarray:
    """Tokens of all requests, int64: whoever was sent earlier decodes for longer."""
    places = [streams.index(stream) for stream in witnesses]
    tokens = np.interp(range(len(streams)), places, [stream.tokens for stream in witnesses])
    return tokens.astype(np.int64)


def prompt_lengths(contexts: Sequence[int], token_budget: int) -> list[int]:
    """Prompts for decodes to have these contexts in the midst of the window that is measured.

    They are computed in order, a budget of tokens an iteration, and whoever is through decodes meanwhile.
    """
    ends: list[int] = []
    iteration, room = 0, token_budget
    for context in contexts:
        while context > room:
            context -= room
            iteration, room = iteration + 1, max(token_budget - len(ends), 1)
        room -= context
        ends.append(iteration)
    ahead = WINDOW // 2 + 1
    return [max(context - (iteration - end) - ahead, 1) for context, end in zip(contexts, ends, strict=True)]


def _count(event: bytes) -> int:
    """Tokens of a request so far, as an event of its stream tells them; parsing all of it takes longer."""
    found = _TOKENS.search(event)
    if found is None:
        raise EngineLostError(f"an event tells no usage: {event[:200]!r}")
    return int(found[1])


def _hint(error: EngineLostError) -> str:
    if isinstance(error, NotSeenError):
        return "start it with --stream-interval 1; leave engine and client more CPU, or run fewer requests"
    return "the engine must go on serving while it is measured"
