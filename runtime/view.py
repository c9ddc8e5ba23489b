"""The cluster as a router and its engines see it: plain records that gateways, migrators and runtimes keep.

A `ClusterView` holds the router's book: what was sent where, how far each request has come, and the rates at
which requests arrive. Whoever routes requests reports five things to it, in the order in which they happen,

    arrived(request)           it reached the router
    dispatched(request, i)     it was sent to instance i
    streamed(request, tokens)  so many more of its tokens came back
    moved(request, i)          it goes on at instance i
    finished(request)          it ended, was given up, or its engine died: off the book; once is enough

and writes down what engines report in the fields of `InstanceView`. `servegym.runtime.questions` turns a view
into the observations that policies were trained on. Nothing here is locked: one thread keeps a view.

All times are seconds on one clock that starts near 0; a first arrival long after 0 reads as a long silence.
"""

from __future__ import annotations

import math
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field

from servegym.envs.cluster.schema import HISTORY
from servegym.errors import InputError
from servegym.runtime.fleet import Fleet, InstanceSettings

RATE_MEMORY_S = 10.0


@dataclass(slots=True, eq=False)
class RequestView:
    """What router and engine know of one request.

    Attributes:
        key: the caller's name for it, unique in the cluster.
        arrived_s: when it reached the router.
        prompt_tokens, predicted_tokens: its prompt, and the output predicted at arrival, both >= 1.
        priority: lower is more urgent.
        slo_ttft_s, slo_tpot_s, weight: service level of its class.
        turn: earlier turns of its session.
        last_instance: where the session's previous turn ran, or -1.
        prefix: ids of the prompt's full prefix blocks, chained: an id names all that stands before, too.
        number: order of arrival; `ClusterView.arrived` counts.
        instance: where it is, or -1 before dispatch.
        streamed_tokens: output tokens that came back.
        booked_tokens: prompt tokens not cached at dispatch; they count as queued until the first token comes.

    What only its engine knows, for questions other than dispatch:

        running: it runs, rather than waits; decoding: all its tokens so far are computed, so that it decodes.
        kv_tokens: KV that it holds on its instance, with the iteration in flight, or in host memory.
        shared_blocks: of its blocks, those that other requests hold, too.
        admitted: order of admission, for example a counter of the engine's.
        preemptions: how often it gave way.
    """

    key: Hashable
    arrived_s: float
    prompt_tokens: int
    predicted_tokens: int
    priority: int = 0
    slo_ttft_s: float = 1.0
    slo_tpot_s: float = 0.05
    weight: float = 1.0
    turn: int = 0
    last_instance: int = -1
    prefix: Sequence[int] = ()
    number: int = 0
    instance: int = -1
    streamed_tokens: int = 0
    booked_tokens: int = 0
    running: bool = False
    decoding: bool = False
    kv_tokens: int = 0
    shared_blocks: int = 0
    admitted: int = 0
    preemptions: int = 0

    @property
    def goal_tokens(self) -> int:
        """Tokens whose KV it needs before the next one can be decoded: prompt and streamed output."""
        return self.prompt_tokens + self.streamed_tokens

    @property
    def left_tokens(self) -> int:
        """Predicted output still to come, at least 0."""
        return max(self.predicted_tokens - self.streamed_tokens, 0)


