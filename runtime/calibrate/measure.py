"""Times of iterations, taken round by round in random order, so that drift does not look like a shape."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from threading import Event, Thread
from typing import Protocol

import numpy as np

from servegym.runtime.calibrate.shapes import Shape


class Bench(Protocol):
    """An engine that runs single iterations."""

    def run(self, shape: Shape) -> float:
        """Seconds of one whole iteration of that shape."""
        ...


def measure(
    bench: Bench,
    shapes: Sequence[Shape],
    *,
    rounds: int,
    seed: int = 0,
    progress: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """Seconds of every shape in every round; float64 [shapes, rounds].

    A first round of all shapes warms up and is forgotten. Each round has its own random order, so no shape
    always follows the same other, and what slows the machine down for a while hits all shapes alike.
    """
    rng = np.random.default_rng(seed)
    seconds = np.zeros((len(shapes), rounds + 1))
    with quiet():
        for k in range(rounds + 1):
            progress(f"round {k} of {rounds}" if k else "warm-up")
            for i in rng.permutation(len(shapes)):
                seconds[i, k] = bench.run(shapes[i])
    return seconds[:, 1:]


def typical(samples: np.ndarray) -> np.ndarray:
    """The median of each row's samples: one interrupted iteration says nothing of the next."""
    return np.median(samples, axis=1)


@contextmanager
def quiet() -> Iterator[None]:
    """No garbage collection: a pause of tens of milliseconds would be taken for an iteration's."""
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()


@contextmanager
def beside(neighbours: Sequence[Bench], shapes: Sequence[Shape], seed: int = 0) -> Iterator[None]:
    """Neighbours run random shapes, a thread each, for as long as the block lasts.

    Raises:
        Exception: whatever stopped a neighbour: times beside a silent one would be wrong.
    """
    stop, failures = Event(), list[Exception]()
    threads = [
        Thread(target=_keep_running, args=(bench, shapes, seed + k, stop, failures), daemon=True)
        for k, bench in enumerate(neighbours, 1)
    ]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    if failures:
        raise failures[0]


def _keep_running(
    bench: Bench, shapes: Sequence[Shape], seed: int, stop: Event, failures: list[Exception]
) -> None:
    rng = np.random.default_rng(seed)
    try:
        while not stop.is_set():
            bench.run(shapes[int(rng.integers(len(shapes)))])
    except Exception as error:  # handed to the thread that measures
        failures.append(error)
