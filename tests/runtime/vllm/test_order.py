"""The order of waiting requests by predicted length."""

from __future__ import annotations

import random

import pytest

from servegym.runtime.vllm.order import ShortestFirst
from servegym.runtime.vllm.seams import QUEUE


class Request:
    """Hashable, as vLLM's are."""

    def __init__(self, k: int, left: int, priority: int = 0) -> None:
        self.request_id, self.left, self.priority, self.arrival_time = str(k), left, priority, float(k)


def queue(*some: Request) -> ShortestFirst:
    made = ShortestFirst(lambda r: r.left)
    made.prepend_requests(some)
    return made


def test_the_shortest_of_the_most_urgent_comes_first():
    a, b, c, d = Request(0, 50), Request(1, 10), Request(2, 10), Request(3, 99, priority=-1)
    waiting = queue(a, b, c, d)
    assert list(waiting) == [d, b, c, a] and len(waiting) == 4
    assert waiting.peek_request() is d
    assert [waiting.pop_request() for _ in range(4)] == [d, b, c, a]
    assert not waiting
    for take in (waiting.pop_request, waiting.peek_request):
        with pytest.raises(IndexError):
            take()


def test_requests_leave_from_the_middle():
    some = [Request(k, random.Random(k).randint(1, 50)) for k in range(30)]
    waiting = queue(*some)
    waiting.remove_requests(some[::3])
    waiting.remove_request(some[1])
    waiting.remove_request(some[1])  # as vLLM may, of its two queues
    left = [r for k, r in enumerate(some) if k % 3 and k != 1]
    assert list(waiting) == sorted(left, key=lambda r: (r.left, r.arrival_time))


def test_it_is_all_that_vllm_asks_of_a_queue():
    assert all(callable(getattr(ShortestFirst, name)) for name in QUEUE)
