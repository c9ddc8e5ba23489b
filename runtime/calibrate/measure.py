"""Times of iterations, taken round by round in random order, so that drift does not look like a shape."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from threading import Event, Thread
from typing import Protocol

import numpy as np

from servegym.runtime.calibrate.shapes import Shape
from servegym.runtime.steady import take_core, undisturbed


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
    warm_up: int = 1,
    progress: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    """Seconds of every shape in every round; float64 [shapes, rounds].

    The first `warm_up` rounds of all shapes come on top and are forgotten. Each round has its own random
    order, so no shape always follows the same other, and what slows the machine down for a while hits all
    shapes alike.
    """
    with undisturbed():
        return _measure(bench, shapes, warm_up + rounds, seed, progress)[:, warm_up:]


def measure_together(
    benches: Sequence[Bench], shapes: Sequence[Shape], rounds: Sequence[int], seed: int = 0
) -> list[np.ndarray]:
    """Seconds on each bench, in so many rounds, while the others are at work; without a warm-up.

    Each has the core on which its instance plays, and goes on until the last one is through: beside an idle
    core that one would be faster than it ever plays.
    """
    measuring = set(range(len(benches)))

    def one(k: int) -> np.ndarray:
        take_core(k, len(benches))
        try:
            seconds = _measure(benches[k], shapes, rounds[k], seed + k)
        finally:
            measuring.discard(k)
        rng = np.random.default_rng(seed + k)
        while measuring:
            benches[k].run(shapes[int(rng.integers(len(shapes)))])
        return seconds

    with undisturbed(), ThreadPoolExecutor(len(benches)) as pool:
        return list(pool.map(one, range(len(benches))))


def _measure(
    bench: Bench,
    shapes: Sequence[Shape],
    rounds: int,
    seed: int,
    progress: Callable[[str], None] = lambda _: None,
) -> np.ndarray:
    rng = np.random.default_rng(seed)
    seconds = np.zeros((len(shapes), rounds))
    for k in range(rounds):
        progress(f"round {k + 1} of {rounds}")
        for i in rng.permutation(len(shapes)):
            seconds[i, k] = bench.run(shapes[i])
    return seconds


def typical(samples: np.ndarray) -> np.ndarray:
    """The median of each row's samples: one interrupted iteration says nothing of the next."""
    return np.median(samples, axis=1)


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