@dataclass(slots=True, eq=False)
class InstanceView:
    """One engine replica.

    Attributes:
        settings: as it was started.
        prefix_tokens: tokens of a prefix block, of which `cached` and `RequestView.prefix` hold the ids; 0
            takes the size of a KV block.
        cached: ids of the prefix blocks in its KV cache, from KV events or the engine itself.

    As last scraped from its /metrics, noisy and stale as they may be:

        scraped_at_s: when; seen_running, seen_waiting: requests; seen_kv_usage: fraction of the KV blocks;
        seen_preemptions: rise of the count of preemptions between the last two scrapes.

    As the router knows it:

        available: passes its health check and takes requests; False while it drains, starts or has failed.
        prefill_cap: most prompt tokens of an iteration, as last set; 0 takes the token budget.
        engaged: source or destination of a live migration in flight.
        joining: a request that has migrated here waits to join its batch.
        inflight: the router's book by key; the sums over it follow.

    Inside the engine, exact, for questions other than dispatch; `infer_engine` fills these in for a router:

        running, waiting: requests in the scheduler's order; a request that migrates or whose prompt completes
            in the iteration in flight is in neither or in `running` without `decoding`.
        free_blocks: KV blocks that no request holds, evictable ones included; -1: all.
        host_free_blocks: blocks of host memory that no swapped KV takes; -1: all.
    """

    settings: InstanceSettings
    prefix_tokens: int = 0
    cached: Container[int] = frozenset()

    scraped_at_s: float = 0.0
    seen_running: float = 0.0
    seen_waiting: float = 0.0
    seen_kv_usage: float = 0.0
    seen_preemptions: float = 0.0

    available: bool = True
    prefill_cap: int = 0
    engaged: bool = False
    joining: bool = False
    inflight: dict[Hashable, RequestView] = field(default_factory=dict)
    prompt_tokens: int = 0
    streamed_tokens: int = 0
    predicted_tokens: int = 0
    prefill_tokens: int = 0
    urgent: int = 0

    running: list[RequestView] = field(default_factory=list)
    waiting: list[RequestView] = field(default_factory=list)
    free_blocks: int = -1
    host_free_blocks: int = -1

    def __post_init__(self) -> None:
        setting = self.settings.setting
        self.prefix_tokens = self.prefix_tokens or setting.block_tokens
        self.prefill_cap = self.prefill_cap or setting.budget
        self.free_blocks = setting.blocks if self.free_blocks < 0 else self.free_blocks
        self.host_free_blocks = setting.host_blocks if self.host_free_blocks < 0 else self.host_free_blocks

    def cached_tokens(self, request: RequestView, most: int) -> int:
        """Leading tokens of a request whose KV is cached here, in whole prefix blocks of at most `most`."""
        if not request.prefix or not self.settings.setting.caching:
            return 0
        blocks = 0
        for block in request.prefix:
            if block not in self.cached:
                break
            blocks += 1
        return min(blocks, most // self.prefix_tokens) * self.prefix_tokens

    def enter(self, request: RequestView, is_urgent: bool) -> None:
        """Write a request into the book."""
        self.inflight[request.key] = request
        self._add(request, 1, is_urgent)

    def leave(self, request: RequestView, is_urgent: bool) -> bool:
        """Strike a request out of the book; False where it does not stand there."""
        if self.inflight.get(request.key) is not request:
            return False
        del self.inflight[request.key]
        self._add(request, -1, is_urgent)
        return True

    def _add(self, request: RequestView, sign: int, is_urgent: bool) -> None:
        self.prompt_tokens += sign * request.prompt_tokens
        self.streamed_tokens += sign * request.streamed_tokens
        self.predicted_tokens += sign * request.predicted_tokens
        if request.streamed_tokens == 0:
            self.prefill_tokens += sign * request.booked_tokens
        self.urgent += sign * is_urgent

    def infer_engine(self) -> None:
        """Fill in the engine's inside from what a router knows: its book and the last scrape.

        Requests that have streamed run and hold KV for all their tokens but the last; the others wait.
        """
        self.running = [r for r in self.inflight.values() if r.streamed_tokens]
        self.waiting = [r for r in self.inflight.values() if not r.streamed_tokens]
        for request in self.running:
            request.running = request.decoding = True
            request.kv_tokens, request.admitted = request.goal_tokens - 1, request.number
        for request in self.waiting:
            request.running = request.decoding = False
            request.kv_tokens = 0
        self.free_blocks = int((1.0 - self.seen_kv_usage) * self.settings.setting.blocks)


class Arrivals:
    """How fast requests arrive: exponential means over 10 s and the counts of the last 16 seconds."""

    def __init__(self) -> None:
        self.last_s = self.gap_s = 0.0
        self._rate = self._prompt_rate = 0.0
        self._second = 0
        self._history = [0.0] * HISTORY

    def add(self, now_s: float, prompt_tokens: int) -> None:
        """Count a request; `gap_s` is the time since the one before it."""
        rate, prompt_rate = self.rates(now_s)
        self.gap_s, self.last_s = now_s - self.last_s, now_s
        self._rate = rate + 1.0 / RATE_MEMORY_S
        self._prompt_rate = prompt_rate + prompt_tokens / RATE_MEMORY_S
        self._turn_to(int(now_s))
        self._history[int(now_s) % HISTORY] += 1.0

    def rates(self, now_s: float) -> tuple[float, float]:
        """Requests and prompt tokens per second: sum over arrivals at a of exp(-(now - a) / 10 s) / 10 s."""
        decay = math.exp(-(now_s - self.last_s) / RATE_MEMORY_S)
        return self._rate * decay, self._prompt_rate * decay

    def history(self, now_s: float) -> list[float]:
        """Arrivals in each of the last `HISTORY` whole seconds, the present one last."""
        second = int(now_s)
        self._turn_to(second)
        at = (second + 1) % HISTORY
        return self._history[at:] + self._history[:at]

    def _turn_to(self, second: int) -> None:
        """Empty the places of the seconds that have begun since the last look."""
        for passed in range(max(self._second + 1, second - HISTORY + 1), second + 1):
            self._history[passed % HISTORY] = 0.0
        self._second = max(second, self._second)


@dataclass(eq=False)
class ClusterView:
    """A router's cluster; the instances are numbered by their place.

    Attributes:
        instances: a fixed list; make another view where engines come and go (failures are `available`).
        longest_output: most output tokens that the service allows, against which instances are checked.
        least_urgent: largest priority in use; requests below it are urgent.
        now_s: the present on the view's clock; whoever asks a question sets it.
    """

    instances: Sequence[InstanceView]
    longest_output: int = 1
    least_urgent: int = 0
    now_s: float = 0.0
    arrivals: Arrivals = field(default_factory=Arrivals)
    _numbers: int = 0

    def __post_init__(self) -> None:
        if not self.instances:
            raise InputError("cluster view", "instances", [], "give at least one")
        self.fleet = Fleet([instance.settings for instance in self.instances])

    def arrived(self, request: RequestView) -> None:
        """A request has reached the router."""
        self.now_s = max(self.now_s, request.arrived_s)
        request.number, self._numbers = self._numbers, self._numbers + 1
        self.arrivals.add(request.arrived_s, request.prompt_tokens)

    def dispatched(self, request: RequestView, instance: int) -> None:
        """A request is sent to an instance, for the first time or after another engine lost it."""
        target = self.instances[instance]
        request.instance = instance
        request.booked_tokens = request.prompt_tokens - target.cached_tokens(
            request, request.prompt_tokens - 1
        )
        target.enter(request, self._is_urgent(request))

    def streamed(self, request: RequestView, tokens: int = 1) -> None:
        """Tokens of a request in flight came back."""
        source = self.instances[request.instance]
        if request.streamed_tokens == 0 and tokens:
            source.prefill_tokens -= request.booked_tokens
        request.streamed_tokens += tokens
        source.streamed_tokens += tokens

    def finished(self, request: RequestView) -> None:
        """A request has ended, was aborted, or was lost with its engine; again is harmless."""
        if request.instance >= 0:
            self.instances[request.instance].leave(request, self._is_urgent(request))

    def moved(self, request: RequestView, instance: int) -> None:
        """A request in flight goes on at another instance."""
        is_urgent = self._is_urgent(request)
        if not self.instances[request.instance].leave(request, is_urgent):
            raise InputError("cluster view", "moved", request.key, "it is not in flight")
        target = self.instances[instance]
        request.instance = instance
        if request.streamed_tokens == 0:
            hit = target.cached_tokens(request, request.prompt_tokens - 1)
            request.booked_tokens = request.prompt_tokens - hit
        target.enter(request, is_urgent)

    def largest_room(self) -> int:
        """Tokens that the largest instance holds, of those that take requests and are meant to stay."""
        able = [x.settings for x in self.instances if x.available]
        return max((s.room_tokens for s in [s for s in able if s.stays] or able), default=0)

    def _is_urgent(self, request: RequestView) -> bool:
        return request.priority < self.least_urgent
