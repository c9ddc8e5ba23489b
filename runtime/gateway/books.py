"""The picker's books: engines, requests in flight, and how far each has come, kept in a `ClusterView`.

What is known of an answer depends on how much of it the picker sees:

- its head: a streamed answer's comes with its first token, another's when it is complete.
- its body, where it is watched: one token an event of a stream, and the usage that some answers end with.
- its end, always: Envoy closes the exchange.

In between, the progress of what is not watched is estimated: a token each tpot since the first one, where
tpot is the profile's decode step at the requests and tokens in flight, times the engine's ratio of seen to
predicted tpot. The ratio is learned from the engine's metrics, where they tell its pace, and so are output
lengths, from all streams; else both are learned from the streams that are watched. An answer that does not
stream counts as begun after the profile's prefill of all prompts that were in flight before it, and its own.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import count

from servegym.envs.cluster.spec import InstanceSpec
from servegym.errors import InputError
from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.gateway.asks import MEDIUM, Ask
from servegym.runtime.gateway.lengths import Lengths
from servegym.runtime.gateway.prefixes import PrefixIndex, byte_ids, token_ids
from servegym.runtime.gateway.readings import Load, Reading
from servegym.runtime.gateway.settings import Endpoint
from servegym.runtime.view import ClusterView, InstanceView, RequestView

MOST_SESSIONS = 1 << 16
LEARNING = 0.1  # what is known of an engine's pace loses so much of its weight when more comes
RATIOS = (0.01, 100.0)
SLACK = 2.0  # of the time between two readings, which are not taken when they are sent


@dataclass(slots=True, eq=False)
class Engine:
    """One engine.

    Attributes:
        number: its place in the view. endpoint, spec: as configured, with the KV cache that it reports.
        index: what its prefix cache holds.
        failures: scrapes in a row without an answer.
        preemptions, decoded, decoding_s: as last read; see `Reading`.
        busy_s, steps: requests by the time that they were here since then, and their tokens by the profile.
        is_known: it was found up, or down.
        is_told: a scrape could be read, so that its readings mean something.
        is_listed: the gateway is to use it.
        seen_s, predicted_s: time that its latest output tokens took, and by the profile; older ones fade.
    """

    number: int
    endpoint: Endpoint
    spec: InstanceSpec
    index: PrefixIndex
    failures: int = 0
    is_known: bool = False
    is_told: bool = False
    is_listed: bool = True
    preemptions: float = 0.0
    decoded: float = 0.0
    decoding_s: float = 0.0
    busy_s: float = 0.0
    steps: float = 0.0
    seen_s: float = 0.0
    predicted_s: float = 0.0

    @property
    def tpot_ratio(self) -> float:
        """Seen by the profile's time per output token."""
        return self.seen_s / self.predicted_s if self.predicted_s else 1.0


