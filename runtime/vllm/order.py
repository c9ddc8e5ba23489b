"""The waiting queue in another order than vLLM's: within a priority, those first that will be done soonest.

As shortest-job-first by predicted length (Fu et al., "Efficient LLM Scheduling by Learning to Rank",
arXiv 2408.15792). Requests that gave way count what is left of them.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeAlias

Request: TypeAlias = Any  # vLLM's, which this module does without


class ShortestFirst:
    """Waiting requests by (priority, predicted tokens left, arrival); a `RequestQueue` of vLLM's.

    Args:
        left: predicted output tokens that a request has still to come.
    """

    def __init__(self, left: Callable[[Request], int]) -> None:
        self._left = left
        self._heap: list[tuple[Any, Request]] = []

    def add_request(self, request: Request) -> None:
        """Insert it."""
        key = (request.priority, self._left(request), request.arrival_time, request.request_id)
        heapq.heappush(self._heap, (key, request))

    def pop_request(self) -> Request:
        """Take the first."""
        if not self._heap:
            raise IndexError("pop from an empty queue")
        return heapq.heappop(self._heap)[1]

    def peek_request(self) -> Request:
        """The first."""
        if not self._heap:
            raise IndexError("peek from an empty queue")
        return self._heap[0][1]

    def prepend_request(self, request: Request) -> None:
        """Insert it; there is no front but that of the order."""
        self.add_request(request)

    def prepend_requests(self, requests: Iterable[Request]) -> None:
        """Insert them."""
        for request in requests:
            self.add_request(request)

    def remove_request(self, request: Request) -> None:
        """Take it out."""
        self.remove_requests([request])

    def remove_requests(self, requests: Iterable[Request]) -> None:
        """Take them out, those that are there."""
        gone = set(requests)
        self._heap = [entry for entry in self._heap if entry[1] not in gone]
        heapq.heapify(self._heap)

    def __bool__(self) -> bool:
        return bool(self._heap)

    def __len__(self) -> int:
        return len(self._heap)

    def __iter__(self) -> Iterator[Request]:
        return (request for _, request in sorted(self._heap, key=lambda entry: entry[0]))
