"""Which vLLM server a request goes to, and which request moves between servers, as a policy decides.

The cluster is known as a router knows it: by its own book, and by the servers' /metrics, scraped every
`scrape_s`. Dispatch is asked at arrival. Every `period_s` the policy is asked for a pair of servers and the
request that moves between them, until it lets things be.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Hashable, Sequence
from contextlib import suppress
from dataclasses import dataclass

import aiohttp

from servegym.runtime.decider import Decider
from servegym.runtime.gateway.readings import Reading, parse_metrics
from servegym.runtime.questions import Dispatch, Move, Pair, ask_dispatch, ask_migrate, ask_move
from servegym.runtime.view import ClusterView, InstanceView, RequestView
from servegym.runtime.vllm.completion import Completion
from servegym.runtime.vllm.hints import OutputLengths, service_level
from servegym.runtime.vllm.leg import EngineLostError
from servegym.runtime.vllm.pulse import Pulse
from servegym.runtime.vllm.relay import Relay
from servegym.runtime.vllm.tally import Tally

log = logging.getLogger("servegym.migrator")


@dataclass
class Limits:
    """Times, seconds.

    Attributes:
        period_s: between two occasions to migrate; 0: never.
        scrape_s: between two looks at /metrics.
        stale_s: age of the last look beyond which decisions are left to the fallback.
        stall_s: without a byte for a request and without progress, after which an engine counts as hung.
        rest_s: for which a failed engine gets nothing new, at least.
        patience_s: for which an answer that has begun waits for an engine, where none is left.
        handoff_s: for which a server may let a hand-off of KV wait, before the KV is computed again.
    """

    period_s: float = 0.5
    scrape_s: float = 0.1
    stale_s: float = 2.0
    stall_s: float = 60.0
    rest_s: float = 5.0
    patience_s: float = 10.0
    handoff_s: float = 10.0


class Migrator:
    """The books and the decisions; a `servegym.runtime.vllm.relay.Desk`.

    Attributes:
        urls, pulses: of the servers, as the instances of `view`.
        view: the cluster.
        relays: requests in flight by key.
        tally: what happened so far.
    """

    def __init__(
        self,
        urls: Sequence[str],
        instances: Sequence[InstanceView],
        decider: Decider,
        session: aiohttp.ClientSession,
        *,
        limits: Limits | None = None,
        handoff: bool = False,
        longest_output: int = 1,
    ) -> None:
        self.urls, self.session, self.handoff = list(urls), session, handoff
        self.view = ClusterView(list(instances), longest_output=longest_output)
        self.decider, self.limits = decider, limits or Limits()
        self.pulses = [Pulse(self.limits.stall_s) for _ in self.urls]
        self.patience_s, self.handoff_s = self.limits.patience_s, self.limits.handoff_s
        self.tally = Tally(self)
        self.relays: dict[Hashable, Relay] = {}
        self._lengths, self._keys = OutputLengths(), itertools.count()
        self._start = time.monotonic()
        self._preemptions: list[float | None] = [None] * len(self.urls)
        self._rests_until = [0.0] * len(self.urls)
        self._moving: dict[Hashable, tuple[int, int]] = {}  # request -> source and target

    # --- requests -----------------------------------------------------------------------------------------

    def admit(self, completion: Completion) -> Relay:
        """A request has arrived; it is not placed yet."""
        now, xargs, priority = self._now(), completion.body.get("vllm_xargs"), completion.body.get("priority")
        hints = xargs if isinstance(xargs, dict) else {}
        most = completion.max_tokens if isinstance(completion.max_tokens, int) else None
        request = RequestView(
            key=next(self._keys),
            arrived_s=now,
            prompt_tokens=completion.prompt_estimate(),
            predicted_tokens=self._lengths.predict(hints, most),
            priority=priority if type(priority) is int else 0,
            **service_level(hints),
        )
        self.view.now_s = now
        self.view.arrived(request)
        relay = Relay(completion, request, self)
        self.relays[request.key] = relay
        return relay

    def place(self, relay: Relay, without: set[int]) -> bool:
        """As `Desk.place`."""
        self.view.finished(relay.request)
        self.view.now_s = self._now()
        question = ask_dispatch(self.view, relay.request, self.decider.rows)
        action = self.decider.decide(question, stale=self._is_stale())
        target = action.instance if isinstance(action, Dispatch) else -1
        usable = [i for i, one in enumerate(self.view.instances) if one.available and i not in without]
        if target not in usable:
            if not usable:
                return False
            target = min(usable, key=lambda i: len(self.view.instances[i].inflight))
        self.view.dispatched(relay.request, target)
        self.tally.counts["dispatched"] += 1
        return True

    def streamed(self, relay: Relay, tokens: int) -> None:
        """As `Desk.streamed`."""
        request = relay.request
        prompt = relay.splice.prompt
        if prompt is not None and len(prompt) != request.prompt_tokens:
            self.view.instances[request.instance].prompt_tokens += len(prompt) - request.prompt_tokens
            request.prompt_tokens = len(prompt)
        self.view.streamed(request, tokens)

    def moved(self, relay: Relay, target: int) -> None:
        """As `Desk.moved`."""
        self.view.moved(relay.request, target)

    def settled(self, relay: Relay, seconds: float | None) -> None:
        """As `Desk.settled`."""
        for i in self._moving.pop(relay.request.key, ()):
            self.view.instances[i].engaged = False
        if seconds is not None:
            self.tally.migrated(seconds)

    def finish(self, relay: Relay) -> None:
        """The request has ended, well or not."""
        del self.relays[relay.request.key]
        self.settled(relay, None)
        self.view.finished(relay.request)
        if relay.splice.finished:
            self._lengths.add(len(relay.splice.tokens))

    def lost(self, instance: int, error: EngineLostError) -> None:
        """As `Desk.lost`."""
        log.warning("engine %s failed: %s", self.urls[instance], error)
        self.note("lost")
        self.view.instances[instance].available = False
        self._rests_until[instance] = self._now() + self.limits.rest_s

    def note(self, event: str) -> None:
        """As `Desk.note`."""
        self.tally.counts[event] += 1

    # --- migration ----------------------------------------------------------------------------------------

    def migrate(self) -> int:
        """An occasion to migrate; returns how many requests were told to move."""
        view = self.view
        view.now_s = self._now()
        for instance in view.instances:
            instance.infer_engine()
        for relay in self.relays.values():
            if relay.completion.pinned:
                relay.request.decoding = False  # so that nobody offers it
        ordered, paired = 0, set[int]()
        while (question := ask_migrate(view, paired)).is_open:
            pair = self.decider.decide(question, stale=self._is_stale())
            if not isinstance(pair, Pair):
                break
            paired |= {pair.source, pair.target}
            move = self.decider.decide(ask_move(view, pair.source, pair.target))
            ordered += isinstance(move, Move) and self._order(move)
        return ordered

    def _order(self, move: Move) -> bool:
        relay = self.relays.get(move.key)
        if relay is None or not relay.move(move.target):
            self.note("immovable")
            return False
        self.note("ordered")
        self._moving[move.key] = move.source, move.target
        for i in (move.source, move.target):
            self.view.instances[i].engaged = True
        return True

    # --- scraping -----------------------------------------------------------------------------------------

    async def watch(self) -> None:
        """Scrape and migrate until cancelled."""
        async with asyncio.TaskGroup() as tasks:
            for i in range(len(self.urls)):
                tasks.create_task(self._watch(i))
            if self.limits.period_s > 0:
                tasks.create_task(self._tick())

    async def _tick(self) -> None:
        while True:
            await asyncio.sleep(self.limits.period_s)
            self.migrate()

    async def _watch(self, i: int) -> None:
        while True:
            with suppress(EngineLostError):
                self.take(i, await scrape(self.session, self.urls[i]))
            if self._now() - self.view.instances[i].scraped_at_s > self.limits.stale_s:
                self.view.instances[i].available = False
            await asyncio.sleep(self.limits.scrape_s)

    def take(self, i: int, reading: Reading) -> None:
        """An engine's numbers came."""
        instance, now = self.view.instances[i], self._now()
        before = self._preemptions[i]
        self.pulses[i].told(reading.generated)
        instance.scraped_at_s = now
        instance.seen_running, instance.seen_waiting = reading.running, reading.waiting
        instance.seen_kv_usage = reading.kv_usage
        instance.seen_preemptions = 0.0 if before is None else max(0.0, reading.preemptions - before)
        self._preemptions[i] = reading.preemptions
        instance.available = now >= self._rests_until[i]

    def _is_stale(self) -> bool:
        looks = [one.scraped_at_s for one in self.view.instances if one.available]
        return bool(looks) and self._now() - min(looks) > self.limits.stale_s

    def _now(self) -> float:
        return time.monotonic() - self._start


async def scrape(session: aiohttp.ClientSession, url: str, timeout_s: float = 2.0) -> Reading:
    """A server's numbers.

    Raises:
        EngineLostError: it does not answer as vLLM does.
    """
    try:
        async with session.get(f"{url}/metrics", timeout=aiohttp.ClientTimeout(timeout_s)) as response:
            return parse_metrics(await response.text())
    except (aiohttp.ClientError, OSError, TimeoutError, ValueError) as error:
        raise EngineLostError(repr(error)) from error