@dataclass(slots=True, eq=False)
class Replica(InstanceView):
    """An engine in the view, whose prefix cache is asked for a whole prompt at a time."""

    cached: PrefixIndex = field(default_factory=lambda: PrefixIndex(0))

    def cached_tokens(self, request: RequestView, most: int) -> int:
        """As of any `InstanceView`."""
        if not self.settings.setting.caching:
            return 0
        return self.cached.leading(request.prefix[: most // self.prefix_tokens]) * self.prefix_tokens


@dataclass(slots=True, eq=False)
class Flight:
    """One request from its pick to its end.

    Attributes:
        ask: what it asks for. request: what the view knows of it.
        order: engines in the order in which Envoy tries them.
        prompt_bytes: of a prompt that is all text, else 0.
        knows_tokens: the ids of its prefix are those of token blocks.
        sent_s: when it was dispatched. first_s: of its first token, or when it is expected; None: unknown.
        has_begun: the head of its answer is here. is_watched: its body passes the picker.
        last_s: of its latest watched token. estimated: tokens that came behind the first, by `estimated_s`.
        reported: output tokens by the answer's usage; 0: not told.
        reported_prompt: prompt tokens likewise. status: of the answer; 0: none yet.
    """

    ask: Ask
    request: RequestView
    order: list[int]
    prompt_bytes: int = 0
    knows_tokens: bool = False
    sent_s: float = 0.0
    first_s: float | None = None
    has_begun: bool = False
    is_watched: bool = False
    last_s: float = 0.0
    estimated: float = 0.0
    estimated_s: float = 0.0
    reported: int = 0
    reported_prompt: int = 0
    status: int = 0


@dataclass(slots=True)
class Sessions:
    """Where the latest turn of each conversation went; the ones idle for longest are forgotten."""

    _known: OrderedDict[str, tuple[int, int]] = field(default_factory=OrderedDict)

    def look(self, name: str | None) -> tuple[int, int]:
        """Earlier turns, and the engine of the last, or -1."""
        return self._known.get(name, (0, -1)) if name else (0, -1)

    def went(self, name: str | None, engine: int, *, again: bool = False) -> None:
        """A turn went to an engine; `again`: the latest, which another engine did not take."""
        if name is None:
            return
        turns, _ = self._known.pop(name, (0, -1))
        self._known[name] = (turns + (not again), engine)
        if len(self._known) > MOST_SESSIONS:
            self._known.popitem(last=False)


class Books:
    """All that the picker knows; one thread keeps it.

    Args:
        endpoints, specs: of the engines, in order.
        lengths: counts and predicts tokens.
        least_urgent: largest priority of the service classes.
    """

    def __init__(
        self,
        endpoints: Sequence[Endpoint],
        specs: Sequence[InstanceSpec],
        lengths: Lengths,
        least_urgent: int = 0,
    ) -> None:
        self.lengths = lengths
        self.sessions = Sessions()
        self.flights: dict[Hashable, Flight] = {}
        opened = [_open(*one) for one in zip(count(), endpoints, specs, strict=False)]
        self.engines = [engine for engine, _ in opened]
        self.by_address = {engine.endpoint.address: engine for engine in self.engines}
        self.view = ClusterView([instance for _, instance in opened], least_urgent=least_urgent)
        self._keys = count()
        self._advanced_s = 0.0

    # --- requests ---------------------------------------------------------------------------------------

    def arrived(self, ask: Ask, now_s: float) -> Flight:
        """A request is here, and will be dispatched."""
        tokens, ids = self.lengths.prompt(ask)
        turn, last = self.sessions.look(ask.session)
        request = RequestView(
            key=next(self._keys),
            arrived_s=now_s,
            prompt_tokens=tokens,
            predicted_tokens=self.lengths.output(ask),
            priority=ask.priority,
            slo_ttft_s=ask.ttft_s,
            slo_tpot_s=ask.tpot_s,
            weight=ask.weight,
            turn=turn,
            last_instance=last,
            prefix=self._prefix(ask, ids),
        )
        self.view.now_s = now_s
        self.view.longest_output = max(self.view.longest_output, request.predicted_tokens)
        self.view.arrived(request)
        is_text = isinstance(ask.prompt, bytes) and MEDIUM not in ask.prompt
        size = len(ask.prompt) if is_text else 0
        ask.prompt = b""  # megabytes, which a flight need not hold
        return Flight(ask, request, [], prompt_bytes=size, knows_tokens=bool(ids))

    def _prefix(self, ask: Ask, ids: Sequence[int]) -> list[int]:
        block = self.view.instances[0].prefix_tokens  # engines of one pool have blocks of one size
        if ids or isinstance(ask.prompt, list):
            return token_ids(ids, block)
        return byte_ids(ask.prompt, block)

    def dispatched(self, flight: Flight, order: list[int], now_s: float) -> None:
        """A request goes to the first engine of `order`, to the others where that fails."""
        flight.order, flight.sent_s = order, now_s
        self.view.dispatched(flight.request, order[0])
        self._remember(flight)
        if not flight.ask.streams:
            i = order[0]
            flight.first_s = now_s + self.view.instances[i].prefill_tokens / self.view.fleet.prefill_speed[i]
        self.flights[flight.request.key] = flight

    def _remember(self, flight: Flight, *, again: bool = False) -> None:
        engine = self.engines[flight.request.instance]
        engine.index.sent(flight.request.prefix, flight.knows_tokens)
        self.sessions.went(flight.ask.session, engine.number, again=again)

    def begun(self, flight: Flight, status: int, served: str | None, now_s: float) -> None:
        """The head of an answer is here, from the engine of that address."""
        flight.status, flight.has_begun = status, True
        engine = self.by_address.get(served or "")
        if engine is not None and engine.number != flight.request.instance and self._is_open(flight):
            self.view.moved(flight.request, engine.number)
            self._remember(flight, again=True)
        if flight.ask.streams and status == 200:
            flight.first_s = flight.last_s = now_s
            self._count(flight, 1 - flight.request.streamed_tokens)

    def tokens(self, flight: Flight, tokens: int, now_s: float) -> None:
        """Events of a watched stream; the first of them came with the head, and is counted already."""
        if tokens > 0:
            flight.last_s = now_s
            self._count(flight, tokens)

    def ended(self, flight: Flight, now_s: float) -> None:
        """The exchange is over, whoever ended it; again is harmless."""
        if not self._is_open(flight):
            return
        request, engine = flight.request, self.engines[flight.request.instance]
        self._advance(flight, now_s, self.tpot_s(engine.number))
        del self.flights[request.key]
        seen = flight.reported
        if flight.ask.streams and flight.first_s is not None:
            if flight.is_watched:
                seen = seen or request.streamed_tokens
                if seen > 1 and not engine.decoded:
                    step_s = self.tpot_s(engine.number) / engine.tpot_ratio
                    self._learn_tpot(engine, flight.last_s - flight.first_s, (seen - 1) * step_s)
            elif engine.decoded and engine.predicted_s:
                # Right on average, but not if some were cut at what they may have.
                seen = 1 + round(flight.estimated)
        if flight.status == 200:
            prompt = flight.reported_prompt or None
            self.lengths.learn(flight.ask.service, flight.prompt_bytes, prompt, seen or None)
        self.view.finished(request)

    def advance(self, now_s: float) -> None:
        """Bring the estimates of what is not watched up to now."""
        tpots = [self.tpot_s(i) for i in range(len(self.engines))]
        for engine, tpot in zip(self.engines, tpots, strict=True):
            busy_s = (now_s - self._advanced_s) * len(self.view.instances[engine.number].inflight)
            engine.busy_s += busy_s
            engine.steps += busy_s / tpot * engine.tpot_ratio
        self._advanced_s = now_s
        for flight in self.flights.values():
            self._advance(flight, now_s, tpots[flight.request.instance])

    def _advance(self, flight: Flight, now_s: float, tpot_s: float) -> None:
        """Estimate the tokens of an answer that has begun; the latest of them took `tpot_s` each."""
        if flight.first_s is None or flight.first_s > now_s or (flight.is_watched and flight.ask.streams):
            return
        since = max(flight.estimated_s, flight.first_s)
        flight.estimated, flight.estimated_s = flight.estimated + (now_s - since) / tpot_s, now_s
        tokens = 1 + int(flight.estimated)
        self._count(flight, min(tokens, flight.ask.most_tokens or tokens) - flight.request.streamed_tokens)

    def tpot_s(self, i: int) -> float:
        """Time per output token that engine i is taken to have, seconds."""
        x, fleet = self.view.instances[i], self.view.fleet
        n = max(1, min(len(x.inflight), int(fleet.max_seqs[i])))
        context = max(n, min(x.prompt_tokens + x.streamed_tokens, int(fleet.capacity[i])))
        return fleet.step_of(i, n, context) * self.engines[i].tpot_ratio

    def _count(self, flight: Flight, tokens: int) -> None:
        if tokens > 0 and self._is_open(flight):
            self.view.streamed(flight.request, tokens)

    def _is_open(self, flight: Flight) -> bool:
        return flight.request.key in self.flights

    def _learn_tpot(self, engine: Engine, took_s: float, predicted_s: float) -> None:
        """Tokens took so long in all, and by the profile: of sums, for long times have few tokens."""
        seen_s = min(max(took_s, RATIOS[0] * predicted_s), RATIOS[1] * predicted_s)
        engine.seen_s += seen_s - LEARNING * engine.seen_s
        engine.predicted_s += predicted_s - LEARNING * engine.predicted_s

    def _learn_pace(self, engine: Engine, tokens: float, took_s: float, since_s: float) -> None:
        """As an engine tells it of the time since its last reading; what cannot be is not believed."""
        step_s = self.tpot_s(engine.number) / engine.tpot_ratio
        if engine.steps:  # as the load was in between, which may be another than now
            step_s = engine.busy_s / engine.steps
        seen_running = self.view.instances[engine.number].seen_running  # it may take more than we were told
        most_s = SLACK * since_s * max(int(self.view.fleet.max_seqs[engine.number]), seen_running)
        if tokens > 0 and 0 < took_s <= most_s and tokens * step_s * RATIOS[0] <= most_s:
            self._learn_tpot(engine, took_s, tokens * step_s)

    # --- engines ----------------------------------------------------------------------------------------

    def list_engines(self, endpoints: Sequence[Endpoint], specs: Sequence[InstanceSpec]) -> None:
        """These are the engines from now on; what runs on another may end there.

        New ones take the places of others that have nothing to do any more.
        """
        addresses = {endpoint.address for endpoint in endpoints}
        for engine in self.engines:
            engine.is_listed = engine.endpoint.address in addresses
            if not engine.is_listed:
                self.down(engine)
        instances = list(self.view.instances)
        free = [e.number for e in self.engines if not e.is_listed and not self._is_used(e.number)]
        for endpoint, spec in zip(endpoints, specs, strict=True):
            if endpoint.address not in self.by_address:
                number = free.pop() if free else len(instances)
                engine, instance = _open(number, endpoint, spec)
                self.engines[number : number + 1], instances[number : number + 1] = [engine], [instance]
        self.by_address = {engine.endpoint.address: engine for engine in self.engines}
        self.view = replace(self.view, instances=instances)

    def _is_used(self, i: int) -> bool:
        return any(i == flight.request.instance or i in flight.order for flight in self.flights.values())

    def read(self, engine: Engine, reading: Reading, now_s: float) -> None:
        """A scrape of an engine could be read."""
        x = self.view.instances[engine.number]
        x.seen_running, x.seen_waiting, x.seen_kv_usage = reading.running, reading.waiting, reading.kv_usage
        rise = reading.preemptions - engine.preemptions
        x.seen_preemptions = max(rise, 0.0) if engine.is_told else 0.0
        if not engine.is_told:
            self._resize(engine, reading)
            x = self.view.instances[engine.number]
        if engine.is_told:
            tokens, took_s = reading.decoded - engine.decoded, reading.decoding_s - engine.decoding_s
            self._learn_pace(engine, tokens, took_s, now_s - x.scraped_at_s)
        engine.busy_s = engine.steps = 0.0
        engine.decoded, engine.decoding_s = reading.decoded, reading.decoding_s
        engine.preemptions, engine.is_told, x.scraped_at_s = reading.preemptions, True, now_s

    def loaded(self, served: str | None, load: Load) -> None:
        """An engine reported its load in a response header; younger than its last scrape."""
        engine = self.by_address.get(served or "")
        if engine is None:
            return
        x = self.view.instances[engine.number]
        if load.waiting is not None:
            x.seen_waiting = load.waiting
        if load.kv_usage is not None:
            x.seen_kv_usage = load.kv_usage

    def up(self, engine: Engine) -> bool:
        """An engine answers; True where that is news."""
        x = self.view.instances[engine.number]
        engine.failures, was, x.available = 0, x.available, True
        return not was

    def down(self, engine: Engine) -> bool:
        """An engine is gone, and with it what it had cached; True where that is news."""
        x = self.view.instances[engine.number]
        was, x.available, engine.is_told = x.available, False, False
        if was:
            engine.index.clear()
        return was

    def lost(self, engine: Engine) -> None:
        """Its process is gone: what had not begun there is on its way to the next engine of its order."""
        for flight in list(self.view.instances[engine.number].inflight.values()):
            found = self.flights[flight.key]
            if found.has_begun or engine.number not in found.order:
                continue
            later = found.order[found.order.index(engine.number) + 1 :]
            target = next((i for i in later if self.view.instances[i].available), None)
            if target is not None:
                self.view.moved(found.request, target)

    def _resize(self, engine: Engine, reading: Reading) -> None:
        """Where a new engine's KV cache is not as configured, believe the engine, and keep the books."""
        setting = self.view.instances[engine.number].settings.setting
        blocks, block_tokens = reading.blocks, reading.block_tokens
        if not blocks or not block_tokens or (setting.blocks, setting.block_tokens) == (blocks, block_tokens):
            return
        spec = replace(engine.spec, kv_blocks=blocks, block_tokens=block_tokens)
        try:
            settings = InstanceSettings.of(spec)
        except InputError:  # no cache can be so
            return
        engine.spec, engine.index.room = spec, blocks
        instances = list(self.view.instances)
        old = instances[engine.number]
        instances[engine.number] = replace(
            old, settings=settings, prefix_tokens=0, prefill_cap=0, free_blocks=-1, host_free_blocks=-1
        )
        self.view = replace(self.view, instances=instances)


def _open(number: int, endpoint: Endpoint, spec: InstanceSpec) -> tuple[Engine, Replica]:
    """An engine of which nothing is known yet, and its instance in the view."""
    settings = InstanceSettings.of(spec)
    engine = Engine(number, endpoint, spec, PrefixIndex(settings.setting.blocks))
    return engine, Replica(settings, cached=engine.index, available=False)
