"""What operators see: Prometheus metrics on a port of their own, and lines of JSON on standard error."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from servegym.runtime.gateway.books import Flight
    from servegym.runtime.gateway.picker import Picker, Refusal

DECISION_S = (5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 5e-2)
TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
E2E_S = (0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)


class Telemetry:
    """Counts and says what happens.

    Attributes:
        log_requests: also a line for each request.
    """

    def __init__(self, log_requests: bool = False) -> None:
        self.log_requests = log_requests
        self.registry = registry = CollectorRegistry()
        self._decision = Histogram(
            "servegym_decision_seconds", "Time of a pick", buckets=DECISION_S, registry=registry
        )
        self._requests = Counter(
            "servegym_requests", "Requests by engine and status", ("engine", "status"), registry=registry
        )
        self._refused = Counter(
            "servegym_refused", "Requests that no engine got", ("reason",), registry=registry
        )
        self._ttft = Histogram(
            "servegym_ttft_seconds", "Arrival to first token of streams", buckets=TTFT_S, registry=registry
        )
        self._e2e = Histogram("servegym_e2e_seconds", "Arrival to end", buckets=E2E_S, registry=registry)
        self._retried = Counter(
            "servegym_retried", "Requests that another engine than the first served", registry=registry
        )
        self._unpicked = Counter(
            "servegym_unpicked",
            "Requests that Envoy went on with alone: not picked in time, or lost sight of",
            registry=registry,
        )
        self._events = Counter(
            "servegym_events", "Engines up or down, reloads, errors", ("event",), registry=registry
        )

    def serve(self, picker: Picker, now: Callable[[], float], host: str, port: int) -> Callable[[], None]:
        """Answer scrapes of these metrics and of the picker's state; returns what ends that."""
        self.registry.register(_State(picker, now))
        server, thread = start_http_server(port, host, self.registry)

        def stop() -> None:
            server.shutdown()
            server.server_close()
            thread.join()

        return stop

    def log(self, event: str, **fields: object) -> None:
        """One line of JSON."""
        line = json.dumps({"time": round(time.time(), 3), "event": event, **fields}, default=str)
        sys.stderr.write(line + "\n")
        sys.stderr.flush()

    def event(self, event: str, **fields: object) -> None:
        """Something that is no request: counted and logged."""
        self.count(event)
        self.log(event, **fields)

    def count(self, event: str) -> None:
        """Something that may come too often to be logged."""
        self._events.labels(event).inc()

    def picked(self, seconds: float) -> None:
        """A pick took so long."""
        self._decision.observe(seconds)

    def refused(self, refusal: Refusal) -> None:
        """A request was turned away."""
        self._refused.labels(refusal.reason).inc()
        if self.log_requests:
            self.log("refused", status=refusal.status, reason=refusal.reason)

    def unpicked(self, requests: int) -> None:
        """So many requests went on without the picker."""
        self._unpicked.inc(requests)
        self.log("unpicked", requests=requests)

    def begun(self, flight: Flight, is_retry: bool, now_s: float) -> None:
        """The head of an answer is here, its status in the books."""
        if is_retry:
            self._retried.inc()
        if flight.ask.streams and flight.status == 200:
            self._ttft.observe(now_s - flight.request.arrived_s)

    def finished(self, flight: Flight, name: str, engine: str, now_s: float) -> None:
        """An exchange is over; status 0: before an answer had begun."""
        request = flight.request
        self._requests.labels(engine, str(flight.status)).inc()
        self._e2e.observe(now_s - request.arrived_s)
        if self.log_requests:
            first = flight.first_s if flight.ask.streams else None
            self.log(
                "request",
                id=name,
                engine=engine,
                status=flight.status,
                service=flight.ask.service,
                priority=request.priority,
                prompt_tokens=request.prompt_tokens,
                predicted_tokens=request.predicted_tokens,
                output_tokens=flight.reported or request.streamed_tokens,
                watched=flight.is_watched,
                ttft_s=None if first is None else round(first - request.arrived_s, 4),
                e2e_s=round(now_s - request.arrived_s, 4),
            )


class _State:
    """The picker's state, read when it is scraped."""

    def __init__(self, picker: Picker, now: Callable[[], float]) -> None:
        self._picker, self._now = picker, now

    def collect(self) -> Iterator[Metric]:
        """Decisions by reason, and what is known of each engine."""
        decisions = CounterMetricFamily(
            "servegym_decisions", "Decisions by who answered, or why a fallback did", labels=["reason"]
        )
        for reason, count in self._picker.decider.counts.items():
            decisions.add_metric([reason], count)
        yield decisions
        books = self._picker.books
        for name, about, read in (
            ("available", "1 while it takes requests", lambda x: float(x.available)),
            ("inflight", "Requests sent and not finished", lambda x: float(len(x.inflight))),
            ("prefill_tokens", "Prompt tokens sent without a first token", lambda x: x.prefill_tokens),
            ("waiting", "As last scraped", lambda x: x.seen_waiting),
            ("kv_usage", "As last scraped", lambda x: x.seen_kv_usage),
            ("scrape_age_seconds", "Since the last scrape", lambda x: self._now() - x.scraped_at_s),
        ):
            gauge = GaugeMetricFamily(f"servegym_engine_{name}", about, labels=["engine"])
            for engine, x in zip(books.engines, books.view.instances, strict=True):
                if engine.is_listed:
                    gauge.add_metric([engine.endpoint.address], read(x))
            yield gauge
