"""What goes wrong in our own code inside vLLM: it is counted and logged, and vLLM goes on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

logger = logging.getLogger("vllm.servegym")  # vLLM shows what is logged below its own name


class Faults:
    """Keeps them.

    Attributes:
        counts: of each kind, which is a place and what was raised there.
    """

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    @contextmanager
    def contained(self, place: str) -> Iterator[None]:
        """Around code that must not take vLLM down; the first fault of a kind is logged."""
        try:
            yield
        except Exception as error:
            kind = f"{place}: {type(error).__name__}"
            self.counts[kind] += 1
            if self.counts[kind] == 1:
                logger.exception("ServeGym: a fault in %s; vLLM goes on by its own rules", place)
