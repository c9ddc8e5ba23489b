"""The thin runtime as a `Bench`: requests are put in place, then one ordinary iteration is timed."""

from __future__ import annotations

from statistics import median
from time import perf_counter

import numpy as np
import torch

from servegym.runtime.calibrate.machine import timed
from servegym.runtime.calibrate.shapes import LEAST_CONTEXT, Shape
from servegym.runtime.engine.instance import Instance
from servegym.runtime.engine.request import make_request

ROUNDS = 25  # of the smallest iteration, for its fixed part
MORE = 4  # output tokens: no request finishes in the iteration that is timed


class EngineBench:
    """One instance that runs single iterations; its KV holds whatever was there before."""

    def __init__(self, instance: Instance, seed: int = 0) -> None:
        self._instance, self._rng = instance, np.random.default_rng(seed)
        self._vocabulary = instance.model.config.vocabulary
        self._device = instance.model.device.type

    def run(self, shape: Shape) -> float:
        """Seconds from the start of scheduling to the last token's delivery."""
        self._place(shape)
        self._wait()
        start = perf_counter()
        self._instance.step()
        self._wait()
        return perf_counter() - start

    def _wait(self) -> None:
        """Return once this instance has nothing left to do; a neighbour's iteration is not its own."""
        if self._instance.stream:
            self._instance.stream.synchronize()

    def _place(self, shape: Shape) -> None:
        self._instance.clear()
        for context in shape.contexts:
            self._put(context - 1, 0)
        for new, past in shape.chunks:
            self._put(past, new)

    def overheads(self) -> tuple[float, float]:
        """Seconds of the smallest iteration beside its forward pass, and until that pass is launched.

        The first is what scheduling, batching and delivery cost; both are medians.
        """
        smallest = Shape((LEAST_CONTEXT,))
        wholes, launches, passes = [], [], []
        with torch.cuda.stream(self._instance.stream), torch.inference_mode():
            for _ in range(ROUNDS):  # in turn: a machine may be faster now and slower then
                wholes.append(self.run(smallest))
                self._place(smallest)
                forward = self._instance.forward(self._instance.scheduler.schedule())
                self._wait()
                start = perf_counter()
                forward()
                launches.append(perf_counter() - start)
                passes.append(timed(forward, self._device))
        return max(median(wholes) - median(passes), 0.0), median(launches)

    def _put(self, computed: int, new: int) -> None:
        """A request has KV of so many tokens and `new` more to compute before it decodes."""
        prompt = self._rng.integers(self._vocabulary, size=computed + new)
        r, scheduler = make_request(0, prompt, MORE), self._instance.scheduler
        scheduler.memory.grow(r, max(computed, 1))
        r.computed, r.instance = computed, scheduler.number
        if not new:
            r.stream(0, perf_counter())
        scheduler.running.append(r)
