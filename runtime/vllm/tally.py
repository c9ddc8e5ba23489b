"""What a migrator counts, for Prometheus and for whoever asks in this process."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

if TYPE_CHECKING:
    from servegym.runtime.vllm.migrator import Migrator

PAUSE_S = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0)
REMEMBERED = 4096


class Tally:
    """Counts.

    Attributes:
        counts: dispatched, recovered (sent again after an engine failed), lost (failures of engines), ordered
            and migrated (moves), handed_off, handoff_failed (or took too long), immovable.
        pauses: seconds of the latest moves from the order to the first token of the next engine.
    """

    def __init__(self, migrator: Migrator) -> None:
        self.counts: Counter[str] = Counter()
        self.pauses: deque[float] = deque(maxlen=REMEMBERED)
        self._registry = CollectorRegistry()
        name = "servegym_migration_pause_seconds"
        self._pause = Histogram(name, "Order to next token", buckets=PAUSE_S, registry=self._registry)
        self._registry.register(_State(migrator))

    def migrated(self, seconds: float) -> None:
        """A move is over."""
        self.counts["migrated"] += 1
        self.pauses.append(seconds)
        self._pause.observe(seconds)

    def text(self) -> str:
        """All of it for Prometheus."""
        return generate_latest(self._registry).decode()


class _State:
    """The migrator's state, read when it is scraped."""

    def __init__(self, migrator: Migrator) -> None:
        self._migrator = migrator

    def collect(self) -> Iterator[Metric]:
        """Events, decisions by reason, and what is known of each engine."""
        migrator = self._migrator
        if not hasattr(migrator, "tally"):  # a registry looks once when it gets a collector
            return
        for name, about, label, counts in (
            ("events", "Requests and engines by what happened", "event", migrator.tally.counts),
            ("decisions", "Decisions by who answered, or why not", "reason", migrator.decider.counts),
        ):
            family = CounterMetricFamily(f"servegym_{name}", about, labels=[label])
            for key, count in counts.items():
                family.add_metric([key], count)
            yield family
        for name, about, read in (
            ("available", "1 while it takes requests", lambda x: float(x.available)),
            ("inflight", "Requests sent and not finished", lambda x: float(len(x.inflight))),
            ("waiting", "As last scraped", lambda x: x.seen_waiting),
            ("kv_usage", "As last scraped", lambda x: x.seen_kv_usage),
        ):
            gauge = GaugeMetricFamily(f"servegym_engine_{name}", about, labels=["engine"])
            for url, instance in zip(migrator.urls, migrator.view.instances, strict=True):
                gauge.add_metric([url], read(instance))
            yield gauge
