from __future__ import annotations

from collections.abc import Callable

import pytest

from servegym.envs.cluster.spec import InstanceSpec
from servegym.runtime.gateway.books import Books
from servegym.runtime.gateway.lengths import Lengths
from servegym.runtime.gateway.readings import Reading
from servegym.runtime.gateway.settings import Endpoint

IDLE = Reading(0.0, 0.0, 0.0, 0.0)


@pytest.fixture
def make_books() -> Callable[..., Books]:
    """Books of some engines that are up, read at 0 s."""

    def make(engines: int = 3, **settings: object) -> Books:
        endpoints = [Endpoint(f"http://127.0.0.1:{k}", "127.0.0.1", k) for k in range(1, engines + 1)]
        spec = InstanceSpec("a100-llama-3.1-8b", **settings)
        books = Books(endpoints, [spec] * engines, Lengths())
        for engine in books.engines:
            books.up(engine)
            books.read(engine, IDLE, 0.0)
        return books

    return make
