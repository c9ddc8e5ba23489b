"""A vLLM scheduler's own state as the view of a cluster of one instance.

Requests enter at arrival and leave when they end; how far each has come is read when a question is asked.
Reads nothing but attributes, so that it needs no vLLM itself.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from itertools import takewhile
from typing import Any

from servegym.runtime.fleet import InstanceSettings
from servegym.runtime.view import ClusterView, InstanceView, RequestView
from servegym.runtime.vllm.hints import OutputLengths, service_level

SCRAPE_S = 0.1  # what a router would know of the engine is renewed so often


class EngineView:
    """The view, and what it takes to keep it.

    Attributes:
        view: a cluster of this engine alone; its clock starts with it and is never set back.
    """

    def __init__(self, settings: InstanceSettings, longest_output: int) -> None:
        self._instance = InstanceView(settings)
        self.view = ClusterView([self._instance], longest_output=longest_output)
        self._requests: dict[str, RequestView] = {}
        self._lengths = OutputLengths()
        self._start, self._admissions, self._preempted = time.monotonic(), 0, 0

    def arrived(self, request: Any) -> None:
        """A request reached the engine."""
        hints = getattr(request.sampling_params, "extra_args", None) or {}
        now = self.now()
        age_s = time.time() - request.arrival_time  # by the clock that vLLM took the time from
        row = RequestView(
            key=request.request_id,
            arrived_s=min(max(0.0, now - age_s), now),
            prompt_tokens=max(1, request.num_prompt_tokens),
            predicted_tokens=self._lengths.predict(hints, request.max_tokens),
            priority=request.priority,
            **service_level(hints),
        )
        self._requests[request.request_id] = row
        self.view.now_s = now
        self.view.arrived(row)
        self.view.dispatched(row, 0)

    def finished(self, request: Any, is_whole: bool = True) -> None:
        """A request ended, with a whole answer or without; again is harmless."""
        row = self._requests.pop(request.request_id, None)
        if row is not None:
            self._catch_up(row, request)
            self.view.finished(row)
            if is_whole:
                self._lengths.add(max(1, row.streamed_tokens))

    def preempted(self, request: Any) -> None:
        """A request gives way."""
        self._preempted += 1
        row = self._requests.get(request.request_id)
        if row is not None:
            self._catch_up(row, request)
            row.preemptions += 1
            row.running = row.decoding = False
            row.kv_tokens = row.admitted = 0

    def left_tokens(self, request: Any) -> int:
        """Predicted output tokens that a request has still to come."""
        row = self._requests.get(request.request_id)
        return request.max_tokens if row is None else max(0, row.predicted_tokens - request.num_output_tokens)

    def scrape(self, running: int, waiting: int, kv_usage: float) -> None:
        """Renew what a router would know, when it is time to."""
        now, instance = self.now(), self._instance
        if now - instance.scraped_at_s < SCRAPE_S:
            return
        instance.scraped_at_s, instance.seen_kv_usage = now, kv_usage
        instance.seen_running, instance.seen_waiting = running, waiting
        instance.seen_preemptions, self._preempted = self._preempted, 0

    def look(self, running: Iterable[Any], free_blocks: int, blocks: Mapping[str, Any]) -> ClusterView:
        """The view of this moment.

        Args:
            running: vLLM's requests in the order of their admission.
            free_blocks: KV blocks that nobody holds.
            blocks: request id -> its KV blocks in order, with the count of those who hold each.
        """
        instance, rows = self._instance, self._requests
        self.view.now_s = self.now()
        instance.free_blocks, instance.running = free_blocks, []
        for request in running:
            key = request.request_id
            row = rows.get(key)
            if row is None:
                continue
            self._catch_up(row, request)
            if not row.admitted:
                self._admissions += 1
                row.admitted, row.running = self._admissions, True
            row.decoding = not request.is_prefill_chunk
            row.kv_tokens = request.num_computed_tokens
            held = blocks.get(key)
            row.shared_blocks = _shared(held) if held and held[0].ref_cnt > 1 else 0  # most share nothing
            instance.running.append(row)
        return self.view

    def look_at_waiting(self, head: Any | None) -> None:
        """Add those who wait, behind `look`; only questions for the prefill cap see them.

        Args:
            head: who is next; the others come by arrival, since to sort a long queue takes long.
        """
        first = None if head is None else self._requests.get(head.request_id)
        others = [row for row in self._requests.values() if not row.running and row is not first]
        self._instance.waiting = others if first is None else [first, *others]

    def now(self) -> float:
        """Seconds on the view's clock."""
        return time.monotonic() - self._start

    def _catch_up(self, row: RequestView, request: Any) -> None:
        new = request.num_output_tokens - row.streamed_tokens
        if new > 0 and row.instance >= 0:
            self.view.streamed(row, new)


def _shared(held: Iterable[Any]) -> int:
    """Leading blocks that others hold, too."""
    return sum(1 for _ in takewhile(lambda block: block.ref_cnt > 1, held))
