"""The pick: which engines a request may try, in which order, or why it is turned away."""

from __future__ import annotations

import time
from collections.abc import Collection
from contextlib import contextmanager
from typing import NamedTuple

from servegym.runtime.decider import Decider
from servegym.runtime.gateway.asks import Ask
from servegym.runtime.gateway.books import Books, Flight
from servegym.runtime.gateway.settings import Settings
from servegym.runtime.questions import Dispatch, ask_dispatch

OVERLOADED, UNAVAILABLE = 429, 503


class Refusal(NamedTuple):
    """A request that no engine gets.

    Attributes:
        status: of HTTP. reason: one word for metrics. message: for the client.
    """

    status: int
    reason: str
    message: str


NO_ENGINE = Refusal(UNAVAILABLE, "no_engine", "no engine is available")
SHED = Refusal(OVERLOADED, "shed", "all engines are overloaded; requests of this priority must wait")


class Picker:
    """Turns asks into flights, by the policy.

    Attributes:
        books: what is known of the engines. decider: who chooses.
        decision_s: time that the latest choice took.
    """

    def __init__(self, books: Books, decider: Decider, settings: Settings) -> None:
        self.books, self.decider, self.settings = books, decider, settings
        self.decision_s = 0.0

    def pick(self, ask: Ask, now_s: float, subset: Collection[str] | None = None) -> Flight | Refusal:
        """Choose engines for a request and write it into the books.

        Args:
            now_s: on the clock of the view.
            subset: addresses of the only engines that may serve it; None: all.
        """
        begin = time.perf_counter()
        able = self.able(subset)
        if not able:
            return NO_ENGINE
        if ask.priority > 0 and all(self._waiting(i) > self.settings.shed_waiting for i in able):
            return SHED
        flight = self.books.arrived(ask, now_s)
        self.books.dispatched(flight, self._order(flight, able, now_s), now_s)
        self.decision_s = time.perf_counter() - begin
        return flight

    def any(self, subset: Collection[str] | None = None) -> list[int]:
        """Engines for a request that generates nothing, such as a list of models; the least busy first."""
        return self._others(self.able(subset), None)

    def able(self, subset: Collection[str] | None = None) -> list[int]:
        """Engines that take requests."""
        instances = self.books.view.instances
        return [
            engine.number
            for engine in self.books.engines
            if instances[engine.number].available and (subset is None or engine.endpoint.address in subset)
        ]

    def addresses(self, order: list[int]) -> str:
        """Engines as the endpoint picker protocol writes them."""
        return ",".join(self.books.engines[i].endpoint.address for i in order)

    def _order(self, flight: Flight, able: list[int], now_s: float) -> list[int]:
        view = self.books.view
        stale = now_s - min([view.instances[i].scraped_at_s for i in able]) > self.settings.stale_s
        with self._only(able):
            question = ask_dispatch(view, flight.request, rows=self.decider.rows)
        action = self.decider.decide(question, stale=stale) if question.is_open else question.actions[0]
        # Without a taker, for example where the prompt is too long for all, an engine says so itself.
        return self._others(able, action.instance if isinstance(action, Dispatch) else None)

    def _others(self, able: list[int], first: int | None) -> list[int]:
        """The choice, then the others by requests in flight, as many as are tried."""
        instances = self.books.view.instances
        rest = sorted((i for i in able if i != first), key=lambda i: len(instances[i].inflight))
        return ([] if first is None else [first]) + rest[: self.settings.retries + (first is None)]

    @contextmanager
    def _only(self, able: list[int]):
        """Let the view offer these engines only."""
        instances = self.books.view.instances
        hidden = {i for i, x in enumerate(instances) if x.available}.difference(able)
        for i in hidden:
            instances[i].available = False
        try:
            yield
        finally:
            for i in hidden:
                instances[i].available = True

    def _waiting(self, i: int) -> float:
        """Requests that wait at an engine: as it says, or by the books, which know of later ones."""
        x = self.books.view.instances[i]
        return max(x.seen_waiting, len(x.inflight) - int(self.books.view.fleet.max_seqs[i]))
